"""Memory allocator of the C library: memory of freed tensors is kept for reuse instead of returned to the system."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # of mallopt, in glibc's malloc.h
_KEPT, _STEP, _HEAP_MOST = 512 << 20, 16 << 20, 32 << 20  # bytes; more than the last one, glibc does not take


def _library() -> ctypes.CDLL | None:
    """Return glibc, or None on other platforms (macOS, Windows, musl)."""
    library = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    return library if hasattr(library, "mallopt") else None


def give_back_freed_memory() -> None:
    """Return freed memory to the system, such as the tokens of a whole text of which only windows are kept."""
    library = _library()
    if library is not None:
        library.malloc_trim(0)


def keep_freed_memory() -> bool:
    """Make glibc keep memory freed from now on, up to half a GiB; return whether it does (not on other platforms).

    Activations of a block are a few MiB each. By default, glibc requests such memory from the system and returns it
    each time, and the system zeroes every page again: a tenth of a pass over a small model's blocks.
    """
    library = _library()
    if library is None:
        return False
    give_back_freed_memory()
    pairs = ((_MMAP_THRESHOLD, _HEAP_MOST), (_TRIM_THRESHOLD, _KEPT), (_TOP_PAD, _STEP))
    return all([library.mallopt(what, size) == 1 for what, size in pairs])
