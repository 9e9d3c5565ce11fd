"""Packed format: a bit per weight and the nonzero values, exact or rounded to int8, in safetensors, used directly."""

import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional as F

from lib.core.errors import UserError
from lib.core.files import reading
from lib.models.safetensors_io import weight_files
from lib.sparse.kernel import KERNEL_DTYPES, PADDING

# transformers does not look for files of this ending: it would fill weights that it does not find with random numbers.
SUFFIX = ".packed.safetensors"
# Key of the file's metadata that holds {"version", "values", "metadata", "tensors": {name: {"shape", "sha256"}}}.
KEY = "packed"
VERSION = 4
INT8_COLUMNS = 64  # of a row, which share a scale
# Integers that hold the bits of a number of that many bytes.
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
DAMAGED = "the file is damaged"


class PackedTensor(NamedTuple):
    """A tensor of any shape as rows of its last dimension.

    ``mask``: int32 [rows, ceil(columns / 32)], a bit per entry, the first column lowest. ``values``: the entries
    whose bits are set, row by row, then PADDING zeros. ``negative``: None, or uint8, a bit for each entry that is zero,
    in order and the first lowest, set where it is -0.0 (``w * mask`` leaves that for half of the pruned weights);
    products ignore it. ``scales``: None, or those of int8 values, one for INT8_COLUMNS of a row and then PADDING zeros;
    the columns are padded to a multiple of INT8_COLUMNS, and without a ``mask`` the values are [rows, columns].
    """

    mask: torch.Tensor | None
    values: torch.Tensor
    negative: torch.Tensor | None = None
    scales: torch.Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        return (self.values if self.scales is None else self.scales).dtype


def pack(tensor: torch.Tensor) -> PackedTensor:
    """Return the packed form of ``tensor``, at least one-dimensional, with entries of 1 to 8 bytes."""
    bits = _bits(tensor).reshape(-1, tensor.shape[-1]).numpy()
    minus = (bits == np.iinfo(bits.dtype).min) & tensor.is_floating_point()  # the sign's bit alone
    kept = (bits != 0) & ~minus
    mask = np.packbits(kept, axis=1, bitorder="little")
    mask = np.pad(mask, ((0, 0), (0, -mask.shape[1] % 4)))
    values = torch.from_numpy(np.concatenate([bits[kept], np.zeros(PADDING, bits.dtype)])).view(tensor.dtype)
    negative = torch.from_numpy(np.packbits(minus[~kept], bitorder="little")) if minus.any() else None
    return PackedTensor(torch.from_numpy(mask.view(np.int32)), values, negative)


def pack_int8(matrix: torch.Tensor) -> PackedTensor:
    """Return the packed form of ``matrix`` [rows, columns], rounded to int8; without a mask if that takes less space.

    Scales are 127ths of the largest number, of the matrix's dtype (of float32: bfloat16) and rounded up, so that
    nothing is cut off. What is rounded to zero needs no value.
    """
    groups = F.pad(matrix.float(), (0, -matrix.shape[1] % INT8_COLUMNS)).unflatten(1, (-1, INT8_COLUMNS))
    largest = groups.abs().amax(-1)
    scales = (largest / 127).to(matrix.dtype if matrix.dtype in KERNEL_DTYPES else torch.bfloat16)
    scales.view(torch.int16).add_(scales.float() * 127 < largest)  # the next number
    numbers = (groups / scales.float().clamp_min(1e-37)[..., None]).round_().to(torch.int8).flatten(1)
    scales = F.pad(scales.flatten(), (0, PADDING))
    if 8 * int(numbers.count_nonzero()) > 7 * numbers.numel():
        return PackedTensor(None, numbers, None, scales)
    return pack(numbers)._replace(scales=scales)


def can_round(tensor: torch.Tensor) -> bool:
    """Return whether ``tensor`` is what ``pack_int8`` takes: a matrix of finite numbers."""
    matrix = tensor.ndim == 2 and tensor.numel() and tensor.dtype in (*KERNEL_DTYPES, torch.float32)
    return bool(matrix and tensor.isfinite().all())


