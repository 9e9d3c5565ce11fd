"""Checkpoints of a LoRA run: which one is resumed from, and whether a command line goes on with its training."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lib.calibration import texts
from lib.core.digests import digest
from lib.core.errors import UserError, first_line
from lib.models.layers import prunable_layers
from lora_ft import common

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, TrainingArguments

LAST = "last"  # --resume_from_checkpoint without a folder
FIELD = "resume_from_checkpoint"
STATE, ADAPTER, WEIGHTS = "trainer_state.json", "adapter_config.json", "adapter_model.safetensors"

# The Trainer's arguments that change what is trained. All others may differ when a run is resumed.
_CHANGE = (
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "max_steps",
    "num_train_epochs",
    "optim",
    "optim_args",
    "optim_target_modules",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "label_smoothing_factor",
    "neftune_noise_alpha",
    "bf16",
    "fp16",
    "seed",
    "data_seed",
    "train_sampling_strategy",
    "dataloader_drop_last",
)
_LENGTH = ("max_steps", "num_train_epochs")
_FLAT = ("constant", "constant_with_warmup")  # learning rates that do not depend on how many steps follow


# ------------------------------------------------------------------------------------------------ the checkpoint


def checkpoints(folder: Path) -> dict[int, Path]:
    """Return the checkpoints in ``folder`` by their steps, those too whose writing was cut off."""
    names = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in folder.glob("checkpoint-*")}
    return {int(found[1]): path for path, found in names.items() if found}


def find_checkpoint(folder: Path, given: str) -> Path:
    """Return the checkpoint to resume from: the folder ``given``, or the last complete one in ``folder``.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    path = Path(given).expanduser()
    if given == LAST:
        found = {step: path for step, path in checkpoints(folder).items() if (path / STATE).is_file()}
        if not found:
            text = f"with --output_dir {folder}: the folder holds no checkpoint; leave the flag out to start again"
            raise UserError(FIELD, text)
        path = found[max(found)]
    for part in (STATE, ADAPTER):
        if not (path / part).is_file():
            raise UserError(FIELD, f"{path}: is no checkpoint of a LoRA run, it holds no {part}")
    if not isinstance(_read(path, STATE).get("global_step"), int):
        raise UserError(FIELD, f"{path}: its {STATE} names no step; {_other(path)}")
    _read(path, ADAPTER)
    return path


def _read(checkpoint: Path, name: str) -> dict:
    return common.read_json(FIELD, checkpoint / name, _other(checkpoint))


def _other(checkpoint: Path) -> str:
    """Return what to type instead of a checkpoint that is damaged."""
    number = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    whole = {step: path for step, path in checkpoints(checkpoint.parent).items() if (path / STATE).is_file()}
    before = [step for step in whole if number and step < int(number[1])]
    if before:
        return f"resume from the one before: --{FIELD} {whole[max(before)]}"
    return "give another checkpoint, or start again with --overwrite_output_dir"


def check_parts(checkpoint: Path) -> None:
    """Refuse a checkpoint whose adapter, optimizer, schedule or random numbers are missing or cut off.

    Without its optimizer the Trainer would go on with a new one, and without a word.
    """
    from safetensors import safe_open

    try:
        with safe_open(checkpoint / WEIGHTS, framework="pt"):
            pass
    except Exception as error:  # safetensors has its own error class
        text = f"{checkpoint}: its {WEIGHTS} cannot be read ({first_line(error)}); {_other(checkpoint)}"
        raise UserError(FIELD, text) from error
    needed = [checkpoint / "optimizer.pt", checkpoint / "scheduler.pt"]
    for path in [*needed, *sorted(checkpoint.glob("rng_state*.pth"))]:
        if not path.is_file():
            text = f"{checkpoint}: holds no {path.name} (--save_only_model?), so that training cannot go on as it was"
            raise UserError(FIELD, f"{text}; {_other(checkpoint)}")
        if not zipfile.is_zipfile(path):
            raise UserError(FIELD, f"{checkpoint}: its {path.name} is damaged or cut off; {_other(checkpoint)}")


