"""Pruned models and their LoRA adapters: found, checked against each other, and loaded."""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

from lib import sparse
from lib.calibration import texts
from lib.cli.flags import flag
from lib.cli.settings import TEXTS, ModelFlags
from lib.core import digests, files
from lib.core.errors import UserError, flag_name, is_out_of_memory
from lib.core.lazy import peft, torch, transformers
from lib.models import load, locate, memory
from lib.models.layers import prunable_layers, refuse_experts
from lib.models.weights import Weights, weights_of

log = logging.getLogger("lora_ft")
# Peft looks for a vocabulary that grew, and remarks that a model without weights takes none.
warnings.filterwarnings("ignore", message="Could not find a config file in|Unable to fetch remote file")
warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")

# Lies beside an adapter: the fingerprints of the weights it was trained on, and the flags of its training.
BASE = "base_model.json"

TRAINED_ON = "give the model it was trained on"
OUT_OF_MEMORY = "lower --ctx_length, or use more GPUs"


@dataclass(kw_only=True)
class PrunedModel(ModelFlags):
    _title: ClassVar[str] = "model"
    _without: ClassVar[Sequence[str]] = ("seed",)

    model: str = flag(MISSING, "the pruned model: folder or hub id")
    config_name: str | None = flag(None, "folder or hub id that lends a missing tokenizer or config", metavar="NAME")


@dataclass(kw_only=True)
class Evaluated(PrunedModel):
    """The flags of a command that measures a model's perplexity."""

    _title: ClassVar[str] = "data"

    lora_weights: str | None = flag(
        None, "the adapter: finetune_lm.py's --output_dir (default: the model alone)", metavar="DIR", title="adapter"
    )
    dataset: str = flag("wikitext2", f"evaluation text: {TEXTS}", metavar="TEXT")
    ctx_length: int = flag(2048, "window length, tokens; at most the model's context", least=2, metavar="N")
    eval_windows: int | None = flag(None, "windows to evaluate, a count (default: all)", least=1, metavar="N")

    def check(self) -> None:
        super().check()
        texts.check_text("dataset", self.dataset)


class Base(NamedTuple):
    """A pruned model without its weights, and its tokenizer; ``config`` is given if its own folder is incomplete."""

    source: load.Source
    skeleton: transformers.PreTrainedModel
    tokenizer: load.Tokenizer
    config: transformers.PreTrainedConfig | None = None


def find_base(settings: PrunedModel) -> Base:
    """Return the model that the flags name, without weights, and its tokenizer.

    Raises:
        UserError: the model is unknown, or lacks a file and --config_name is not given.
    """
    folder = Path(settings.model)
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    tokenizes = bool(names & set(load.TOKENIZER_FILES))
    borrows = bool(names and settings.config_name) and not (tokenizes and "config.json" in names)
    try:
        source = lender = locate.locate(settings.config_name if borrows else settings.model, settings.cache_dir)
        if names and not tokenizes and not borrows:
            fix = "give the model that it was pruned from: --config_name NAME"
            raise UserError("model", settings.model, "the folder holds no tokenizer", fix)
        skeleton, tokenizer = load.load_skeleton(lender), load.load_tokenizer(lender)
    except UserError as error:
        error.field = "config_name" if borrows else error.field
        raise
    if borrows:
        source = load.Source(settings.model, str(folder), folder.resolve().name, lender.cache_dir)
    sparse.refuse_packed(source)  # It has no gradients, and is not saved again.
    refuse_experts("model", settings.model, prunable_layers(skeleton))
    return Base(source, skeleton, tokenizer, skeleton.config if borrows else None)


def prepare_evaluation(settings: Evaluated) -> tuple[Base, torch.Tensor]:
    """Return the model, whose adapter fits, and the windows to evaluate, [windows, tokens]."""
    base = find_base(settings)
    if settings.lora_weights is not None:
        attach(settings.lora_weights, copy.deepcopy(base.skeleton))
    length = settings.ctx_length
    check_length("ctx_length", length, base.skeleton)
    windows = texts.evaluation_windows(settings.dataset, base.tokenizer, length, settings.eval_windows, field="dataset")
    load.check_vocabulary(base.source.given, base.skeleton, windows)
    return base, windows


def evaluation_record(settings: Evaluated, base: Base, windows: torch.Tensor) -> dict:
    """Return what a record of figures says of the model, the text and the flags."""
    return {
        "model": base.source.anywhere,
        "lora_weights": settings.lora_weights,
        "evaluation": {"text": settings.dataset, "windows": len(windows), "seqlen": settings.ctx_length},
        "flags": settings.flags(),
    }


