"""Sparse models on the CPU: weights stay packed on disk and in memory, and are multiplied in that form."""

from lib.sparse.fusing import sparsify
from lib.sparse.kernel import Unavailable, processor
from lib.sparse.kernel import load as load_kernel
from lib.sparse.layers import DenseLinear, SparseLinear
from lib.sparse.loading import load_packed
from lib.sparse.packed import is_packed, kind_to_run_in, pack_files, unpack_files

__all__ = [
    "DenseLinear",
    "SparseLinear",
    "Unavailable",
    "is_packed",
    "kind_to_run_in",
    "load_kernel",
    "load_packed",
    "pack_files",
    "processor",
    "sparsify",
    "unpack_files",
]
