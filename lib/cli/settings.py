"""Settings: the groups of flags shared by the commands, and checks for contradictions."""

from __future__ import annotations

import re
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import ClassVar

from lib.allocation import price
from lib.allocation.formulas import ALLOCATIONS, MAPPINGS
from lib.calibration import texts
from lib.calibration.hidden import CALIB_DTYPES, HIDDEN_STATES, PROPAGATE
from lib.cli.flags import Flags, flag, number_or_auto
from lib.cli.task import Measurement, Task
from lib.core.errors import UserError
from lib.core.files import in_repository
from lib.core.names import check_name, did_you_mean
from lib.evaluation.zero_shot import ZERO_SHOT_TASKS
from lib.models.layers import SUPPORTED
from lib.models.load import DTYPES
from lib.models.locate import SMOLLM2
from lib.pruning import plan as plans
from lib.pruning.pruners import DAMPED, ITERATED, PRUNERS, VARIANTS, Options, configured
from lib.spectra import measure, spectrum
from lib.spectra.spectrum import DRIVERS
from lib.spectra.tail import METRICS, WEIGHTWATCHER

METHODS = [f"{p}_{a}" if a else p for a in ALLOCATIONS for p in PRUNERS]
TEXTS = f"{{{', '.join(texts.DATASETS)}}} or a .txt, .json or .jsonl file (field `text`)"


@dataclass(kw_only=True)
class Model(Flags):
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
        metavar="NAME",
    )
    seed: int = flag(0, "random seed for sampling calibration data", metavar="N")


@dataclass(kw_only=True)
class Texts(Flags):
    _title: ClassVar[str] = "data"

    calib_data: str = flag("c4", f"calibration text: {TEXTS}", metavar="TEXT")
    nsamples: int = flag(128, "calibration windows, a count", least=1, metavar="N")
    seqlen: int = flag(2048, "window length, tokens; at most the model's context", least=1, metavar="N")


@dataclass(kw_only=True)
class Method(Flags):
    _title: ClassVar[str] = "pruning"

    prune_method: str | None = flag(
        None,
        f"{{{', '.join(PRUNERS)}}}, each alone or with a suffix for how the sparsity is distributed over layers, "
        f"{{{', '.join('_' + a for a in ALLOCATIONS if a)}}}; _ww: by {{ww_metric}}",
        metavar="METHOD",
    )
    sparsity_ratio: float = flag(0.0, "fraction of the weights to remove, in [0, 1)", least=0, below=1, metavar="S")


@dataclass(kw_only=True)
class Pruning(Flags):
    _title: ClassVar[str] = "pruning"

    sparsity_type: str = flag("unstructured", "unstructured, or N:M (2:4, 4:8 ...): keep N of M", metavar="TYPE")
    use_variant: bool = flag(False, "Wanda's variant: one share of each row's score instead of a count", prunes=True)
    pruner_iterations: int | None = flag(
        None,
        "for alps: iterations of ADMM (default: 10, rho from .3 to 1; 30 is rho from .1 to 3, slower and a little "
        "better)",
        least=1,
        prunes=True,
        metavar="N",
    )
    damping: float | None = flag(
        None,
        "of the Hessian, as a share of its mean diagonal, for sparsegpt (default: .01), alps and {refit} (default: .1)",
        above=0,
        most=1000,  # nothing is left of the inputs' correlations then
        prunes=True,
        metavar="X",
    )
    refit: int | None = flag(
        None,
        "conjugate-gradient steps that improve the weights on the fixed mask, after any pruner (default: 10 for alps, "
        "0 for the others)",
        least=0,
        prunes=True,
        metavar="N",
    )
    statistics: str = flag(
        "pruned",
        "what calibration passes on from block to block: {choices} weights' outputs; pruned, as published",
        choices=PROPAGATE,
        prunes=True,
        metavar="WHICH",
    )
    calib_dtype: str | None = flag(
        None,
        "dtype of the products of calibration's passes through a float32 model: {choices}; statistics and solves keep "
        "their precision (default: the model's own)",
        choices=CALIB_DTYPES,
        prunes=True,
        metavar="NAME",
    )


