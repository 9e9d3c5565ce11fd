"""Pruned models and LoRA adapters: locating, checking against each other and loading."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from lib import sparse
from lib.calibration import texts as data
from lib.cli.flags import Flags, flag
from lib.cli.settings import TEXTS
from lib.core import digests
from lib.core.errors import UserError, first_line
from lib.core.lazy import torch
from lib.models import load, locate, memory, safetensors_io
from lib.models.layers import prunable_layers
from lib.models.weights import Weights, weights_of

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("lora_ft")

BASE = "base_model.json"  # beside an adapter: which weights it was trained on

_RESTORE = "restore it, or remove it to go on without knowing which weights it belongs to"
_DENSE = 0.01  # a sparsity below this is no pruning


# ---------------------------------------------------------------------------------------------------------- flags


@dataclass(kw_only=True)
class PrunedModel(Flags):
    _title: ClassVar[str] = "model"

    model: str = flag(MISSING, "the pruned model: folder or hub id")
    config_name: str | None = flag(
        None, "folder or hub id that lends the tokenizer or config the model lacks", metavar="NAME"
    )
    cache_dir: str = flag("llm_weights", "where weights from the hub are kept", in_repository=True, metavar="DIR")
    dtype: str = flag(
        "auto",
        "{choices} to compute in; auto: the checkpoint's own on CUDA (float16 for float32), float32 on a CPU",
        choices=load.DTYPES,
        metavar="NAME",
    )


@dataclass(kw_only=True)
class Dataset(Flags):
    _title: ClassVar[str] = "data"

    dataset: str = flag("wikitext2", f"evaluation text: {TEXTS}", metavar="TEXT")
    ctx_length: int = flag(2048, "window length, tokens; at most the model's context", least=2, metavar="N")
    eval_windows: int | None = flag(None, "windows to evaluate, a count (default: all)", least=1, metavar="N")

    def check(self) -> None:
        super().check()
        data.check_text("dataset", self.dataset)


# ------------------------------------------------------------------------------------------------- before loading


class Base(NamedTuple):
    """A model as described by its folder, without weights, and its tokenizer.

    ``config`` is borrowed from another model, or None for the model's own; the tokenizer may be borrowed as well.
    """

    source: load.Source
    skeleton: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    config: object | None = None
    lender: str | None = None  # of the tokenizer


@contextmanager
def lent_by(field: str) -> Iterator[None]:
    """Make errors about a model name the flag ``field`` that it came from."""
    try:
        yield
    except UserError as error:
        raise UserError(field, error.text) from error


def find_base(model: str, config_name: str | None, cache_dir: str) -> Base:
    """Return the model ``model`` without weights, and its tokenizer.

    Args:
        config_name: a folder or hub id that supplies the config and tokenizer missing from the model's own folder.

    Raises:
        UserError: the model is unknown, or lacks a part and ``config_name`` is not given.
    """
    folder = Path(model).expanduser()
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    borrows_config = "config.json" not in names and any(name.endswith((".safetensors", ".bin")) for name in names)
    borrows_tokenizer = bool(names) and not names & set(load.TOKENIZER_FILES)
    if config_name is None:
        if borrows_tokenizer and "config.json" in names:
            raise UserError("model", f"{model}: the folder holds no tokenizer; give its model: --config_name NAME")
        source = _locate(model, cache_dir)
        return Base(source, load.load_skeleton(source), load.load_tokenizer(source))
    with lent_by("config_name"):
        lender = locate.locate(config_name, cache_dir)
    if borrows_config:
        source = load.Source(model, str(folder), folder.resolve().name, cache_dir)
        sparse.refuse_packed(source)
        with lent_by("config_name"):
            skeleton = load.load_skeleton(lender)
    else:
        source = _locate(model, cache_dir)
        skeleton = load.load_skeleton(source)
    with lent_by("config_name" if borrows_tokenizer else "model"):
        tokenizer = load.load_tokenizer(lender if borrows_tokenizer else source)
    config = skeleton.config if borrows_config else None
    return Base(source, skeleton, tokenizer, config, config_name if borrows_tokenizer else None)


def _locate(model: str, cache_dir: str) -> load.Source:
    source = locate.locate(model, cache_dir)
    sparse.refuse_packed(source)  # it has no gradients, and is not saved again
    return source


def check_vocabulary(base: Base, *texts: Tensor | None) -> None:
    """Refuse texts whose tokenizer gives tokens that the model does not have."""
    with lent_by("config_name" if base.lender else "model"):
        load.check_vocabulary(base.lender or base.source.given, base.skeleton, *texts)


def check_length(field: str, length: int, skeleton: PreTrainedModel) -> None:
    """Refuse a number of tokens that the model does not support."""
    context = load.context_length(skeleton)
    if context is not None and length > context:
        raise UserError(field, f"{length}: is more than the model's context; give at most {context}")


def check_adapter(given: str, base: Base) -> None:
    """Refuse a folder that holds no LoRA adapter, or one of another model than ``base``, as far as its files tell.

    Raises:
        UserError: as described above; names the first matrix that does not fit and the adapter's model.
    """
    about, shapes = _described(given)
    fix = f"it was made for {about.get('base_model_name_or_path')}, give that --model"
    modules = dict(base.skeleton.named_modules())
    for key, shape in shapes.items():
        name, _, part = key.removeprefix("base_model.model.").rpartition(".lora_")
        wanted = getattr(modules.get(name), "weight", None)
        if part[:1] not in ("A", "B") or not part.endswith(".weight"):
            continue
        if wanted is None:
            raise UserError("lora_weights", f"{given}: {base.source.given} has no layer {name}; {fix}")
        axis, side = (1, "columns") if part[0] == "A" else (0, "rows")
        if len(shape) != 2:
            raise UserError("lora_weights", f"{given}: {key} is no matrix; train the adapter again")
        if shape[axis] != wanted.shape[axis]:
            have = f"{name} has {wanted.shape[axis]} {side} and the adapter is for {shape[axis]}"
            raise UserError("lora_weights", f"{given}: does not fit {base.source.given}, {have}; {fix}")
    check_base_files(given, base)


def _described(given: str) -> tuple[dict, dict[str, tuple[int, ...]]]:
    """Return the config of the LoRA adapter in the folder ``given``, and the shapes of its matrices by key."""
    from safetensors import safe_open

    folder = Path(given).expanduser()
    if not folder.is_dir():
        raise UserError("lora_weights", f"{given}: folder not found; give the --output_dir of finetune_lm.py")
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    for path in (config, weights):
        if not path.is_file():
            model = path is config and (folder / "config.json").is_file()
            hint = "; it holds a model, not an adapter" if model else ""
            raise UserError("lora_weights", f"{given}: the folder holds no {path.name}{hint}")
    fix = "restore it, or train the adapter again"
    about = read_json("lora_weights", config, fix)
    try:
        with safe_open(weights, framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    except Exception as error:  # safetensors has its own error class
        raise UserError("lora_weights", f"{weights}: cannot be read ({first_line(error)}); {fix}") from error
    if about.get("peft_type") != "LORA":
        raise UserError("lora_weights", f"{given}: is a {about.get('peft_type')} adapter; only LORA is supported")
    if about.get("modules_to_save") or about.get("bias", "none") != "none":
        text = "changes more than its own matrices (modules_to_save or bias); only LoRA alone is supported"
        raise UserError("lora_weights", f"{given}: {text}")
    return about, shapes


# -------------------------------------------------------------------------------------------------------- loading


def load_base(
    base: Base, dtype: torch.dtype, seqlen: int, device: torch.device | None = None, stored: torch.dtype | None = None
) -> Weights:
    """Return the model with its weights, all on GPUs or all on the CPU.

    Args:
        seqlen: tokens per window; each GPU keeps room for the work on one.
        device: where to put the whole model instead.
        stored: see ``Weights``.
    """
    reserve = memory.working_set(base.skeleton, dtype, hessians=False, windows=1, seqlen=seqlen)
    model = load.load_llm(base.source, dtype, device, reserve, base.config)
    places = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    if "cpu" in places and len(places) > 1:
        need = "does not fit in the GPUs' memory, which LoRA needs; use more GPUs, or none (CUDA_VISIBLE_DEVICES=)"
        raise UserError("model", f"{base.source.given}: {need}")
    weights = weights_of(model, stored)
    sparsity = weights.sparsity()
    if sparsity < _DENSE:
        log.warning("the model %s is dense, not pruned: its sparsity is %.4f", base.source.given, sparsity)
    return weights


def load_adapter(given: str, weights: Weights, base: Base) -> PeftModel:
    """Return the model with the adapter around its layers, in evaluation mode.

    Raises:
        UserError: the adapter records that it was trained on other weights, or lacks some of its own.
    """
    check_base(given, weights, base)
    return attach(given, weights)


def attach(given: str, weights: Weights) -> PeftModel:
    """Return the model with the adapter around its layers, in evaluation mode.

    Raises:
        UserError: the adapter lacks weights that its config names, or they are of other shapes.
    """
    from peft import PeftModel

    quiet_peft()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys")
        try:
            return PeftModel.from_pretrained(weights.model, Path(given).expanduser()).eval()
        except UserWarning as error:
            text = f"{given}: lacks weights that its config names ({first_line(error)})"
            raise UserError("lora_weights", text) from error
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of any class: what a config leads to that is not of its weights
            text = f"{given}: its config does not fit its weights ({first_line(error)}); train the adapter again"
            raise UserError("lora_weights", text) from error


def describe_base(weights: Weights, base: Base, sparsity: float) -> dict:
    """Return what is recorded beside an adapter of the weights that it is trained on."""
    return {"model": identity(base.source), "sparsity": sparsity, "fingerprints": weights.fingerprints()}


def read_json(field: str, path: Path, fix: str) -> dict:
    """Return the JSON object in the file ``path``.

    Raises:
        UserError: the file is damaged or holds no object; ``fix`` says what to do.
    """
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(field, f"{path}: cannot be read ({first_line(error)}); {fix}") from error
    if not isinstance(about, dict):
        raise UserError(field, f"{path}: holds no JSON object; {fix}")
    return about


def recorded(folder: Path, field: str = "lora_weights") -> dict:
    """Return what was recorded beside an adapter when its training started; nothing if there is no record.

    Raises:
        UserError: the record is damaged.
    """
    path = folder / BASE
    if not path.is_file():
        return {}
    about = read_json(field, path, _RESTORE)
    if not isinstance(about.get("fingerprints", {}), dict):
        raise UserError(field, f"{path}: its fingerprints are damaged; {_RESTORE}")
    return about


def check_base(given: str, weights: Weights, base: Base) -> None:
    """Refuse the adapter in the folder ``given`` if it records training on weights other than ``weights``.

    Raises:
        UserError: names the first layer that differs.
    """
    about = recorded(Path(given).expanduser())
    if "fingerprints" not in about:
        lacks = f"{BASE} is an older version's, without fingerprints" if about else f"has no {BASE}"
        text = "--lora_weights %s: %s: whether it was trained on %s cannot be checked"
        log.warning(text, given, lacks, base.source.given)
        return
    _compare(given, about, weights.fingerprints(), base)


def check_base_files(given: str, base: Base) -> None:
    """Refuse what ``check_base`` refuses before the weights are loaded, if their files are on this machine."""
    about = recorded(Path(given).expanduser())
    now = _stored_fingerprints(base) if "fingerprints" in about else None
    if now is not None:
        _compare(given, about, now, base)


def _compare(given: str, about: Mapping, now: Mapping[str, str], base: Base) -> None:
    try:
        other = digests.first_difference(about["fingerprints"], now)
    except (TypeError, ValueError) as error:  # no hexadecimal digits, or not as many as they were
        text = f"{Path(given) / BASE}: its fingerprints are damaged; {_RESTORE}"
        raise UserError("lora_weights", text) from error
    if other:
        text = f"was trained on other weights than those of --model {base.source.given} (see {other})"
        raise UserError("lora_weights", f"{given}: {text}; give the model it was trained on, {about.get('model')}")


def _stored_fingerprints(base: Base) -> dict[str, str] | None:
    """Return the fingerprints of the layers as the model's files hold them; None if they do not by the layers' names.

    The files are mapped, so that only the few entries of each matrix are read that its fingerprint needs.
    """
    from safetensors import safe_open

    folder = Path(base.source.path)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if not single.is_file() and not index.is_file():
        return None
    try:
        entries = safetensors_io.Checkpoint(folder).entries if index.is_file() else safetensors_io.read_header(single)
    except UserError:  # it is for the loading to say whether it is damaged
        return None
    weights = {layer.name: f"{layer.name}.weight" for layer in prunable_layers(base.skeleton)}
    if not entries.keys() >= set(weights.values()):
        return None
    with ExitStack() as opened:
        paths = {entries[key].file for key in weights.values()}
        shards = {path: opened.enter_context(safe_open(path, framework="pt")) for path in paths}
        tensors = ((name, shards[entries[key].file].get_tensor(key)) for name, key in weights.items())
        return {name: digests.fingerprint(tensor) for name, tensor in tensors}


def identity(source: load.Source) -> str:
    """Return a name of the model that is valid anywhere: an absolute path, or the name as given."""
    path = Path(source.given).expanduser()
    return str(path.resolve()) if path.exists() else source.given


def adapted_layers(model: PeftModel) -> dict[str, nn.Module]:
    """Return the layers of the model that have an adapter, by their names in the model without adapters."""
    return {name: layer.get_base_layer() for name, layer in lora_layers(model).items()}


def lora_layers(model: PeftModel) -> dict[str, nn.Module]:
    """Return peft's own modules, which hold a layer and its adapter, by the layers' names."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules = model.base_model.model.named_modules()
    return {name: module for name, module in modules if isinstance(module, BaseTunerLayer)}


# ---------------------------------------------------------------------------------------------------------- reports


def quiet_peft() -> None:
    """Silence peft's search for a config that would show whether the vocabulary grew, which it does not here."""
    warnings.filterwarnings("ignore", message="Could not find a config file in")


@contextmanager
def kept(resume: str | Callable[[], str], unless: type[Exception] | tuple[()] = ()) -> Iterator[None]:
    """If the body of the with statement fails, report what is on disk and how to ``resume``.

    Args:
        resume: the text, or a function that returns it after the failure.
        unless: errors of this class are not reported.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(resume if isinstance(resume, str) else resume()) from error
    except unless:
        raise
    except Exception:
        log.warning("%s", resume if isinstance(resume, str) else resume())
        raise
