"""Sweep over methods, sparsities and epsilons: run files and a plot, the model and the texts loaded once."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import Field, dataclass
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console

import main as program
from lib.cli.command import command, make_parser
from lib.cli.flags import check_values, flag
from lib.cli.settings import METHODS, Experiment
from lib.core import files
from lib.core.errors import UserError, first_line
from lib.core.lazy import torch
from lib.core.names import check_name
from lib.models import locate
from lib.run.language import LanguageModel
from lib.run.record import changed_inputs, inputs_of, is_complete, read_run
from lib.run.report import spread_of

log = logging.getLogger("main")

RESUME = "the same command resumes"
REST = (
    "All other flags are main.py's; one for certain methods only (--owl_m, --damping, --save_model ...) is not given "
    "to others. A setting whose run file is complete, with the same flags and unchanged files, is skipped."
)


@dataclass(kw_only=True)
class Several(Experiment):
    """The flags of main.py, some of which (``_lists``) hold several values in one string."""

    _title: ClassVar[str] = "settings to run"
    _lists: ClassVar[Sequence[str]] = ()

    seeds: int = flag(
        1,
        "calibration seeds, a count: {seed} and those after it; of several, each but 0 has a folder",
        least=1,
        metavar="N",
    )
    force: bool = flag(False, "run what is complete, too")

    def methods(self) -> list[str | None]:
        """Return the values of --prune_method, None for the dense model."""
        raise NotImplementedError

    def settings(self) -> list[Experiment]:
        """Return the checked settings of each run."""
        raise NotImplementedError

    def check(self) -> None:
        if self.metrics_only:
            raise UserError("metrics_only", "prunes nothing, so there is nothing to sweep; use main.py")
        pruned = [setting for setting in self.settings() if setting.prune_method]
        for name in ("save_plan", "export_llmcompressor"):
            if getattr(self, name) and len(pruned) > 1:
                text = f"{getattr(self, name)}: {len(pruned)} settings would write the same file; use main.py"
                raise UserError(name, text)

    def every_seed(self) -> range:
        """Return the seeds with which each setting is run."""
        return range(self.seed, self.seed + self.seeds)

    def one(self, method: str | None, below: str = "", seed: int | None = None, **changes) -> Experiment:
        """Return main.py's settings of one run: the flags that apply to its ``method``, and the ``changes``.

        Args:
            below: folder below --save and --save_model, since run names contain only the method and the sparsity.
            seed: one of ``every_seed``; None for the first, used if nothing depends on it.

        Raises:
            UserError: as main.py would raise.
        """
        values = {}
        for _, item, _ in Experiment.declared():
            # What no method understands reaches main.py's check, which refuses it.
            kept = self._understands(method, item) or not any(self._understands(m, item) for m in self.methods())
            if kept and item.name in self.given and item.name not in self._lists:
                values[item.name] = getattr(self, item.name)
        seed = self.seed if seed is None else seed
        place = Path(below, f"seed_{seed}" if self.seeds > 1 and seed else "")
        values |= {"prune_method": method, "seed": seed, "save": str(Path(self.save) / place)} | changes
        if "save_model" in values:
            values["save_model"] = str(Path(self.save_model) / place)
        made = Experiment(**values)
        made.given = frozenset(values)
        check_values(made)
        made.check()
        return made

    def _understands(self, method: str | None, item: Field) -> bool:
        values = {name: getattr(self, name) for name in self.given - {"seeds", "force", "allocations", *self._lists}}
        only, traits = item.metadata["only"], Experiment(**values | {"prune_method": method}).traits()
        return not only or bool(traits & set(only.split(" | ")))


def words(text: str) -> list[str]:
    """Return the words separated by commas or spaces."""
    return text.replace(",", " ").split()


def number(field: str, word: str) -> float:
    """Return ``word`` as a number."""
    try:
        return float(word)
    except ValueError:
        raise UserError(field, f"{word!r} is not a number") from None


def numbers(field: str, text: str) -> list[float]:
    """Return the numbers separated by commas or spaces, each once."""
    found = [number(field, word) for word in words(text)]
    if not found:
        raise UserError(field, f"{text!r}: holds no number")
    return list(dict.fromkeys(found))


@dataclass(kw_only=True)
class Sweep(Several):
    _lists: ClassVar[Sequence[str]] = ("prune_method", "sparsity_ratio", "epsilon")
    _spelled: ClassVar[dict[str, str]] = {
        "prune_method": "methods", "sparsity_ratio": "sparsities", "epsilon": "epsilons"
    }  # fmt: skip

    prune_method: str = flag(
        "dense,magnitude,wanda,sparsegpt,magnitude_ww,wanda_ww,sparsegpt_ww",
        "main.py's methods, and dense",
        aliases=["prune_method"],
        metavar="M,M",
    )
    sparsity_ratio: str = flag("0.5,0.6,0.7", "sparsities", aliases=["sparsity_ratio"], metavar="S,S")
    epsilon: str = flag(
        "0.2",
        "for the methods with _ww: E (or auto), several, or one for a method: wanda_ww=E; where a method has several, "
        "each has a separate folder",
        aliases=["epsilon"],
        metavar="E,E",
    )
    save: str = flag("results/sweep", "where run files and sweep.png are written", metavar="DIR")

    def methods(self) -> list[str | None]:
        names = [check_name("prune_method", name, ["dense", *METHODS]) for name in words(self.prune_method)]
        if not names:
            raise UserError("prune_method", f"{self.prune_method!r}: names no method")
        return [None if name == "dense" else name for name in dict.fromkeys(names)]

    def check(self) -> None:
        self._entries()
        super().check()
        if self.methods() == [None] and self.seeds > 1:
            raise UserError("seeds", f"{self.seeds} with --methods dense: nothing is drawn for it; leave it out")

    def idle(self) -> list[str]:
        """Return the values of --epsilons that are for no method of the sweep."""
        entries, steered = self._entries(), [method for method in self.methods() if method and method.endswith("_ww")]
        found = [f"{name}={value}" for name in entries if name and name not in steered for value in entries[name]]
        return found + ([] if set(steered) - set(entries) else [str(value) for value in entries.get("", ())])

    def settings(self) -> list[Experiment]:
        found = [self.one(None)] if None in self.methods() else []
        for seed in self.every_seed():
            for method in filter(None, self.methods()):
                found += self._of(method, seed)
        return found

    def _of(self, method: str, seed: int) -> list[Experiment]:
        """Return the settings of a ``method`` with one seed, by sparsity and epsilon."""
        found = []
        epsilons = self._epsilons(method) if method.endswith("_ww") else []
        for sparsity in numbers("sparsity_ratio", self.sparsity_ratio):
            for epsilon in epsilons:
                below = f"epsilon_{epsilon}" if len(epsilons) > 1 else ""
                found.append(self.one(method, below, seed, sparsity_ratio=sparsity, epsilon=epsilon))
            if not epsilons:
                found.append(self.one(method, "", seed, sparsity_ratio=sparsity))
        return found

    def _entries(self) -> dict[str, list[float | str]]:
        """Return the values of --epsilons by method, each once; under an empty name those for all."""
        entries: dict[str, list[float | str]] = {}
        for word in words(self.epsilon):
            name, _, value = word.rpartition("=")
            if name:
                check_name("epsilon", name, [name for name in METHODS if name.endswith("_ww")])
            epsilon = "auto" if value == "auto" else number("epsilon", value)
            if epsilon not in entries.setdefault(name, []):
                entries[name].append(epsilon)
        return entries

    def _epsilons(self, method: str) -> list[float | str]:
        entries = self._entries()
        found = entries.get(method) or entries.get("")
        if not found:
            raise UserError("epsilon", f"{self.epsilon!r}: holds none for {method}; add {method}=E, or E for all")
        return found


PARSER = make_parser(Sweep, "sweep.py", __doc__, REST)


def run_all(todo: Sequence[Experiment], force: bool) -> tuple[list[dict | None], list[dict]]:
    """Run the incomplete settings; return each setting's record, None if it failed, and the records made now."""
    subject, inputs = LanguageModel(planned=todo), Inputs()
    records: list[dict | None] = []
    made: list[dict] = []
    for i, settings in enumerate(todo):
        what = f"[{i + 1}/{len(todo)}] {_name(settings)}"
        record = read_run(Path(settings.save), settings.task().run)
        now = inputs.of(settings)
        if not force and is_complete(record, settings.flags()) and inputs.are_those_of(record, now):
            print(f"{what}: complete already, skipped (--force runs it again)", flush=True)
            records.append(record)
            continue
        print(what, flush=True)
        try:
            inputs.check(settings, now)
            made.append(program.run(settings, Console(quiet=True), subject))
            records.append(made[-1])
        except UserError as error:
            log.error("%s failed: %s", _name(settings), error)
            records.append(None)
        except Exception as error:  # one setting does not stop the others, hours into a sweep
            known = isinstance(error, torch.OutOfMemoryError)
            log.error("%s failed: %s", _name(settings), first_line(error), exc_info=None if known else error)
            records.append(None)
    return records, made