@dataclass(kw_only=True)
class Metric(Flags):
    _title: ClassVar[str] = "allocation"

    ww_metric: str = flag(
        "alpha_peak",
        "metric of each matrix, for _ww: {choices}; a larger alpha, stable rank or entropy (less heavy-tailed) is "
        "pruned more; so is a larger norm, as published",
        choices=[*METRICS, *WEIGHTWATCHER],
        only="ww",
        metavar="METRIC",
    )
    ww_metric_cache: str | None = flag(
        None,
        "folder in which the metric is cached (default: data/NAME of the repository, NAME the model's own folder name)",
        only="ww",
        metavar="DIR",
    )
    epsilon: float | str = flag(
        0.3,
        "half width of the map from metric to sparsity for _ww, in [0, 1], or auto: the best on held-out calibration "
        "text",
        least=0,
        most=1,
        convert=number_or_auto,
        only="ww",
        metavar="E",
    )


@dataclass(kw_only=True)
class Spectra(Flags):
    _title: ClassVar[str] = "allocation"

    mapping_type: str = flag("block_wise", "for _ww: {choices}", choices=MAPPINGS, only="ww", metavar="TYPE")
    esd_driver: str = flag(
        "exact",
        "{choices}; exact: float32 SVD, as published; fast: eigenvalues of the float64 Gram matrix",
        choices=DRIVERS,
        only="ww",
        metavar="NAME",
    )
    farms: bool = flag(False, "spectra of windows of one aspect ratio (FARMS) instead of whole matrices", only="ww")
    farms_rows: int = flag(
        2000, "rows of a window; at most the matrix's shorter side", least=2, needs="farms", only="ww", metavar="N"
    )
    farms_ratio: float = flag(1.0, "columns of a window over its rows", above=0, needs="farms", only="ww", metavar="Q")
    farms_steps: int = flag(15, "windows in each direction, a count", least=1, needs="farms", only="ww", metavar="K")


@dataclass(kw_only=True)
class Widths(Flags):
    _title: ClassVar[str] = "allocation"

    owl_m: float = flag(
        5.0, "for _owl: outliers exceed M times the block's mean score", above=0, only="owl", metavar="M"
    )
    owl_lambda: float = flag(
        0.08, "for _owl: half width of the map, a sparsity in [0, 1]", least=0, most=1, only="owl", metavar="L"
    )
    dlp_alpha: float = flag(
        0.15, "for _dlp: half width of the map, a sparsity in [0, 1]", least=0, most=1, only="dlp", metavar="A"
    )
    atp_beta: float = flag(
        0.005, "for _atp: step from block to block, a sparsity in [0, 1]", least=0, most=1, only="atp", metavar="B"
    )


@dataclass(kw_only=True)
class Price(Flags):
    _title: ClassVar[str] = "allocation"

    price_steps: int = flag(
        16,
        "for _price: steps of the search, each a backward pass over windows of text, or over up to 256 images",
        least=1,
        only="price",
        metavar="N",
    )
    price_start: str = flag(
        "uniform",
        "for _price: allocation that the search starts from: {choices}",
        choices=[name or "uniform" for name in ALLOCATIONS if name != "price"],
        only="price",
        metavar="NAME",
    )
    price_refresh: int = flag(
        0,
        "for _price: further steps, after ranking the weights again on the path of the plan found so far",
        least=0,
        only="price",
        metavar="N",
    )
    price_dtype: str = flag(
        "auto",
        "for _price: {choices} to search in; auto: bfloat16 on a CPU that multiplies it, else the model's own",
        choices=price.DTYPES,
        only="price",
        metavar="NAME",
    )


@dataclass(kw_only=True)
class PriceEffort(Flags):
    _title: ClassVar[str] = "allocation"

    price_effort: str = flag(
        "full",
        "for _price: {choices}: a step looks at two windows, or, faster and less exactly, at half of one",
        choices=price.EFFORTS,
        only="price",
        metavar="NAME",
    )


@dataclass(kw_only=True)
class Plans(Flags):
    _title: ClassVar[str] = "allocation"

    metrics_only: bool = flag(False, "compute, cache and print the metric, then exit")
    plan: str | None = flag(
        None, "take the layers' ratios from a file that {save_plan} wrote", prunes=True, metavar="FILE"
    )
    save_plan: str | None = flag(None, "write the layers' ratios, by name, as JSON", prunes=True, metavar="FILE")
    export_llmcompressor: str | None = flag(
        None, "write the layers' ratios as an llm-compressor recipe (YAML)", prunes=True, metavar="FILE"
    )


@dataclass(kw_only=True)
class Evaluation(Flags):
    _title: ClassVar[str] = "evaluation"

    eval_data: str = flag("wikitext2", f"evaluation text: {TEXTS}", metavar="TEXT")
    eval_windows: int | None = flag(None, "windows to evaluate, a count (default: all)", least=1, metavar="N")
    eval_wikitext: bool = flag(True, "measure the perplexity on {eval_data}")


