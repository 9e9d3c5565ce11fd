"""Benchmark of a dense model and models pruned from it: latencies and speed-ups, engine by engine."""

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import environment
from checkpoints import (
    GRAPHS,
    Checkpoint,
    Parser,
    check_graph,
    check_length,
    check_sparse,
    command,
    export_hint,
    fingerprint,
    graph_file,
    open_checkpoint,
    physical_cores,
)
from engines import ENGINES, ONE_SEQUENCE, SPARSE, energy_meter
from rich.console import Console
from rich.table import Table

from lib import sparse
from lib.core import files
from lib.core.errors import UserError
from lib.run.record import provenance

log = logging.getLogger("main")  # whose level main.quiet() sets

# Largest difference of logits over the largest logit. Float32 engines sum in another order; DeepSparse approximates
# exponentials as well; bfloat16 keeps 8 bits of every activation through all blocks.
# 8 bits for a whole matrix's weights and a whole tensor's activations are what they are: shown, not judged.
TOLERANCE = {name: 5e-5 for name in ENGINES} | {"deepsparse": 5e-4, "torch_bfloat16": 0.25, "packed": 0.25}
TOLERANCE |= {"torch_int8": float("inf"), "onnxruntime_int8": float("inf")}
DEFAULT_ENGINES = [name for name in ENGINES if name not in ("deepsparse", "torch_csr")]
DECODE_ROUNDS = 3  # times --rounds: a token takes a tenth of a window's time, and is disturbed the more easily
ISA = ("amx_bf16", "avx512_bf16", "avx512_vnni", "avx512f", "avx_vnni", "avx2")


def processor() -> dict:
    """Return the CPU's model, its widest relevant instruction sets, and its cores."""
    fields = sparse.processor()
    flags = set(fields.get("flags", "").split())
    return {
        "model": fields.get("model name", "unknown"),
        "instructions": [name for name in ISA if name in flags],
        "physical_cores": physical_cores(),
        "logical_cores": os.cpu_count(),
    }


def check_load(cores: int, when: str) -> None:
    load = os.getloadavg()[0]
    if load > cores:
        log.warning("the machine is busy %s: load average %.1f on %d cores: unreliable timings", when, load, cores)


def bandwidth_bound(sparsity: float) -> float:
    """Return bits of a dense bfloat16 weight over bits of a packed one: the maximum gain for a matrix read once."""
    return 16 / (16 * (1 - sparsity) + 1)


def cells_of(engine: str, args: argparse.Namespace) -> list[dict]:
    """Return the cells measured for an engine: graphs and batches, with the number of turns."""
    batches = [1] if engine in ONE_SEQUENCE else args.batch
    found = [("prefill", 1, args.rounds)] + [("decode", batch, args.rounds * DECODE_ROUNDS) for batch in batches]
    return [{"graph": g, "batch": batch, "rounds": n} for g, batch, n in found if g in args.graphs]