def check_same_adapter(checkpoint: Path, lora, targets: str | Sequence[str], skeleton: PreTrainedModel) -> None:
    """Refuse to resume from a checkpoint of a different adapter than the flags ``lora`` describe."""
    before = _read(checkpoint, ADAPTER)
    for name in ("lora_r", "lora_alpha", "lora_dropout"):
        value, was = getattr(lora, name), before.get("r" if name == "lora_r" else name)
        if was != value:
            raise UserError(name, f"{value}: the run of {checkpoint} was started with {was}; give that")
    had = before.get("target_modules") or []
    had = [had] if isinstance(had, str) else had
    if targets == "all-linear":
        names = [layer.name for layer in prunable_layers(skeleton)]
        same = all(any(f".{name}".endswith(f".{part}") for part in had) for name in names)
    else:
        same = set(targets) == set(had)
    if not same:
        was, given = ",".join(sorted(had)), targets if isinstance(targets, str) else ",".join(targets)
        raise UserError("lora_target_modules", f"{given}: the run of {checkpoint} was started with {was}; give that")


# ---------------------------------------------------------------------------------------------- the same training


def training_flags(training: TrainingArguments, block_size: int, dtype: str) -> dict:
    """Return the flags that change what is trained, as they are recorded: by name, with JSON's kinds of values."""
    flags = {name: getattr(training, name) for name in _CHANGE}
    if training.max_steps > 0:
        del flags["num_train_epochs"]  # which has no effect then
    at_once = training.per_device_train_batch_size * training.world_size
    flags |= {"batch_size": training.gradient_accumulation_steps * at_once, "block_size": block_size, "dtype": dtype}
    return json.loads(json.dumps(flags, default=str))


def training_text(name: str, most: int | None, blocks: Tensor) -> dict:
    """Return what is recorded of the blocks to train on: their text's name, the most asked for, and a digest."""
    name = name if name in texts.DATASETS else str(Path(name).expanduser().resolve())
    return {"name": name, "max_train_samples": most, "blocks": len(blocks), "digest": digest(blocks)}


def check_flags(checkpoint: Path, flags: Mapping[str, object]) -> None:
    """Refuse to resume with flags that change what is trained; warn if an older version recorded none."""
    before = _recorded(checkpoint, "flags")
    if not before:
        known = "fingerprints" in common.recorded(checkpoint.parent, FIELD)
        what = "flags and text" if known else "flags, text and model"
        text = "--%s %s: has no record of its start (an older version's): whether its %s were these cannot be checked"
        common.log.warning(text, FIELD, checkpoint, what)
    for name, value in flags.items():
        was = before.get(name, value)
        if was == value or (name in _LENGTH and _goes_on(before, was, value)):
            continue
        given = "left out" if value is None else str(value)
        fix = "started without it; leave it out" if was is None else f"started with {was}; give that"
        raise UserError(name, f"{given}: the run of {checkpoint} was {fix}, or start again in another folder")


def _goes_on(before: Mapping[str, object], was, value) -> bool:
    """Return whether a longer run takes the same steps first: its learning rates do not depend on its length."""
    share = 0 < before.get("warmup_steps", 0) < 1
    return before.get("lr_scheduler_type") in _FLAT and not share and 0 < was < value


def check_text(checkpoint: Path, field: str, text: Mapping[str, object]) -> None:
    """Refuse to resume on other blocks of tokens.

    Args:
        field: the flag that names the text.
        text: see ``training_text``.
    """
    before = _recorded(checkpoint, "text")
    if not before or before.get("digest") == text["digest"]:
        return
    name, most = before.get("name"), before.get("max_train_samples")
    if name != text["name"]:
        raise UserError(field, f"{text['name']}: the run of {checkpoint} was started on {name}; give that")
    if most != text["max_train_samples"]:
        given = text["max_train_samples"] or "left out"
        fix = f"with {most}; give that" if most else "without it; leave it out"
        raise UserError("max_train_samples", f"{given}: the run of {checkpoint} was started {fix}")
    what = f"the text or the tokenizer has changed since the run of {checkpoint} was started"
    raise UserError(field, f"{text['name']}: {what}; restore it, or start again in another folder")


def _recorded(checkpoint: Path, part: str) -> dict:
    """Return a ``part`` of what was recorded beside the checkpoint when its training started, or nothing."""
    found = common.recorded(checkpoint.parent, FIELD).get("training")
    found = found.get(part) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}
