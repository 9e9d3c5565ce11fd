"""A pruned model and a LoRA adapter are found, checked against each other and loaded."""

import json
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

import main
from lib import UserError, metrics, models, prune, results

log = logging.getLogger("lora_ft")

ROOT = Path(__file__).resolve().parent.parent
CACHE = str(ROOT / "llm_weights")  # the same from wherever a command is typed
BASE = "base_model.json"  # beside an adapter: which weights it was trained on

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "spiece.model")
_DENSE = 0.01  # a sparsity below this is no pruning


class Base(NamedTuple):
    """A model as its folder describes it: without weights, and with the tokenizer that belongs to it."""

    source: models.Source
    skeleton: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


class Loaded(NamedTuple):
    """A model with its weights, its matrices that are pruned, and the number of zeros in each of them."""

    model: PreTrainedModel
    layers: list[models.PrunableLayer]
    zeros: list[int]

    @property
    def sparsity(self) -> float:
        return sum(self.zeros) / sum(layer.module.weight.numel() for layer in self.layers)


@contextmanager
def renamed(flags: Mapping[str, str]) -> Iterator[None]:
    """Let an error of lib, which speaks of main.py's flags, name the flags that this command has in their place."""
    try:
        yield
    except UserError as error:
        raise UserError(re.sub(r"--\w+", lambda flag: flags.get(flag[0], flag[0]), str(error))) from error


# ------------------------------------------------------------------------------------------------- before loading


def find_base(model: str, config_name: str | None, cache_dir: str) -> Base:
    """Return the model ``model`` without weights, and its tokenizer.

    Args:
        config_name: a folder or hub id that lends the config and the tokenizer that the model's own folder lacks.

    Raises:
        UserError: there is no such model, or it lacks a part and ``config_name`` is not given.
    """
    folder = Path(model).expanduser()
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    borrows_config = "config.json" not in names and any(name.endswith((".safetensors", ".bin")) for name in names)
    borrows_tokenizer = bool(names) and not names & set(_TOKENIZER_FILES)
    if config_name is None:
        if borrows_tokenizer and "config.json" in names:
            raise UserError(f"--model {model}: the folder holds no tokenizer; say whose it is: --config_name NAME")
        source = lender = models.locate(model, cache_dir)
    else:
        with renamed({"--model": "--config_name"}):
            lender = models.locate(config_name, cache_dir)
        source = _with_config(folder, lender) if borrows_config else models.locate(model, cache_dir)
    skeleton = models.load_skeleton(source)
    with renamed({"--model": "--config_name"} if borrows_tokenizer else {}):
        tokenizer = models.load_tokenizer(lender if borrows_tokenizer else source)
    return Base(source, skeleton, tokenizer)


def _with_config(folder: Path, lender: models.Source) -> models.Source:
    """Return a source that holds the weights of ``folder`` and the config of ``lender``."""
    joined = tempfile.TemporaryDirectory(prefix="lora_ft-")
    _joined.append(joined)
    for path in folder.iterdir():
        (Path(joined.name) / path.name).symlink_to(path.resolve())
    try:
        AutoConfig.from_pretrained(lender.path, cache_dir=lender.cache_dir).save_pretrained(joined.name)
    except Exception as error:  # whatever a wrong config.json, or a hub that cannot be reached, leads to
        raise UserError(f"--config_name {lender.given}: its config cannot be loaded ({_first_line(error)})") from error
    return models.Source(str(folder), joined.name, folder.resolve().name, lender.cache_dir)


_joined: list[tempfile.TemporaryDirectory] = []  # kept until the program ends, since weights are read from there


def check_length(flag: str, length: int, skeleton: PreTrainedModel) -> None:
    """Refuse a number of tokens that the model was not made for."""
    context = models.context_length(skeleton)
    if length < 2:
        raise UserError(f"{flag} {length}: must be at least 2, since a loss needs a next token")
    if context is not None and length > context:
        raise UserError(f"{flag} {length}: is more than the model's context; give at most {context}")


