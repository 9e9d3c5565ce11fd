"""Trainer of LoRA adapters: its arguments with the published defaults, its check of the loss, its checkpoints.

Imports transformers, which takes seconds: finetune_lm.py imports this module after it has read its own flags.
"""

from __future__ import annotations

import math
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers

from lib.cli.command import Parser
from lib.core import cpu, processes
from lib.core.errors import UserError, first_line, is_out_of_memory
from lora_ft import common

BATCH = 128  # Blocks to an optimizer step, as published.
FIELD = "resume_from_checkpoint"
STATE = "trainer_state.json"  # the Trainer writes it last

# What changes the training. What is logged, evaluated and saved, how often and on how many devices, may change when a
# run is resumed.
ADAPTER_FLAGS = "lora_r lora_alpha lora_dropout lora_target_modules block_size max_train_samples".split()
TRAINER_FLAGS = """
    learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps max_steps num_train_epochs batch_size
    optim optim_args optim_target_modules weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm
    label_smoothing_factor neftune_noise_alpha bf16 fp16 seed data_seed train_sampling_strategy dataloader_drop_last
""".split()

SWITCH = {"nargs": "?", "const": True}  # A flag that needs no value, for HfArgumentParser.


@contextmanager
def refusals(trainer: LoraTrainer | None = None) -> Iterator[None]:
    """Turn an error by which transformers or torch refuse their arguments into one line.

    Once the ``trainer`` has made a step, an error is no longer the arguments'.
    """
    try:
        yield
    except (ArithmeticError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error) or (trainer and trainer.state.global_step):
            raise
        problem = f"training cannot be set up with these flags ({first_line(error)})"
        raise UserError(None, None, problem, "change them, or leave them out") from error


@dataclass
class LoraArguments(transformers.TrainingArguments):
    """Arguments of the Trainer with the published defaults; each field is a flag of finetune_lm.py."""

    learning_rate: float = 1e-4
    num_train_epochs: float = 1.0
    per_device_train_batch_size: int = 1
    warmup_steps: float = 5
    optim: str = "adamw_torch"
    logging_steps: float = 10
    save_steps: float = 50
    eval_steps: float | None = 50

    # Blocks to an optimizer step, over all processes and accumulation steps, and the steps that make as many.
    batch_size: int | None = None
    gradient_accumulation_steps: int | None = None

    # Without flags: bfloat16 where the GPU has it, else float16; an evaluation now and then if there is training, too.
    bf16: bool | None = field(default=None, metadata=SWITCH)
    fp16: bool | None = field(default=None, metadata=SWITCH)
    eval_strategy: str | None = None

    # The Trainer's filter waits for the GPU after every forward pass, and hides what ``Watch`` stops at.
    logging_nan_inf_filter: bool = False
    # Every adapter is used in every step, and searching for unused ones takes time.
    ddp_find_unused_parameters: bool | None = False

    def __post_init__(self) -> None:
        if self.do_predict:
            raise UserError("do_predict", None, "does nothing here", "use --do_eval, or lora_ft/evaluate_ppl.py")
        if self.bf16 is None and self.fp16 is None and cpu.gpus() and not self.use_cpu:
            self.bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            self.fp16 = not self.bf16
        self.bf16, self.fp16 = bool(self.bf16), bool(self.fp16)
        if self.eval_strategy is None:
            self.eval_strategy = "steps" if self.do_train and self.do_eval else "no"
        if self.disable_tqdm is None:
            self.disable_tqdm = not sys.stderr.isatty()
        self.dataloader_pin_memory &= cpu.gpus() > 0

        # A step's blocks are made of those that all processes take at once.
        at_once = self.per_device_train_batch_size * processes.started()
        steps, batch = self.gradient_accumulation_steps, self.batch_size
        if steps is None:
            steps, remainder = divmod(batch or BATCH, at_once)
            if remainder:
                problem = f"is not made of {at_once} blocks at once"
                raise UserError("batch_size", batch or BATCH, problem, f"give a multiple of {at_once}")
        elif batch not in (None, steps * at_once):
            problem = f"--gradient_accumulation_steps {steps} makes {steps * at_once} blocks to a step"
            raise UserError("batch_size", batch, problem, "leave one of the two out")
        self.gradient_accumulation_steps, self.batch_size = steps, steps * at_once

        super().__post_init__()
        if self.n_gpu > 1:
            self._n_gpu = 1  # One process spreads the model over its GPUs, and not the batch.
        if self.world_size > 1:
            # The Trainer fills up larger batches with blocks that it has seen, and they would count in the mean loss.
            self.per_device_eval_batch_size = 1


class TrainerParser(Parser, transformers.HfArgumentParser):
    """Parser of the Trainer's flags, for what the parser ``command`` of finetune_lm.py's own flags leaves."""

    def __init__(self, command: Parser) -> None:
        super().__init__(LoraArguments, prog=command.prog, allow_abbrev=False)
        self._option_string_actions |= command._option_string_actions  # read already; for "did you mean"


def parse_arguments(words: Sequence[str], command: Parser, **values) -> LoraArguments:
    """Return the Trainer's arguments of the command line ``words``, and ``values`` of those that were read already.

    Raises:
        UserError: an unknown flag, or a value that transformers refuses.
    """
    namespace = TrainerParser(command).parse_args(words)
    with refusals():
        return LoraArguments(**vars(namespace) | values)


class Watch(transformers.TrainerCallback):
    """Stops at a logged loss that is not finite; lets a resumed run log, save and evaluate at its own flags' steps."""

    def on_train_begin(self, args, state, control, **_) -> None:
        state.compute_steps(args, state.max_steps)

    def on_log(self, args, state, control, logs: Mapping[str, float], **_) -> None:
        for name, kind in {"loss": "training", "train_loss": "training", "eval_loss": "evaluation"}.items():
            if not math.isfinite(logs.get(name, 0)):
                problem = f"the {kind} loss is {logs[name]} at step {state.global_step}"
                raise UserError(None, None, problem, "lower --learning_rate, or try --bf16")


class LoraTrainer(transformers.Trainer):
    """Trainer that calls ``before_first_save`` once, before the first checkpoint or adapter is written."""

    before_first_save: Callable[[], None] | None = None

    def save_model(self, *args, **kwargs) -> None:  # Of each checkpoint, too, before the rest of it is saved.
        prepare, self.before_first_save = self.before_first_save, None
        if prepare:
            prepare()
            self.accelerator.wait_for_everyone()  # Else it could remove what another process has saved already.
        super().save_model(*args, **kwargs)


def find_checkpoint(folder: Path, name: str, sharded: bool) -> Path:
    """Return the checkpoint to resume from: the folder ``name``, or the last complete one in ``folder``.

    Args:
        sharded: whether DeepSpeed or FSDP saves the optimizer, in shards of its own format.

    Raises:
        UserError: there is none, or a file of it is missing.
    """
    checkpoint = Path(name)
    if name == "last":
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
    """Refuse to resume from ``checkpoint`` with other ``flags`` than its run was started with, naming the first."""
    before = common.training_record(FIELD, checkpoint.parent)["training"]
    for name, value in flags.items():
        if before.get(name) != value:
            old = "left out" if before.get(name) is None else before[name]
            problem = f"was {old} when the run of {checkpoint} was started"
            raise UserError(name, value, problem, "give it as it was, or start again in another folder")
