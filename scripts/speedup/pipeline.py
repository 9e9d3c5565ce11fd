"""Pipeline of the speed-up benchmark (run.sh): prune a model if requested, export it if needed, measure it."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import benchmark
import environment
import torch
from checkpoints import (
    LEAST_SPARSE,
    ROOT,
    Checkpoint,
    Parser,
    check_free,
    command,
    fingerprint,
    locate_folder,
    open_checkpoint,
)
from export_onnx import add_export_flags, describe, export

from lib.calibration import texts
from lib.core.errors import UserError
from lib.models import load, locate
from lib.models.layers import prunable_modules

METHODS = ("magnitude", "magnitude_ww")  # of main.py, those that need no calibration text
DEFAULT_SPARSITIES = [0.5, 0.7]
DEFAULT = f"default: {locate.SMOLLM2} --sparsity {' '.join(map(str, DEFAULT_SPARSITIES))}"
EPSILON = "0.1"  # half of the default: at a sparsity of 0.9 no matrix of SmolLM2 loses every weight


def is_exported(checkpoint: Checkpoint, length: int, graphs: list[str], onnx: bool) -> bool:
    """Return whether the files to be measured for these weights at this length already exist."""
    path = checkpoint.deployment / "export.json"
    record = json.loads(path.read_text()) if path.is_file() else {}
    same = record.get("fingerprint") == fingerprint(checkpoint.folder) and record.get("sequence_length") == length
    found = record["graphs"] if same else {}
    return all(graph in found and (not onnx or found[graph] is not None) for graph in graphs)


def prune_to(model: str, sparsities: list[float], method: str, work: Path) -> list[Checkpoint]:
    """Prune ``model`` with main.py to each sparsity, into ``work``, unless already done."""
    pruned = []
    for sparsity in sparsities:
        folder = work / f"{method}_{sparsity}"
        if folder.is_dir():
            print(f"pruned before: {folder}", flush=True)
        else:
            flags = f"--prune_method {method} --sparsity_ratio {sparsity} --epsilon {EPSILON} --eval_wikitext false"
            where = ["--save_model", str(work), "--save", str(work / "figures")]
            done = subprocess.run([sys.executable, "main.py", "--model", model, *flags.split(), *where], cwd=ROOT)
            if done.returncode:
                raise UserError("sparsity", f"{sparsity}: {model} could not be pruned, see above")
        pruned.append(open_checkpoint(str(folder)))
    return pruned


def stand_in(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """Return a dense model of the same shape: the zeros of ``checkpoint`` filled with numbers of similar size.

    Its text is nonsense. Its latency equals that of the dense model, since only zeros affect it.
    """
    if not folder.is_dir():
        model = load.load_llm(checkpoint.source, torch.float32, torch.device("cpu"))
        draw = torch.Generator().manual_seed(0)
        for linear in prunable_modules(model).values():
            weight = linear.weight.data
            zero = weight == 0
            spread = weight[~zero].std() if (~zero).sum() > 1 else torch.tensor(0.02)
            weight[zero] = torch.randn(int(zero.sum()), generator=draw) * spread
        load.save_llm(model, load.load_tokenizer(checkpoint.source), folder)
    return open_checkpoint(str(folder))


def _check_args(args: argparse.Namespace) -> None:
    """Check everything that needs no model, before anything is created."""
    if not args.models:
        args.models, args.sparsity = [locate.SMOLLM2], args.sparsity or DEFAULT_SPARSITIES
    benchmark.check_measuring_flags(args)
    texts.check_text("--text", args.text)
    for sparsity in args.sparsity or ():
        if not LEAST_SPARSE <= sparsity < 1:
            raise UserError("sparsity", f"{sparsity}: must be at least {LEAST_SPARSE} and below 1")
    if args.sparsity and (len(args.models) > 1 or args.dense):
        raise UserError("sparsity", "prunes one dense MODEL; leave it out for models that are pruned already")
    for model in (*args.models, *([args.dense] if args.dense else [])):
        locate_folder(model)
    if "deepsparse" in args.engines:
        environment.check_deepsparse()


def find_models(args: argparse.Namespace) -> list[Checkpoint]:
    """Return the dense model and the pruned ones requested by ``args``, created if needed."""
    given = [open_checkpoint(model) for model in args.models]
    work = Path(args.work) / given[0].source.name
    if args.sparsity:
        dense, sparse = given[0], prune_to(args.models[0], sorted(set(args.sparsity)), args.method, work)
    else:
        for checkpoint in given:
            benchmark.check_sparse(checkpoint, "add --sparsity 0.5 0.7 0.8 0.9 to have it pruned here")
        if args.dense:
            dense = open_checkpoint(args.dense)
        else:
            print(f"no --dense: {given[0].folder} with its zeros filled stands in for the dense model", flush=True)
            dense = stand_in(given[0], work / f"dense-{fingerprint(given[0].folder)}")
        sparse = sorted(given, key=lambda checkpoint: checkpoint.sparsity)
    benchmark.check_pair(dense, sparse)
    return [dense, *sparse]


def run(args: argparse.Namespace) -> None:
    _check_args(args)
    models_found = find_models(args)
    if "deepsparse" in args.engines:
        environment.deepsparse_python()
    for length in args.sequence_length:
        chosen = [checkpoint._replace(graphs=f"deployment_{length}") for checkpoint in models_found]
        for index, checkpoint in enumerate(chosen):
            _export(checkpoint, length, benchmark.needs_onnx(args.engines, index), args)
        one = argparse.Namespace(**vars(args) | {"sequence_length": length})
        benchmark.leave(benchmark.benchmark(chosen, one), one)


def _export(checkpoint: Checkpoint, length: int, onnx: bool, args: argparse.Namespace) -> None:
    if is_exported(checkpoint, length, args.graphs, onnx):
        print(f"exported before: {checkpoint.deployment}", flush=True)
        return
    check_free("the export", checkpoint.deployment, "export.json")
    record = export(checkpoint, length, checkpoint.deployment, args.graphs, args.text, onnx)
    print(describe(record, checkpoint.deployment), flush=True)


def make_parser() -> Parser:
    parser = Parser(prog="run.sh", description="Export pruned models and measure them against their dense one.")
    add = parser.add_argument
    add("models", metavar="MODEL", nargs="*", help=f"folder of a pruned model; a dense one with --sparsity ({DEFAULT})")
    add("--dense", metavar="MODEL", help="the model they were pruned from (default: MODEL with its zeros filled)")
    add("--sparsity", type=float, nargs="+", metavar="S", help="prune MODEL to each of these first")
    add("--method", default="magnitude", choices=METHODS, help="method for --sparsity; others: prune with main.py")
    add("--work", default="out/speedup", metavar="DIR", help="where models that are made here go")
    add_export_flags(parser, several=True)
    benchmark.add_measuring_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    return command(make_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
