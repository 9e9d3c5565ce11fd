"""Pipeline of a run: steps that measure, allocate, prune and save a subject, a language model or a classifier."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

from lib.allocation import block_scores, epsilon, formulas, price
from lib.allocation.price_model import PriceModel
from lib.calibration.hidden import BlockInputs
from lib.cli.task import Measurement, Task
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

log = logging.getLogger("main")

# A measured sparsity may miss the target by this much before it is worth a warning.
MISSED = 0.002


class Subject(Protocol):
    """What a run prunes: a model whose blocks are lent by its weights, and the data that it is calibrated on."""

    # The model's name, for caches and plans.
    name: str
    # What is pruned, and what a metric is measured on.
    weights: Weights
    measured: Weights
    # A copy of the dense weights, if one is held.
    dense: Mapping[str, torch.Tensor] | None
    # The dtype of the products in calibration's passes, None for the model's own.
    calib_dtype: torch.dtype | None
    # Hashes of the data of calibration and of a search.
    calibration_digest: str
    search_digests: Sequence[str]
    # What was measured on the dense weights, by what it depends on.
    scores: dict[tuple, object]

    def inputs(self) -> BlockInputs:
        """Return the inputs of the first block."""

    def price_model(self, effort: price.Effort, by_magnitude: bool) -> PriceModel:
        """Return the model whose prices are searched, with the masks of magnitude or of Wanda."""


# -------------------------------------------------------------------------------------------------------------- steps


def measure_values(
    subject: Subject, task: Task, measurement: Measurement, options: price.SearchOptions, journal: Journal | None = None
) -> tuple[Mapping[str, float] | None, price.SearchResult | None]:
    """Return the values that the allocation needs for each layer, and the search that found them, None without one.

    Args:
        measurement: the metric, for _ww.
        options: of the search, for _price.
    """
    needs = None if task.plan else task.needs
    if needs is None:
        return None, None
    if needs == "metric":
        metric, folder, how = measurement
        return measure.load_or_measure(folder, metric, subject.name, subject.measured, how).values, None
    if needs == "price":
        values, _ = measure_values(subject, task.starting_task, measurement, options)
        start = make_plan(task.starting_task, subject.weights.layers, values).ratios if task.start else None
        search = search_prices(subject, task, start, options, journal)
        return search.ratios, search

    target = task.target if needs in block_scores.WEIGHT_SCORES else 0.0  # the other scores depend on no target
    multiple = task.hyper["owl_m"] if needs == "outlier_ratio" else 0.0
    key = (needs, target, multiple, subject.calibration_digest)
    if key not in subject.scores:
        values = block_scores.measure_scores(needs, subject.weights, target, subject.inputs, multiple)
        # All processes take the first one's, which are the same but for the last bit, so that all make the same plan.
        subject.scores[key] = processes.on_main(lambda: values)
    return subject.scores[key], None


def search_prices(
    subject: Subject,
    task: Task,
    start: Mapping[str, float] | None,
    options: price.SearchOptions,
    journal: Journal | None,
) -> price.SearchResult:
    """Return the result of the search for ratios of equal price, which begins with the ratios ``start``.

    That of an unfinished run is taken from its journal, since a GPU may not reproduce the same bits.
    """
    key = "" if journal is None else _search_key(subject, task)
    earlier = None if journal is None else journal.get("prices", key)
    if earlier is not None:
        log.info("the ratios of equal price are those that the interrupted run found")
        return price.SearchResult.of(earlier)
    if processes.count() > 1:
        log.info("the first process searches for prices, the others wait for them")

    def search_alone() -> price.SearchResult:
        with processes.single_process():
            model = subject.price_model(options.effort, task.by_magnitude)
            return price.search(model, subject.weights.layers, task.target, start, options)

    begin = tuple((start or {}).items())
    scores_key = ("price", task.target, task.by_magnitude, begin, options, *subject.search_digests)
    if scores_key not in subject.scores:
        subject.scores[scores_key] = processes.on_main(search_alone)
    if journal is not None:
        journal.put("prices", key, subject.scores[scores_key]._asdict())
    return subject.scores[scores_key]


def _search_key(subject: Subject, task: Task) -> str:
    """Return a hash of all that the result of a search depends on."""
    return digest([task.identity, subject.search_digests, subject.name, subject.weights.fingerprints()])


def make_plan(
    task: Task, layers: Sequence[Layer], values: Mapping[str, float] | None, trial: float | None = None
) -> SparsityPlan:
    """Return the allocation's plan for ``values``; ``trial`` is an epsilon to try instead of the flag's."""
    allocation = formulas.ALLOCATIONS[task.allocation]
    hyper = {name: task.hyper[name] for name in allocation.flags}
    if trial is not None:
        hyper["epsilon"] = trial
    ratios = allocation.share(layers, task.target, values, **hyper)
    if task.nm is None:
        return SparsityPlan(task.target, ratios)
    nm = dict.fromkeys(ratios, task.nm)
    if task.allocation:
        nm = formulas.mixed_nm(layers, ratios, task.target, task.nm[1])
    return SparsityPlan(task.target, {name: 1 - n / m for name, (n, m) in nm.items()}, nm)


def allocate(
    subject: Subject, task: Task, values: Mapping[str, float] | None, journal: Journal | None = None
) -> tuple[SparsityPlan, list[epsilon.Trial]]:
    """Return the plan, and the trials made for it with --epsilon auto."""
    layers = subject.weights.layers
    if task.plan:
        return plans.load_plan(Path(task.plan), subject.name, layers), []
    if task.hyper.get("epsilon") != "auto":
        return make_plan(task, layers, values), []

    tried = {}
    if journal is not None:
        tried = _Tried(journal, _search_key(subject, task))
        subject.weights.use_scratch(journal.scratch)
    largest = formulas.largest_epsilon(layers, task.target, values, task.hyper["mapping_type"])
    plan_of = partial(make_plan, task, layers, values)
    grid = epsilon.epsilon_grid(largest)
    trials = epsilon.try_epsilons(subject.weights, plan_of, grid, task.pruner, subject.search, subject.dense, tried)
    return plan_of(epsilon.best(trials).epsilon), trials


class _Tried(dict):
    """Results of a search by plan, each recorded in the journal as soon as it is known."""

    def __init__(self, journal: Journal, key: str) -> None:
        super().__init__(journal.get("trials", key) or {})
        self._journal, self._key = journal, key

    def __setitem__(self, plan: str, perplexity: float) -> None:
        super().__setitem__(plan, perplexity)
        self._journal.put("trials", self._key, dict(self))


def prune(
    subject: Subject,
    task: Task,
    plan: SparsityPlan,
    values: Mapping[str, float] | None,
    propagate: str,
    journal: Journal | None = None,
) -> list[walk.LayerReport]:
    """Prune the subject, whose weights are still dense, by ``plan`` and return the report of each layer.

    Args:
        values: those behind the plan, for the report.
        propagate: whether a block's inputs come from ``pruned`` or ``dense`` predecessors.
        journal: checked to hold blocks of this same run, or none.
    """
    if journal is not None:
        versions = {name: provenance()["versions"][name] for name in ("torch", "transformers")}
        device = next(iter(subject.weights.visit())).device.type
        # The number of processes determines the order of float32 additions.
        machine = versions | {"device": device, "processes": str(processes.count())}
        identity = {"flags": task.identity, "versions": machine, "plan": digest(plan)}
        identity |= {"calibration": subject.calibration_digest, "fingerprints": subject.weights.fingerprints()}
        journal.begin(identity)
    inputs = subject.inputs()._replace(dtype=subject.calib_dtype) if task.pruner.statistic else None
    return walk.walk(subject.weights, plan, task.pruner, inputs, values, propagate, journal)


def save(record: Record, write: Callable[[], Path] | None) -> UserError | None:
    """Save the pruned model by ``write``, if there is one, which returns its folder; then write the results so far.

    An error that the user can fix is returned instead of raised, since the figures can still be measured.
    """
    try:
        if write is not None:
            with record.stage("save"):
                folder = write()
            record.content["saved_model"] = str(folder)
    except UserError as error:
        log.warning("%s; the figures are measured all the same", error)
        return error
    finally:
        record.write()
    return None


# ------------------------------------------------------------------------------------------------- what is left behind


def write_plan(
    subject: Subject, task: Task, plan: SparsityPlan, save_plan: str | None, recipe: str | None, flags: Mapping
) -> None:
    """Write the plan to ``save_plan``, with the ``flags`` behind it, and as an llm-compressor ``recipe``, if asked."""
    layers = subject.weights.layers
    content = plans.llm_compressor_recipe(plan, layers, task.pruner_name) if recipe else None
    if save_plan:
        plans.save_plan(Path(save_plan), plan, subject.name, layers, {"method": task.method, "flags": flags})
    if content:
        files.write_atomically(Path(recipe), content)


def warn_if_off_target(task: Task, sparsity: float) -> None:
    """Warn if the measured ``sparsity`` of a pruned model misses the target by more than rounding."""
    if task.pruner and abs(sparsity - task.target) > MISSED:
        text = "the measured sparsity, %.4f, misses the target of %g: per row, Wanda removes a whole number of weights"
        log.warning(text, sparsity, task.target)
