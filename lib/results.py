"""What a run leaves behind."""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch

from lib import UserError

PACKAGES = ("torch", "transformers", "peft", "timm", "accelerate", "datasets", "lm_eval", "numpy", "safetensors")


class LayerReport(NamedTuple):
    """One row of the per-layer table: planned ``ratio`` and measured ``sparsity`` are fractions of the matrix.

    ``nm`` is (N, M) where N of every M columns were kept.
    """

    name: str
    shape: tuple[int, ...]
    metric: float | None
    ratio: float
    sparsity: float
    nm: tuple[int, int] | None = None


class Stages:
    """Seconds and peak memory of each stage of a run, in ``table``: {stage: {"seconds", "peak_rss_mb", ...}}."""

    def __init__(self) -> None:
        self.table: dict[str, dict[str, float]] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure what happens inside the with statement as ``name``."""
        with suppress(OSError):  # resets the peak; without it (not Linux) the peak is that of the run so far
            Path("/proc/self/clear_refs").write_text("5")
        for device in range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0):
            torch.cuda.reset_peak_memory_stats(device)  # raises before CUDA is initialised
        start = time.perf_counter()
        yield
        for device in range(torch.cuda.device_count()):
            torch.cuda.synchronize(device)
        row = {"seconds": round(time.perf_counter() - start, 3), "peak_rss_mb": _peak_rss_mb()}
        if torch.cuda.is_available():
            peaks = [torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count())]
            row["peak_cuda_mb"] = [round(peak / 2**20) for peak in peaks]
        self.table[name] = row


def _peak_rss_mb() -> int:
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) // 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (2**20 if sys.platform == "darwin" else 1024)


def prepare(flag: str, folder: Path, need_bytes: int = 0) -> None:
    """Refuse a ``folder`` that cannot be written or whose disk has less than ``need_bytes`` free; leave no trace."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]  # innermost first
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UserError(
            f"{flag} {folder}: cannot be written ({error.strerror or error}); give another folder"
        ) from error
    finally:
        for path in made:
            with suppress(OSError):
                path.rmdir()
    if free < need_bytes:
        short = f"{need_bytes / 2**30:.1f} GiB are needed and {free / 2**30:.1f} GiB are free"
        raise UserError(f"{flag} {folder}: the disk is too full, {short}; give a folder on another disk")


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` to a temporary name beside ``path`` and rename it."""
    write_files(path.parent, {path.name: text})


def write_files(folder: Path, texts: Mapping[str, str]) -> None:
    """Write each of ``texts`` {file name: content} to ``folder``, all of them or none.

    Raises:
        UserError: the disk is full or the folder cannot be written; what is there already is left as it is.
    """
    written: dict[Path, Path] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            tmp = folder / f".{name}.{os.getpid()}"
            written[tmp] = folder / name
            tmp.write_text(text, encoding="utf-8")
        for tmp, path in written.items():
            tmp.rename(path)
    except OSError as error:
        for tmp in written:
            with suppress(OSError):
                tmp.unlink()
        raise UserError(f"{folder / name}: cannot be written ({error.strerror or error})") from error


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``target`` that takes its place when the with statement ends without an error.

    Raises:
        UserError: the disk is full or the place cannot be written.
    """
    tmp = old = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        tmp = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        yield tmp
        tmp.chmod(0o777 & ~_umask())  # mkdtemp's own is private
        if target.exists():
            old = target.with_name(f".{target.name}-old-{os.getpid()}")
            target.rename(old)
        try:
            tmp.rename(target)
        except OSError:
            if old is not None:
                old.rename(target)
            raise
    except Exception as error:  # safetensors has an error class of its own for a full disk
        if not isinstance(error, OSError) and "os error" not in str(error):
            raise
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(f"{target}: the model cannot be saved there ({reason})") from error
    finally:
        for leftover in (tmp, old):
            if leftover is not None:
                shutil.rmtree(leftover, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def save_figure(figure, path: Path, dpi: int) -> None:
    """Write a matplotlib ``figure`` as a PNG, under a temporary name at first.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    tmp = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(tmp, dpi=dpi, format="png")
        tmp.rename(path)
    except OSError as error:
        tmp.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error


def perplexity_text(method: str, sparsity: float, perplexity: float) -> str:
    """Return the content of ``perplexity_<run>.txt``, in the published format."""
    return f"method\tactual_sparsity\tppl_test\n{method}\t{sparsity:.4f}\t{perplexity:.4f}\n"


def layers_text(rows: Sequence[LayerReport]) -> str:
    """Return the content of ``layers_<run>.tsv``, a row per matrix."""
    lines = ["name\tshape\tmetric\tplanned_ratio\tsparsity\ttype"]
    for row in rows:
        metric = "" if row.metric is None else f"{row.metric:.6f}"
        shape = "x".join(map(str, row.shape))
        kind = "unstructured" if row.nm is None else "{}:{}".format(*row.nm)
        lines.append(f"{row.name}\t{shape}\t{metric}\t{row.ratio:.6f}\t{row.sparsity:.6f}\t{kind}")
    return "\n".join(lines) + "\n"


def zero_shot_table(scores: Sequence[tuple], means: Mapping[str, float]) -> str:
    """Return a table of ``scores`` (task, metric, value, standard error or None, samples), the ``means`` below it."""
    rows = [("task", "metric", "value", "stderr", "samples")]
    for task, metric, value, stderr, samples in scores:
        rows.append((task, metric, f"{value:.4f}", "" if stderr is None else f"{stderr:.4f}", str(samples)))
    rows += [("mean", metric, f"{value:.4f}", "", "") for metric, value in means.items()]
    width = [max(map(len, column)) for column in zip(*rows, strict=True)]
    just = (str.ljust, str.ljust, str.rjust, str.rjust, str.rjust)
    lines = ["  ".join(f(cell, w) for f, cell, w in zip(just, row, width, strict=True)).rstrip() for row in rows]
    return "\n".join(lines) + "\n"


def zero_shot_text(method: str, table: str) -> str:
    """Return the content of ``zero_shot_<run>.txt``: ``{method}:``, as published, and the table."""
    return f"{method}:\n{table}"


def run_text(record: dict) -> str:
    """Return the content of ``run_<run>.json``: ``record`` and, below it, where the numbers come from."""
    return json.dumps(record | provenance(), indent=1, default=str) + "\n"


def read_run(folder: Path, run: str) -> dict | None:
    """Return the record of an earlier run of the same name, None if there is none that can be read."""
    with suppress(OSError, ValueError):
        return json.loads((folder / f"run_{run}.json").read_text(encoding="utf-8"))
    return None


def is_complete(record: dict | None, flags: Mapping[str, object]) -> bool:
    """Return whether ``record`` is that of a run that ended well, with these very ``flags``."""
    return bool(record) and record.get("complete") is True and record.get("flags") == json.loads(json.dumps(flags))


def provenance() -> dict:
    """Return package versions, git commit, devices and the time, for the run's record."""
    versions = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": versions,
        "git_commit": _git_commit(),
        "device": cuda or [f"cpu ({torch.get_num_threads()} threads)"],
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _git_commit() -> str | None:
    here = Path(__file__).parent
    with suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return None
