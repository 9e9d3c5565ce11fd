"""Settings: groups of flags that commands share, those of main.py, and checks for contradictions between them."""

from __future__ import annotations

import re
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import ClassVar

from lib.allocation import price, price_model
from lib.allocation.block_scores import BLOCK_SCORES
from lib.allocation.formulas import ALLOCATIONS, MAPPINGS
from lib.calibration import texts
from lib.calibration.hidden import CALIB_DTYPES, HIDDEN_STATES, PROPAGATE
from lib.cli.flags import Flags, flag, number_or_auto
from lib.cli.task import Measurement, Task
from lib.core.errors import UserError, flag_name
from lib.core.files import in_repository
from lib.core.names import check_name, did_you_mean
from lib.evaluation.zero_shot import ZERO_SHOT_TASKS
from lib.models.layers import SUPPORTED
from lib.models.load import DTYPES
from lib.models.locate import SMOLLM2
from lib.pruning import plan as plans
from lib.pruning.pruners import DAMPED, ITERATED, PRUNERS, VARIANTS, configured
from lib.spectra import measure, spectrum
from lib.spectra.spectrum import DRIVERS
from lib.spectra.tail import METRICS, WEIGHTWATCHER

METHODS = [f"{p}_{a}" if a else p for a in ALLOCATIONS for p in PRUNERS]
TEXTS = f"{{{', '.join(texts.DATASETS)}}} or a .txt, .json or .jsonl file (field `text`)"
CALIBRATED = " | ".join([name for name, pruner in PRUNERS.items() if pruner.statistic] + ["refit"])


@dataclass(kw_only=True)
class ModelFlags(Flags):
    _title: ClassVar[str] = "model"

    model: str = flag(MISSING, f"hub id, local folder, .gguf file, or {SMOLLM2}; families that were tried: {SUPPORTED}")
    cache_dir: str = flag(
        "llm_weights", "where weights from the hub or from GGUF are kept", in_repository=True, metavar="DIR"
    )
    dtype: str = flag(
        "auto",
        "{choices} to compute in; auto: the checkpoint's own on CUDA (float16 for float32), float32 on a CPU, "
        "which saves in the checkpoint's own",
        choices=DTYPES,
    )
    seed: int = flag(0, "random seed for sampling calibration data")


@dataclass(kw_only=True)
class TextFlags(Flags):
    _title: ClassVar[str] = "data"

    calib_data: str = flag("c4", f"text: {TEXTS}", only="calibration | search", warns=True, metavar="TEXT")
    nsamples: int = flag(128, "windows, a count", least=1, only="calibration", warns=True)
    seqlen: int = flag(2048, "length of a window, tokens", least=1, only="pruning | evaluation", warns=True)


@dataclass(kw_only=True)
class PruningFlags(Flags):
    _title: ClassVar[str] = "pruning"

    prune_method: str | None = flag(
        None,
        f"{{{', '.join(PRUNERS)}}}, each alone or with a suffix for how the sparsity is distributed over layers, "
        f"{{{', '.join('_' + a for a in ALLOCATIONS if a)}}}; _ww: by {{ww_metric}}",
        metavar="METHOD",
    )
    sparsity_ratio: float = flag(0.0, "fraction of the weights to remove, in [0, 1)", least=0, below=1)
    sparsity_type: str = flag("unstructured", "unstructured, or N:M (2:4, 4:8 ...): keep N of M", metavar="TYPE")
    use_variant: bool = flag(
        False, "its variant: one share of each row's score instead of a count", only=" | ".join(VARIANTS)
    )
    pruner_iterations: int | None = flag(
        None,
        "iterations of ADMM (default: 10, rho from .3 to 1; 30: rho from .1 to 3, slower and a little better)",
        least=1,
        only=" | ".join(ITERATED),
    )
    damping: float | None = flag(
        None,
        "added to the Hessian, a share of its mean diagonal (default: .01 for sparsegpt, .1 for alps and {refit})",
        above=0,
        most=1000,  # nothing is left of the inputs' correlations then
        only=" | ".join((*DAMPED, "refit")),
    )
    refit: int | None = flag(
        None,
        "conjugate-gradient steps that improve the weights on the fixed mask (default: 10 for alps, else 0)",
        least=0,
        only="pruning",
    )
    statistics: str = flag(
        "pruned",
        "what calibration passes on from block to block: {choices} weights' outputs",
        choices=PROPAGATE,
        only=CALIBRATED,
    )
    calib_dtype: str | None = flag(
        None,
        "{choices}: of the products in calibration's passes through a float32 model (default: the model's own)",
        choices=CALIB_DTYPES,
        only=CALIBRATED,
    )


