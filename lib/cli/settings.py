"""Settings: groups of flags that commands share, those of main.py, and checks for contradictions between them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import ClassVar

from lib.allocation import price
from lib.allocation.block_scores import BLOCK_SCORES, WEIGHT_SCORES
from lib.allocation.formulas import ALLOCATIONS, MAPPINGS
from lib.calibration import texts
from lib.calibration.hidden import CALIB_DTYPES, HIDDEN_STATES, PROPAGATE
from lib.calibration.statistics import EXPERT_WEIGHTING
from lib.cli.flags import Flags, flag
from lib.cli.task import Task
from lib.core.digests import digest
from lib.core.errors import UserError, check_name, flag_name
from lib.core.files import in_repository
from lib.evaluation.zero_shot import ZERO_SHOT_TASKS
from lib.models.layers import SUPPORTED
from lib.models.load import DTYPES
from lib.models.locate import SMOLLM2
from lib.pruning import plan as plans
from lib.pruning.drop import DROP_BY
from lib.pruning.pruners import DAMPED, ITERATED, PRUNERS, VARIANTS, Pruner, configured
from lib.recovery.adam import STATES, TRAINED
from lib.recovery.distill import BY, RecoveryOptions
from lib.sparse import PACKED_VALUES
from lib.spectra import spectrum
from lib.spectra.cache import Measurement
from lib.spectra.spectrum import DRIVERS
from lib.spectra.tail import METRICS, WEIGHTWATCHER

METHODS = [f"{p}_{a}" if a else p for a in ALLOCATIONS for p in PRUNERS]
TEXTS = (
    f"{{{', '.join(texts.DATASETS)}}}, hf:NAME[:CONFIG][:SPLIT][:FIELD] of the hub, or a .txt, .json or .jsonl file "
    "(field `text`, or `messages` or `conversations` for the chat template)"
)
CALIBRATED = " | ".join([name for name, pruner in PRUNERS.items() if pruner.statistic] + ["refit"])
OWN_TEXT, BY_ALPHA = "--calib_data self, where it is read", "--drop_by alpha"  # traits
# Published command lines give these flags to uniform methods as well, where they do nothing.
OF_WW = {"only": "_ww", "tolerated": "uniform"}
MEASURED = f"_ww | {BY_ALPHA}"


@dataclass(kw_only=True)
class ModelFlags(Flags):
    _title: ClassVar[str] = "model"

    model: str = flag(MISSING, f"hub id, local folder, .gguf file, or {SMOLLM2}; families that were tried: {SUPPORTED}")
    cache_dir: str | None = flag(None, "folder of weights (default: the repository's llm_weights)", metavar="DIR")
    dtype: str = flag(
        "auto", "{choices} to compute in; auto: the checkpoint's own on CUDA (float16 for float32), float32 on a CPU, "
        "which saves in the checkpoint's own", choices=DTYPES,
    )  # fmt: skip
    seed: int = flag(0, "random seed for sampling calibration data")


@dataclass(kw_only=True)
class TextFlags(Flags):
    _title: ClassVar[str] = "data"

    calib_data: str = flag(
        "c4", f"text: {TEXTS}; or self: what the dense model answers to prompts", only="calibration | search | recover",
        warns=True, metavar="TEXT",
    )  # fmt: skip
    prompts: str | None = flag(None, "lines, or `prompt` or `messages` in JSON", only=OWN_TEXT, metavar="FILE")
    prompt_data: str = flag("c4", "without them: text whose first sentences they are", only=OWN_TEXT, metavar="TEXT")
    save_calib: str | None = flag(None, "write that text, for later runs", only=OWN_TEXT, metavar="FILE")
    nsamples: int = flag(128, "windows, a count", least=1, only="calibration", warns=True)
    seqlen: int = flag(2048, "length of a window, tokens", least=2, only="pruning | evaluation | recover", warns=True)


@dataclass(kw_only=True)
class PruningFlags(Flags):
    _title: ClassVar[str] = "pruning"

    prune_method: str | None = flag(
        None, f"{{{', '.join(PRUNERS)}}}, each alone or with a suffix for how the sparsity is distributed over layers, "
        f"{{{', '.join('_' + a for a in ALLOCATIONS if a)}}}; _ww: by {{ww_metric}}", metavar="METHOD",
    )  # fmt: skip
    sparsity_ratio: float = flag(0.0, "fraction of the weights to remove, in [0, 1)", least=0, below=1, only="pruning")
    sparsity_type: str = flag("unstructured", "unstructured, or N:M: keep N of M", only="pruning", metavar="TYPE")
    use_variant: bool = flag(False, "its variant: a share of each row's score, not a count", only=" | ".join(VARIANTS))
    pruner_iterations: int | None = flag(
        None, "iterations of ADMM (default: 10, rho from .3 to 1; 30: rho from .1 to 3, slower and a little better)",
        least=1, only=" | ".join(ITERATED),
    )  # fmt: skip
    damping: float | None = flag(
        None, "added to the Hessian: a share of its mean diagonal (default: .01 for sparsegpt, .1 for alps, {refit})",
        above=0, most=1000, only=" | ".join((*DAMPED, "refit")),
    )  # fmt: skip
    refit: int | None = flag(
        None, "conjugate-gradient steps on the fixed mask (default: 10 for alps, else 0)", least=0, only="pruning"
    )
    statistics: str = flag(
        "pruned", "outputs that calibration passes on: of {choices} weights", choices=PROPAGATE, only=CALIBRATED
    )
    calib_dtype: str | None = flag(
        None, "{choices} to calibrate a float32 model in (default: its own)", choices=CALIB_DTYPES, only=CALIBRATED
    )


@dataclass(kw_only=True)
class AllocationFlags(Flags):
    _title: ClassVar[str] = "allocation"

    ww_metric: str = flag(
        "alpha_peak", "of each matrix: {choices}; the larger (for alpha: the less heavy-tailed), the more is pruned",
        choices=[*METRICS, *WEIGHTWATCHER], only=MEASURED, tolerated="uniform",
    )  # fmt: skip
    ww_metric_cache: str | None = flag(
        None, "folder in which the metric is cached (default: the repository's data/NAME, NAME the model's own folder)",
        metavar="DIR", only=f"{MEASURED} | {OWN_TEXT}", tolerated="uniform",
    )  # fmt: skip
    epsilon: float | str = flag(
        0.3, "half width of the map from metric to sparsity, in [0, 1], or auto: the best on held-out calibration text",
        least=0, most=1, **OF_WW,
    )  # fmt: skip
    mapping_type: str = flag(
        "block_wise", "what shares a ratio: {choices}; an expert is one of a mixture's", choices=list(MAPPINGS), **OF_WW
    )
    esd_driver: str = flag(
        "exact", "{choices}: float32 SVD (published), float64 Gram matrix", choices=DRIVERS, only=MEASURED
    )
    farms: bool = flag(False, "spectra of windows of one aspect ratio (FARMS) instead of whole matrices", only=MEASURED)
    farms_rows: int = flag(2000, "rows of a window; at most the matrix's shorter side", least=2, only="farms")
    farms_ratio: float = flag(1.0, "columns of a window over its rows", above=0, only="farms")
    farms_steps: int = flag(15, "windows in each direction, a count", least=1, only="farms", metavar="K")
    owl_m: float = flag(5.0, "outliers exceed M times the block's mean score", above=0, only="_owl", metavar="M")
    owl_lambda: float = flag(0.08, "half width of the map, a sparsity in [0, 1]", least=0, most=1, only="_owl")
    dlp_alpha: float = flag(0.15, "half width of the map, a sparsity in [0, 1]", least=0, most=1, only="_dlp")
    atp_beta: float = flag(0.005, "step from block to block, a sparsity in [0, 1]", least=0, most=1, only="_atp")
    price_steps: int = flag(16, "steps of the search, each a backward pass over text or images", least=1, only="_price")
    price_effort: str = flag("full", "{choices}: 2 windows a step or half of one", choices=price.EFFORTS, only="_price")
    metrics_only: bool = flag(False, "compute, cache and print the metric, then exit")
    plan: str | None = flag(None, "take the layers' ratios from a {save_plan} file", only="pruning", metavar="FILE")
    save_plan: str | None = flag(None, "write the layers' ratios, by name, as JSON", only="pruning", metavar="FILE")
    export_llmcompressor: str | None = flag(
        None, "write an llm-compressor recipe (YAML) of them", only=" | ".join(plans.LLM_COMPRESSOR), metavar="FILE"
    )


@dataclass(kw_only=True)
class MixtureFlags(Flags):
    _title: ClassVar[str] = "mixtures of experts"

    only: str | None = flag(
        None, "{choices}: the sparsity is theirs, all else stays dense", choices=("experts",), only="pruning"
    )
    drop_experts: float = flag(0.0, "fraction of experts to remove first, in [0, 1)", least=0, below=1, only="pruning")
    drop_by: str = flag(
        "reap", "{choices}; reap: by their part in the output, alpha: {ww_metric}", choices=DROP_BY, only="drop_experts"
    )
    expert_weighting: str = flag(
        "auto", "by which the tokens of an expert count: {choices}; auto: router for norms, none for Hessians",
        choices=EXPERT_WEIGHTING, only=CALIBRATED,
    )  # fmt: skip


@dataclass(kw_only=True)
class RecoveryFlags(Flags):
    _title: ClassVar[str] = "recovery"

    recover: int | None = flag(
        None, "tokens of {calib_data} to distil the dense model into what is left; zeros stay", least=1, only="pruning"
    )
    train: str = flag("surviving", "{choices}; norms and biases always are", choices=TRAINED, only="recover")
    rank: int = flag(32, "of the update of each matrix", least=1, only="low_rank")
    learning_rate: float | None = flag(
        None, "the highest (default: .0033 of the remaining weights' rms; low_rank: .01)", above=0, only="recover"
    )
    batch: int = flag(2, "windows a step, a count", least=1, only="recover")
    states: str = flag("float32", "of Adam's moments: {choices}", choices=STATES, only="recover")
    by: str = flag("model", "{choices}: end to end, or one by one, for what is streamed", choices=BY, only="recover")

    def recovery_options(self) -> RecoveryOptions:
        """Return how the model is recovered."""
        return RecoveryOptions(self.recover or 0, *(getattr(self, name) for name in RecoveryOptions._fields[1:]))


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
    tasks: str = flag(",".join(ZERO_SHOT_TASKS), "tasks or groups, by commas", only="eval_zero_shot", metavar="NAMES")
    num_fewshot: int = flag(0, "worked examples before each question, a count", least=0, only="eval_zero_shot")
    limit: int | None = flag(None, "questions per task, a count (default: all)", least=1, only="eval_zero_shot")
    eval_batch_size: int | str = flag(
        "auto", "questions at a time; auto: the most that fit on the GPU, 8 on a CPU", least=1, only="eval_zero_shot"
    )
    include_path: str | None = flag(None, "folder of more tasks, as data/tasks", only="eval_zero_shot", metavar="DIR")


@dataclass(kw_only=True)
class OutputFlags(Flags):
    _title: ClassVar[str] = "output"

    save: str = flag("results", "where the run's figures are written", metavar="DIR")
    save_model: str | None = flag(
        None, "write the pruned model to DIR/METHOD_RATIO, in place of an earlier one and all its files; anything else "
        "there (a file, another folder, an export in it) is refused", only="pruning", metavar="DIR",
    )  # fmt: skip
    packed: str | None = flag(
        None, "write the model packed, for scripts/generate.py; its values: {choices}, exact if left out",
        choices=PACKED_VALUES, nargs="?", const="exact", only="save_model",
    )  # fmt: skip

    def folders(self, task: Task) -> list[Path]:
        """Return where models are saved, if they are: the pruned one, then the recovered one if there is one."""
        names = [task.folder, f"{task.folder}_recovered"] if "recover" in task.traits else [task.folder]
        return [Path(self.save_model, name) for name in names] if self.save_model else []


@dataclass(kw_only=True)
class ScaleFlags(Flags):
    _title: ClassVar[str] = "large models"

    stream: str = flag(
        "auto", "read blocks from disk: {choices}; auto: if memory is short", choices=("auto", "always", "never")
    )
    hidden_states: str = flag(
        "auto", "place: {choices}; auto: a GPU with room, else cpu", choices=HIDDEN_STATES, only="calibration | recover"
    )
    restart: bool = flag(False, "discard an unfinished run in {save_model} and begin again", only="save_model")


@dataclass(kw_only=True)
class MethodFlags(PruningFlags, AllocationFlags, MixtureFlags):
    """The flags that say what a model is pruned by, one of ``_pruners``, for both main programs."""

    _pruners: ClassVar[Mapping[str, Pruner]] = PRUNERS

    def traits(self) -> set[str]:
        """Return what holds of the run: pruner and allocations by name, what is read, and each flag that is on."""
        traits = super().traits()
        if self.metrics_only:
            return traits | {"_ww"}
        pruner, _, suffix = (self.prune_method or "").partition("_")
        traits |= {f"_{suffix}"} if suffix else set()
        traits |= {"pruning", pruner} if self.prune_method else set()
        traits |= {"search"} if suffix == "price" or self.epsilon == "auto" else set()
        traits |= {"uniform"} if not (suffix or self.plan) else set()
        scored = ALLOCATIONS[suffix].wants in BLOCK_SCORES
        if self.prune_method and (PRUNERS[pruner].statistic or self.refit or scored):
            traits.add("calibration")
        return traits

    def situation(self) -> str:
        if self.metrics_only:
            return f"with {flag_name('metrics_only')}, which prunes and evaluates nothing"
        return f"with {self.prune_method}" if self.prune_method else f"without {flag_name('prune_method')}"

    def check(self) -> None:
        if self.prune_method is not None:
            check_name("prune_method", self.prune_method, METHODS)
        super().check()

    def identity(self, *groups: type[Flags]) -> dict[str, object]:
        """Return the flags of the ``groups`` that determine weights, in their spelling."""
        names = {"seed", "dtype"}.union(*(group.__annotations__ for group in groups))
        names -= {"ww_metric_cache", "metrics_only", "save_plan", "save_calib", "export_llmcompressor"}
        items = [item for _, item, _ in self.declared() if item.name in names]
        return {self.spelling(item.name): getattr(self, item.name) for item in items}

    def task(self) -> Task:
        """Return the task that the flags describe; flags that contradict each other are a UserError."""
        if self.metrics_only:
            return self.settled(Task("metrics", None, "ww", 0.0))
        if self.prune_method is None:
            return self.settled(Task("dense", None, "", 0.0))
        method, nm, implied = self.prune_method, parse_nm(self.sparsity_type), None
        name, _, suffix = method.partition("_")
        grouped, by = nm is not None, f"--sparsity_type {self.sparsity_type}"
        if self.plan:
            if suffix or nm:
                problem = f"with {f'--prune_method {method}' if suffix else by}: the plan says all of that already"
                raise UserError("plan", None, problem, f"use --prune_method {name} alone")
            content = plans.read_plan(Path(self.plan))
            implied, by, method = content["target"], f"--plan {self.plan}", f"{name}_plan"
            grouped = any("nm" in row for row in content["layers"].values())
        elif nm:
            implied = 1 - nm[0] / nm[1]
            if suffix and nm[0] == 1:
                problem = f"with {method}: every layer keeps at least one of {nm[1]}: nothing can be distributed"
                raise UserError("sparsity_type", self.sparsity_type, problem, f"use 2:{2 * nm[1]}")
        target = implied or self.sparsity_ratio
        if not target and not self.drop_experts:
            raise UserError("prune_method", None, f"{method} without a sparsity", f"add {flag_name('sparsity_ratio')}")
        if self.sparsity_ratio and abs(self.sparsity_ratio - target) > 1e-9:
            problem = f"with {by}, which removes {target:g}"
            raise UserError("sparsity_ratio", self.sparsity_ratio, problem, "leave it out")
        if self.use_variant and grouped:
            raise UserError("use_variant", None, f"with {by}: the variant is unstructured only")
        table = VARIANTS if self.use_variant else self._pruners
        pruner = configured(name, table, self.pruner_iterations, self.damping, self.refit)
        return self.settled(Task(method, pruner, suffix, target, nm, self.plan))

    def settled(self, task: Task) -> Task:
        """Return the ``task`` with its traits and the allocations' hyper-parameters."""
        names = {"owl_m"}.union(*(allocation.flags for allocation in ALLOCATIONS.values()))
        hyper = {name: getattr(self, name) for name in names}
        flags = [item for title, item, _ in self.declared() if title == MixtureFlags._title]
        mixture = {item.name: getattr(self, item.name) for item in flags if getattr(self, item.name) != item.default}
        mixture |= {"mapping_type": self.mapping_type} if self.mapping_type == "expert_wise" else {}
        identity = self.identity(TextFlags, PruningFlags, AllocationFlags, MixtureFlags)
        return task._replace(hyper=hyper, identity=identity, mixture=mixture, traits=frozenset(self.traits()))


