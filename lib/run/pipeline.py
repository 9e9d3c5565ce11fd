"""Pipeline of a run: steps that measure, allocate, prune and save a subject, a language model or a classifier."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

from lib import sparse
from lib.allocation import block_scores, epsilon, formulas, price
from lib.allocation.formulas import Values
from lib.calibration.hidden import BlockInputs
from lib.cli.task import Task
from lib.core import files, processes
from lib.core.digests import digest
from lib.core.errors import UserError
from lib.core.lazy import torch
from lib.models.layers import Layer
from lib.models.weights import Weights
from lib.pruning import plan as plans
from lib.pruning import walk
from lib.pruning.plan import SparsityPlan
from lib.run.journal import Journal
from lib.run.record import Record, provenance
from lib.spectra import measure
from lib.spectra.cache import Measurement

log = logging.getLogger("main")


class Subject(Protocol):
    """What a run prunes: a model whose blocks are lent by its weights, and the data that it is calibrated on."""

    name: str  # the model's, for caches and plans
    given: str  # the same as the user gave it, or an absolute path
    weights: Weights  # what is pruned
    measured: Weights  # what a metric is measured on
    dense: Mapping[str, torch.Tensor] | None  # a copy of the dense weights, if one is held
    calib_dtype: torch.dtype | None  # of the products in calibration's passes, None for the model's own
    calibration_digest: str  # of its data
    search_digests: Sequence[str]  # of the data of a search
    scores: dict[tuple, object]  # what was measured on the dense weights, by what it depends on

    def inputs(self) -> BlockInputs:
        """Return the inputs of the first block."""

    def price_model(self, options: price.SearchOptions, by_magnitude: bool) -> price.PriceModel:
        """Return the model whose prices are searched, with the masks of magnitude or of Wanda."""


def measure_values(
    subject: Subject, task: Task, measurement: Measurement, options: price.SearchOptions, journal: Journal | None = None
) -> tuple[Values | None, price.SearchResult | None]:
    """Return the values that the allocation needs for each layer, and the search that found them, None without one.

    The ``measurement`` is the metric, for _ww; the ``options`` are those of the search, for _price.
    """
    needs = None if task.plan else task.needs
    if needs is None:
        return None, None
    if needs == "metric":
        return measure.load_or_measure(measurement, subject.name, subject.measured).values, None
    if needs == "price":
        search = search_prices(subject, task, options, journal)
        return search.ratios, search

    of_weights = block_scores.WEIGHT_SCORES.get(needs)
    multiple = {"multiple": task.hyper["owl_m"]} if needs == "outlier_ratio" else {}
    read = (subject.calibration_digest, subject.weights.expert_weighting)
    key = (needs, task.target) if of_weights else (needs, *read, *multiple.values())
    if key not in subject.scores:
        if of_weights:
            values = block_scores.shares_below(subject.weights, task.target, of_weights)
        else:
            number = partial(block_scores.BLOCK_SCORES[needs], **multiple)
            values = block_scores.score_blocks(subject.weights, subject.inputs(), number)
        # All processes take the first one's, which are the same but for the last bit, so that all make the same plan.
        subject.scores[key] = processes.on_main(lambda: values)
    return subject.scores[key], None


def search_prices(
    subject: Subject, task: Task, options: price.SearchOptions, journal: Journal | None
) -> price.SearchResult:
    """Return the result of the search for ratios of equal price.

    That of an unfinished run is taken from its journal, since a GPU may not reproduce the same bits.
    """
    key = _search_key(subject, task) if journal else ""
    if journal and (earlier := journal.get("prices", key)) is not None:
        log.info("the ratios of equal price are those that the interrupted run found")
        return price.SearchResult(**earlier)

    def search_alone() -> price.SearchResult:
        with processes.single_process():
            model = subject.price_model(options, task.by_magnitude)
            return price.search(model, subject.weights.layers, task.target, options)

    asked = ("price", task.target, task.by_magnitude, options, *subject.search_digests)
    if asked not in subject.scores:
        subject.scores[asked] = processes.on_main(search_alone)
    if journal:
        journal.put("prices", key, subject.scores[asked]._asdict())
    return subject.scores[asked]


def _search_key(subject: Subject, task: Task) -> str:
    """Return a hash of all that the result of a search depends on."""
    return digest([task.identity, subject.search_digests, subject.name, subject.weights.fingerprints()])


def _chosen(task: Task, layers: Sequence[Layer]) -> list[Layer]:
    """Return the layers over which the sparsity is distributed."""
    return [layer for layer in layers if layer.expert or not task.mixture.get("only")]


def make_plan(task: Task, layers: Sequence[Layer], values: Values | None, trial: float | None = None) -> SparsityPlan:
    """Return the allocation's plan for ``values``; ``trial`` is an epsilon to try instead of the flag's."""
    allocation = formulas.ALLOCATIONS[task.allocation]
    hyper = {name: task.hyper[name] for name in allocation.flags} | ({} if trial is None else {"epsilon": trial})
    chosen = _chosen(task, layers)
    target = task.target * (sum(layer.size for layer in chosen) / sum(layer.size for layer in layers))
    ratios = allocation.share(chosen, task.target, values, **hyper)
    if task.nm is None:
        return SparsityPlan(target, dict.fromkeys((layer.name for layer in layers), 0.0) | ratios)
    uniform = dict.fromkeys(ratios, task.nm)
    nm = formulas.mixed_nm(chosen, ratios, task.target, task.nm[1]) if task.allocation else uniform
    nm = dict.fromkeys((layer.name for layer in layers), (task.nm[1], task.nm[1])) | nm
    return SparsityPlan(target, {name: 1 - n / m for name, (n, m) in nm.items()}, nm)


def allocate(
    subject: Subject, task: Task, values: Values | None, journal: Journal | None = None
) -> tuple[SparsityPlan, dict[float, float]]:
    """Return the plan, and the perplexity of each epsilon that was tried for it with --epsilon auto."""
    layers = subject.weights.layers
    if task.plan:
        return plans.load_plan(Path(task.plan), subject.name, layers), {}
    if task.hyper.get("epsilon") != "auto":
        return make_plan(task, layers, values), {}

    tried, remember = {}, None
    if journal:
        key = _search_key(subject, task)
        tried, remember = journal.get("trials", key), partial(journal.put, "trials", key)
        subject.weights.use_scratch(journal.scratch)
    bounded = _chosen(task, layers), task.target, values, task.hyper["mapping_type"]
    grid = epsilon.epsilon_grid(formulas.largest_epsilon(*bounded))
    tries = {trial: make_plan(task, layers, values, trial) for trial in grid}
    trials = epsilon.try_epsilons(subject.weights, tries, task.pruner, subject.search, subject.dense, tried, remember)
    return tries[epsilon.best(trials)], trials


def prune(
    subject: Subject,
    task: Task,
    plan: SparsityPlan,
    values: Values | None,
    propagate: str,
    journal: Journal | None = None,
) -> list[walk.LayerReport]:
    """Prune the subject, whose weights are still dense, by ``plan`` and return the report of each layer.

    A block's inputs come from the predecessors that ``propagate`` says, ``pruned`` or ``dense`` ones. The journal is
    checked to hold blocks of this same run, or none.
    """
    if journal:
        identity = {"model": subject.name, "source": subject.given, "flags": task.identity, "plan": digest(plan)}
        identity |= {"versions": machine(subject.weights), "target": task.target}
        identity |= {"calibration": subject.calibration_digest, "fingerprints": subject.weights.fingerprints()}
        if task.pruner.statistic and identity["versions"]["device"] == "cpu":
            identity["bits"] = {"the number of threads": torch.get_num_threads(), "the compiled kernel": _kernel()}
        journal.begin(identity)
    inputs = subject.inputs()._replace(dtype=subject.calib_dtype) if task.pruner.statistic else None
    return walk.walk(subject.weights, plan, task.pruner, inputs, values, propagate, journal)


def machine(weights: Weights) -> dict[str, str]:
    """Return what the bits of a result depend on besides flags and data; processes: the order of float32 additions."""
    versions = {name: provenance()["versions"][name] for name in ("torch", "transformers")}
    return versions | {"device": weights.device.type, "processes": str(processes.count())}


def _kernel() -> str:
    """Return whether the CPU's compiled kernel is there."""
    try:
        sparse.load_kernel()
    except sparse.Unavailable:
        return "missing"
    return "there"


