"""Run records: stages, figures and their provenance, and the formats of the files that a run writes."""

from __future__ import annotations

import json
import logging
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from lib import __version__
from lib.core import cpu, processes
from lib.core.digests import digest, file_state
from lib.core.files import write_atomically
from lib.core.lazy import torch
from lib.pruning.walk import LayerReport
from lib.run.card import write_card
from lib.run.journal import PROGRESS

log = logging.getLogger(__name__)

# Flags that may name a file or folder, which may change between two runs with equal flags.
INPUTS = ("model", "resume", "calib_data", "eval_data", "prompts", "prompt_data", "plan", "include_path")
_OF_A_MODEL = (".safetensors", ".bin", ".json", ".model", ".txt")  # what is read from its folder
_PACKAGES = ("torch", "transformers", "peft", "timm", "accelerate", "datasets", "lm_eval", "numpy", "safetensors")


class Record:
    """The record of a run, rewritten whenever it grows.

    Attributes:
        content: of ``run_<run>.json``.
        stages: the entry of the content that says what each stage cost.
        rows: the per-layer table, ``layers_<run>.tsv``.
        saved: the folders of the models that were saved.
        files: other files to write, {name: text}.
    """

    def __init__(self, folder: Path, run: str) -> None:
        self.folder, self.run = folder, run
        self.stages: dict[str, dict] = {}
        self.rows: list[LayerReport] = []
        self.saved: list[Path] = []
        self.files: dict[str, str] = {}
        self.content: dict = {"complete": False, "stages": self.stages}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure the body of the with statement as the stage ``name``."""
        with suppress(OSError):  # resets the peak; without it (not Linux) the peak is that of the run so far
            Path("/proc/self/clear_refs").write_text("5")
        for device in cuda_in_use():
            torch.cuda.reset_peak_memory_stats(device)
        start, busy = time.perf_counter(), time.process_time()
        yield
        for device in cuda_in_use():
            torch.cuda.synchronize(device)
        self.stages[name] = {
            "seconds": round(time.perf_counter() - start, 3),
            "cpu_seconds": round(time.process_time() - busy, 3),
            "peak_rss_mb": _peak_rss_mb(),
        }
        peaks = {f"cuda:{d}": round(torch.cuda.max_memory_allocated(d) / 2**20) for d in cuda_in_use()}
        self.stages[name] |= {"peak_cuda_mb": peaks} if peaks else {}

    def add_model(self, folder: Path) -> None:
        """Add the folder of a saved model; the run's figures are those of the last one."""
        self.saved.append(folder)
        self.content["saved_model"] = str(folder)

    def write(self, complete: bool = False) -> None:
        """Write all files, the run file last, since it states whether the run is complete."""
        self.content["complete"] = complete
        layers = {f"layers_{self.run}.tsv": layers_text(self.rows)} if self.rows else {}
        for name, content in {**self.files, **layers, f"run_{self.run}.json": run_text(self.content)}.items():
            write_atomically(self.folder / name, content)
        if self.content.get("saved_model") and processes.is_main():
            # The dense model's figure, if a run has measured it here, with all experts, on the same windows.
            dense = read_run(self.folder, "dense_sparsity_0.0") or {}
            now, then = ((x.get("model", {}) | {"parameters": 0}, x.get("evaluation")) for x in (self.content, dense))
            card = {"dense": dense.get("perplexity") if now == then else None} | self.content | provenance()
            write_card(Path(self.content["saved_model"]), card, self.rows)
        for folder in self.saved if complete and processes.is_main() else ():
            (folder / PROGRESS).unlink(missing_ok=True)  # there is nothing left to resume

    def how_to_resume(self, resume: str) -> str:
        """Return what is on disk after a failure, and how to go on: ``resume`` with a saved model, or start again."""
        saved = self.content["saved_model"]
        advice = f"the pruned model is saved in {saved}; {resume}" if saved else "the same command starts again"
        return f"figures so far: {self.folder}/*_{self.run}.*; {advice}"


@contextmanager
def explain_failure(explanation: Callable[[], str]) -> Iterator[None]:
    """If the body of the with statement fails, report what is on disk and how to go on."""
    try:
        yield
    except BaseException:
        log.warning("%s", explanation())
        raise