def unpack(content: torch.Tensor | PackedTensor, shape: list[int]) -> torch.Tensor:
    """Return the tensor of ``shape`` that was packed, bit for bit or from int8; or what is not packed as it is."""
    if not isinstance(content, PackedTensor):
        return content
    if content.scales is not None:
        scales = content.scales[:-PADDING].view(shape[0], -1, 1).float()
        padded = [shape[0], scales.shape[1] * INT8_COLUMNS]
        numbers = content.values if content.mask is None else unpack(content._replace(scales=None), padded)
        numbers = numbers.unflatten(1, (-1, INT8_COLUMNS)) * scales
        return numbers.flatten(1)[:, : shape[1]].to(content.dtype)
    kept = np.unpackbits(content.mask.numpy().view(np.uint8), axis=1, count=shape[-1], bitorder="little").astype(bool)
    bits = _bits(content.values).numpy()
    flat = np.zeros(kept.shape, bits.dtype)
    flat[kept] = bits[: bits.size - PADDING]
    if content.negative is not None:
        zeros = np.zeros(kept.size - int(kept.sum()), bits.dtype)
        minus = np.unpackbits(content.negative.numpy(), count=zeros.size, bitorder="little").astype(bool)
        zeros[minus] = np.iinfo(bits.dtype).min
        flat[~kept] = zeros
    return torch.from_numpy(flat).view(content.dtype).reshape(shape)


def row_starts(mask: torch.Tensor) -> torch.Tensor:
    """Return where each row's values begin, int64 [rows + 1]; the last entry is their number."""
    counts = np.bitwise_count(mask.numpy().view(np.uint32)).sum(axis=1, dtype=np.int64)
    return torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor's bits as integers of its own width: -0.0 differs from 0.0, and every NaN keeps its payload."""
    return tensor.contiguous().view(BITS[tensor.element_size()])


def is_packed(folder: Path | str) -> bool:
    """Return whether ``folder`` holds a packed model."""
    return any(Path(folder).glob(f"*{SUFFIX}"))


def pack_files(source: Path, target: Path, values: str = "exact") -> tuple[int, int]:
    """Write the packed form of the model in ``source`` into the empty folder ``target``, with one of PACKED_VALUES.

    Return the bytes of the weights' files before and after. The output is read back and what is exact compared, bit for
    bit. int8 is for all matrices, the embedding among them.
    """
    pairs = [(path, target / path.name.replace(".safetensors", SUFFIX)) for path in weight_files(source)]
    for pair in pairs:
        _pack_file(*pair, values)
    _copy_others(source, target)
    return sum(path.stat().st_size for path, _ in pairs), sum(path.stat().st_size for _, path in pairs)


def unpack_files(source: Path, target: Path) -> int:
    """Write the model packed in ``source`` into the empty folder ``target`` and return the number of its tensors.

    Of int8 values these are not the tensors that were packed, but those that products are of.

    Raises:
        UserError: not a packed folder, another version of the format, or a damaged file.
    """
    count = 0
    for path in packed_files(source):
        tensors = {name: unpack(content, shape) for name, content, shape in read_file(path)}
        with _reading(path), safe_open(path, framework="pt") as file:
            metadata = {key: str(value) for key, value in json.loads(file.metadata()[KEY])["metadata"].items()}
        save_file(tensors, target / path.name.replace(SUFFIX, ".safetensors"), metadata)
        count += len(tensors)
    _copy_others(source, target)
    return count


def packed_files(folder: Path) -> list[Path]:
    """Return the packed files of ``folder``."""
    files = sorted(folder.glob(f"*{SUFFIX}"))
    if not files:
        raise UserError(None, folder, f"holds no *{SUFFIX}", "give a folder that pack.py or main.py --packed wrote")
    return files


def run_dtype(folder: Path) -> torch.dtype:
    """Return float16 if a weight of the packed ``folder`` has that dtype, else bfloat16; reads only headers."""
    for path in packed_files(folder):
        with _reading(path), safe_open(path, framework="pt") as file:
            if any(file.get_slice(name).get_dtype() == "F16" for name in file.keys()):
                return torch.float16
    return torch.bfloat16


def holds_int8(folder: Path) -> bool:
    """Return whether the matrices of the packed ``folder`` were rounded to int8; reads only a header."""
    path = packed_files(folder)[0]
    with _reading(path), safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()[KEY])["values"] == "int8"