@dataclass(kw_only=True)
class AllocationFlags(Flags):
    _title: ClassVar[str] = "allocation"

    ww_metric: str = flag(
        "alpha_peak",
        "metric of each matrix: {choices}; a larger alpha, stable rank or entropy (less heavy-tailed) is "
        "pruned more; so is a larger norm, as published",
        choices=[*METRICS, *WEIGHTWATCHER],
        only="_ww",
        tolerated="uniform",
    )
    ww_metric_cache: str | None = flag(
        None,
        "folder in which the metric is cached (default: data/NAME of the repository, NAME the model's own folder name)",
        only="_ww",
        tolerated="uniform",
        metavar="DIR",
    )
    epsilon: float | str = flag(
        0.3,
        "half width of the map from metric to sparsity, in [0, 1], or auto: the best on held-out calibration text",
        least=0,
        most=1,
        convert=number_or_auto,
        only="_ww",
        tolerated="uniform",
    )
    mapping_type: str = flag("block_wise", "{choices}", choices=MAPPINGS, only="_ww", tolerated="uniform")
    esd_driver: str = flag(
        "exact", "{choices}; exact: float32 SVD, as published; fast: float64 Gram matrix", choices=DRIVERS, only="_ww"
    )
    farms: bool = flag(False, "spectra of windows of one aspect ratio (FARMS) instead of whole matrices", only="_ww")
    farms_rows: int = flag(2000, "rows of a window; at most the matrix's shorter side", least=2, only="farms")
    farms_ratio: float = flag(1.0, "columns of a window over its rows", above=0, only="farms")
    farms_steps: int = flag(15, "windows in each direction, a count", least=1, only="farms", metavar="K")
    owl_m: float = flag(5.0, "outliers exceed M times the block's mean score", above=0, only="_owl", metavar="M")
    owl_lambda: float = flag(0.08, "half width of the map, a sparsity in [0, 1]", least=0, most=1, only="_owl")
    dlp_alpha: float = flag(0.15, "half width of the map, a sparsity in [0, 1]", least=0, most=1, only="_dlp")
    atp_beta: float = flag(0.005, "step from block to block, a sparsity in [0, 1]", least=0, most=1, only="_atp")
    price_steps: int = flag(16, "steps of the search, each a backward pass over text or images", least=1, only="_price")
    price_start: str = flag(
        "uniform",
        "allocation that the search starts from: {choices}",
        choices=[name or "uniform" for name in ALLOCATIONS if name != "price"],
        only="_price",
    )
    price_refresh: int = flag(
        0, "further steps, after ranking the weights again under the plan so far", least=0, only="_price"
    )
    price_dtype: str = flag(
        "auto",
        "{choices}; auto: bfloat16 on a CPU that multiplies it, else the model's own",
        choices=price_model.SEARCH_DTYPES,
        only="_price",
    )
    price_effort: str = flag(
        "full", "{choices}: a step reads two windows, or, faster, half of one", choices=price.EFFORTS, only="_price"
    )
    metrics_only: bool = flag(False, "compute, cache and print the metric, then exit")
    plan: str | None = flag(
        None, "take the layers' ratios from a file that {save_plan} wrote", only="pruning", metavar="FILE"
    )
    save_plan: str | None = flag(None, "write the layers' ratios, by name, as JSON", only="pruning", metavar="FILE")
    export_llmcompressor: str | None = flag(
        None, "write the layers' ratios as an llm-compressor recipe (YAML)", only="pruning", metavar="FILE"
    )


@dataclass(kw_only=True)
class EvaluationFlags(Flags):
    _title: ClassVar[str] = "evaluation"

    eval_data: str = flag("wikitext2", f"text: {TEXTS}", only="evaluation", warns=True, metavar="TEXT")
    eval_windows: int | None = flag(None, "windows, a count (default: all)", least=1, only="evaluation", warns=True)
    eval_wikitext: bool = flag(True, "measure the perplexity on {eval_data}")


