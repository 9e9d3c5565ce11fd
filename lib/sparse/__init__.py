"""Sparse models on the CPU: weights stay packed on disk and in memory, and are multiplied in that form."""

from importlib import import_module

PACKED_VALUES = ("exact", "int8")  # of the matrices of a packed model

# Imported when they are used: some need transformers, which takes seconds, and pruners want the compiled kernel only.
_HOMES = {
    "DenseLinear": "layers",
    "SparseEmbedding": "layers",
    "SparseLinear": "layers",
    "Unavailable": "kernel",
    "holds_int8": "packed",
    "is_packed": "packed",
    "load_kernel": "kernel",
    "load_packed": "loading",
    "pack_files": "packed",
    "packed_dtypes": "loading",
    "refuse_packed": "loading",
    "sparsify": "fusing",
    "unpack_files": "packed",
    "zeros_skipped": "skipping",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
