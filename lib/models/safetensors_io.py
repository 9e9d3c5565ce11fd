"""Safetensors files: reading and writing one tensor at a time, in memory, never mapped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lib.core.errors import UserError, first_line
from lib.core.files import atomic
from lib.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_CODES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64", "I64": "int64", "I32": "int32"}
_PIECE = 2**24  # bytes hashed or written at a time, and numbers converted


class Entry(NamedTuple):
    """Location of a tensor: its ``file``, the byte at which it ``start``s, its ``size``, dtype and shape."""

    file: Path
    start: int
    size: int
    code: str
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, Entry]:
    """Return the tensors of a safetensors file by name.

    Raises:
        UserError: the file is truncated or is not a safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= size - 8:
                raise ValueError("its header does not fit into it")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        found = {}
        for name, about in header.items():
            begin, end = about["data_offsets"]
            if about["dtype"] not in _CODES or 8 + length + end > size:
                raise ValueError(f"{name} is cut off, or of an unknown dtype")
            entry = Entry(path, 8 + length + begin, end - begin, about["dtype"], tuple(about["shape"]))
            found[name] = entry
        return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(None, f"{path}: cannot be read as safetensors ({first_line(error)})") from error


class Checkpoint:
    """A safetensors checkpoint in a ``folder``: one file, or several with an index."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        paths = sorted(folder.glob("*.safetensors"))
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            try:
                paths = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
            except (ValueError, KeyError, AttributeError) as error:
                raise UserError("model", f"{folder}: its index cannot be read ({first_line(error)})") from error
        if not paths:
            load = f"AutoModelForCausalLM.from_pretrained('{folder}').save_pretrained('DIR')"
            text = f"{folder}: holds no *.safetensors, and pickled weights cannot be streamed; convert them: {load}"
            raise UserError("model", text)
        self.entries: dict[str, Entry] = {}
        for path in paths:
            self.entries |= read_header(path)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return tensors by name, in the CPU's memory and in their own dtype."""
        return {name: read_tensor(self.entries[name]) for name in names}


def read_tensor(entry: Entry) -> Tensor:
    """Return a tensor copied into memory: mapped pages would stay resident."""
    if not entry.size:
        return torch.empty(entry.shape, dtype=getattr(torch, _CODES[entry.code]))
    buffer = torch.empty(entry.size, dtype=torch.uint8)
    view = memoryview(buffer.numpy())
    with entry.file.open("rb", buffering=0) as file:
        file.seek(entry.start)
        done = 0
        while done < entry.size:
            count = file.readinto(view[done:])
            if not count:
                raise UserError(None, f"{entry.file}: is cut off")
            done += count
        os.posix_fadvise(file.fileno(), entry.start, entry.size, os.POSIX_FADV_DONTNEED)
    return buffer.view(getattr(torch, _CODES[entry.code])).view(entry.shape)


def read_converted(entry: Entry, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a tensor on ``device``, in ``dtype`` if floating-point, without ever holding all of it in two dtypes."""
    own = getattr(torch, _CODES[entry.code])
    if not own.is_floating_point:
        return read_tensor(entry).to(device)
    value = torch.empty(entry.shape, dtype=dtype, device=device)
    flat = value.view(-1)
    for start in range(0, len(flat), _PIECE):
        count = min(_PIECE, len(flat) - start)
        place = {"start": entry.start + start * own.itemsize, "size": count * own.itemsize}
        flat[start : start + count] = read_tensor(entry._replace(shape=(count,), **place))
    return value


def write_shard(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> str:
    """Write ``tensors`` as a safetensors file, durably and under a temporary name first; return its SHA-256.

    Args:
        dtype: in which floating-point tensors are written, None for their own; one tensor at a time is converted.
    """
    codes = {getattr(torch, name): code for code, name in _CODES.items()}
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        size = tensor.numel() * torch.empty(0, dtype=kind).element_size()
        header[name] = {"dtype": codes[kind], "shape": list(tensor.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begin at a multiple of eight bytes
    sha256 = hashlib.sha256()
    with atomic(path) as file:
        for piece in (len(text).to_bytes(8, "little"), text):
            file.write(piece)
            sha256.update(piece)
        for tensor in tensors.values():
            kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
            data = memoryview(tensor.detach().to("cpu", kind).contiguous().view(-1).view(torch.uint8).numpy())
            file.write(data)
            sha256.update(data)
    return sha256.hexdigest()


def write_index(folder: Path) -> None:
    """Write the index of all shards in ``folder`` that transformers reads."""
    shards = {path.name: read_header(path) for path in sorted(folder.glob("*.safetensors"))}
    names = {name: file for file, entries in shards.items() for name in entries}
    total = sum(entry.size for entries in shards.values() for entry in entries.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}, indent=2)
    (folder / "model.safetensors.index.json").write_text(text + "\n")