def check_adapter(given: str, base: Base) -> None:
    """Refuse a folder that holds no LoRA adapter, or one whose matrices do not fit those of the model ``base``.

    Raises:
        UserError: as said, naming the first matrix that does not fit and the model that the adapter was made for.
    """
    from safetensors import safe_open

    folder = Path(given).expanduser()
    if not folder.is_dir():
        raise UserError(f"--lora_weights {given}: there is no such folder; give the --output_dir of finetune_lm.py")
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    for path in (config, weights):
        if not path.is_file():
            model = path is config and (folder / "config.json").is_file()
            hint = "; it holds a model, not an adapter" if model else ""
            raise UserError(f"--lora_weights {given}: the folder holds no {path.name}{hint}")
    try:
        about = json.loads(config.read_text(encoding="utf-8"))
        with safe_open(weights, framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    except Exception as error:  # safetensors has an error class of its own
        raise UserError(f"--lora_weights {given}: cannot be read ({_first_line(error)})") from error
    if about.get("peft_type") != "LORA":
        raise UserError(f"--lora_weights {given}: is a {about.get('peft_type')} adapter; only LORA is supported")
    mend = f"; it was made for {about.get('base_model_name_or_path')}, give that --model"
    modules = dict(base.skeleton.named_modules())
    for key, shape in shapes.items():
        name, _, part = key.removeprefix("base_model.model.").rpartition(".lora_")
        wanted = getattr(modules.get(name), "weight", None)
        if part[:1] in ("A", "B") and part.endswith(".weight"):
            if wanted is None:
                raise UserError(f"--lora_weights {given}: {base.source.given} has no layer {name}{mend}")
            axis, side = (1, "columns") if part[0] == "A" else (0, "rows")
            if shape[axis] != wanted.shape[axis]:
                have = f"{name} has {wanted.shape[axis]} {side} and the adapter is for {shape[axis]}"
                raise UserError(f"--lora_weights {given}: does not fit {base.source.given}, {have}{mend}")


# -------------------------------------------------------------------------------------------------------- loading


def load_base(base: Base, dtype: str, device=None) -> Loaded:
    """Return the model with its weights, all of them on GPUs or all of them on the CPU."""
    model = models.load_llm(base.source, dtype, device)
    places = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    if "cpu" in places and len(places) > 1:
        need = "does not fit in the GPUs' memory, which LoRA needs; use more GPUs, or none (CUDA_VISIBLE_DEVICES=)"
        raise UserError(f"--model {base.source.given}: {need}")
    layers = models.prunable_layers(model)
    loaded = Loaded(model, layers, prune.count_zeros(models.find_blocks(model)[1], layers))
    if loaded.sparsity < _DENSE:
        log.warning("--model %s: is dense, not pruned: its sparsity is %.4f", base.source.given, loaded.sparsity)
    return loaded


def load_adapter(given: str, loaded: Loaded, base: Base):
    """Return the model with the adapter around its layers (a PeftModel, in evaluation mode).

    Raises:
        UserError: the adapter was trained on other weights, as far as it says on which.
    """
    from peft import PeftModel

    check_base(Path(given).expanduser(), f"--lora_weights {given}", loaded, base)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys")
        try:
            return PeftModel.from_pretrained(loaded.model, Path(given).expanduser()).eval()
        except UserWarning as error:
            raise UserError(
                f"--lora_weights {given}: lacks weights that its config names ({_first_line(error)})"
            ) from error


def write_base(folder: Path, loaded: Loaded, base: Base) -> None:
    """Write beside an adapter which weights it was trained on."""
    about = {"model": identity(base.source), "sparsity": loaded.sparsity}
    about["mean_abs"] = {layer.name: metrics.mean_abs(layer.module) for layer in loaded.layers}
    results.write_atomically(folder / BASE, json.dumps(about, indent=1) + "\n")


def check_base(folder: Path, flag: str, loaded: Loaded, base: Base) -> None:
    """Refuse the adapter in ``folder`` if it says that it was trained on other weights than ``loaded``."""
    path = folder / BASE
    if not path.is_file():
        log.warning("%s: has no %s: whether it was trained on %s cannot be checked", flag, BASE, base.source.given)
        return
    about = json.loads(path.read_text(encoding="utf-8"))
    for layer in loaded.layers:
        if not metrics.same_weights(layer.module, about["mean_abs"].get(layer.name, 0)):
            raise UserError(
                f"{flag}: was trained on other weights than those of --model {base.source.given} (see {layer.name}); "
                f"give the model it was trained on, {about['model']}"
            )


def identity(source: models.Source) -> str:
    """Return what names the model from anywhere: an absolute path, or what was given."""
    path = Path(source.given).expanduser()
    return str(path.resolve()) if path.exists() else source.given


def adapted_layers(model) -> dict[str, object]:
    """Return the layers of a PeftModel that have an adapter, by their names in the model itself."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules = model.base_model.model.named_modules()
    return {name: module.get_base_layer() for name, module in modules if isinstance(module, BaseTunerLayer)}


def quiet() -> None:
    """Leave the terminal to our own lines, and among several processes to those of the first."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # a training text is long
    main.quiet()
    log.setLevel(logging.INFO)
    # peft looks for a config beside the weights to see whether the vocabulary grew, which it does not here.
    warnings.filterwarnings("ignore", message="Could not find a config file in")
    if int(os.environ.get("RANK", 0)) > 0:
        for name in ("lora_ft", "lib", "main"):
            logging.getLogger(name).setLevel(logging.ERROR)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