@dataclass(kw_only=True)
class ZeroShot(Flags):
    _title: ClassVar[str] = "evaluation"

    eval_zero_shot: bool = flag(False, "answer {tasks} with lm-eval and measure the accuracy")
    tasks: str = flag(
        ",".join(ZERO_SHOT_TASKS), "lm-eval's names of tasks or groups", needs="eval_zero_shot", metavar="A,B"
    )
    num_fewshot: int = flag(
        0, "worked examples before each question, a count", least=0, needs="eval_zero_shot", metavar="N"
    )
    limit: int | None = flag(
        None, "questions per task, a count (default: all)", least=1, needs="eval_zero_shot", metavar="N"
    )
    eval_batch_size: str = flag(
        "auto", "batch size; auto: the largest that fits on the GPU, 8 on a CPU", needs="eval_zero_shot", metavar="N"
    )
    include_path: str | None = flag(
        None, "folder of more lm-eval task files, such as data/tasks", needs="eval_zero_shot", metavar="DIR"
    )

    def check(self) -> None:
        super().check()
        if not any(self.tasks.split(",")):
            raise UserError("tasks", f"{self.tasks!r}: names no task; give lm-eval's names with commas between them")
        if self.eval_batch_size != "auto" and not re.fullmatch(r"[1-9]\d*", self.eval_batch_size):
            raise UserError("eval_batch_size", f"{self.eval_batch_size}: must be auto or at least 1")

    def task_names(self) -> tuple[str, ...]:
        """Return the names of the tasks, each once."""
        return tuple(dict.fromkeys(filter(None, self.tasks.split(","))))

    def batch_size(self) -> int | str:
        """Return the number of questions at a time, or auto."""
        return "auto" if self.eval_batch_size == "auto" else int(self.eval_batch_size)


@dataclass(kw_only=True)
class Output(Flags):
    _title: ClassVar[str] = "output"

    save: str = flag("results", "where the run's figures are written", metavar="DIR")
    save_model: str | None = flag(
        None,
        "write the pruned model to DIR/METHOD_RATIO; an earlier one there is replaced with all its files, anything "
        "else there (a file, another folder, an export in it) is refused",
        prunes=True,
        metavar="DIR",
    )

    def model_folder(self, task: Task) -> Path | None:
        """Return where the pruned model is saved, None if it is not."""
        return Path(self.save_model) / task.folder if self.save_model else None


@dataclass(kw_only=True)
class Packed(Flags):
    _title: ClassVar[str] = "output"

    packed: bool = flag(
        False,
        "write {save_model}'s folder packed, a bit per weight and the values that are left; scripts/generate.py runs "
        "it",
        needs="save_model",
        prunes=True,
    )


@dataclass(kw_only=True)
class Scale(Flags):
    _title: ClassVar[str] = "large models"

    stream: str = flag(
        "auto",
        "read the weights block by block from disk: {choices}; auto: when they do not fit into the free memory of GPUs "
        "and CPU. A streamed model is pruned into {save_model}",
        choices=("auto", "always", "never"),
        metavar="WHEN",
    )
    hidden_states: str = flag(
        "auto",
        "where calibration's hidden states are kept: {choices}; auto: on the GPU where there is room, else in the "
        "CPU's memory",
        choices=HIDDEN_STATES,
        prunes=True,
        metavar="WHERE",
    )
    restart: bool = flag(
        False, "begin again where {save_model} holds an unfinished run, instead of resuming it", prunes=True
    )