def check_length(field: str, length: int, skeleton: torch.nn.Module) -> None:
    """Refuse more tokens than the model has positions for."""
    context = load.context_length(skeleton)
    if context is not None and length > context:
        raise UserError(field, length, "is more than the model's context", f"give at most {context}")


def training_record(field: str, folder: Path) -> dict:
    """Return the content of ``BASE`` in ``folder``: {"model", "fingerprints", "training"}."""
    path = folder / BASE
    with files.reading(path, field=field, fix="restore it, or train the adapter again"):
        record = json.loads(path.read_text(encoding="utf-8"))
        return {key: record[key] for key in ("model", "fingerprints", "training")}


def load_base(
    base: Base, dtypes: load.Dtypes, seqlen: int, device: torch.device | None = None
) -> tuple[Weights, float]:
    """Return the model with its weights, all on GPUs or all on the CPU, and its sparsity.

    Args:
        seqlen: tokens per window; each GPU keeps room for the work on one.
        device: where to put the whole model instead.
    """
    reserve = memory.working_set(base.skeleton, dtypes.compute, hessians=False, windows=1, seqlen=seqlen)
    model = load.load_llm(base.source, dtypes.compute, device, reserve, base.config)
    places = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    if "cpu" in places and len(places) > 1:
        fix = "use more GPUs, or none (CUDA_VISIBLE_DEVICES=)"
        raise UserError("model", base.source.given, "does not fit in the GPUs' memory, as LoRA needs", fix)
    weights = weights_of(model, dtypes.save)
    sparsity = weights.sparsity()
    if sparsity < 0.01:
        log.warning("the model %s is dense, not pruned: its sparsity is %.4f", base.source.given, sparsity)
    return weights, sparsity


def load_with_adapter(settings: Evaluated, base: Base) -> tuple[Weights, float, torch.nn.Module]:
    """Return ``load_base`` of the model to evaluate, and the model with the adapter that the flags name, if any."""
    weights, sparsity = load_base(base, load.choose_dtypes(settings.dtype, base.skeleton), settings.ctx_length)
    if settings.lora_weights is None:
        return weights, sparsity, weights.model
    check_base("lora_weights", Path(settings.lora_weights), base, weights)
    return weights, sparsity, attach(settings.lora_weights, weights.model)


def check_base(field: str, folder: Path, base: Base, weights: Weights) -> None:
    """Refuse the adapter in ``folder`` if it was trained on other weights than the model's, naming a layer."""
    if not (folder / BASE).is_file():
        message = "%s: has no %s: whether it was trained on %s cannot be checked"
        log.warning(message, folder, BASE, base.source.given)
        return
    record = training_record(field, folder)
    if layer := digests.first_difference(record["fingerprints"], weights.fingerprints()):
        problem = f"was trained on other weights than those of {flag_name('model')} {base.source.given} (see {layer})"
        raise UserError(field, folder, problem, f"{TRAINED_ON}, {record['model']}")


def attach(folder: str, model: torch.nn.Module) -> torch.nn.Module:
    """Return ``model`` as peft's, with the adapter in ``folder`` around its layers, in evaluation mode.

    On a model without weights this only shows whether the adapter fits.

    Raises:
        UserError: there is none, or not one of LoRA alone, or it is damaged or has other matrices than the model needs.
    """
    path = Path(folder)
    if not (path / "adapter_config.json").is_file():
        hint = ", but a model" if (path / "config.json").is_file() else ""
        raise UserError("lora_weights", folder, f"holds no adapter{hint}", "give finetune_lm.py's --output_dir")
    try:
        config = peft.PeftConfig.from_pretrained(path)
        if config.peft_type != "LORA" or config.modules_to_save or config.bias != "none":
            problem = "is not an adapter of LoRA's matrices alone (without modules_to_save and bias)"
            raise UserError("lora_weights", folder, problem, "give one of finetune_lm.py")
        adapted = peft.PeftModelForCausalLM(model, config)
        keys = adapted.load_adapter(path, "default")
    except Exception as error:  # peft, safetensors and torch each have their own for files that do not fit
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError("lora_weights", folder, f"is damaged, or of another model ({reason})", TRAINED_ON) from error
    for verb, names in (("lacks", keys.missing_keys), ("has in excess", keys.unexpected_keys)):
        if names:
            raise UserError("lora_weights", folder, f"{verb} {len(names)} matrices, first {names[0]}", TRAINED_ON)
    return adapted.eval()
