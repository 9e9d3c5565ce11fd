"""Checkpoints of a LoRA run: which one is resumed, and whether a command line continues its training."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

from lib.core.errors import UserError
from lora_ft import common

LAST = "last"  # --resume_from_checkpoint without a folder
FIELD = "resume_from_checkpoint"
STATE = "trainer_state.json"  # the Trainer writes it last

# What changes the training. What is logged, evaluated and saved, how often and on how many devices, may change when a
# run is resumed.
ADAPTER_FLAGS = """
    lora_r lora_alpha lora_dropout lora_target_modules dtype block_size max_train_samples
""".split()
TRAINER_FLAGS = """
    learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps max_steps num_train_epochs batch_size
    optim optim_args optim_target_modules weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm
    label_smoothing_factor neftune_noise_alpha bf16 fp16 seed data_seed train_sampling_strategy dataloader_drop_last
""".split()


def find_checkpoint(folder: Path, name: str, sharded: bool) -> Path:
    """Return the checkpoint to resume from: the folder ``name``, or the last complete one in ``folder``.

    Args:
        sharded: whether DeepSpeed or FSDP saves the optimizer, in shards of its own format.

    Raises:
        UserError: there is none, or a file of it is missing.
    """
    checkpoint = Path(name)
    if name == LAST:
        complete = {path.parent for path in folder.glob(f"checkpoint-*[0-9]/{STATE}")}
        if not complete:
            raise UserError(FIELD, None, f"finds no checkpoint in {folder}", "leave the flag out to start again")
        checkpoint = max(complete, key=lambda path: int(path.name.rpartition("-")[2]))
    for path in (checkpoint / STATE, checkpoint / "adapter_model.safetensors", checkpoint.parent / common.BASE):
        if not path.is_file():
            fix = "give a folder checkpoint-N in finetune_lm.py's --output_dir"
            raise UserError(FIELD, checkpoint, f"is no checkpoint of a LoRA run, there is no {path}", fix)

    # Without these, the Trainer would begin a new optimizer and schedule and say nothing.
    for path in () if sharded else (checkpoint / "optimizer.pt", checkpoint / "scheduler.pt"):
        if not zipfile.is_zipfile(path):
            problem = "is missing (--save_only_model?) or damaged, so that training cannot go on as it was"
            raise UserError(FIELD, path, problem, "give an earlier checkpoint, or leave the flag out to start again")
    return checkpoint


def check_same_training(checkpoint: Path, flags: Mapping[str, object]) -> None:
    """Refuse to resume from ``checkpoint`` with other ``flags`` than its run was started with.

    A longer run takes the same steps first if its learning rates do not depend on its length.

    Raises:
        UserError: names the first flag that differs, and its value before.
    """
    before = common.training_record(FIELD, checkpoint.parent)["training"]
    flat = before["lr_scheduler_type"] in ("constant", "constant_with_warmup")
    flat = flat and not 0 < before["warmup_steps"] < 1  # which is a share of all steps
    for name, value in flags.items():
        old = before.get(name)
        longer = flat and name in ("max_steps", "num_train_epochs") and 0 < old < value
        if old != value and not longer:
            problem = f"the run of {checkpoint} was started {'without it' if old is None else f'with {old}'}"
            fix = f"{'leave it out' if old is None else 'give that'}, or start again in another folder"
            raise UserError(name, "left out" if value is None else value, problem, fix)