def read_file(path: Path) -> Iterator[tuple[str, torch.Tensor | PackedTensor, list[int]]]:
    """Yield name, content and shape of every tensor of a packed file, memory-mapped and checked.

    Raises:
        UserError: another version of the format, or a truncated or altered file.
    """
    with _reading(path), safe_open(path, framework="pt") as file:
        header = json.loads((file.metadata() or {}).get(KEY, '{"version": 1}'))
        if header["version"] != VERSION:
            problem = f"is in version {header['version']} of the packed format and this reads {VERSION}"
            raise UserError(None, path, problem, "pack again: python scripts/speedup/pack.py MODEL --save DIR")
        stored = set(file.keys())
        for name, entry in header["tensors"].items():
            keys = {field: f"{name}.{field}" for field in PackedTensor._fields}
            parts = {field: file.get_tensor(key) for field, key in keys.items() if key in stored}
            content = PackedTensor(*map(parts.get, keys)) if parts else file.get_tensor(name)
            if _digest(content, entry["shape"]) != entry["sha256"] or not _fits(content, entry["shape"]):
                raise UserError(None, path, f"{name} is not what was packed (its SHA-256 differs)", DAMAGED)
            yield name, content, entry["shape"]


def _reading(path: Path) -> AbstractContextManager[None]:
    return reading(path, "cannot be read as a packed model", fix=DAMAGED)


def _pack_file(source: Path, target: Path, values: str) -> None:
    stored, entries = {}, {}
    with safe_open(source, framework="pt") as file:
        metadata = file.metadata() or {}
        for name in file.keys():
            tensor = file.get_tensor(name)
            if values == "int8" and can_round(tensor):
                content = pack_int8(tensor)
            else:
                content = pack(tensor) if tensor.numel() and tensor.ndim else tensor
            if sum(part.nbytes for part in _parts(content).values()) >= tensor.nbytes:
                content = tensor
            entries[name] = {"shape": list(tensor.shape), "sha256": _digest(content, tensor.shape)}
            stored |= {name + ending: part for ending, part in _parts(content).items()}
        # One key: safetensors writes several in an order that changes from run to run.
        header = {"version": VERSION, "values": values, "metadata": metadata, "tensors": entries}
        save_file(stored, target, {KEY: json.dumps(header)})
        for name, content, shape in read_file(target):
            rounded = isinstance(content, PackedTensor) and content.scales is not None
            if not rounded and not torch.equal(_bits(unpack(content, shape)), _bits(file.get_tensor(name))):
                raise RuntimeError(f"{source}: {name} does not come back from its packed form")


def _parts(content: torch.Tensor | PackedTensor) -> dict[str, torch.Tensor]:
    """Return the stored tensors by what a file adds to the name."""
    parts = content._asdict() if isinstance(content, PackedTensor) else {}
    return {f".{field}": part for field, part in parts.items() if part is not None} or {"": content}


def _digest(content: torch.Tensor | PackedTensor, shape: list[int]) -> str:
    """Return the SHA-256 of the dtypes, shapes and bits of a stored tensor."""
    tensors = _parts(content).values()
    digest = hashlib.sha256(f"{list(shape)} {[(str(each.dtype), list(each.shape)) for each in tensors]}".encode())
    for tensor in tensors:
        digest.update(_bits(tensor).flatten().numpy())
    return digest.hexdigest()


def _fits(content: torch.Tensor | PackedTensor, shape: list[int]) -> bool:
    """Return whether the parts are consistent: anyone can write a file, the kernel takes addresses from them."""
    if not isinstance(content, PackedTensor):
        return list(content.shape) == shape
    mask, values, negative, scales = content
    rows, columns, word = math.prod(shape[:-1]), shape[-1], 32 if scales is None else INT8_COLUMNS
    words = -(-columns // word)
    if values is None or (
        scales is not None and (values.dtype != torch.int8 or len(shape) != 2 or negative is not None)
    ):
        return False
    if scales is not None and (scales.dtype not in KERNEL_DTYPES or list(scales.shape) != [rows * words + PADDING]):
        return False
    if mask is None:
        return scales is not None and list(values.shape) == [rows, words * word]
    if mask.dtype != torch.int32 or list(mask.shape) != [rows, words * word // 32] or values.ndim != 1:
        return False
    last = mask.numpy().view(f"u{word // 8}")[:, -1]
    beyond = last >> (columns % word) if columns % word else np.zeros(rows, np.uint32)
    count = int(row_starts(mask)[-1])
    zeros = rows * columns - count
    signs = negative is None or (negative.dtype == torch.uint8 and list(negative.shape) == [-(-zeros // 8)])
    return not beyond.any() and count + PADDING == len(values) and signs


def _copy_others(source: Path, target: Path) -> None:
    """Copy config, tokenizer and other non-weight files; not subfolders, such as an export of the weights."""
    for path in source.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            shutil.copy(path, target)