def run_engine(engine: str, models: list[dict], cells: list[dict], args: argparse.Namespace) -> list[dict]:
    """Return the cells measured by ``engines.py`` in a separate process, or {..., "error": its last line} for each."""
    python = environment.deepsparse_python() if engine == "deepsparse" else sys.executable
    spec = {"engine": engine, "models": models, "cells": cells, "cores": args.cores, "warmup": args.warmup}
    threads = {name: str(args.cores) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    variables = os.environ | threads | {"NM_DISABLE_ANALYTICS": "True", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as tmp:
        given, found = Path(tmp, "spec.json"), Path(tmp, "result.json")
        given.write_text(json.dumps(spec))
        program = str(Path(__file__).with_name("engines.py"))
        done = subprocess.run([python, program, given, found], env=variables, capture_output=True, text=True)
        if found.is_file():
            return json.loads(found.read_text())
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    killed = f"killed by signal {-done.returncode} (out of memory?): " if done.returncode < 0 else ""
    error = {"engine": engine, "error": f"{killed}{last}"[:500]}
    return [error | {"graph": cell["graph"], "batch": cell["batch"]} for cell in cells]


def summarise(result: dict, sparsities: list[float], tokens: int) -> list[dict]:
    """Return a row per model: the first is the dense one, with which the others are compared round by round."""
    dense = result["models"][0]["seconds"]
    rows = []
    for model, sparsity in zip(result["models"], sparsities, strict=False):  # some engines: the dense one alone
        seconds = model["seconds"]
        ratios = sorted(d / s for d, s in zip(dense, seconds, strict=True))
        rows.append(
            {
                "graph": result["graph"],
                "batch": result["batch"],
                "engine": result["engine"],
                "sparsity": sparsity,
                "median_seconds": statistics.median(seconds),
                "least_seconds": min(seconds),
                "tokens_per_second": tokens / statistics.median(seconds),
                "speedup": statistics.median(ratios),
                "speedup_range": [ratios[0], ratios[-1]],
                "joules": model["joules"] and statistics.median(model["joules"]),
                "supported_operators": model["supported"],
                "logits": model["agreement"],
            }
        )
    return rows


def check_agreement(rows: list[dict]) -> None:
    """Refuse figures of an engine that computes something other than the model."""
    for row in rows:
        engine, off, most = row["engine"], row["logits"]["relative"], TOLERANCE[row["engine"]]
        if not off <= most:
            what = f"{engine}: its logits ({row['graph']}, sparsity {row['sparsity']:.2f}) disagree with PyTorch's"
            raise UserError(
                None,
                f"{what} by {off:.1e} of the largest (at most {most:g}), so its time says nothing; "
                "leave it out with --engines",
            )


def needs_onnx(engines: list[str], index: int) -> bool:
    """Return whether any of the ``engines`` runs the graph of the model at ``index``; the dense model comes first."""
    return any(name in ONE_SEQUENCE and (name in SPARSE or index == 0) for name in engines)


def check_exports(checkpoints: list[Checkpoint], args: argparse.Namespace) -> None:
    """Refuse a model without graphs of this length, or whose graphs were exported from other weights."""
    length = args.sequence_length
    for index, checkpoint in enumerate(checkpoints):
        for graph in args.graphs:
            path = graph_file(checkpoint.deployment, graph)
            if needs_onnx(args.engines, index):
                check_graph(path, graph, length)
            record = checkpoint.deployment / "export.json"
            if not path.with_suffix(".npz").is_file() or not record.is_file():
                raise UserError(None, f"{path}: was not written by export_onnx.py; {export_hint(path, length)}")
            about = json.loads(record.read_text())
            check_length(about["sequence_length"], path, length)
            if about["fingerprint"] != fingerprint(checkpoint.folder):
                raise UserError(None, f"{path}: is of other weights than the model's; {export_hint(path, length)}")


def benchmark(checkpoints: list[Checkpoint], args: argparse.Namespace) -> dict:
    """Measure the dense model ``checkpoints[0]`` and its pruned ones in every engine and write JSON and PNG."""
    check_exports(checkpoints, args)
    sparsities = [checkpoint.sparsity for checkpoint in checkpoints]
    models = [
        {"folder": str(c.folder), "deployment": str(c.deployment), "sparse": index > 0}
        for index, c in enumerate(checkpoints)
    ]
    check_load(os.cpu_count(), "before the measurement")
    record = {"complete": True, "processor": processor(), "loadavg_before": os.getloadavg(), "rows": [], "failed": []}
    record |= {"models": [str(c.folder) for c in checkpoints], "sparsities": sparsities}
    record |= {"flags": vars(args), "versions_of_engines": {}}
    record["energy"] = energy_meter() is not None
    for engine in args.engines:
        measured, cells = models if engine in SPARSE else models[:1], cells_of(engine, args)
        log.info("%s: %d models, %d cells, %d cores", engine, len(measured), len(cells), args.cores)
        for result in run_engine(engine, measured, cells, args):
            if "error" in result:
                log.warning("%s cannot run the %s graph: %s", engine, result["graph"], result["error"])
                record["failed"].append(result)
                continue
            record["versions_of_engines"] |= result["versions"]
            graph = result["graph"]
            rows = summarise(result, sparsities, args.sequence_length if graph == "prefill" else result["batch"])
            check_agreement(rows)
            record["rows"] += rows
    check_load(os.cpu_count(), "after the measurement")
    record["loadavg_after"] = os.getloadavg()
    record["ideal"] = [checkpoints[0].ideal_speedup(sparsity) for sparsity in sparsities]
    record["bandwidth_bound"] = [bandwidth_bound(sparsity) for sparsity in sparsities]
    if not record["rows"]:
        raise UserError(None, f"no engine could run: {record['failed'][0]['error']}")
    return record


def table(record: dict, graph: str, batch: int = 1) -> Table:
    about = record["processor"]
    flags = record["flags"]
    what = f"a prompt of {flags['sequence_length']} tokens" if graph == "prefill" else (
        f"one token after {flags['sequence_length'] - 1}, batch {batch}"
    )  # fmt: skip
    title = (
        f"{what}, {flags['cores']} of {about['physical_cores']} cores of {about['model']} "
        f"({', '.join(about['instructions'][:2])}), load {record['loadavg_before'][0]:.1f}"
    )
    out = Table(title=title, title_justify="left")
    headings = "engine,sparsity,median ms,least ms,tokens/s,over own dense,range,over torch bfloat16,joules,logits off"
    for heading in headings.split(","):
        out.add_column(heading, justify="left" if heading == "engine" else "right")
    rows = rows_of(record, graph, batch)
    bfloat16 = next((row["median_seconds"] for row in rows if row["engine"] == "torch_bfloat16"), None)
    for before, row in zip([None, *rows], rows, strict=False):
        low, high = row["speedup_range"]
        if before is not None and before["engine"] != row["engine"]:
            out.add_section()
        out.add_row(
            row["engine"],
            f"{row['sparsity']:.2f}",
            f"{row['median_seconds'] * 1e3:.1f}",
            f"{row['least_seconds'] * 1e3:.1f}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['speedup']:.2f}",
            f"{low:.2f}-{high:.2f}",
            "-" if bfloat16 is None else f"{bfloat16 / row['median_seconds']:.2f}",
            "-" if row["joules"] is None else f"{row['joules']:.2f}",
            f"{row['logits']['relative']:.0e}",
        )
    return out


def rows_of(record: dict, graph: str, batch: int) -> list[dict]:
    return [row for row in record["rows"] if (row["graph"], row["batch"]) == (graph, batch)]


def where_it_pays(record: dict, graph: str, batch: int) -> str | None:
    """Return one line per table: by how much packed models beat the fastest dense engine, if they do."""
    rows = rows_of(record, graph, batch)
    dense = [row for row in rows if row["sparsity"] == record["sparsities"][0]]
    packed = [row for row in rows if row["engine"] == "packed" and row["sparsity"] > record["sparsities"][0]]
    if not dense or not packed:
        return None
    best = min(dense, key=lambda row: row["median_seconds"])
    gains = {row["sparsity"]: best["median_seconds"] / row["median_seconds"] for row in packed}
    pays = [sparsity for sparsity, gain in gains.items() if gain > 1]
    verdict = f"pays from {min(pays):.0%} on" if pays else "does not pay"
    told = ", ".join(f"{gain:.2f} at {sparsity:.0%}" for sparsity, gain in gains.items())
    return f"here sparsity {verdict}: {told} times the speed of the fastest dense engine, {best['engine']}"


def plot(record: dict, path: Path) -> None:
    """Draw speed-up over sparsity, one line per engine that gains from zeros at batch 1, and its bound.

    The bound for a window is the ratio of multiplications with a dense head, for a token that of bits per weight.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    graphs = record["flags"]["graphs"]
    figure, axes = pyplot.subplots(1, len(graphs), figsize=(5.5 * len(graphs), 4.2), squeeze=False)
    for axis, graph in zip(axes[0], graphs, strict=True):
        rows = rows_of(record, graph, 1)
        for engine in [name for name in dict.fromkeys(row["engine"] for row in rows) if name in SPARSE]:
            line = [row for row in rows if row["engine"] == engine]
            x, y = [row["sparsity"] for row in line], [row["speedup"] for row in line]
            low, high = zip(*(row["speedup_range"] for row in line), strict=True)
            below, above = [a - b for a, b in zip(y, low, strict=True)], [b - a for a, b in zip(y, high, strict=True)]
            axis.errorbar(x, y, yerr=[below, above], marker="o", capsize=3, label=engine)
        x = record["sparsities"]
        dense = next((row["median_seconds"] for row in rows if row["engine"] == "torch_bfloat16"), None)
        line = [row for row in rows if row["engine"] == "packed"]
        if dense and line:
            y = [dense / row["median_seconds"] for row in line]
            axis.plot([row["sparsity"] for row in line], y, marker="s", label="packed, over torch bfloat16")
        bound, says = ("ideal", "multiplications") if graph == "prefill" else ("bandwidth_bound", "bandwidth")
        axis.plot(x, record[bound], "k--", label=f"bound: {says}")
        tokens = record["flags"]["sequence_length"]
        title = f"a prompt of {tokens} tokens" if graph == "prefill" else f"one token after {tokens - 1}"
        axis.set(title=title, xlabel="sparsity of the blocks")
        axis.set_ylabel("speed-up over the same engine's dense model")
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    files.save_figure(figure, path, dpi=120)
    pyplot.close(figure)


def leave(record: dict, args: argparse.Namespace) -> None:
    """Print the tables and write ``speedup_<tokens>.json`` and ``.png`` to --save."""
    console = Console(width=None if sys.stdout.isatty() else 130)
    for graph in args.graphs:
        for batch in sorted({row["batch"] for row in record["rows"] if row["graph"] == graph}):
            console.print(table(record, graph, batch))
            console.print(where_it_pays(record, graph, batch) or "", highlight=False)
    if not record["energy"]:
        console.print("energy: not available (/sys/class/powercap cannot be read here)", highlight=False)
    says = {"ideal": "of a window, the head staying dense", "bandwidth_bound": "of a token, by bits read"}
    for name in says:
        bounds = ", ".join(f"{bound:.2f}" for bound in record[name][1:])
        console.print(f"ideal speed-up {says[name]}: {bounds}", highlight=False)
    for failed in record["failed"]:
        what = f"{failed['engine']} could not run the {failed['graph']} graph"
        console.print(f"{what}: {failed['error']}", highlight=False)
    path = Path(args.save) / f"speedup_{args.sequence_length}.json"
    files.write_atomically(path, json.dumps(record | provenance(), indent=1, default=str) + "\n")
    plot(record, path.with_suffix(".png"))
    console.print(f"written: {path} and .png", highlight=False)


def add_measuring_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    engines = [name for name in ENGINES if name != "deepsparse"]
    add("--engines", nargs="+", default=DEFAULT_ENGINES, choices=engines, help="what to measure with")
    add("--deepsparse", action="store_true", help="measure DeepSparse too, the paper's engine, in its own environment")
    add("--batch", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N", help="sequences that decode at once")
    add("--cores", type=int, default=1, metavar="N", help="threads of every engine")
    add("--rounds", type=int, default=5, metavar="N", help="measured turns of each model, three times as many tokens")
    add("--warmup", type=int, default=1, metavar="N", help="rounds before that, which do not count")
    add("--save", default="results/speedup", metavar="DIR", help="where JSON and PNG go")


def check_measuring_flags(args: argparse.Namespace) -> None:
    for flag, least in (("cores", 1), ("rounds", 1), ("warmup", 0)):
        if getattr(args, flag) < least:
            raise UserError(flag, f"{getattr(args, flag)}: must be at least {least}")
    if min(args.batch) < 1 or 1 not in args.batch:
        raise UserError("batch", f"{' '.join(map(str, args.batch))}: must be positive, 1 among them")
    if args.deepsparse and "deepsparse" not in args.engines:
        args.engines = [*args.engines, "deepsparse"]
    if args.cores > physical_cores():
        raise UserError("cores", f"{args.cores}: this machine has {physical_cores()} physical cores")
    files.check_writable("save", Path(args.save))


def check_pair(dense: Checkpoint, sparse: list[Checkpoint]) -> None:
    """Refuse pruned models that were not pruned, or whose shapes differ from the dense one's."""
    for checkpoint in sparse:
        check_sparse(checkpoint, "prune it first: python main.py --prune_method ... --save_model DIR")
        if (checkpoint.block_weights, checkpoint.head_weights) != (dense.block_weights, dense.head_weights):
            raise UserError(
                None, f"{checkpoint.source.given}: has other shapes than the dense model, {dense.source.given}"
            )
        if checkpoint.sparsity <= dense.sparsity:
            raise UserError(
                None,
                f"{dense.source.given}: is no denser ({dense.sparsity:.4f} zeros) than {checkpoint.source.given} "
                f"({checkpoint.sparsity:.4f}); the dense model comes first",
            )


def run(args: argparse.Namespace) -> None:
    check_measuring_flags(args)
    dense, *sparse = [open_checkpoint(model) for model in (args.dense, *args.sparse)]
    check_pair(dense, sparse)
    if "deepsparse" in args.engines:
        environment.deepsparse_python()
    leave(benchmark([dense, *sparse], args), args)


def make_parser() -> Parser:
    parser = Parser(prog="benchmark.py", description=__doc__)
    add = parser.add_argument
    add("dense", metavar="DENSE", help="folder of the dense model, exported")
    add("sparse", metavar="SPARSE", nargs="+", help="folders of models pruned from it, exported")
    add("--sequence_length", type=int, default=2048, metavar="N", help="the window length that was exported, tokens")
    add("--graphs", nargs="+", default=GRAPHS, choices=GRAPHS, help="whole window, one token")
    add_measuring_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    return command(make_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