class Inputs:
    """Inputs of the settings, local files and folders: as they are now, as runs on disk had them, and as first seen."""

    def __init__(self) -> None:
        self._first: dict[str, str] = {}
        self._warned = False  # of runs of an older version

    def of(self, settings: Experiment) -> dict[str, str]:
        """Return what identifies the inputs of ``settings`` now."""
        now = inputs_of(settings.flags())
        self._first = now | self._first
        return now

    def are_those_of(self, record: dict, now: dict[str, str]) -> bool:
        """Return whether a complete run on disk read what is there ``now``; one of an older version counts."""
        changed = changed_inputs(record, now)
        if changed is None and now and not self._warned:
            text = "runs of an older version do not note which files they read (%s): taken to be the same; else --force"
            log.warning(text, ", ".join(f"--{name}" for name in now))
            self._warned = True
        for name in changed or ():
            given = record["flags"][name]
            log.info("--%s %s has changed since the complete run on disk: it is run again", name, given)
        return not changed

    def check(self, settings: Experiment, now: dict[str, str]) -> None:
        """Refuse to mix an input that is changed now with what this process has read of it before.

        Raises:
            UserError: names it.
        """
        for name, own in now.items():
            if own != self._first[name]:
                text = "was changed since this command started; start it again, and it is read anew"
                raise UserError(name, f"{getattr(settings, name)}: {text}")


