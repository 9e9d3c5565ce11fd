"""Compiled kernel: this folder's C++ files as a shared library in the user's cache, for this CPU's instruction set."""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from lib.core import cpu
from lib.core.errors import UserError
from lib.core.files import atomic

log = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent / "csrc"
HEADERS, SOURCES = (sorted(_FOLDER.glob(ending)) for ending in ("*.h", "*.cpp"))
# What the kernel is compiled for, the best first, and the compiler's -m flags; on ARM, NEON needs none.
_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512vbmi2", "avx512vnni", "avx2", "fma", "f16c", "popcnt")
LEVELS = {
    "amx": (*_AVX512, "amxtile", "amxbf16"),  # whose few tokens are those of avx512
    "avx512bf16": (*_AVX512, "avx512bf16"),
    "avx512": _AVX512,
    "avx2": ("avx2", "bmi2", "fma", "f16c", "popcnt"),
    "neon": (),
}
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fopenmp")
MAX_TOKENS = 8  # of a call of the kernel
PADDING = 64  # values after a matrix's last, which the kernel may read
KERNEL_DTYPES = (torch.bfloat16, torch.float16)  # of weights
# The library's functions and the kinds of their arguments. Those with "_" are called by methods of Kernel.
_KINDS = {"p": ctypes.c_void_p, "n": ctypes.c_int64, "i": ctypes.c_int, "d": ctypes.c_double}
FUNCTIONS = {
    "_multiply": "pipipii",
    "_unpack": "ppnpi",
    "_multiply_many": "ppnpi",
    "_multiply_tiles": "ppnpi",
    "_solve_block": "pppnnnpi",
    "decode": "ppippnnpi",  # as step.cpp says
}
_SCRATCH: list[tempfile.TemporaryDirectory] = []  # folders of libraries that are not kept


class Unavailable(RuntimeError):
    """The kernel is unavailable on this machine. The message is one line with the reason."""


class MatrixStruct(ctypes.Structure):
    """A weight as kernel.h declares it. It holds addresses: its creator must keep the tensors alive."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("mask", "values", "starts", "bias")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "words", "half")),
        ("scales", ctypes.c_void_p),
    ]


class BlockStruct(ctypes.Structure):
    """A LLaMA's block as step.cpp sees it: addresses of matrices and of the norms' weights, and sizes."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("qkv", "o", "gate_up", "down", "before", "after")),
        *((name, ctypes.c_double) for name in ("before_eps", "after_eps", "scale")),
        *((name, ctypes.c_int64) for name in ("width", "heads", "keys", "size", "inner")),
    ]