def cuda_in_use() -> list[int]:
    """Return the CUDA devices on which this process holds memory: to ask any other costs it half a gigabyte."""
    if "torch" not in sys.modules or not torch.cuda.is_initialized():
        return []
    return [device for device in range(cpu.gpus()) if torch.cuda.memory_reserved(device)]


def _peak_rss_mb() -> int:
    with suppress(OSError):
        return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) // 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**20  # on macOS, where it cannot be reset


def layers_text(rows: Sequence[LayerReport]) -> str:
    """Return the content of ``layers_<run>.tsv``, a row per matrix."""
    counted = any(row.tokens is not None for row in rows)  # in a mixture
    lines = ["name\tshape\tmetric\tplanned_ratio\tsparsity\ttype" + "\ttokens" * counted]
    for row in rows:
        metric = "" if row.metric is None else f"{row.metric:.6f}"
        kind = "unstructured" if row.nm is None else "{}:{}".format(*row.nm)
        figures = ("x".join(map(str, row.shape)), metric, f"{row.ratio:.6f}", f"{row.sparsity:.6f}")
        tokens = ("" if row.tokens is None else str(row.tokens),) if counted else ()
        lines.append("\t".join((row.name, *figures, kind, *tokens)))
    return "\n".join(lines) + "\n"


def run_text(record: Mapping) -> str:
    """Return the content of ``run_<run>.json``: ``record`` followed by the provenance of the numbers."""
    return json.dumps(_json(record | provenance()), indent=1, default=str, allow_nan=False) + "\n"


def _json(value):
    """Return ``value`` with the words inf, -inf and nan for what JSON has no number for; null means "not measured"."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    if isinstance(value, Mapping):
        return {key: _json(item) for key, item in value.items()}
    return [_json(item) for item in value] if isinstance(value, (list, tuple)) else value


def read_run(folder: Path, run: str) -> dict | None:
    """Return the record of an earlier run of the same name, None if missing or unreadable."""
    with suppress(OSError, ValueError):
        return parsed((folder / f"run_{run}.json").read_text(encoding="utf-8"))
    return None


def parsed(content: str) -> dict:
    """Return the record in the content of a run file, its perplexity a number; a ValueError if it is not JSON."""
    record = json.loads(content)
    if isinstance(record.get("perplexity"), str):  # not finite, which JSON has no number for
        record["perplexity"] = float(record["perplexity"])
    return record


def has_flags(record: dict | None, flags: Mapping[str, object]) -> bool:
    """Return whether ``record`` belongs to a run with exactly these ``flags``."""
    return bool(record) and record.get("flags") == json.loads(json.dumps(flags))


def inputs_of(flags: Mapping[str, object]) -> dict[str, str]:
    """Return the states of the local files and folders that ``flags`` name, by flag; of a hub's there is none."""
    states = {}
    for name in filter(flags.get, INPUTS):
        path = Path(str(flags[name])).expanduser()
        paths = [path, *path.rglob("*")] if name == "include_path" else [path]
        if name == "model" and path.is_dir():
            paths = [file for file in path.iterdir() if file.suffix in _OF_A_MODEL]
        with suppress(OSError):  # whoever reads it reports it
            lines = [f"{file.relative_to(path)} {file_state(file)}" for file in sorted(paths) if file.is_file()]
            if lines:
                states[name] = digest(lines)
    return states


@cache
def _code() -> dict:
    """Return package versions and git commit, found out once: those of the code that this process has imported."""
    versions = {"alphapruning": __version__, "python": sys.version.split()[0]}
    versions |= {name: version(name) for name in _PACKAGES if find_spec(name)}
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = None  # of a copy without git
    with suppress(OSError, subprocess.CalledProcessError):
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return {"versions": versions, "git_commit": commit}


def provenance() -> dict:
    """Return package versions, git commit, devices and time for the run's record."""
    cuda = [torch.cuda.get_device_name(device) for device in cuda_in_use()]
    return {
        **_code(),
        "device": cuda or [f"cpu ({torch.get_num_threads()} threads)"],
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
