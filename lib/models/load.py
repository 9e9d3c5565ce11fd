"""Models: inspecting one without its weights, loading and saving."""

from __future__ import annotations

import copy
import logging
import os
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, TypeAlias
from urllib.parse import urlsplit
from urllib.request import getproxies

from lib.core import cpu
from lib.core.errors import UserError, first_line, flag_name
from lib.core.files import new_folder, reading, writing
from lib.core.lazy import torch, transformers
from lib.models import safetensors_io
from lib.models.layers import SUPPORTED, architecture, check_support, find_blocks, prunable_layers, stored_tensors
from lib.models.memory import free_memory
from lib.models.weights import Weights, held_dtypes

log = logging.getLogger(__name__)

DTYPES = ("auto", "float16", "bfloat16", "float32")
Tokenizer: TypeAlias = "transformers.PreTrainedTokenizerBase"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "spiece.model")
_HUB_PATIENCE = 5.0  # seconds

_WITH_IMAGES = "ForConditionalGeneration"  # in names of classes whose text model may be loaded by itself
# Python files of a model's folder are never run; transformers would ask at the terminal.
_NO_CODE = {"trust_remote_code": False}


class Source(NamedTuple):
    """Where a model comes from: as ``given`` by the user, its ``path`` (folder or hub id), and its own ``name``."""

    given: str
    path: str
    name: str
    cache_dir: str

    @property
    def anywhere(self) -> str:
        """A name of the model that is valid in any folder: an absolute path, or the name as given."""
        path = Path(self.given)
        return str(path.resolve()) if path.exists() else self.given


def load_skeleton(source: Source) -> transformers.PreTrainedModel:
    """Return the model without weights (on the meta device): its config, blocks and shapes, within a second.

    A hub id that cannot be reached, or a kind of model that is not supported, is a UserError.
    """
    if not Path(source.path).exists():
        check_hub()
        log.info("looking up %s in %s and on the Hugging Face hub", source.path, source.cache_dir)
    reason, skeleton = "is not a causal language model", None
    try:
        config = transformers.AutoConfig.from_pretrained(source.path, cache_dir=source.cache_dir, **_NO_CODE)
        if getattr(config, "quantization_config", None):
            fix = "pruning needs the float16, bfloat16 or float32 weights"
            raise UserError("model", source.given, "is quantised", fix)
        names = config.architectures or ["ForCausalLM"]
        # BERT has a language model's head, and is not causal.
        causal = any("ForCausalLM" in name for name in names) or getattr(config, "is_decoder", True)
        if getattr(config, "is_encoder_decoder", False):
            reason = "is an encoder-decoder"
        elif causal and all("ForCausalLM" in name or "LMHead" in name or _WITH_IMAGES in name for name in names):
            with suppress(ValueError), torch.device("meta"):  # the library may have no causal model for this config
                skeleton = transformers.AutoModelForCausalLM.from_config(config, **_NO_CODE)
        if skeleton is None or _WITH_IMAGES in type(skeleton).__name__:
            raise UserError("model", source.given, f"{architecture(config)} {reason}", f"supported: {SUPPORTED}")
        if _WITH_IMAGES in names[0]:
            log.warning("%s is a model with images; its text model alone is read, pruned and saved", source.given)
    except UserError:
        raise
    except Exception as error:  # OSError, ValueError, KeyError ...: whatever a wrong config.json leads to
        raise unreadable(source, error) from error
    check_support(source.given, skeleton)
    return skeleton


def check_hub() -> None:
    """Work from the local cache if the hub cannot be reached; called before the first request to it.

    The hub's own client would retry for up to a minute. If a proxy is set, only the proxy can decide.
    """
    if os.environ.get("HF_HUB_OFFLINE") or getproxies():
        return
    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        socket.create_connection((host.hostname, host.port or 443), _HUB_PATIENCE).close()
    except OSError:
        log.warning("%s cannot be reached: only what is in the local cache can be used", host.hostname)
        os.environ["HF_HUB_OFFLINE"] = "1"  # read by the libraries when they are imported
        for name in {"huggingface_hub.constants", "datasets.config"} & sys.modules.keys():
            sys.modules[name].HF_HUB_OFFLINE = True