@dataclass(kw_only=True)
class ZeroShotFlags(Flags):
    _title: ClassVar[str] = "evaluation"

    eval_zero_shot: bool = flag(False, "answer {tasks} with lm-eval and measure the accuracy")
    tasks: str = flag(
        ",".join(ZERO_SHOT_TASKS), "lm-eval's names of tasks or groups", only="eval_zero_shot", metavar="A,B"
    )
    num_fewshot: int = flag(0, "worked examples before each question, a count", least=0, only="eval_zero_shot")
    limit: int | None = flag(None, "questions per task, a count (default: all)", least=1, only="eval_zero_shot")
    eval_batch_size: str = flag(
        "auto", "batch size; auto: the largest that fits on the GPU, 8 on a CPU", only="eval_zero_shot", metavar="N"
    )
    include_path: str | None = flag(
        None, "folder of more lm-eval task files, such as data/tasks", only="eval_zero_shot", metavar="DIR"
    )

    def check(self) -> None:
        super().check()
        if not any(self.tasks.split(",")):
            raise UserError("tasks", repr(self.tasks), "names no task", "give lm-eval's names with commas between them")
        if self.eval_batch_size != "auto" and not re.fullmatch(r"[1-9]\d*", self.eval_batch_size):
            raise UserError("eval_batch_size", self.eval_batch_size, "must be auto or at least 1")

    def task_names(self) -> tuple[str, ...]:
        """Return the names of the tasks, each once."""
        return tuple(dict.fromkeys(filter(None, self.tasks.split(","))))

    def batch_size(self) -> int | str:
        """Return the number of questions at a time, or auto."""
        return "auto" if self.eval_batch_size == "auto" else int(self.eval_batch_size)


@dataclass(kw_only=True)
class OutputFlags(Flags):
    _title: ClassVar[str] = "output"

    save: str = flag("results", "where the run's figures are written", metavar="DIR")
    save_model: str | None = flag(
        None,
        "write the pruned model to DIR/METHOD_RATIO; an earlier one there is replaced with all its files, anything "
        "else there (a file, another folder, an export in it) is refused",
        only="pruning",
        metavar="DIR",
    )
    packed: bool = flag(False, "write the model packed, for scripts/generate.py", only="save_model")

    def model_folder(self, task: Task) -> Path | None:
        """Return where the pruned model is saved, None if it is not."""
        return Path(self.save_model) / task.folder if self.save_model else None


@dataclass(kw_only=True)
class ScaleFlags(Flags):
    _title: ClassVar[str] = "large models"

    stream: str = flag(
        "auto",
        "read weights block by block from disk, prune into {save_model}: {choices}; auto: if they exceed free memory",
        choices=("auto", "always", "never"),
    )
    hidden_states: str = flag(
        "auto",
        "place of hidden states: {choices}; auto: the GPU if it has room, else cpu",
        choices=HIDDEN_STATES,
        only="calibration",
    )
    restart: bool = flag(
        False, "begin again where {save_model} holds an unfinished run, instead of resuming it", only="save_model"
    )


@dataclass(kw_only=True)
class MethodFlags(PruningFlags, AllocationFlags):
    """The flags that say what a model is pruned by, for both main programs."""

    def traits(self) -> set[str]:
        """Return what holds of the run: pruner and allocations by name, what is read, and each flag that is on."""
        traits = super().traits()
        if self.metrics_only:
            return traits | {"_ww"}
        pruner, _, suffix = (self.prune_method or "").partition("_")
        allocations = [suffix, self.price_start.replace("uniform", "")] if suffix == "price" else [suffix]
        traits |= {f"_{name}" for name in allocations if name}
        traits |= {"pruning", pruner} if self.prune_method else set()
        traits |= {"search"} if suffix == "price" or self.epsilon == "auto" else set()
        traits |= {"uniform"} if not (suffix or self.plan) else set()
        scored = {ALLOCATIONS[name].wants for name in allocations} & BLOCK_SCORES.keys()
        if self.prune_method and (PRUNERS[pruner].statistic or self.refit or scored):
            traits.add("calibration")
        return traits

    def situation(self) -> str:
        if self.metrics_only:
            return f"with {flag_name('metrics_only')}, which prunes and evaluates nothing"
        if self.prune_method is None:
            return f"without {flag_name('prune_method')}"
        return f"with {self.prune_method}"

    def check(self) -> None:
        if self.prune_method is not None:
            check_name("prune_method", self.prune_method, METHODS)
        super().check()

    def dense_task(self) -> Task:
        """Return the task of a run that prunes nothing.

        Raises:
            UserError: a sparsity is asked for.
        """
        for name, value in (("sparsity_ratio", self.sparsity_ratio), ("sparsity_type", self.sparsity_type)):
            if value not in (0, "unstructured"):
                fix = f"add {flag_name('prune_method')}, one of: {', '.join(METHODS)}"
                raise UserError(name, value, "does nothing without a method", fix)
        return self.settled(Task("dense", None, "", 0.0))

    def settled(self, task: Task) -> Task:
        """Return the ``task`` with its traits and the allocations' hyper-parameters."""
        names = {name for allocation in ALLOCATIONS.values() for name in allocation.flags} | {"owl_m"}
        hyper = {name: getattr(self, name) for name in sorted(names)}
        start = self.price_start.replace("uniform", "") if task.allocation == "price" else ""
        return task._replace(start=start, hyper=hyper, traits=frozenset(self.traits()))