@dataclass(kw_only=True)
class Experiment(
    Model, Texts, Method, Pruning, Metric, Spectra, Widths, Price, PriceEffort, Plans, Evaluation, ZeroShot, Output,
    Packed, Scale,
):
    """The flags of main.py."""

    def check(self) -> None:
        super().check()
        for name in ("calib_data", "eval_data"):
            texts.check_text(name, getattr(self, name))
        if self.eval_wikitext and self.seqlen < 2:
            raise UserError("seqlen", f"{self.seqlen}: must be at least 2")
        if self.ww_metric in WEIGHTWATCHER and (self.farms or self.esd_driver != "exact"):
            name, given = ("farms", "") if self.farms else ("esd_driver", f"{self.esd_driver} ")
            text = f"{given}with --ww_metric {self.ww_metric}: that metric goes through weightwatcher's own spectrum"
            raise UserError(name, text)
        self.task()
        if self.restart and not self.save_model:
            raise UserError("restart", "without --save_model does nothing; add --save_model")

    def identity(self) -> dict[str, object]:
        """Return the flags that determine the pruned weights, in their spelling."""
        groups = (Texts, Method, Pruning, Metric, Spectra, Widths, Price, PriceEffort)
        names = [name for group in groups for name in group.__annotations__ if not name.startswith("_")]
        names = ["seed", "dtype", "plan", *(name for name in names if name not in ("ww_metric_cache", "metrics_only"))]
        return {self.spelling(name): getattr(self, name) for name in names}

    def task(self) -> Task:
        """Return the task that the flags describe.

        Raises:
            UserError: flags that contradict each other, or that do nothing for this method.
        """
        task = self._metrics_only() if self.metrics_only else self._method()
        check_only(self, task, planned=bool(self.plan))
        if self.epsilon == "auto":
            if task.allocation != "ww" or self.metrics_only:
                raise UserError("epsilon", f"auto with {task.method}: needs a --prune_method with _ww")
            self._check_search("epsilon", "auto")
        if task.needs == "price":
            self._check_search("prune_method", task.method)
            if self.seqlen < 2:
                raise UserError("seqlen", f"{self.seqlen} with {task.method}: must be at least 2")
        return task._replace(hyper=hyper_parameters(self), plan=self.plan, identity=self.identity())

    def measurement(self, model: str) -> Measurement:
        """Return how the metric of the ``model`` is measured, and where it is cached."""
        farms = spectrum.Farms(self.farms_rows, self.farms_ratio, self.farms_steps) if self.farms else None
        folder = Path(self.ww_metric_cache or Path(in_repository("data"), model))
        return Measurement(self.ww_metric, folder, measure.Settings(self.esd_driver, farms, self.seed))

    def price_options(self, task: Task) -> price.Options:
        """Return the options of the search for prices; its dtype depends on the model's."""
        effort = price.EFFORTS[self.price_effort]
        return price.Options(self.price_steps, self.price_refresh, None, task.by_magnitude, effort)

    def one_file(self) -> bool:
        """Return whether the texts for calibration and evaluation are one file, which is not split."""
        same = Path(self.calib_data).resolve() == Path(self.eval_data).resolve()
        return same and self.calib_data not in texts.DATASETS

    def _check_search(self, field: str, given: str) -> None:
        """Refuse a search that would see the evaluation text."""
        if self.one_file() and self.eval_wikitext:
            text = "--calib_data and --eval_data are one file, so the choice would see the evaluation text; give two"
            raise UserError(field, f"{given}: {text}")

    def _metrics_only(self) -> Task:
        for name in ("prune_method", "sparsity_ratio", "eval_wikitext", "eval_zero_shot", *pruning_flags(self)):
            if name in self.given:
                text = "with --metrics_only: nothing is pruned or evaluated then; leave one of them out"
                raise UserError(name, text)
        return Task("metrics", None, "ww", 0.0)

    def _method(self) -> Task:
        nm = None if self.sparsity_type == "unstructured" else parse_nm(self.sparsity_type)
        if self.prune_method is None:
            return self._dense(nm)
        method, target = check_name("prune_method", self.prune_method, METHODS), self.sparsity_ratio
        name, _, suffix = method.partition("_")
        if self.use_variant and name not in VARIANTS:
            text = f"with --prune_method {method}: only {', '.join(VARIANTS)} has a variant"
            raise UserError("use_variant", text)
        if self.export_llmcompressor and name not in plans.LLM_COMPRESSOR:
            raise UserError("export_llmcompressor", f"with {method}: for {' and '.join(plans.LLM_COMPRESSOR)} only")
        if self.plan:
            method, suffix, target = f"{name}_plan", "", self._planned_target(method)
        elif nm:
            target = self._nm_target(method, suffix, nm)
        elif not target:
            text = f"{method} without a sparsity; add --sparsity_ratio (or --sparsity_type N:M)"
            raise UserError("prune_method", text)
        table = VARIANTS if self.use_variant else PRUNERS
        start = self.price_start.replace("uniform", "") if suffix == "price" else ""
        return Task(method, configured(name, table, self._options(name)), suffix, target, nm, start)

    def _options(self, pruner: str) -> Options:
        if self.pruner_iterations is not None and pruner not in ITERATED:
            raise UserError("pruner_iterations", f"does nothing with {pruner}; it is for {', '.join(ITERATED)}")
        if self.damping is not None and pruner not in DAMPED and not self.refit:
            text = f"does nothing with {pruner} without --refit; it is for {' and '.join(DAMPED)}"
            raise UserError("damping", text)
        for name, default in (("statistics", "pruned"), ("calib_dtype", None)):
            given = getattr(self, name)
            if (given != default or name in self.given) and not (PRUNERS[pruner].statistic or self.refit):
                raise UserError(name, f"{given} does nothing with {pruner}, which needs no calibration")
        return Options(self.pruner_iterations, self.damping, self.refit)

    def _dense(self, nm: tuple[int, int] | None) -> Task:
        if self.sparsity_ratio or nm:
            name = "sparsity_type" if nm else "sparsity_ratio"
            text = f"{getattr(self, name)} without a method; add --prune_method, one of: {', '.join(METHODS)}"
            raise UserError(name, text)
        for name in pruning_flags(self):
            if name in self.given:
                raise UserError(name, "without --prune_method does nothing")
        return Task("dense", None, "", 0.0)

    def _planned_target(self, method: str) -> float:
        """Return the target of the plan to be used."""
        if "_" in method:
            text = f"with --prune_method {method}: the plan is the allocation; use {method.partition('_')[0]}"
            raise UserError("plan", text)
        if self.sparsity_type != "unstructured" or self.save_plan:
            name = "save_plan" if self.save_plan else f"sparsity_type {self.sparsity_type}"
            raise UserError("plan", f"with --{name}: the plan says all of that already; leave one of them out")
        content = plans.read_plan(Path(self.plan))
        mixed = len({str(row.get("nm")) for row in content["layers"].values()}) > 1
        if self.export_llmcompressor and mixed:
            text = "with a plan of mixed N:M: llm-compressor has one N:M for all layers"
            raise UserError("export_llmcompressor", text)
        if self.sparsity_ratio and abs(self.sparsity_ratio - content["target"]) > 1e-9:
            text = f"{self.sparsity_ratio} with --plan {self.plan}: that plan is for {content['target']}"
            raise UserError("sparsity_ratio", text)
        if self.use_variant and any("nm" in row for row in content["layers"].values()):
            raise UserError("use_variant", "with a plan of N:M: the variant is unstructured only")
        return content["target"]

    def _nm_target(self, method: str, suffix: str, nm: tuple[int, int]) -> float:
        """Return the sparsity implied by N:M."""
        given = f"with --sparsity_type {self.sparsity_type}"
        if self.use_variant:
            raise UserError("use_variant", f"{given}: the variant is unstructured only")
        if suffix and nm[0] == 1:
            nothing = f"every layer keeps at least one of {nm[1]}: nothing can be distributed; use 2:{2 * nm[1]}"
            raise UserError("sparsity_type", f"1:{nm[1]} with {method}: {nothing}")
        if suffix and self.export_llmcompressor:
            text = f"{given} and {method}: llm-compressor has one N:M for all layers"
            raise UserError("export_llmcompressor", text)
        implied = 1 - nm[0] / nm[1]
        if self.sparsity_ratio and abs(self.sparsity_ratio - implied) > 1e-9:
            fix = f"that type removes {implied:g}; leave --sparsity_ratio out or give {implied:g}"
            raise UserError("sparsity_ratio", f"{self.sparsity_ratio} {given}: {fix}")
        return implied


