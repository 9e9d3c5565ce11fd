"""Sparsities, methods and epsilons become run files and a plot, the model and the texts loaded once."""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from rich.console import Console

import main
from lib import UserError, results

METHODS = "dense,magnitude,wanda,sparsegpt,magnitude_ww,wanda_ww,sparsegpt_ww"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sweep.py",
        description=__doc__,
        epilog="All other flags are main.py's and hold for every setting: --model, --calib_data ... "
        "A setting whose run file is complete, with the same flags, is skipped.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--sparsities", default="0.5,0.6,0.7", metavar="S,S", help="values of --sparsity_ratio")
    parser.add_argument("--methods", default=METHODS, metavar="M,M", help="values of --prune_method, and dense")
    parser.add_argument("--epsilons", default="0.2", metavar="E,E", help="values of --epsilon, for methods with _ww")
    parser.add_argument("--save", default="results/sweep", metavar="DIR", help="run files, and sweep.png; _ww below it")
    parser.add_argument("--force", action="store_true", help="run what is complete, too")
    return parser


def settings(args: argparse.Namespace, rest: list[str]) -> list[argparse.Namespace]:
    """Return the flags of main.py for each setting, checked; the calibrated texts are the same for all.

    Each epsilon has a folder of its own, since the names of run files hold the method and the sparsity only.
    """
    found = []
    for method in args.methods.split(","):
        epsilons = args.epsilons.split(",") if method.endswith("_ww") else [None]
        for sparsity in args.sparsities.split(",") if method != "dense" else [None]:
            for epsilon in epsilons:
                folder = Path(args.save) / f"epsilon_{epsilon}" if epsilon else Path(args.save)
                flags = [*rest, "--save", str(folder)]
                flags += ["--prune_method", method, "--sparsity_ratio", sparsity] if sparsity else []
                flags += ["--epsilon", epsilon] if epsilon else []
                setting = main.make_parser().parse_args(flags)
                main.check_args(setting)
                found.append(setting)
    return found


def sweep(todo: list[argparse.Namespace], force: bool) -> tuple[list[dict], list[dict], int]:
    """Run what is not complete; return all records, those made now, and the number of settings that failed."""
    kept: dict = {}
    records, made, failed = [], [], 0
    for i, args in enumerate(todo):
        what = _name(args)
        record = results.read_run(Path(args.save), main.check_args(args).run)
        if not force and results.is_complete(record, main.flags_of(args)):
            print(f"[{i + 1}/{len(todo)}] {what}: complete already, skipped (--force runs it again)", flush=True)
            records.append(record)
            continue
        print(f"[{i + 1}/{len(todo)}] {what}", flush=True)
        try:
            made.append(main.run(args, Console(quiet=True), kept))
            records.append(made[-1])
        except (UserError, torch.OutOfMemoryError) as error:  # one setting does not stop the others
            print(f"sweep.py: error: {what}: {error}", file=sys.stderr)
            failed += 1
    return records, made, failed


def _name(args: argparse.Namespace) -> str:
    if not args.prune_method:
        return "dense"
    epsilon = f", epsilon {args.epsilon}" if args.prune_method.endswith("_ww") else ""
    return f"{args.prune_method} at {args.sparsity_ratio:g}{epsilon}"


def saved_seconds(made: list[dict], start_up: float) -> float:
    """Return by how much at least separate runs would have taken longer than those in ``made`` did together.

    Each would have started Python (``start_up`` seconds) and have read the texts and the model as the first one had to;
    for a calibrated method that is more than the first, dense or magnitude, may have read: hence at least.
    """
    loading = [sum(record["stages"][name]["seconds"] for name in ("text", "load")) for record in made]
    return sum(start_up + max(0.0, loading[0] - own) for own in loading[1:])


def plot(records: list[dict], path: Path) -> None:
    """Write a PNG: perplexity over sparsity, a line per method and epsilon, log axis."""
    from matplotlib.figure import Figure

    lines: dict[str, list[tuple[float, float]]] = {}
    dense = [record for record in records if record["method"] == "dense"]
    for record in records:
        label = record["method"]
        label += f", epsilon {record['flags']['epsilon']}" if label.endswith("_ww") else ""
        if record not in dense:
            lines.setdefault(label, []).append((record["target_sparsity"], record["perplexity"]))
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for label, points in lines.items():
        style = "o-" if "_" in label else "s--"
        axes.plot(*zip(*sorted(points), strict=True), style, label=label, linewidth=1, markersize=4)
    for record in dense:
        axes.axhline(record["perplexity"], color="black", linewidth=0.8, linestyle=":", label="dense")
    axes.set(yscale="log", xlabel="sparsity", title=records[0]["model"]["name"])
    axes.set_ylabel(f"perplexity, {records[0]['evaluation']['text']}")
    axes.legend(fontsize="small")
    results.save_figure(figure, path, dpi=150)


def run(argv: list[str], start_up: float) -> int:
    """Run the sweep of the command line ``argv``; return 0, 1 if a setting failed, 2 for a wrong command line."""
    args, rest = make_parser().parse_known_args(argv)
    try:
        todo = settings(args, rest)
        results.prepare("--save", Path(args.save))
    except UserError as error:
        print(f"sweep.py: error: {error}", file=sys.stderr)
        return 2
    begin = time.perf_counter()
    records, made, failed = sweep(todo, args.force)
    seconds = time.perf_counter() - begin + start_up
    if made:
        saved = saved_seconds(made, start_up)
        print(
            f"{len(made)} settings in {seconds:.0f} s; as separate runs of main.py at least {seconds + saved:.0f} s "
            f"({(seconds + saved) / seconds:.2f} times as long): each starts in {start_up:.1f} s and loads for itself"
        )
    measured = [record for record in records if record["perplexity"] is not None]
    if measured:
        plot(measured, Path(args.save) / "sweep.png")
        print(f"written: {args.save}/sweep.png; the table: python scripts/table.py {args.save}")
    return 1 if failed else 0


def _since_start() -> float:
    """Return the seconds since this process began: what every run of main.py spends before it begins."""
    import psutil

    return time.time() - psutil.Process().create_time()


if __name__ == "__main__":
    main.quiet()
    sys.exit(run(sys.argv[1:], _since_start()))
