"""Fingerprints of weight matrices: they distinguish a fine-tuned copy but not a half-precision one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lib.core.lazy import numpy, torch

if TYPE_CHECKING:
    from torch import Tensor

_ENTRIES = 64
_STRIDE = 2654435761  # a large odd number: consecutive entries fall into unrelated rows and columns


def fingerprint(weight: Tensor) -> str:
    """Return the float32 values of 64 entries of ``weight`` at fixed places, as hexadecimal digits."""
    places = (torch.arange(_ENTRIES) * _STRIDE + 12345) % weight.numel()
    flat = weight.detach().reshape(-1)
    return flat[places.to(flat.device)].float().cpu().numpy().astype("<f4").tobytes().hex()


def is_fingerprint(text: object) -> bool:
    """Return whether ``text``, as read from a file, is a fingerprint."""
    digits = "0123456789abcdef"
    return isinstance(text, str) and len(text) == 8 * _ENTRIES and not text.strip(digits)


def same_weights(a: str, b: str) -> bool:
    """Return whether two fingerprints belong to the same matrix, up to rounding to half precision.

    The root mean square of the differences, over that of the entries, must be below the rounding of the coarser one. A
    rank-8 update of 2 % of a matrix's norm moves its entries by about 2 % of theirs, rounding to bfloat16 by 0.2 % at
    most.
    """
    x, y = (numpy.frombuffer(bytes.fromhex(text), dtype="<f4").astype(numpy.float64) for text in (a, b))
    scale = max(numpy.square(x).mean(), numpy.square(y).mean()) ** 0.5
    # Below float16's smallest normal number its rounding is absolute: 2^-25 at most.
    return bool(numpy.square(x - y).mean() ** 0.5 <= max(_rounding(x), _rounding(y)) * scale + 2**-25)


def _rounding(entries) -> float:
    """Return the relative error by which a copy may differ: one unit of the coarsest dtype that holds the entries."""
    values = torch.from_numpy(entries).float()
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(values.to(dtype).float(), values):
            return torch.finfo(dtype).eps / 2
    return torch.finfo(torch.float32).eps


def first_difference(before: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """Return the first layer of ``now`` whose fingerprint differs or is missing in ``before``, None if all agree."""
    for name, own in now.items():
        if name not in before or not same_weights(before[name], own):
            return name
    return None