def hyper_parameters(settings: Flags) -> dict[str, object]:
    """Return the hyper-parameters of all allocations by field."""
    names = {name for allocation in ALLOCATIONS.values() for name in allocation.flags}
    return {name: getattr(settings, name) for name in sorted(names | {"owl_m"})}


def pruning_flags(settings: Flags) -> list[str]:
    """Return the fields that do nothing unless something is pruned."""
    return [item.name for _, item, _ in settings.declared() if item.metadata.get("prunes")]


def check_only(settings: Flags, task: Task, planned: bool = False) -> None:
    """Refuse flags of an allocation that is not used.

    The published flags of _ww are accepted with a uniform method, since published command lines include them.
    """
    tolerated = () if planned or task.allocation else [name for name in Metric.__annotations__] + ["mapping_type"]
    for _, item, _ in settings.declared():
        only = item.metadata.get("only")
        asked = only in (task.allocation, task.start)
        if only and item.name in settings.given and not asked and item.name not in tolerated:
            raise UserError(item.name, f"does nothing with {task.method}; it is for the methods with _{only}")


def parse_nm(text: str) -> tuple[int, int]:
    """Return (N, M) of ``N:M``."""
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if not found:
        hint = did_you_mean(text, ["unstructured"])
        raise UserError("sparsity_type", f"{text}: must be unstructured or N:M such as 2:4.{hint}")
    keep, group = int(found[1]), int(found[2])
    if not 0 < keep < group:
        raise UserError("sparsity_type", f"{text}: N:M keeps N of M, so N must be at least 1 and below M")
    return keep, group