def _name(settings: Experiment) -> str:
    task = settings.task()
    epsilon = f", epsilon {settings.epsilon}" if task.allocation == "ww" else ""
    seed = f", seed {settings.seed}" if settings.seed else ""
    return f"{task.method} at {task.target:g}{epsilon}{seed}" if task.pruner else task.method


def saved_seconds(made: list[dict], start_up: float) -> float:
    """Return a lower bound on the time that separate runs would have taken beyond that of ``made``.

    Each would have started Python (``start_up`` seconds) and read the texts and the model as the first one did; a
    calibrated method reads more than the first run, dense or magnitude, may have: hence a lower bound.
    """
    loading = [sum(record["stages"][name]["seconds"] for name in ("prepare", "load")) for record in made]
    return sum(start_up + max(0.0, loading[0] - own) for own in loading[1:])


def plot(records: Sequence[dict], path: Path) -> None:
    """Write a PNG: perplexity over sparsity, its mean over seeds, one line per method and epsilon, log axis.

    A mean that is not finite has no place on the axis: the legend names it.
    """
    from matplotlib.figure import Figure

    lines: dict[str, dict[float, list[float]]] = {}
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for record in records:
        label = record["method"]
        if label == "dense":
            height = record["perplexity"] if math.isfinite(record["perplexity"]) else math.nan
            label += f" ({record['perplexity']})" if math.isnan(height) else ""
            axes.axhline(height, color="black", linewidth=0.8, linestyle=":", label=label)
            continue
        label += f", epsilon {record['flags']['epsilon']}" if label.endswith("_ww") else ""
        lines.setdefault(label, {}).setdefault(record["target_sparsity"], []).append(record["perplexity"])
    for label, found in lines.items():
        style = "o-" if "_" in label else "s--"
        means = {sparsity: spread_of(figures).mean for sparsity, figures in sorted(found.items())}
        label += "".join(f", {mean} at {sparsity:g}" for sparsity, mean in means.items() if not math.isfinite(mean))
        heights = [mean if math.isfinite(mean) else math.nan for mean in means.values()]
        axes.plot(list(means), heights, style, label=label, linewidth=1, markersize=4)
    axes.set(yscale="log", xlabel="sparsity", title=records[0]["model"]["name"])
    axes.set_ylabel(f"perplexity, {records[0]['evaluation']['text']}")
    axes.legend(fontsize="small")
    files.save_figure(figure, path, dpi=150)


def measured(records: Sequence[dict | None]) -> list[dict]:
    """Return the records with a perplexity, finite or not."""
    return [record for record in records if record and record.get("perplexity") is not None]


def run(sweep: Sweep) -> int:
    """Run the sweep; return 0, or 1 if a setting failed."""
    files.prepare("save", Path(sweep.save))
    locate.locate(sweep.model, sweep.cache_dir)  # or every setting would fail
    if "epsilon" in sweep.given and sweep.idle():  # not refused: the published scripts give it for all their methods
        log.warning("--epsilons %s: does nothing with --methods %s", ",".join(sweep.idle()), sweep.prune_method)
    start_up, begin = _since_start(), time.perf_counter()
    records, made = run_all(sweep.settings(), sweep.force)
    seconds = time.perf_counter() - begin + start_up
    if made:
        saved = saved_seconds(made, start_up)
        print(
            f"{len(made)} settings in {seconds:.0f} s; as separate runs of main.py at least {seconds + saved:.0f} s "
            f"({(seconds + saved) / seconds:.2f} times as long): each starts and loads for itself"
        )
    if measured(records):
        plot(measured(records), Path(sweep.save) / "sweep.png")
        print(f"written: {sweep.save}/sweep.png; the table: python scripts/table.py {sweep.save}")
    failed = records.count(None)
    if failed:
        log.error("%d of %d settings failed; the same command runs only these again", failed, len(records))
    return 1 if failed else 0


def _since_start() -> float:
    """Return the seconds since this process started: the start-up time of every run of main.py."""
    import psutil

    return time.time() - psutil.Process().create_time()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit status: 0, 1 if a setting failed, 2 for a wrong flag."""
    return command(Sweep, run, argv, PARSER, resume=RESUME)


if __name__ == "__main__":
    sys.exit(main())
