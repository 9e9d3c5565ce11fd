"""Every allocation on one model and pruner becomes a table and a plot, the model loaded and calibrated once."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sweep

import main
from lib import UserError, registry, results
from lib.allocation import ALLOCATIONS
from lib.pruners import PRUNERS

# Hyper-parameters that are tried, by suffix; others are run with main.py's defaults.
VALUES = {"ww": ("epsilon", "0.1,0.2,0.3"), "atp": ("atp_beta", "0.005,0.010,0.013")}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="compare_allocations.py",
        description=__doc__,
        epilog="All other flags are main.py's and hold for every setting: --model, --calib_data ... "
        "A setting whose run file is complete, with the same flags, is skipped.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--pruner", default="wanda", help=f"{{{','.join(PRUNERS)}}}")
    add("--allocations", default=",".join(ALLOCATIONS), metavar="A,B", help="suffixes; an empty one is uniform")
    add("--sparsities", default="0.5,0.6,0.7", metavar="S,S", help="values of --sparsity_ratio")
    for suffix, (flag, values) in VALUES.items():
        add(f"--{flag}s", default=values, metavar="X,X", help=f"values of --{flag}, for _{suffix}")
    add(
        "--save", default="results/allocations", metavar="DIR", help="run files, table and plot; a setting has a folder"
    )
    add("--force", action="store_true", help="run what is complete, too")
    return parser


def settings(args: argparse.Namespace, rest: list[str]) -> dict[str, list[argparse.Namespace]]:
    """Return main.py's flags for each label of a row of the table, one set for each sparsity, checked."""
    registry.check_name("--pruner", args.pruner, PRUNERS)
    found: dict[str, list[argparse.Namespace]] = {}
    for suffix in args.allocations.split(","):
        registry.check_name("--allocations", suffix, ALLOCATIONS)
        flag = VALUES[suffix][0] if suffix in VALUES else None
        for value in getattr(args, f"{flag}s").split(",") if flag else [None]:
            label = (suffix or "uniform") + (f" {flag} {value}" if flag else "")
            for sparsity in args.sparsities.split(","):
                flags = [*rest, "--save", str(Path(args.save) / label.replace(" ", "_"))]
                flags += ["--prune_method", f"{args.pruner}_{suffix}".rstrip("_"), "--sparsity_ratio", sparsity]
                setting = main.make_parser().parse_args(flags + ([f"--{flag}", value] if flag else []))
                main.check_args(setting)
                found.setdefault(label, []).append(setting)
    return found


def table(rows: dict[str, dict[float, float]], sparsities: list[float]) -> str:
    """Return a Markdown table of perplexities, the best of each column in bold."""
    best = {s: min((found[s] for found in rows.values() if s in found), default=None) for s in sparsities}
    lines = [
        "| allocation | " + " | ".join(f"{s:g}" for s in sparsities) + " |",
        "|---" + "|---:" * len(sparsities) + "|",
    ]
    for label, found in rows.items():
        cells = [f"{found[s]:.2f}" if s in found else "-" for s in sparsities]
        cells = [f"**{cell}**" if found.get(s) == best[s] else cell for s, cell in zip(sparsities, cells, strict=True)]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: dict[str, dict[float, float]], sparsities: list[float], title: str, path: Path) -> None:
    """Write a PNG: a line for each allocation, a mark for its perplexity at each sparsity, log axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 1.4 + 0.32 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for sparsity in sparsities:
        points = [(found[sparsity], y) for y, found in enumerate(rows.values()) if sparsity in found]
        axes.plot(*zip(*points, strict=True), "o", label=f"sparsity {sparsity:g}")
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.grid(axis="x", which="both", alpha=0.3)
    axes.set(xscale="log", xlabel="perplexity", title=title)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    results.save_figure(figure, path, dpi=150)


def run(argv: list[str]) -> int:
    """Run the comparison of the command line ``argv``; return 0, 1 if a setting failed, 2 for a wrong command line."""
    args, rest = make_parser().parse_known_args(argv)
    try:
        wanted = settings(args, rest)
        results.prepare("--save", Path(args.save))
    except UserError as error:
        print(f"compare_allocations.py: error: {error}", file=sys.stderr)
        return 2
    records, _, failed = sweep.sweep([setting for group in wanted.values() for setting in group], args.force)
    by_flags = {str(sorted(record["flags"].items(), key=str)): record for record in records}
    rows: dict[str, dict[float, float]] = {}
    for label, group in wanted.items():
        for setting in group:
            record = by_flags.get(str(sorted(main.flags_of(setting).items(), key=str)))
            if record is not None and record["perplexity"] is not None:
                rows.setdefault(label, {})[record["target_sparsity"]] = record["perplexity"]
    if rows:
        sparsities = sorted({s for found in rows.values() for s in found})
        text = table(rows, sparsities)
        results.write_atomically(Path(args.save) / "allocations.md", text)
        plot(rows, sparsities, f"{records[0]['model']['name']}, {args.pruner}", Path(args.save) / "allocations.png")
        print(f"\n{text}\nwritten: {args.save}/allocations.md, allocations.png")
    return 1 if failed else 0


if __name__ == "__main__":
    main.quiet()
    sys.exit(run(sys.argv[1:]))