def load_tokenizer(source: Source) -> Tokenizer:
    """Return the model's own tokenizer, with its defaults; a UserError if it is missing or cannot be read."""
    folder = Path(source.path)
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        fix = "copy the original model's there (tokenizer.json, tokenizer_config.json ...)"
        raise UserError("model", source.given, "the folder holds no tokenizer", fix)
    try:
        return transformers.AutoTokenizer.from_pretrained(source.path, cache_dir=source.cache_dir, **_NO_CODE)
    except Exception as error:
        raise unreadable(source, error, "the tokenizer of ") from error


def check_vocabulary(given: str, model: transformers.PreTrainedModel, *tokens: torch.Tensor | list | None) -> None:
    """Refuse token ids for which the model ``given`` has no embedding: its tokenizer is another model's."""
    count = model.get_input_embeddings().num_embeddings
    largest = max([int(torch.as_tensor(ids).max()) for ids in tokens if ids is not None and len(ids)], default=0)
    if largest >= count:
        problem = f"its tokenizer gives token {largest} and the model has {count} embeddings"
        raise UserError("model", given, problem, "they do not belong together")


def context_length(model: transformers.PreTrainedModel) -> int | None:
    """Return the number of positions that the model supports, None if its config does not state it."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


class Dtypes(NamedTuple):
    """The dtype in which a model is computed, and the one to which its pruned weights are rounded for saving."""

    compute: torch.dtype
    save: torch.dtype


def choose_dtypes(dtype: str, skeleton: transformers.PreTrainedModel) -> Dtypes:
    """Resolve ``dtype``, a name of DTYPES, for this model on this machine.

    ``auto`` follows the checkpoint. On CUDA float32 becomes float16, as published, and bfloat16 stays: its models
    overflow in float16. The CPU computes in float32 and saves in the checkpoint's own dtype.
    """
    checkpoint = skeleton.config.get_text_config().dtype or skeleton.config.dtype or torch.float32
    if dtype != "auto":
        compute = save = getattr(torch, dtype)
    elif cpu.gpus():
        compute = save = torch.bfloat16 if checkpoint == torch.bfloat16 else torch.float16
    else:
        compute, save = torch.float32, checkpoint
    return Dtypes(compute, save)


def load_llm(
    source: Source, dtype: torch.dtype, device: torch.device | str | None = None, reserve: int = 0, config=None
) -> transformers.PreTrainedModel:
    """Return the model in evaluation mode: over all GPUs (and the CPU, if they are too small), or on the CPU.

    The whole model is put on ``device`` instead, if one is given. ``reserve`` bytes of each GPU are left for the work
    (see ``working_set``); a ``config`` of another model is for a folder that contains only weights. Weights that are
    missing, damaged or of another model, or too large for GPU and CPU memory, are a UserError.
    """
    options = {"device_map": None if device is None else {"": device}}
    spread = device is None and cpu.gpus() > 0
    if spread:
        options = {"device_map": "auto", "max_memory": free_memory(reserve)}
    if config is not None:  # transformers looks for both in the folder otherwise
        generation = transformers.GenerationConfig.from_model_config(config)
        options |= {"config": config, "generation_config": generation}
    options |= {"cache_dir": source.cache_dir, "dtype": dtype, "output_loading_info": True} | _NO_CODE
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(source.path, **options)
    except Exception as error:
        raise unreadable(source, error) from error
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:  # from_pretrained would leave random numbers there
        raise UserError("model", source.given, f"the checkpoint lacks {len(missing)} weights, first {missing[0]}")

    # ``hf_device_map`` exists only for a split model; it is not set here, since the libraries compare it with strings.
    device_map = getattr(model, "hf_device_map", {"": next(model.parameters()).device})
    places = [str(place) for place in device_map.values()]
    if "disk" in places:
        raise UserError("model", source.given, "does not fit in the memory of the GPUs and the CPU together")
    if spread and set(places) == {"cpu"}:
        fix = f"free GPU memory, or lower {flag_name('nsamples')} or {flag_name('seqlen')}"
        raise UserError("model", source.given, "no GPU has room for a part of it beside the work", fix)
    if "cpu" in places and len(set(places)) > 1:
        message = "%d of the model's %d parts stay in the CPU's memory and visit the GPU"
        log.info(message, places.count("cpu"), len(places))
    untie(model)
    return model.eval()


def unreadable(source: Source, error: Exception, subject: str = "") -> UserError:
    """Return the error for a folder or hub id (or for ``subject``, "the tokenizer of " one) that cannot be loaded."""
    reason = first_line(error)
    if Path(source.path).exists():
        return UserError("model", source.given, f"{subject}the folder cannot be loaded ({reason})")
    if "gated" in str(error) or "401" in str(error):
        reason = "access must be asked for on its page, then: hf auth login"
    elif "not a valid model identifier" in str(error) or "404" in str(error):
        reason = "unknown to the hub, or private"
    else:
        reason = "it is not a local folder and the hub cannot be reached"
    fix = f"a copy fetched elsewhere with `hf download {source.path} --local-dir DIR` works: {flag_name('model')} DIR"
    return UserError("model", source.given, f"{subject}{source.path} cannot be loaded, {reason}", fix)


def empty_llm(folder: Path, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """Return a folder's model in evaluation mode, its parameters in ``dtype`` on the meta device.

    Its buffers are computed in float32 as ``from_pretrained`` computes them: in 16 bits GPT-J's table of angles would
    be of other angles. Those that checkpoints contain are then in the dtype in which it holds them. A damaged config,
    or damaged settings of generation, is a UserError.
    """
    from accelerate import init_empty_weights

    with reading(folder / "config.json", "cannot be used"), init_empty_weights(include_buffers=False):
        config = transformers.AutoConfig.from_pretrained(folder, **_NO_CODE)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, **_NO_CODE)
    path = folder / "generation_config.json"
    with reading(path, "cannot be used", fix="correct it, or delete it for the defaults"):
        if path.is_file():
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    tensors = dict(stored_tensors(model))
    for name, held in held_dtypes(model, dtype).items():
        tensors[name].data = tensors[name].data.to(held)
    model.config.dtype = dtype
    model.tie_weights()
    return model.eval()


def untie(model: transformers.PreTrainedModel) -> None:
    """Make the config of a model say so if its head is not its embedding: a later ``tie_weights`` would replace it.

    ``from_pretrained`` keeps both weights of a checkpoint that has them and whose config ties them.
    """
    if model.get_output_embeddings() is None or not model.config.get_text_config().tie_word_embeddings:
        return
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    if not (head is embedding or head.is_meta or embedding.is_meta or torch.equal(head.cpu(), embedding.cpu())):
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False


def save_llm(model: torch.nn.Module, tokenizer: Tokenizer, target: Path, dtype=None) -> None:
    """Write a Hugging Face folder, with weights in ``dtype``, None for their own; one that cannot be is a UserError."""
    weights = Weights(model, find_blocks(model)[1], prunable_layers(model), dtype)
    with new_folder(target) as folder:
        for block in weights.visit():
            path = folder / f"model-block-{block.index:05d}.safetensors"
            safetensors_io.write_shard(path, weights.tensors(block.index), weights.save_dtypes(block.index))
        complete_folder(folder, weights, tokenizer)


def complete_folder(folder: Path, weights: Weights, tokenizer: Tokenizer) -> None:
    """Complete a folder with one shard per block as a Hugging Face folder."""
    model = weights.model
    with writing(folder):
        # Each parameter around the blocks gets a file, so that only one at a time is in memory.
        for index, (name, tensor) in enumerate(weights.outer_tensors()):
            path = folder / f"model-edges-{index:05d}.safetensors"
            safetensors_io.write_shard(path, {name: tensor}, weights.save_dtypes(-1))
        safetensors_io.write_index(folder)
        config = copy.deepcopy(model.config)
        config.architectures, config.dtype = [type(model).__name__], weights.save_dtype or model.dtype
        config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
