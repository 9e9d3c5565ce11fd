"""Digests that answer three questions: are these the same weights, is this the same file, is this the same value?"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from lib.core.lazy import numpy, torch

_LARGE = 2**25  # bytes of a file that takes long to read


def fingerprint(weight: torch.Tensor) -> str:
    """Return the float32 values of 64 entries of ``weight`` at fixed places, as hexadecimal digits.

    It distinguishes a fine-tuned copy of a matrix but not a half-precision one; see ``same_weights``.
    """
    # A large odd number: consecutive places fall into unrelated rows and columns.
    places = (torch.arange(64) * 2654435761 + 12345) % weight.numel()
    flat = weight.detach().reshape(-1)
    return flat[places.to(flat.device)].float().cpu().numpy().astype("<f4").tobytes().hex()


def same_weights(a: str, b: str) -> bool:
    """Return whether two fingerprints belong to the same matrix, up to rounding to half precision.

    Copies in one dtype must be equal: training a bfloat16 checkpoint a little further changes few entries. Otherwise
    the root mean square of the differences, over that of the entries, must be below the rounding of the coarser one. A
    rank-8 update of 2 % of a matrix's norm moves its entries by about 2 %, rounding to bfloat16 by 0.2 % at most.
    """
    x, y = (torch.from_numpy(numpy.frombuffer(bytes.fromhex(digits), "<f4").astype("f4")) for digits in (a, b))
    dtypes = {_coarsest(x), _coarsest(y)}
    if len(dtypes) == 1:
        # The smallest entries of a bfloat16 checkpoint are rounded where it is loaded in float16.
        return torch.equal(x, y) or (dtypes != {torch.float32} and torch.equal(x.half(), y.half()))
    x, y = x.double(), y.double()
    scale = max(x.square().mean(), y.square().mean()) ** 0.5
    unit = max(torch.finfo(dtype).eps / 2 for dtype in dtypes)
    # Below float16's smallest normal number its rounding is absolute: 2^-25 at most.
    return bool((x - y).square().mean() ** 0.5 <= unit * scale + 2**-25)


def _coarsest(entries: torch.Tensor) -> torch.dtype:
    """Return the dtype of the fewest bits that holds the ``entries`` exactly."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    return next(dtype for dtype in dtypes if torch.equal(entries.to(dtype).float(), entries) or dtype is dtypes[-1])


def first_difference(before: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """Return the first layer of ``now`` whose fingerprint differs or is missing in ``before``, None if all agree."""
    return next((name for name in now if name not in before or not same_weights(before[name], now[name])), None)


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file."""
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**24):
            sha256.update(piece)
    return sha256.hexdigest()


def file_state(path: Path) -> str:
    """Return the size and the checksum of a file, or of a large one the time of its last change."""
    stat = path.stat()
    return f"{stat.st_size} bytes {checksum(path) if stat.st_size <= _LARGE else f'of {stat.st_mtime_ns}'}"


def digest(value: object) -> str:
    """Return a hash of a tensor's values or of any JSON value, such as a plan."""
    if isinstance(value, torch.Tensor):
        content = value.cpu().contiguous().numpy().tobytes()
    else:
        content = json.dumps(value, sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()[:32]
