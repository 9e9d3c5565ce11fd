"""Speed-up benchmark of pruned models against their dense one, engine by engine: bash scripts/speedup/run.sh"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lib.calibration.texts import check_text
from lib.cli.command import command, make_parser
from lib.cli.flags import Flags, flag
from lib.core import cpu, files
from lib.core.errors import UserError, flag_name
from lib.models.locate import SMOLLM2
from lib.run.record import provenance
from scripts.speedup.checkpoints import LEAST_SPARSE, ROOT, Checkpoint, check_free, locate_folder, open_checkpoint
from scripts.speedup.engines import ENGINES, FILES, ONE_SEQUENCE, SPARSE
from scripts.speedup.export_onnx import TEXT_HELP, export
from scripts.table import formatted

# Largest difference of logits over the largest logit. Float32 engines sum in another order; DeepSparse approximates
# exponentials as well; bfloat16 keeps 8 bits of every activation through all blocks. Int8, with 8 bits for a whole
# matrix's weights and a whole tensor's activations, is shown and not judged.
TOLERANCE = {
    "packed": 0.25,
    "torch_bfloat16": 0.25,
    "torch_float32": 5e-5,
    "onnxruntime": 5e-5,
    "onnxruntime_int8": float("inf"),
    "deepsparse": 5e-4,
}
DECODE_ROUNDS = 3  # times --rounds: a token takes a tenth of a window's time, and is disturbed the more easily
HEADINGS = (
    "engine", "sparsity", "median ms", "least ms", "tokens/s", "over own dense", "range", "over torch bfloat16",
    "logits off",
)  # fmt: skip


@dataclass(kw_only=True)
class SpeedUp(Flags):
    _title: ClassVar[str] = "benchmark"

    model: Sequence[str] = flag(
        (), f"folder of a pruned model; a dense one with {{sparsity}} (default: {SMOLLM2} {{sparsity}} 0.5 0.7)",
        positional=True, nargs="*", metavar="MODEL",
    )  # fmt: skip
    dense: str | None = flag(None, "the model that MODEL was pruned from", metavar="MODEL")
    sparsity: Sequence[float] = flag(
        (), "prune the dense MODEL by magnitude to these first", nargs="+", least=LEAST_SPARSE, below=1, metavar="S"
    )
    work: str = flag("out/speedup", "where models that are made here go", metavar="DIR")
    sequence_length: Sequence[int] = flag((128, 512), "window lengths, tokens", nargs="+", least=2, metavar="N")
    graphs: Sequence[str] = flag(tuple(FILES), "a whole window, and one token after it", nargs="+", choices=FILES)
    text: str = flag("wiki_leads", TEXT_HELP, metavar="TEXT")
    engines: Sequence[str] = flag(
        tuple(name for name in ENGINES if name != "deepsparse"), "what to measure with", nargs="+",
        choices=tuple(name for name in ENGINES if name != "deepsparse"),
    )  # fmt: skip
    deepsparse: bool = flag(False, "measure DeepSparse, too, with the interpreter that DEEPSPARSE_PYTHON names")
    batch: Sequence[int] = flag((1, 2, 4, 8), "sequences that decode at once", nargs="+", least=1, metavar="N")
    cores: int = flag(1, "threads of every engine", least=1, metavar="N")
    rounds: int = flag(5, "measured turns of each model, three times as many tokens", least=1, metavar="N")
    save: str = flag("results/speedup", "where the JSON goes", metavar="DIR")

    def check(self) -> None:
        if not self.model:
            self.model, self.sparsity = (SMOLLM2,), self.sparsity or (0.5, 0.7)
        if self.sparsity and (len(self.model) > 1 or self.dense):
            raise UserError("sparsity", None, "prunes one dense MODEL", "leave it out for pruned models")
        if not self.sparsity and not self.dense:
            fix = f"give the model that MODEL was pruned from, or {flag_name('sparsity')} 0.5 0.7"
            raise UserError("dense", None, "is missing", fix)
        cores = cpu.physical_cores()
        if self.cores > cores:
            raise UserError("cores", self.cores, f"this machine has {cores} physical cores", "give fewer")
        if self.deepsparse and not shutil.which(os.environ.get("DEEPSPARSE_PYTHON", "")):
            fix = "set DEEPSPARSE_PYTHON=DIR/bin/python of its environment (docs/speedup.md says how to make it)"
            raise UserError("deepsparse", None, "has no interpreter", fix)
        check_text("text", self.text)
        files.check_writable("save", Path(self.save))
        for model in filter(None, (*self.model, self.dense)):
            locate_folder(model)


PARSER = make_parser(SpeedUp, "run.sh", __doc__)


def find_models(settings: SpeedUp) -> list[Checkpoint]:
    """Return the dense model and the pruned ones, pruned by main.py first if ``settings`` ask for it."""
    dense = open_checkpoint(settings.dense or settings.model[0])
    names = settings.model
    if settings.sparsity:
        work = Path(settings.work) / dense.source.name
        names = [str(prune_to(dense, ratio, work)) for ratio in sorted(set(settings.sparsity))]
    pruned = sorted((open_checkpoint(name) for name in names), key=lambda checkpoint: checkpoint.sparsity)
    for checkpoint in pruned:
        checkpoint.check_sparse()
        if checkpoint.block_weights != dense.block_weights:
            fix = "give the model that it was pruned from"
            raise UserError(None, checkpoint.source.given, f"has other shapes than {dense.source.given}", fix)
        if checkpoint.sparsity <= dense.sparsity:
            problem = f"is no denser ({dense.sparsity:.4f} zeros) than {checkpoint.source.given}"
            raise UserError("dense", dense.source.given, problem, "give the model that it was pruned from")
    return [dense, *pruned]


def prune_to(dense: Checkpoint, ratio: float, work: Path) -> Path:
    """Return the folder in ``work`` of a model pruned to ``ratio``; main.py makes it unless it is there."""
    folder = work / f"magnitude_{ratio}"
    if folder.is_dir():
        print(f"pruned before: {folder}", flush=True)
        return folder
    flags = f"--prune_method magnitude --sparsity_ratio {ratio} --eval_wikitext false".split()
    where = ["--save_model", str(work.resolve()), "--save", str(work.resolve() / "figures")]
    command = [sys.executable, "main.py", "--model", str(dense.folder.resolve()), *flags, *where]
    if subprocess.run(command, cwd=ROOT).returncode:
        raise UserError("sparsity", ratio, f"{dense.source.given} could not be pruned to it", "see above")
    return folder


def exported(checkpoint: Checkpoint, length: int, onnx: bool, settings: SpeedUp) -> Path:
    """Return the folder of the graphs for windows of ``length`` tokens; exported unless these weights' are there.

    Args:
        onnx: whether an engine runs the graph; else its input and the model's own logits are enough.
    """
    folder = checkpoint.folder / f"deployment_{length}"
    path = folder / "export.json"
    record = json.loads(path.read_text()) if path.is_file() else {}
    graphs = record["graphs"] if record.get("fingerprint") == checkpoint.fingerprint() else {}
    if all(graph in graphs and (not onnx or graphs[graph] is not None) for graph in settings.graphs):
        print(f"exported before: {folder}", flush=True)
    else:
        check_free(None, folder, "export.json")
        export(checkpoint, length, folder, settings.graphs, settings.text, onnx)
    return folder


def cells_of(engine: str, settings: SpeedUp) -> list[dict]:
    """Return the cells measured for an engine: graphs and batches, with the number of turns."""
    batches, rounds = ([1] if engine in ONE_SEQUENCE else settings.batch), settings.rounds
    cells = [{"graph": "prefill", "batch": 1, "rounds": rounds}]
    cells += [{"graph": "decode", "batch": batch, "rounds": rounds * DECODE_ROUNDS} for batch in batches]
    return [cell for cell in cells if cell["graph"] in settings.graphs]


def run_engine(engine: str, models: list[dict], settings: SpeedUp) -> list[dict]:
    """Return the cells measured by ``engines.py`` in a separate process, or {..., "error": its last line} for each."""
    python = os.environ["DEEPSPARSE_PYTHON"] if engine == "deepsparse" else sys.executable
    cells = cells_of(engine, settings)
    spec = {"engine": engine, "models": models, "cells": cells, "cores": settings.cores, "warmup": 1}
    threads = {name: str(settings.cores) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    variables = os.environ | threads | {"NM_DISABLE_ANALYTICS": "True", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as tmp:
        asked, answered = Path(tmp, "spec.json"), Path(tmp, "result.json")
        asked.write_text(json.dumps(spec))
        program = str(Path(__file__).with_name("engines.py"))
        done = subprocess.run([python, program, asked, answered], env=variables, capture_output=True, text=True)
        if answered.is_file():
            return json.loads(answered.read_text())
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    killed = f"killed by signal {-done.returncode} (out of memory?): " if done.returncode < 0 else ""
    error = {"engine": engine, "error": f"{killed}{last}"[:500]}
    return [error | {"graph": cell["graph"], "batch": cell["batch"]} for cell in cells]


def summarise(result: dict, sparsities: Sequence[float], tokens: int) -> list[dict]:
    """Return a row per model: the first is the dense one, with which the others are compared round by round."""
    dense, rows = result["models"][0]["seconds"], []
    for model, sparsity in zip(result["models"], sparsities, strict=False):  # some engines: the dense one alone
        seconds = model["seconds"]
        ratios = sorted(d / s for d, s in zip(dense, seconds, strict=True))
        named = {name: result[name] for name in ("graph", "batch", "engine", "version")}
        rows.append(named | {
            "sparsity": sparsity,
            "median_seconds": statistics.median(seconds),
            "least_seconds": min(seconds),
            "tokens_per_second": tokens / statistics.median(seconds),
            "speedup": statistics.median(ratios),
            "speedup_range": [ratios[0], ratios[-1]],
            "logits": model["agreement"],
        })  # fmt: skip
    return rows


def check_agreement(rows: Sequence[dict]) -> None:
    """Refuse figures of an engine that computes something other than the model."""
    for row in rows:
        off, most = row["logits"]["relative"], TOLERANCE[row["engine"]]
        if not off <= most:
            cell = f"{row['graph']}, sparsity {row['sparsity']:.2f}"
            problem = f"its logits ({cell}) disagree with PyTorch's by {off:.1e} of the largest (at most {most:g})"
            raise UserError(None, row["engine"], problem, "its time says nothing, so leave it out with --engines")


def measure(checkpoints: Sequence[Checkpoint], length: int, settings: SpeedUp) -> dict:
    """Export what is missing, measure the dense model, which comes first, and its pruned ones in every engine."""
    engines, models = [*settings.engines, *["deepsparse"] * settings.deepsparse], []
    for index, checkpoint in enumerate(checkpoints):
        onnx = any(name in ONE_SEQUENCE and (name in SPARSE or index == 0) for name in engines)
        folder = exported(checkpoint, length, onnx, settings)
        models.append({"folder": str(checkpoint.folder), "deployment": str(folder)})
    sparsities, rows, failed = [checkpoint.sparsity for checkpoint in checkpoints], [], []
    for engine in engines:
        print(f"{engine} ...", file=sys.stderr, flush=True)
        for result in run_engine(engine, models if engine in SPARSE else models[:1], settings):
            if "error" in result:
                failed.append(result)
                continue
            rows += summarise(result, sparsities, length if result["graph"] == "prefill" else result["batch"])
    check_agreement(rows)
    if not rows:
        raise UserError(None, "no engine could run", failed[0]["error"])
    record = {"complete": True, "processor": cpu.model_name(), "loadavg": os.getloadavg(), "sparsities": sparsities}
    record |= {"sequence_length": length, "rows": rows, "failed": failed, "flags": settings.flags()}
    return record | {"models": [model["folder"] for model in models]} | provenance()


def table(record: dict, graph: str, batch: int) -> str:
    """Return the title and the Markdown table of one graph and batch."""
    length = record["sequence_length"]
    rows = [row for row in record["rows"] if (row["graph"], row["batch"]) == (graph, batch)]
    title = f"a prompt of {length} tokens" if graph == "prefill" else f"one token after {length - 1}, batch {batch}"
    bfloat16 = next((row["median_seconds"] for row in rows if row["engine"] == "torch_bfloat16"), None)
    lines = []
    for row in rows:
        low, high = row["speedup_range"]
        lines.append([
            row["engine"], f"{row['sparsity']:.2f}", f"{row['median_seconds'] * 1e3:.1f}",
            f"{row['least_seconds'] * 1e3:.1f}", f"{row['tokens_per_second']:.0f}", f"{row['speedup']:.2f}",
            f"{low:.2f}-{high:.2f}", f"{bfloat16 / row['median_seconds']:.2f}" if bfloat16 else "-",
            f"{row['logits']['relative']:.0e}",
        ])  # fmt: skip
    return f"{title}\n\n{formatted([HEADINGS, *lines], 'markdown')}\n"


def run(settings: SpeedUp) -> None:
    """Measure at every window length, print the tables and write ``speedup_<tokens>.json``."""
    checkpoints = find_models(settings)
    for length in settings.sequence_length:
        record = measure(checkpoints, length, settings)
        print(f"\n{settings.cores} cores of {record['processor']}, load {record['loadavg'][0]:.1f}\n")
        for graph, batch in dict.fromkeys((row["graph"], row["batch"]) for row in record["rows"]):
            print(table(record, graph, batch))
        for cell in record["failed"]:
            print(f"{cell['engine']} could not run the {cell['graph']} graph: {cell['error']}")
        path = Path(settings.save) / f"speedup_{length}.json"
        files.write_atomically(path, json.dumps(record, indent=1) + "\n")
        print(f"written: {path}")


def main(argv: Sequence[str] | None = None) -> int:
    return command(SpeedUp, run, argv, PARSER, out_of_memory="use a smaller model")


if __name__ == "__main__":
    sys.exit(main())