@dataclass(kw_only=True)
class Experiment(ModelFlags, TextFlags, MethodFlags, EvaluationFlags, ZeroShotFlags, OutputFlags, ScaleFlags):
    """The flags of main.py."""

    def traits(self) -> set[str]:
        evaluates = self.eval_wikitext and not self.metrics_only
        return super().traits() | ({"evaluation"} if evaluates else set())

    def check(self) -> None:
        for name in ("prune_method", "sparsity_ratio", "eval_wikitext", "eval_zero_shot"):
            if self.metrics_only and name in self.given:
                raise UserError(name, None, f"does nothing {self.situation()}", "leave one of them out")
        super().check()
        for name in ("calib_data", "eval_data"):
            texts.check_text(name, getattr(self, name))
        if self.eval_wikitext and self.seqlen < 2:
            raise UserError("seqlen", self.seqlen, "must be at least 2")
        if self.ww_metric in WEIGHTWATCHER and (self.farms or self.esd_driver != "exact"):
            name, value = ("farms", None) if self.farms else ("esd_driver", self.esd_driver)
            problem = f"does nothing with --ww_metric {self.ww_metric}, which goes through weightwatcher's own spectrum"
            raise UserError(name, value, problem)
        task = self.task()
        if self.epsilon == "auto":
            if task.allocation != "ww" or self.metrics_only:
                raise UserError("epsilon", "auto", f"needs a --prune_method with _ww, not {task.method}")
            self._check_search("epsilon", "auto")
        if task.needs == "price":
            self._check_search("prune_method", task.method)
            if self.seqlen < 2:
                raise UserError("seqlen", self.seqlen, f"must be at least 2 with {task.method}")

    def _check_search(self, field: str, value: str) -> None:
        """Refuse a search that would see the evaluation text."""
        if self.one_file() and self.eval_wikitext:
            problem = "--calib_data and --eval_data are one file, so the choice would see the evaluation text"
            raise UserError(field, value, problem, "give two")

    def one_file(self) -> bool:
        """Return whether the texts for calibration and evaluation are one file, which is not split."""
        same = Path(self.calib_data).resolve() == Path(self.eval_data).resolve()
        return same and self.calib_data not in texts.DATASETS

    def identity(self) -> dict[str, object]:
        """Return the flags that determine the pruned weights, in their spelling."""
        groups = (TextFlags, PruningFlags, AllocationFlags)
        names = {"seed", "dtype"}.union(*(group.__annotations__ for group in groups))
        names -= {"_title", "ww_metric_cache", "metrics_only", "save_plan", "export_llmcompressor"}
        return {self.spelling(name): getattr(self, name) for name in sorted(names)}

    def measurement(self, model: str) -> Measurement:
        """Return how the metric of the ``model`` is measured, and where it is cached."""
        farms = spectrum.Farms(self.farms_rows, self.farms_ratio, self.farms_steps) if self.farms else None
        folder = Path(self.ww_metric_cache or Path(in_repository("data"), model))
        return Measurement(self.ww_metric, folder, measure.SpectrumSettings(self.esd_driver, farms, self.seed))

    def price_options(self) -> price.SearchOptions:
        """Return the options of the search for prices."""
        return price.SearchOptions(self.price_steps, self.price_refresh, price.EFFORTS[self.price_effort])

    def task(self) -> Task:
        """Return the task that the flags describe.

        Raises:
            UserError: flags that contradict each other.
        """
        if self.metrics_only:
            return self.settled(Task("metrics", None, "ww", 0.0))
        nm = None if self.sparsity_type == "unstructured" else parse_nm(self.sparsity_type)
        if self.prune_method is None:
            return self.dense_task()
        method, target = self.prune_method, self.sparsity_ratio
        name, _, suffix = method.partition("_")
        if self.export_llmcompressor and name not in plans.LLM_COMPRESSOR:
            problem = f"with {method}: for {' and '.join(plans.LLM_COMPRESSOR)} only"
            raise UserError("export_llmcompressor", None, problem)
        if self.plan:
            method, suffix, target = f"{name}_plan", "", self._planned_target(method)
        elif nm:
            target = self._nm_target(method, suffix, nm)
        elif not target:
            fix = "add --sparsity_ratio (or --sparsity_type N:M)"
            raise UserError("prune_method", None, f"{method} without a sparsity", fix)
        table = VARIANTS if self.use_variant else PRUNERS
        pruner = configured(name, table, self.pruner_iterations, self.damping, self.refit)
        task = self.settled(Task(method, pruner, suffix, target, nm))
        return task._replace(plan=self.plan, identity=self.identity())

    def _planned_target(self, method: str) -> float:
        """Return the target of the plan to be used."""
        if "_" in method:
            problem = f"with --prune_method {method}: the plan is the allocation"
            raise UserError("plan", None, problem, f"use {method.partition('_')[0]}")
        if self.sparsity_type != "unstructured" or self.save_plan:
            name = "save_plan" if self.save_plan else f"sparsity_type {self.sparsity_type}"
            raise UserError("plan", None, f"with --{name}: the plan says all of that already", "leave one of them out")
        content = plans.read_plan(Path(self.plan))
        mixed = len({str(row.get("nm")) for row in content["layers"].values()}) > 1
        if self.export_llmcompressor and mixed:
            problem = "with a plan of mixed N:M: llm-compressor has one N:M for all layers"
            raise UserError("export_llmcompressor", None, problem)
        if self.sparsity_ratio and abs(self.sparsity_ratio - content["target"]) > 1e-9:
            problem = f"with --plan {self.plan}: that plan is for {content['target']}"
            raise UserError("sparsity_ratio", self.sparsity_ratio, problem)
        if self.use_variant and any("nm" in row for row in content["layers"].values()):
            raise UserError("use_variant", None, "with a plan of N:M: the variant is unstructured only")
        return content["target"]

    def _nm_target(self, method: str, suffix: str, nm: tuple[int, int]) -> float:
        """Return the sparsity implied by N:M."""
        situation = f"with --sparsity_type {self.sparsity_type}"
        if self.use_variant:
            raise UserError("use_variant", None, f"{situation}: the variant is unstructured only")
        if suffix and nm[0] == 1:
            problem = f"with {method}: every layer keeps at least one of {nm[1]}: nothing can be distributed"
            raise UserError("sparsity_type", f"1:{nm[1]}", problem, f"use 2:{2 * nm[1]}")
        if suffix and self.export_llmcompressor:
            problem = f"{situation} and {method}: llm-compressor has one N:M for all layers"
            raise UserError("export_llmcompressor", None, problem)
        implied = 1 - nm[0] / nm[1]
        if self.sparsity_ratio and abs(self.sparsity_ratio - implied) > 1e-9:
            problem = f"{situation}: that type removes {implied:g}"
            fix = f"leave --sparsity_ratio out or give {implied:g}"
            raise UserError("sparsity_ratio", self.sparsity_ratio, problem, fix)
        return implied


def parse_nm(text: str) -> tuple[int, int]:
    """Return (N, M) of ``N:M``."""
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match:
        hint = did_you_mean(text, ["unstructured"])
        raise UserError("sparsity_type", text, f"must be unstructured or N:M such as 2:4.{hint}")
    keep, group = int(match[1]), int(match[2])
    if not 0 < keep < group:
        raise UserError("sparsity_type", text, "N:M keeps N of M, so N must be at least 1 and below M")
    return keep, group