@dataclass(kw_only=True)
class Experiment(
    ModelFlags, TextFlags, MethodFlags, RecoveryFlags, EvaluationFlags, ZeroShotFlags, OutputFlags, ScaleFlags
):
    """The flags of main.py."""

    def traits(self) -> set[str]:
        traits = super().traits() | ({"evaluation"} if self.eval_wikitext and not self.metrics_only else set())
        traits |= {self.train} if self.recover else set()
        by = self.drop_by if self.drop_experts else None
        traits |= {"reap": {"calibration"}, "alpha": {BY_ALPHA}}.get(by, set())
        read = traits & {"calibration", "search", "recover"}
        return traits | {OWN_TEXT} if read and self.calib_data == "self" else traits

    def check(self) -> None:
        for name in ("prune_method", "eval_wikitext", "eval_zero_shot"):
            if self.metrics_only and name in self.given:
                raise UserError(name, None, f"does nothing {self.situation()}", "leave one of them out")
        super().check()
        for name in ("calib_data", "eval_data", "prompt_data", "prompts"):
            if getattr(self, name) and (name, getattr(self, name)) != ("calib_data", "self"):
                texts.check_text(name, getattr(self, name))
        if self.prompts and "prompt_data" in self.given:
            raise UserError("prompt_data", self.prompt_data, "does nothing with --prompts", "leave one of them out")
        if self.ww_metric in WEIGHTWATCHER and (self.farms or self.esd_driver != "exact"):
            problem = "has weightwatcher's own spectrum, on which --farms and --esd_driver do nothing"
            raise UserError("ww_metric", self.ww_metric, problem, "leave them out")
        if self.save_calib and Path(self.save_calib).suffix not in (".json", ".jsonl"):
            raise UserError("save_calib", self.save_calib, "would be read as a plain text", "end its name in .jsonl")
        task = self.task()
        if self.only and (self.plan or task.needs in (*WEIGHT_SCORES, "price")):
            problem = f"with {self.plan or task.method}, which says how much is removed of every matrix"
            raise UserError("only", self.only, problem, "leave one of them out")
        if self.epsilon == "auto" and not (task.pruner and task.allocation == "ww"):
            raise UserError("epsilon", "auto", f"needs a --prune_method with _ww, not {task.method}")
        if (self.recover or "search" in task.traits) and self.eval_wikitext and self.one_file():
            problem = "is --eval_data's file, too, so that the model would see the evaluation text"
            raise UserError("calib_data", self.calib_data, problem, "give two")

    def pruned_from(self) -> dict:
        """Return the ``source`` that is distilled, a hub id, a folder or None, and its ``fingerprints`` if known."""
        return {"source": self.model}

    def one_file(self) -> bool:
        """Return whether the texts for calibration and evaluation are one file, which is not split."""
        same = Path(self.calib_data).resolve() == Path(self.eval_data).resolve()
        return same and not texts.is_split(self.calib_data)

    def measurement(self, model: str, whole: bool = False) -> Measurement:
        """Return how the metric of the ``model`` is measured, and where it is cached; ``whole``: before experts go."""
        farms = spectrum.Farms(self.farms_rows, self.farms_ratio, self.farms_steps) if self.farms else None
        folder = Path(self.ww_metric_cache or in_repository("data"))
        folder = folder if self.ww_metric_cache and (whole or not self.drop_experts) else folder / model
        return Measurement(self.ww_metric, folder, self.esd_driver, farms, self.seed)

    def name_of(self, model: str) -> str:
        """Return the name of the ``model`` for caches and plans: without some experts, which the text decides, too."""
        by = self.ww_metric if self.drop_by == "alpha" else self.drop_by
        chosen = f"{by}-drop{self.drop_experts:g}-{digest(self.identity(TextFlags))[:8]}"
        return f"{model}-{chosen}" if self.drop_experts else model

    def price_options(self) -> price.SearchOptions:
        """Return the options of the search for prices."""
        return price.EFFORTS[self.price_effort]._replace(steps=self.price_steps)


def parse_nm(sparsity_type: str) -> tuple[int, int] | None:
    """Return (N, M) of ``N:M``, None of ``unstructured``."""
    if sparsity_type == "unstructured":
        return None
    match = re.fullmatch(r"([1-9]\d*):(\d+)", sparsity_type)
    if not match or int(match[1]) >= int(match[2]):
        raise UserError("sparsity_type", sparsity_type, "must be unstructured, or N:M with 0 < N < M")
    return int(match[1]), int(match[2])
