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

    The root mean square of the differences, over that of the entries, must be below the rounding of the coarser one. A
    rank-8 update of 2 % of a matrix's norm moves its entries by about 2 %, rounding to bfloat16 by 0.2 % at most.
    """
    x, y = (numpy.frombuffer(bytes.fromhex(digits), dtype="<f4").astype(numpy.float64) for digits in (a, b))
    scale = max(numpy.square(x).mean(), numpy.square(y).mean()) ** 0.5
    # Below float16's smallest normal number its rounding is absolute: 2^-25 at most.
    return bool(numpy.square(x - y).mean() ** 0.5 <= max(_rounding(x), _rounding(y)) * scale + 2**-25)


def _rounding(entries) -> float:
    """Return the relative error by which a copy may differ: one unit of the coarsest dtype that holds the entries."""
    values = torch.from_numpy(entries).float()
    exact = [dtype for dtype in (torch.bfloat16, torch.float16) if torch.equal(values.to(dtype).float(), values)]
    return torch.finfo(exact[0]).eps / 2 if exact else torch.finfo(torch.float32).eps


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
