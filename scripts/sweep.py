"""Sweep over methods, sparsities, epsilons and seeds: run files, a table and a plot; model and texts loaded once."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import Field, dataclass
from io import StringIO
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import table

import main as program
from lib.cli.command import command, make_parser
from lib.cli.flags import check_values, flag
from lib.cli.settings import METHODS, Experiment
from lib.core import files
from lib.core.errors import UserError, check_name, first_line, is_out_of_memory
from lib.models import locate
from lib.run.language import LanguageModel
from lib.run.record import INPUTS, has_flags, inputs_of, read_run

log = logging.getLogger("main")

# The hyper-parameter of which several values may be tried, by the suffix of its methods.
TRIED = {"ww": "epsilon", "atp": "atp_beta"}
RESUME = "the same command resumes"
REST = (
    "All other flags are main.py's; one for certain methods only (--owl_m, --damping, --save_model ...) is not given "
    "to others. A setting whose run file is complete, with the same flags and unchanged files, is skipped."
)


@dataclass(kw_only=True)
class Sweep(Experiment):
    """The flags of main.py, some of which (``_lists``) hold several values in one string."""

    _title: ClassVar[str] = "settings to run"
    _lists: ClassVar[Sequence[str]] = ("prune_method", "sparsity_ratio", "epsilon", "atp_beta")
    _spelled: ClassVar[dict[str, str]] = {
        "prune_method": "methods", "sparsity_ratio": "sparsities", "epsilon": "epsilons", "atp_beta": "atp_betas"
    }  # fmt: skip

    prune_method: str = flag(
        "dense,magnitude,wanda,sparsegpt,magnitude_ww,wanda_ww,sparsegpt_ww", "main.py's methods, and dense",
        aliases=["prune_method"], metavar="M,M",
    )  # fmt: skip
    sparsity_ratio: str = flag("0.5,0.6,0.7", "sparsities", aliases=["sparsity_ratio"], metavar="S,S")
    epsilon: str = flag(
        "0.2", "for the methods with _ww: E (or auto), several, or one for a method: wanda_ww=E; where a method has "
        "several, each has a separate folder", aliases=["epsilon"], metavar="E,E",
    )  # fmt: skip
    atp_beta: str = flag("0.005", "the same for _atp", aliases=["atp_beta"], metavar="B,B")
    save: str = flag("results/sweep", "where run files, sweep.md and sweep.png are written", metavar="DIR")
    seeds: int = flag(
        1, "calibration seeds, a count: {seed} and those after it; of several, each but 0 has a folder", least=1,
    )  # fmt: skip
    force: bool = flag(False, "run what is complete, too")

    def methods(self) -> list[str | None]:
        """Return the methods to run, None for the dense model."""
        names = [check_name("prune_method", name, ["dense", *METHODS]) for name in words(self.prune_method)]
        if not names:
            raise UserError("prune_method", repr(self.prune_method), "names no method")
        return [None if name == "dense" else name for name in dict.fromkeys(names)]

    def check(self) -> None:
        if self.metrics_only:
            raise UserError("metrics_only", None, "prunes nothing, so there is nothing to sweep", "use main.py")
        pruned = [settings for settings in self.settings() if settings.prune_method]
        for name in ("save_plan", "save_calib", "export_llmcompressor"):
            if getattr(self, name) and len(pruned) > 1:
                problem = f"{len(pruned)} settings would write the same file"
                raise UserError(name, getattr(self, name), problem, "use main.py")
        for suffix, name in TRIED.items():
            taken = any(method and method.endswith(f"_{suffix}") for method in self.methods())
            if name in self.given and self._entries(name) and not taken:
                # It is not refused, since the published scripts give it whatever their methods are.
                log.warning("--%s does nothing without a method with _%s", self.spelling(name), suffix)

    def settings(self) -> list[Experiment]:
        """Return the checked settings of each run, seed by seed: an interrupted sweep leaves complete tables."""
        settings = [self._of_run(None)] if None in self.methods() else []
        for seed in range(self.seed, self.seed + self.seeds):
            for method in filter(None, self.methods()):
                tried = self._tried(method)
                for values in tried:
                    folder = Path(*(f"{name}_{value}" for name, value in values.items() if len(tried) > 1))
                    folder = folder / f"seed_{seed}" if self.seeds > 1 and seed else folder
                    for sparsity in self._entries("sparsity_ratio")[""]:
                        settings.append(self._of_run(method, folder, sparsity_ratio=sparsity, seed=seed, **values))
        return settings

    def _tried(self, method: str) -> list[dict[str, float | str]]:
        """Return the changes of hyper-parameters to try with a ``method``."""
        name = TRIED.get(method.partition("_")[2])
        if name is None:
            return [{}]
        entries = self._entries(name)
        values = entries.get(method) or entries.get("")
        if not values:
            fix = f"add {method}=E, or E for all"
            raise UserError(name, repr(getattr(self, name)), f"holds none for {method}", fix)
        return [{name: value} for value in values]

    def _entries(self, name: str) -> dict[str, list[float | str]]:
        """Return the numbers that a flag holds by method, each once; under an empty name those for all methods."""
        entries: dict[str, list[float | str]] = {}
        for word in words(getattr(self, name)):
            method, _, value = word.rpartition("=")
            if method:
                check_name(name, method, [method for method in METHODS if TRIED.get(method.partition("_")[2]) == name])
            try:
                value = "auto" if (name, value) == ("epsilon", "auto") else float(value)
            except ValueError:
                raise UserError(name, repr(value), "is not a number") from None
            if value not in entries.setdefault(method, []):
                entries[method].append(value)
        if not entries:
            raise UserError(name, repr(getattr(self, name)), "holds no number")
        return entries

    def _of_run(self, method: str | None, folder: Path | str = "", **changes) -> Experiment:
        """Return main.py's checked settings of one run: the flags that apply to its ``method``, and the ``changes``.

        Args:
            folder: below --save and --save_model, since the names of a run's files tell only method and sparsity.
        """
        flags = {}
        for _, item, _ in Experiment.declared():
            if item.name in self.given and item.name not in self._lists:
                takers = [name for name in self.methods() if self._applies(item, name)]
                # A flag for none of the methods is passed on, so that main.py's check refuses it.
                if method in takers or not takers:
                    flags[item.name] = getattr(self, item.name)
        flags |= {"prune_method": method, "save": str(Path(self.save, folder)), **changes}
        if "save_model" in flags:
            flags["save_model"] = str(Path(self.save_model, folder))
        settings = Experiment(**flags)
        settings.given = frozenset(flags)
        check_values(settings)
        settings.check()
        return settings

    def _applies(self, item: Field, method: str | None) -> bool:
        """Return whether a flag of main.py does something for a ``method``."""
        declared = {flag.name: flag.metadata for _, flag, _ in Experiment.declared()}
        names, before = declared.keys() & self.given - {*self._lists}, None
        while names != before:  # what a flag is for may be one that does nothing itself
            before = names
            traits = Experiment(**{name: getattr(self, name) for name in names} | {"prune_method": method}).traits()
            purposes = {name: declared[name]["only"] for name in names if not declared[name]["warns"]}
            names = {x for x in names if not purposes.get(x) or traits & {*purposes[x].split(" | ")}}
        return item.name in names


def words(flag_value: str) -> list[str]:
    """Return the words separated by commas or spaces."""
    return flag_value.replace(",", " ").split()


PARSER = make_parser(Sweep, "sweep.py", __doc__, REST)


def run_all(todo: Sequence[Experiment], force: bool) -> list[Path | None]:
    """Run the settings that are not complete; return the run file of each, None for one that failed."""
    subject = LanguageModel(planned=todo)
    first_seen: dict[str, str] = {}  # digests of local files and folders, by flag
    run_files: list[Path | None] = []
    for i, settings in enumerate(todo, 1):
        folder, task = Path(settings.save), settings.task()
        name = f"{task.method} at {task.target:g}" if task.pruner else task.method
        name += f", epsilon {settings.epsilon}" if task.allocation == "ww" else ""
        name += f", seed {settings.seed}" if settings.seed else ""
        inputs = inputs_of(settings.flags())
        first_seen = inputs | first_seen
        record = read_run(folder, task.run)
        run_files.append(folder / f"run_{task.run}.json")

        if not force and has_flags(record, settings.flags()) and record["complete"]:
            changed = [name for name in INPUTS if record.get("inputs", {}).get(name) != inputs.get(name)]
            if not changed:
                print(f"[{i}/{len(todo)}] {name}: complete already, skipped (--force runs it again)", flush=True)
                continue
            names = ", ".join(f"--{name}" for name in changed)
            log.info("%s: changed since the complete run on disk, which is made again", names)

        print(f"[{i}/{len(todo)}] {name}", flush=True)
        try:
            for flag_name, digest in inputs.items():
                if digest != first_seen[flag_name]:  # what was read of it before must not be mixed with it
                    problem = "was changed since this command started"
                    raise UserError(flag_name, getattr(settings, flag_name), problem, "start it again")
            with redirect_stdout(StringIO()):
                program.run(settings, subject)
        except Exception as error:  # one setting does not stop the others, hours into a sweep
            run_files[-1] = None
            foreseen = isinstance(error, UserError) or is_out_of_memory(error)
            reason = error if isinstance(error, UserError) else first_line(error)
            log.error("%s failed: %s", name, reason, exc_info=None if foreseen else error)
    return run_files


def run(sweep: Sweep) -> int:
    """Run the sweep and write its table and plot; return 0, or 1 if a setting failed."""
    folder = Path(sweep.save)
    files.check_writable("save", folder)
    locate.locate(sweep.model, sweep.cache_dir)  # or every setting would fail
    run_files = run_all(sweep.settings(), sweep.force)
    runs = table.read_runs(filter(None, run_files))
    if len(runs):
        lines = table.formatted(table.by_sparsity(runs), "markdown")
        calibration = f"calibration on {sweep.nsamples} windows of {sweep.seqlen} of {sweep.calib_data}"
        page = f"{lines}\n\n{runs['model'].iloc[0]}: {table.caption(runs)}; {calibration}. {table.NOTES}\n"
        files.write_atomically(folder / "sweep.md", page)
        table.plot(folder / "sweep.png", table.cells_of(runs))
        print(f"written: {folder}/sweep.md and .png; with published figures: python scripts/table.py {folder}")
    failed = run_files.count(None)
    if failed:
        log.error("%d of %d settings failed; the same command runs only these again", failed, len(run_files))
    return 1 if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    return command(Sweep, run, argv, PARSER, resume=RESUME)


if __name__ == "__main__":
    sys.exit(main())