class DecoderStruct(ctypes.Structure):
    """A LLaMA as step.cpp sees it: addresses of its blocks, embedding, last norm's weight and head, and sizes."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("blocks", "embedding", "norm", "head")),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("count", "width", "half")),
    ]


class Kernel:
    """One compiled library, for one of LEVELS."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        for name, kinds in FUNCTIONS.items():
            function = getattr(library, name.removeprefix("_"))
            function.argtypes, function.restype = [_KINDS[dtype] for dtype in kinds], None
            setattr(self, name, function)
        self.has_tiles = bool(library.request_tiles())

    def multiply(self, matrix: MatrixStruct, x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return the products [..., rows] of ``x`` [..., columns], 1 to MAX_TOKENS of them, plus the bias.

        ``x`` is of the weight's dtype, the products are of that ``dtype`` or float32. Sums are float32.
        """
        y, threads = torch.empty(*x.shape[:-1], matrix.rows, dtype=dtype or x.dtype), torch.get_num_threads()
        tokens, place, x = x.numel() // matrix.columns, ctypes.c_void_p(y.data_ptr()), x.contiguous()
        wide = y.dtype == torch.float32
        self._multiply(ctypes.addressof(matrix), 1, x.data_ptr(), tokens, ctypes.byref(place), wide, threads)
        return y

    def multiply_many(
        self, weight: MatrixStruct | torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the products [tokens, rows] of ``x`` [tokens, columns], and ``bias`` added, skipping the zeros.

        ``weight``: packed (its own bias is not used), or a dense [rows, columns] whose zeros are looked for. All are
        float32 (but a packed weight's values) and contiguous. Each number is the sum of its products in the order of
        the columns, rounded at each step (FMA): the same for any number of tokens and threads.
        """
        if isinstance(weight, torch.Tensor):
            weight = MatrixStruct(None, weight.data_ptr(), None, None, *weight.shape)
        y, threads = x.new_empty(len(x), weight.rows), torch.get_num_threads()
        self._multiply_many(ctypes.addressof(weight), x.data_ptr(), len(x), y.data_ptr(), threads)
        return y if bias is None else y.add_(bias)

    def multiply_tiles(self, matrix: MatrixStruct, x: torch.Tensor) -> torch.Tensor:
        """Return the products [tokens, rows] of a packed matrix and ``x`` [tokens, columns], plus the bias, on AMX.

        All are bfloat16, sums are float32. It needs ``has_tiles``, which says that the system allows them.
        """
        y, x = x.new_empty(len(x), matrix.rows), x.contiguous()
        self._multiply_tiles(ctypes.addressof(matrix), x.data_ptr(), len(x), y.data_ptr(), torch.get_num_threads())
        return y

    def solve_block(
        self, block: torch.Tensor, upper: torch.Tensor, drop: torch.Tensor, group: int | None
    ) -> torch.Tensor:
        """Zero and repair ``block`` as ``sparsegpt.solve_block`` does; all are contiguous."""
        errors, sizes = torch.empty_like(block), (*block.shape, group or 0)
        places = block.data_ptr(), upper.data_ptr(), drop.data_ptr()
        self._solve_block(*places, *sizes, errors.data_ptr(), torch.get_num_threads())
        return errors

    def unpack(self, matrix: MatrixStruct, rows: torch.Tensor, out: torch.Tensor) -> None:
        """Fill ``out`` [count, words * 32] with those of a packed or int8 matrix's rows, int64 [count], 0 or more."""
        self._unpack(ctypes.addressof(matrix), rows.data_ptr(), len(rows), out.data_ptr(), torch.get_num_threads())


def load_kernel(level: str | None = None) -> Kernel:
    """Return the kernel for ``level`` of LEVELS, or for the best that this CPU supports; compiled if necessary.

    Raises:
        Unavailable: unsupported instructions, a missing or failing compiler, or no place for the library.
    """
    level = level or (levels() or [None])[0]
    if level not in levels():
        raise Unavailable(f"this CPU ({platform.machine()}) has {f'no {level}' if level else 'neither AVX2 nor NEON'}")
    return _loaded(level)


@cache
def _loaded(level: str) -> Kernel:
    try:
        path = _built(level)
        try:
            return Kernel(path)
        except (OSError, AttributeError):  # nothing can be loaded from the cache, or the library lacks a function
            return Kernel(_built(level, keep=False))
    except (OSError, UserError, AttributeError) as error:
        raise Unavailable(f"the kernel cannot be kept or loaded ({error})") from error


def levels() -> list[str]:
    """Return which of LEVELS this machine supports, best first."""
    has = cpu.instructions()
    names = [name for name, flags in LEVELS.items() if has.issuperset(flags or [name])]
    # Intel's vdpbf16ps starts every other cycle, on the port of vpexpandw: two float32 products are faster there.
    # A step of 32 columns takes 1.26 ns with it and 1.54 without on an EPYC of 2023 (Zen 4).
    if "avx512bf16" in names and cpu.processor().get("vendor_id") != "AuthenticAMD":
        names.remove("avx512bf16")
        names.insert(names.index("avx512") + 1, "avx512bf16")
    return names


def _built(level: str, keep: bool = True) -> Path:
    """Return the library's path in the user's cache, where it is compiled if it is missing or damaged.

    Its name identifies source, compiler, flags, C library and its own content. A cache to which others can write is not
    used, since whatever lies there would be run; then, or without ``keep``, it is compiled for this process alone.
    """
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    compiler = next(filter(None, map(shutil.which, names)), None)
    if compiler is None:
        raise Unavailable(f"no C++ compiler found ({', '.join(names)})")
    try:
        base = os.environ.get("XDG_CACHE_HOME", "")  # a relative one is to be ignored, says its specification
        folder = (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "alphapruning"
    except RuntimeError as error:  # no home folder
        raise Unavailable(f"there is no place for the kernel ({error}); set XDG_CACHE_HOME") from error
    flags = [*FLAGS, *(f"-m{flag.replace('amx', 'amx-')}" for flag in LEVELS[level])]
    content = b"".join(source.read_bytes() for source in (*HEADERS, *SOURCES))
    version = subprocess.run([compiler, "--version"], capture_output=True).stdout
    key = _digest(content + version + repr((compiler, flags, platform.libc_ver())).encode())

    folder.mkdir(0o700, parents=True, exist_ok=True)
    if keep and not _is_private(folder):
        log.warning("%s is not used: it must be yours, and nobody else's to write (chmod 700)", folder)
        keep = False
    for path in folder.glob(f"sparse-{level}-{key}-*.so") if keep else ():
        if _is_private(path) and path.stem.endswith(_digest(path.read_bytes())):
            return path
    scratch = tempfile.TemporaryDirectory(prefix="alphapruning-")
    library = Path(scratch.name) / "sparse.so"
    done = subprocess.run([compiler, *flags, *SOURCES, "-o", library], capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        reason = next((line for line in lines if "error" in line), lines[-1])
        raise Unavailable(f"{compiler} failed ({reason[:200]})")
    if not keep:
        _SCRATCH.append(scratch)  # removed when the process ends
        return library
    target = folder / f"sparse-{level}-{key}-{_digest(library.read_bytes())}.so"
    with atomic(target) as file:  # which makes it durable; the compiler does not
        os.fchmod(file.fileno(), 0o700)
        file.write(library.read_bytes())
    log.info("compiled the sparse kernel for %s, once: %s", level, target)
    return target


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _is_private(path: Path) -> bool:
    """Return whether ``path``, no link, belongs to this user, and nobody else can write to it."""
    stat = path.lstat()
    return stat.st_uid == os.getuid() and not stat.st_mode & 0o022
