"""Safetensors files, read and written one tensor at a time.

The safetensors library maps a file, whose pages then count as this process's memory, and writes tensors that are all
in memory in the file's dtype. A streamed run of SmolLM2 takes 729 MiB with it, and 635 MiB with this module.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from lib.core.errors import UserError
from lib.core.files import atomic, reading
from lib.core.lazy import numpy, torch

# The format's names of dtypes, and torch's.
_CODES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64", "I64": "int64", "I32": "int32"}
_CODES["I8"] = "int8"

# The file that says in which shard of a checkpoint each tensor is.
_INDEX = "model.safetensors.index.json"

# Numbers that are converted at a time.
_PIECE = 2**24


class Entry(NamedTuple):
    """Location of a tensor: its ``file``, the byte at which it ``start``s, its ``size`` in bytes, dtype and shape."""

    file: Path
    start: int
    size: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, Entry]:
    """Return the tensors of a safetensors file by name; one that is cut off, or is something else, is a UserError."""
    with reading(path, "cannot be read as safetensors"):
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= size - 8:
                raise ValueError("its header does not fit into it")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        entries = {}
        for name, fields in header.items():
            begin, end = fields["data_offsets"]
            if fields["dtype"] not in _CODES:
                raise ValueError(f"{name} is of the dtype {fields['dtype']}")
            dtype = getattr(torch, _CODES[fields["dtype"]])
            tensor = torch.empty(fields["shape"], dtype=dtype, device="meta")
            if not 0 <= begin <= size - 8 - length - tensor.nbytes or len(range(begin, end)) != tensor.nbytes:
                raise ValueError(f"{name} is cut off, or of another shape")
            entries[name] = Entry(path, 8 + length + begin, end - begin, dtype, tuple(tensor.shape))
        return entries


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model's folder that transformers loads, [] if there are none.

    They are the one that config.json names, else ``model.safetensors``, else those of the index
    (transformers.modeling_utils._get_resolved_checkpoint_files). Files beside them, such as older copies, do not count.
    A damaged config or index is a UserError.
    """
    config = folder / "config.json"
    with reading(config):
        named = json.loads(config.read_text()).get("transformers_weights") if config.is_file() else None
        candidates = [folder / name for name in ([named] if named else ["model.safetensors", _INDEX])]
    path = next(filter(Path.is_file, candidates), None)
    if path is None or path.suffix != ".json":
        return [path] if path else []
    with reading(path):
        names = sorted(set(json.loads(path.read_text())["weight_map"].values()))
        if outside := [n for n in names if Path(n).name != n or not n.endswith(".safetensors")]:
            raise ValueError(f"{outside[0]} is no safetensors file of this folder")
        return [folder / name for name in names]


def checkpoint_entries(folder: Path) -> dict[str, Entry]:
    """Return the tensors of a checkpoint by name; one that is damaged, pickled, or holds a tensor twice, is refused."""
    entries: dict[str, Entry] = {}
    for path in weight_files(folder):
        header = read_header(path)
        for name in sorted(header.keys() & entries.keys()):
            problem = f"{name} is both in {entries[name].file.name} and in {path.name}"
            raise UserError("model", folder, problem, "fetch or save the model again")
        entries |= header
    if not entries:
        problem = f"holds neither model.safetensors nor {_INDEX}, and pickled weights cannot be streamed"
        fix = f"convert them: AutoModelForCausalLM.from_pretrained('{folder}').save_pretrained('DIR')"
        raise UserError("model", folder, problem, fix)
    return entries


def read_tensor(entry: Entry, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return a tensor on ``device``, if floating-point in ``dtype`` (None: its own); never is all of it held in two."""
    if dtype is None or not entry.dtype.is_floating_point:
        return _read(entry, 0, entry.size).view(entry.shape).to(device)
    tensor = torch.empty(entry.shape, dtype=dtype, device=device)
    flat, itemsize = tensor.view(-1), entry.dtype.itemsize
    for start in range(0, len(flat), _PIECE):
        count = min(_PIECE, len(flat) - start)
        flat[start : start + count] = _read(entry, start * itemsize, count * itemsize)
    return tensor


def _read(entry: Entry, start: int, size: int) -> torch.Tensor:
    """Return ``size`` bytes of a tensor from byte ``start`` on, [numbers], in memory of their own."""
    if not size:
        return torch.empty(0, dtype=entry.dtype)
    content = numpy.fromfile(entry.file, "u1", size, offset=entry.start + start)
    if len(content) < size:
        raise UserError(None, entry.file, "is cut off")
    return torch.from_numpy(content).view(entry.dtype)


def write_shard(path: Path, tensors: Mapping[str, torch.Tensor], dtypes: Mapping[str, torch.dtype] = {}) -> str:
    """Write ``tensors`` as a safetensors file, durably and under a temporary name first; return its SHA-256.

    Floating-point ones are written in ``dtypes``, if not in their own; one tensor at a time is converted.
    """
    codes = {getattr(torch, name): code for code, name in _CODES.items()}
    dtypes = {name: dtypes.get(name, t.dtype) if t.is_floating_point() else t.dtype for name, t in tensors.items()}
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * dtypes[name].itemsize
        header[name] = {"dtype": codes[dtypes[name]], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # The data begin at a multiple of eight bytes.

    sha256 = hashlib.sha256()
    with atomic(path) as file:

        def write(content: bytes | memoryview) -> None:
            file.write(content)
            sha256.update(content)

        write(len(encoded).to_bytes(8, "little") + encoded)
        for name, tensor in tensors.items():
            flat = tensor.detach().to("cpu", dtypes[name]).contiguous().view(-1)
            write(memoryview(flat.view(torch.uint8).numpy()))
    return sha256.hexdigest()


def write_index(folder: Path) -> None:
    """Write the index of all shards in ``folder`` that transformers reads."""
    entries: dict[str, Entry] = {}
    for path in sorted(folder.glob("*.safetensors")):
        entries |= read_header(path)
    metadata = {"total_size": sum(entry.size for entry in entries.values())}
    index = {"metadata": metadata, "weight_map": {name: entries[name].file.name for name in sorted(entries)}}
    (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
