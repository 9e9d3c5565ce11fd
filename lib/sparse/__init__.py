"""Sparse models on the CPU: weights stay packed on disk and in memory, and are multiplied as they are."""

from lib.sparse.kernel import Unavailable
from lib.sparse.layers import DenseLinear, SparseLinear, sparsify
from lib.sparse.loading import load_packed
from lib.sparse.packed import is_packed, pack_files, unpack_files

__all__ = [
    "DenseLinear",
    "SparseLinear",
    "Unavailable",
    "is_packed",
    "load_packed",
    "pack_files",
    "sparsify",
    "unpack_files",
]
