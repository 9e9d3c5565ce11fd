"""Checks of the Trainer's flags before the model is loaded: their ranges, and a Trainer of a model of one number."""

from __future__ import annotations

import copy
import math
import tempfile
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lib.cli.flags import check_range
from lib.core.errors import UserError, first_line
from lib.core.lazy import torch, transformers
from lib.core.names import check_name

if TYPE_CHECKING:
    from transformers import TrainingArguments

_NATURAL, _COUNT, _SEED = {"least": 1}, {"least": 0}, {"least": 0, "most": 2**32 - 1}
_POSITIVE, _SHARE = {"least": 0, "below": math.inf}, {"least": 0, "below": 1}

# Of the Trainer's flags that finetune_lm.py does not declare itself: transformers checks few of them.
RANGES: dict[str, Mapping[str, float]] = {
    "per_device_eval_batch_size": _NATURAL,
    "eval_accumulation_steps": _NATURAL,
    "torch_empty_cache_steps": _NATURAL,
    "save_total_limit": _NATURAL,
    "dataloader_num_workers": _COUNT,
    "dataloader_prefetch_factor": _NATURAL,
    "ddp_bucket_cap_mb": _NATURAL,
    "ddp_timeout": _NATURAL,
    "seed": _SEED,
    "data_seed": _SEED,
    "weight_decay": _POSITIVE,
    "max_grad_norm": _POSITIVE,
    "neftune_noise_alpha": _POSITIVE,
    "eval_delay": _POSITIVE,
    "adam_beta1": _SHARE,
    "adam_beta2": _SHARE,
    "adam_epsilon": _POSITIVE,
    "label_smoothing_factor": _SHARE,
}


def check_ranges(other: Mapping[str, object]) -> None:
    """Refuse values of the Trainer's flags that are out of their ranges."""
    for name, about in RANGES.items():
        check_range(name, other[name], about)
    steps = other["max_steps"]
    if steps != -1 and steps < 1:
        text = "must be at least 1; leave it out for as many steps as --num_train_epochs makes"
        raise UserError("max_steps", f"{steps}: {text}")
    for name in ("dataloader_persistent_workers", "dataloader_multiprocessing_context", "dataloader_prefetch_factor"):
        if other[name] and not other["dataloader_num_workers"]:
            raise UserError(name, "without --dataloader_num_workers does nothing; add --dataloader_num_workers N")


def check_arguments(training: TrainingArguments) -> None:
    """Refuse what the Trainer takes and this training, which measures a loss alone, cannot do.

    Raises:
        UserError: as described above, or as ``check_reports``.
    """
    check_reports(training)
    if training.label_names != ["labels"]:
        raise UserError("label_names", f"{','.join(training.label_names)}: the labels are the text; leave the flag out")
    best = training.metric_for_best_model
    if best not in (None, "loss", "eval_loss"):
        raise UserError("metric_for_best_model", f"{best}: only the loss is measured; give loss, or leave it out")
    if training.use_liger_kernel and not transformers.utils.is_liger_kernel_available():
        raise UserError("use_liger_kernel", "needs liger-kernel, which is not installed; install it, or leave it out")
    if training.fsdp and training.world_size == 1:
        raise UserError("fsdp", "works with several processes; start them with accelerate launch, or leave it out")


def check_reports(training: TrainingArguments) -> None:
    """Refuse to report to a service that transformers does not know or whose package is not installed."""
    from transformers.integrations import integration_utils as services

    installed = services.get_available_reporting_integrations()
    for name in training.report_to:
        check_name("report_to", name, [*services.INTEGRATION_TO_CALLBACK, "none", "all"])
        if name not in installed:
            raise UserError("report_to", f"{name}: its package is not installed; install it, or leave the flag out")


def rehearse(training: TrainingArguments) -> None:
    """Refuse flags with which no Trainer, optimizer, schedule or loader of blocks can be made.

    They are made for a model of one number: whatever transformers finds wrong, it finds here, and not once a model
    is loaded. Sharded training is left out, which sets up the processes for its model.

    Raises:
        UserError: as described above.
    """
    if training.deepspeed or training.fsdp:
        return
    training, device = copy.copy(training), training.device
    blocks = torch.zeros(4, 2, dtype=torch.int32)
    training.report_to, training.push_to_hub = [], False  # nobody is told of a rehearsal
    try:
        with warnings.catch_warnings(), tempfile.TemporaryDirectory() as training.output_dir:
            warnings.simplefilter("ignore")
            trainer = transformers.Trainer(
                torch.nn.Linear(1, 1, bias=False).to(device),
                training,
                train_dataset=blocks if training.do_train else None,
                eval_dataset=blocks if training.do_eval else None,
            )
            if training.do_train:
                trainer.get_train_dataloader()
                trainer.create_optimizer_and_scheduler(num_training_steps=10)
            if training.do_eval:
                trainer.get_eval_dataloader()
            if training.gradient_checkpointing:
                ask = {"use_reentrant": True} | (training.gradient_checkpointing_kwargs or {})
                torch.utils.checkpoint.checkpoint(torch.zeros_like, blocks, **ask)
    except Exception as error:  # of any class: what a wrong flag leads to
        raise UserError(None, f"with these flags training cannot be set up ({first_line(error)})") from error