def save(record: Record, write: Callable[[], Path] | None) -> UserError | None:
    """Save the pruned model by ``write``, if there is one, which returns its folder; then write the results so far.

    An error that the user can fix is returned instead of raised, since the figures can still be measured.
    """
    try:
        if write:
            with record.stage("save"):
                record.add_model(write())
    except UserError as error:
        log.warning("%s; the figures are measured all the same", error)
        return error
    finally:
        record.write()
    return None


def write_plan(
    subject: Subject, task: Task, plan: SparsityPlan, save_plan: str | None, recipe: str | None, flags: Mapping
) -> None:
    """Write the plan to ``save_plan``, with the ``flags`` behind it, and as an llm-compressor ``recipe``, if asked."""
    layers = subject.weights.layers
    if recipe:
        files.write_atomically(Path(recipe), plans.llm_compressor_recipe(plan, layers, task.pruner_name))
    if save_plan:
        plans.save_plan(Path(save_plan), plan, subject.name, layers, {"method": task.method, "flags": flags})


def warn_if_off_target(target: float, sparsity: float) -> None:
    """Warn if the measured ``sparsity`` of a pruned model misses the target by more than rounding."""
    if abs(sparsity - target) > 0.002:
        text = "the measured sparsity, %.4f, misses the target of %g: per row, Wanda removes a whole number of weights"
        log.warning(text, sparsity, target)
