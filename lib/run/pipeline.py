"""Experiment steps: checks before the weights are loaded, state shared by several runs, and making a plan."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lib import sparse
from lib.allocation import block_scores, formulas, price, price_model
from lib.allocation import epsilon as search
from lib.calibration import hidden, texts
from lib.cli.flags import Flags
from lib.cli.settings import Experiment, Output, Task, ZeroShot
from lib.core import cpu, files, processes
from lib.core.digests import digest
from lib.core.errors import UserError, flag_name
from lib.core.files import in_repository
from lib.core.lazy import torch
from lib.evaluation import zero_shot as evaluation
from lib.models import load, locate, memory
from lib.models.layers import Layer, prunable_layers
from lib.models.safetensors_io import Checkpoint
from lib.models.streamed import Streamed
from lib.models.weights import Packed, Weights, weights_of
from lib.pruning import plan as plans
from lib.pruning.plan import SparsityPlan
from lib.run.journal import MANIFEST, Identity, Journal, can_reopen, partial_folder
from lib.run.record import has_flags, provenance, read_run
from lib.spectra import measure, spectrum

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("main")

FIGURES = ("run", "layers", "perplexity", "zero_shot", "price")  # what the names of a run's files begin with
MISSED = 0.002  # by which a measured sparsity may miss the target before it is worth a warning


class Windows(NamedTuple):
    """Windows of token ids, [windows, seqlen]; None if not needed."""

    calibration: Tensor | None = None
    evaluation: Tensor | None = None
    search: tuple[Tensor, Tensor] | None = None  # of calibration and held out, for --epsilon auto and _price


class Prepared(NamedTuple):
    """Everything known before the weights are loaded."""

    source: load.Source
    skeleton: PreTrainedModel
    layers: tuple[Layer, ...]
    dtypes: load.Dtypes
    calib_dtype: torch.dtype | None  # of the products of calibration's passes, None for the model's own
    tokenizer: PreTrainedTokenizerBase
    seqlen: int
    windows: Windows
    questions: evaluation.Tasks | None
    reserve: int  # bytes of each GPU that are left for the work
    streamed: Path | None  # the folder from which the weights are streamed
    journal: Journal | None  # of the pruned model's folder


class Session:
    """State shared by several runs of one process: texts, questions, the model and a copy of its dense weights.

    A session that is not ``shared`` serves one run and keeps nothing. The model is loaded once, so it must leave room
    on each GPU for the most demanding of the ``planned`` runs.
    """

    def __init__(self, shared: bool = False, planned: Sequence[Experiment] = ()) -> None:
        self.shared, self.planned = shared, planned
        self.dense: Mapping[str, Tensor] | None = None
        self._made: dict = {}

    def once(self, make: Callable, *args):
        """Return ``make(*args)``, or in a shared session its earlier result for the same arguments."""
        if not self.shared:
            return make(*args)
        key = (getattr(make, "func", make), getattr(make, "args", ()), args)
        if key not in self._made:
            self._made[key] = make(*args)
        return self._made[key]

    def weights(self, known: Prepared) -> Weights:
        """Return the model's dense weights, loaded or restored."""
        dtypes = known.dtypes
        key = ("weights", known.source, dtypes)
        if key in self._made:
            self._made[key].restore(self.dense)
            return self._made[key]
        if sparse.is_packed(known.source.path):
            log.info("loading %s, which is packed", known.source.path)
            weights = Packed(sparse.load_packed(known.source.path), known.layers)
        elif known.streamed:
            log.info("streaming %s block by block", known.streamed)
            model = load.empty_llm(known.source, known.streamed, dtypes.compute)
            device = processes.device() or memory.freest()  # which the blocks visit
            weights = Streamed(model, Checkpoint(known.streamed), device, dtypes.stored)
        else:
            log.info("loading %s", known.source.path)
            model = load.load_llm(known.source, dtypes.compute, processes.device(), reserve=known.reserve)
            weights = weights_of(model, None if dtypes.stored == dtypes.compute else dtypes.stored)
        if self.shared:
            self._made[key], self.dense = weights, weights.snapshot()
        return weights


# ------------------------------------------------------------------------------------- before the weights are loaded


def prepare(settings: Experiment, task: Task, session: Session) -> Prepared:
    """Check everything that can be checked without the weights: 13 GB take a while to load."""
    files.check_writable("save", Path(settings.save))
    warn_of_replacement(settings, task)
    _check_written_files(settings, task)
    source = processes.on_main(lambda: locate.locate(settings.model, settings.cache_dir))
    if task.pruner or settings.metrics_only or settings.stream == "always":
        sparse.refuse_packed(source)
    skeleton = session.once(load.load_skeleton, source)
    layers = session.once(prunable_layers, skeleton)
    if sparse.is_packed(source.path):
        dtypes = sparse.packed_dtypes(source, settings.dtype)
    else:
        dtypes = load.choose_dtypes(settings.dtype, skeleton)
    _check_layers(settings, task, source, layers)
    calib_dtype = _calib_dtype(settings, dtypes)
    if settings.hidden_states == "gpu" and wants_calibration(task) and not cpu.gpus():
        raise UserError("hidden_states", "gpu: there is no GPU that torch can use; leave it out, or use cpu or disk")
    if wants_calibration(task) and settings.nsamples < processes.count():
        text = f"{settings.nsamples}: {processes.count()} processes share them, so give at least as many"
        raise UserError("nsamples", text)
    if settings.save_model:
        target = model_folder(settings, task)
        have = _written_before(settings, task, target)
        files.check_writable("save_model", target.parent, memory.saved_bytes(skeleton, source, dtypes.stored) - have)
    reads = not settings.metrics_only and (settings.eval_wikitext or wants_calibration(task))
    seqlen = _seqlen(settings.seqlen, load.context_length(skeleton), reads)
    tokenizer = session.once(load.load_tokenizer, source)
    windows = _read_windows(settings, task, tokenizer, seqlen, session)
    load.check_vocabulary(settings.model, skeleton, windows.calibration, windows.evaluation)
    reserve = max(_reserve(run, skeleton, dtypes, seqlen, session) for run in (settings, *session.planned))
    ask = partial(memory.fits_in_memory, reserve=reserve)
    fits = all(processes.gathered(session.once(ask, skeleton, dtypes.compute)))  # once: later the model is in the way
    streamed = _streamed_folder(settings, task, source, fits)
    tasks = questions(settings, session)
    journal = _open_journal(settings, task)  # last: what is refused above leaves no trace
    return Prepared(
        source, skeleton, layers, dtypes, calib_dtype, tokenizer, seqlen, windows, tasks, reserve, streamed, journal
    )


def _calib_dtype(settings: Experiment, dtypes: load.Dtypes) -> torch.dtype | None:
    """Return the dtype of the products of calibration's passes, None for the model's own."""
    if settings.calib_dtype is None:
        return None
    if dtypes.compute != torch.float32:
        own = str(dtypes.compute).removeprefix("torch.")
        text = f"the model is computed in {own}, which is as fast; leave it out, or use --dtype float32"
        raise UserError("calib_dtype", f"{settings.calib_dtype}: {text}")
    if not cpu.gpus() and not cpu.multiplies(torch.bfloat16):
        text = "--calib_dtype %s: this CPU has no instructions for it, so that it is slower than float32"
        log.warning(text, settings.calib_dtype)
    return getattr(torch, settings.calib_dtype)


def _streamed_folder(settings: Experiment, task: Task, source: load.Source, fits: bool) -> Path | None:
    """Return the folder from which the weights are streamed, or None if they are loaded."""
    if settings.stream == "never" and processes.count() > 1 and not fits:
        text = f"never: each of the {processes.count()} processes holds the whole model, for which there is no room"
        raise UserError("stream", f"{text}; leave it out, or start one process, which uses all GPUs")
    if settings.stream == "never" or (settings.stream == "auto" and fits) or sparse.is_packed(source.path):
        return None
    if task.wants == "price":
        why = "--stream always" if settings.stream == "always" else "the model does not fit beside what a search needs"
        text = f"{task.method}: {why}, and a streamed model has no prices; use more or larger GPUs, or a --plan"
        raise UserError("prune_method", text)
    if settings.eval_zero_shot and not fits:
        text = "the model does not fit into the memory of the GPUs and the CPU together, which lm-eval needs"
        raise UserError("eval_zero_shot", f"with a streamed model: {text}; leave it out, and measure on more GPUs")
    if task.pruner and settings.packed:
        text = "with a streamed model, whose blocks go to disk as they are; pack it afterwards: scripts/speedup/pack.py"
        raise UserError("packed", text)
    if task.pruner and not settings.save_model:
        why = "always" if settings.stream == "always" else "auto (the model does not fit into memory)"
        raise UserError("stream", f"{why} without --save_model: pruned blocks go to disk; add --save_model DIR")
    folder = locate.local_copy(source)
    Checkpoint(folder)  # refuses what cannot be streamed
    return folder


def _written_before(settings: Experiment, task: Task, target: Path) -> int:
    """Return the bytes that an unfinished run wrote for ``target``, which need no more space on the disk."""
    reopened = can_reopen(target, settings.restart, _unmeasured(settings, task))
    # A packed folder is unpacked beside itself.
    folder = target if reopened and not sparse.is_packed(target) else partial_folder(target)
    return sum(path.stat().st_size for path in folder.glob("*") if path.is_file())


def _unmeasured(settings: Experiment, task: Task) -> bool:
    """Return whether the run with these flags was stopped in its evaluation, when its model was whole."""
    earlier = read_run(Path(settings.save), task.run)
    return has_flags(earlier, settings.flags()) and earlier.get("complete") is False


def _open_journal(settings: Experiment, task: Task) -> Journal | None:
    if not settings.save_model:
        return None
    return Journal(model_folder(settings, task), settings.restart, _unmeasured(settings, task))


def warn_of_replacement(settings: Output, task: Task) -> None:
    """Warn about files that will be replaced: published names contain neither seed nor N:M nor epsilon.

    Raises:
        UserError: something would be replaced that an earlier run did not write.
    """
    if settings.save_model:
        _check_target(settings, model_folder(settings, task))
    earlier = read_run(Path(settings.save), task.run)
    if earlier and not has_flags(earlier, settings.flags()):
        log.warning("%s/*_%s.* of a run with other flags will be replaced", settings.save, task.run)
    if settings.save_model and model_folder(settings, task).exists() and not (earlier and not earlier.get("complete")):
        log.warning("%s already exists and will be replaced, with every file in it", model_folder(settings, task))


def _check_target(settings: Output, target: Path) -> None:
    """Refuse to replace ``target`` by a pruned model if anything else than an earlier one would be lost."""
    files.check_folder("save_model", target)
    for name, path in settings.paths().items():
        for place in (target, partial_folder(target)):
            if path.resolve().is_relative_to(place.resolve()):
                inside = f"{flag_name(name)} {path} lies in {place}, which would be replaced"
                itself = f"{place} is {flag_name(name)} itself, and would be replaced"
                text = itself if path.resolve() == place.resolve() else inside
                raise UserError("save_model", f"{settings.save_model}: {text}; give another folder")
    found = sorted(target.iterdir()) if target.is_dir() else []
    mark = MANIFEST if isinstance(settings, Experiment) else "config.json"
    fix = "move it away, or give another folder"
    if found and target / mark not in found:
        text = f"{target} would be replaced, and no earlier run wrote it (it holds no {mark})"
        raise UserError("save_model", f"{settings.save_model}: {text}; {fix}")
    for path in found:
        if path.is_dir():  # an export of the weights, for example; a saved model has no folders
            text = f"{target} would be replaced, and with it the folder {path.name}, which no pruning wrote"
            raise UserError("save_model", f"{settings.save_model}: {text}; {fix}")


def _check_written_files(settings: Experiment, task: Task) -> None:
    """Refuse a file to write in the place of an input, of another output, or of what is no ordinary file."""
    figures = {f"{kind}_{task.run}" for kind in FIGURES}
    others = settings.paths()
    model = others.get("model")
    for name in ("save_plan", "export_llmcompressor"):
        path = others.pop(name, None)
        if path is None:
            continue
        files.check_file(name, path)
        for other, place in others.items():
            if path.resolve() == place.resolve():
                raise UserError(name, f"{path}: is {flag_name(other)}, too; give another file")
        if model is not None and path.resolve().is_relative_to(model.resolve()):
            raise UserError(name, f"{path}: lies in the folder of {flag_name('model')}; give another file")
        if path.stem in figures and path.resolve().parent == Path(settings.save).resolve():
            raise UserError(name, f"{path}: is where the run's figures are written; give another file")
        files.check_writable(name, path.parent)


def model_folder(settings: Output, task: Task) -> Path:
    """Return where the pruned model is saved."""
    return Path(settings.save_model) / task.folder


def metric_folder(settings: Experiment, name: str) -> Path:
    """Return where the metrics of the model ``name`` are cached."""
    return Path(settings.ww_metric_cache or Path(in_repository("data"), name))


def metric_file(settings: Experiment, known: Prepared) -> Path:
    """Return the file in which the metric is cached."""
    stem = metric_settings(settings).stem(settings.ww_metric)
    return metric_folder(settings, known.source.name) / f"{stem}.npy"


def whole_model(weights: Weights, known: Prepared, saved: str | None) -> PreTrainedModel:
    """Return the model in memory; a streamed one, known to fit, is loaded from its folder."""
    if not weights.streamed:
        return weights.model
    source = known.source if saved is None else locate.locate(saved, known.source.cache_dir)
    return load.load_llm(source, known.dtypes.compute, processes.device(), reserve=known.reserve)


def metric_settings(settings: Experiment) -> measure.Settings:
    farms = spectrum.Farms(settings.farms_rows, settings.farms_ratio, settings.farms_steps) if settings.farms else None
    return measure.Settings(settings.esd_driver, farms, settings.seed)


def wants_calibration(task: Task) -> bool:
    """Return whether the pruner or the allocation needs calibration windows."""
    scored = {task.wants, task.first.wants} & block_scores.BLOCK_SCORES.keys()
    return bool(task.pruner and (task.pruner.statistic or scored))


def check_used(settings: Experiment) -> None:
    """Refuse a flag that nothing reads in this run, or warn if it is about texts: scripts pass those to every run."""
    task = settings.task()
    if task.pruner and "hidden_states" in settings.given and not wants_calibration(task):
        text = f"{settings.hidden_states} does nothing with {task.method}, which needs no calibration"
        raise UserError("hidden_states", text)
    evaluates = settings.eval_wikitext and not settings.metrics_only
    searches = settings.epsilon == "auto" or task.wants == "price"
    used = {
        "nsamples": wants_calibration(task),
        "calib_data": wants_calibration(task) or searches,
        "eval_data": evaluates,
        "eval_windows": evaluates,
        "seqlen": not settings.metrics_only,
    }
    unused = [f"--{name}" for name in used if name in settings.given and not used[name]]
    if unused:
        log.warning("no effect in this run, which reads no such text: %s", ", ".join(unused))


def _reserve(
    settings: Experiment, skeleton: PreTrainedModel, dtypes: load.Dtypes, seqlen: int, session: Session
) -> int:
    task = settings.task()
    hessians = bool(task.pruner) and task.pruner.statistic == "hessian"
    calibrated = -(-settings.nsamples // processes.count()) if wants_calibration(task) else 0
    copies = task.pruner.copies if task.pruner else 0
    least = session.once(memory.working_set, skeleton, dtypes.compute, hessians, calibrated, seqlen, copies)
    layers = session.once(prunable_layers, skeleton)
    if task.wants == "lamp_score":
        return least + block_scores.LAMP_BYTES * max(layer.size for layer in layers)
    if task.wants != "price":
        return least
    gpus = 1 if processes.device() else max(1, cpu.gpus())
    effort = settings.price_options().effort
    ranks = memory.rank_bytes(layers, task.by_magnitude) // gpus  # they lie beside the layers
    count, length = price.FIT_WINDOWS + effort.held_out_windows, effort.length(seqlen)
    shape = (length, effort.windows_per_step, count)
    return max(least, ranks + memory.price_working_set(skeleton, layers, dtypes.compute, *shape))


def _check_layers(settings: Experiment, task: Task, source: load.Source, layers: tuple[Layer, ...]) -> None:
    """Refuse contradictions between the flags and the model's shapes, and a metric's cache that cannot be written."""
    for layer in layers if task.nm else ():
        if layer.shape[1] % task.nm[1]:
            text = f"{layer.name} has {layer.shape[1]} columns, which {task.nm[1]} does not divide"
            raise UserError("sparsity_type", f"{settings.sparsity_type}: {text}")
    if "ww" in (task.allocation, task.start):
        folder, how = metric_folder(settings, source.name), metric_settings(settings)
        if not measure.has_cache(folder, settings.ww_metric, source.name, layers, how):
            files.check_writable("ww_metric_cache", folder)
        for layer in layers if settings.farms else ():
            try:
                spectrum.farms_windows(layer.shape, how.farms)
            except spectrum.NoFit as error:
                raise UserError("farms", f"with {layer.name}: {error}; lower --farms_rows or --farms_ratio") from error
    for part in (task, task.first) if task.pruner and not settings.plan else ():
        if part.wants is None:
            make_plan(settings, part, layers, None)  # from shapes alone: it is met, or refused here
    if settings.plan:
        plans.load_plan(Path(settings.plan), source.name, layers)


def _seqlen(asked: int, context: int | None, reads: bool) -> int:
    if context is None or asked <= context:
        return asked
    if reads:
        log.warning("--seqlen %d is more than the model's context; using %d", asked, context)
    return context


def _read_windows(
    settings: Experiment, task: Task, tokenizer: PreTrainedTokenizerBase, seqlen: int, session: Session
) -> Windows:
    if settings.metrics_only:
        return Windows()
    windows = Windows()
    if wants_calibration(task):
        if settings.eval_wikitext and settings.one_file():
            session.once(_warn_of_one_text, settings.eval_data)
        draws = (settings.calib_data, tokenizer, settings.nsamples, seqlen, settings.seed)
        windows = windows._replace(calibration=session.once(texts.calibration_windows, *draws))
    if settings.epsilon == "auto":
        counts = (search.WINDOWS, search.WINDOWS)
        draws = (settings.calib_data, tokenizer, counts, seqlen, settings.seed, "--epsilon auto")
        windows = windows._replace(search=session.once(texts.search_windows, *draws))
    if task.wants == "price":
        effort = settings.price_options().effort
        counts, length = (price.FIT_WINDOWS, effort.held_out_windows), effort.length(seqlen)
        draws = (settings.calib_data, tokenizer, counts, length, settings.seed, "_price")
        windows = windows._replace(search=session.once(texts.search_windows, *draws))
    if settings.eval_wikitext:
        cut = (settings.eval_data, tokenizer, seqlen, settings.eval_windows)
        windows = windows._replace(evaluation=session.once(texts.evaluation_windows, *cut))
    return windows


def _warn_of_one_text(name: str) -> None:
    log.warning("%s is both calibrated and evaluated on; give another text: --eval_data FILE", name)


def questions(settings: ZeroShot, session: Session) -> evaluation.Tasks | None:
    """Return the requested tasks with their data loaded; None without --eval_zero_shot."""
    if not settings.eval_zero_shot:
        return None
    names = tuple(dict.fromkeys(filter(None, settings.tasks.split(","))))
    return session.once(evaluation.find_tasks, names, settings.include_path, settings.num_fewshot)


def zero_shot(
    settings: ZeroShot, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: evaluation.Tasks
) -> evaluation.ZeroShot:
    """Return the model's results on ``tasks``."""
    batch = settings.eval_batch_size if settings.eval_batch_size == "auto" else int(settings.eval_batch_size)
    return evaluation.zero_shot(model, tokenizer, tasks, settings.num_fewshot, settings.limit, batch)


# ------------------------------------------------------------------------------------------------------ with weights


def measure_values(
    settings: Experiment, task: Task, weights: Weights, known: Prepared, session: Session
) -> dict[str, float] | None:
    """Return the values that the allocation needs for each layer, None if it needs none."""
    wants = None if settings.plan else task.wants
    if wants is None:
        return None
    if wants == "metric":
        folder, how = metric_folder(settings, known.source.name), metric_settings(settings)
        return measure.load_or_measure(folder, settings.ww_metric, known.source.name, weights, how).values
    target = task.target if wants in block_scores.WEIGHT_SCORES else 0.0  # the other scores depend on no target
    multiple = settings.owl_m if wants == "outlier_ratio" else 0.0
    asked = (wants, weights, target, multiple, known.windows.calibration, settings.hidden_states)
    values = session.once(_scores, *asked)
    return processes.on_main(lambda: values)  # the same in the last bit, so that all make the same plan


def find_prices(
    settings: Experiment, task: Task, weights: Weights, known: Prepared, session: Session
) -> price.Found | None:
    """Return the result of the search for ratios of equal price, None for another allocation.

    The result of an unfinished run is taken from its journal: a GPU may not reproduce the same bits.
    """
    if settings.plan or task.wants != "price":
        return None
    journal, key = known.journal, ""
    if journal is not None:
        windows = [digest(part) for part in known.windows.search]
        key = digest([settings.identity(), windows, known.source.name, weights.fingerprints()])
        earlier = journal.get("prices", key)
        if earlier is not None:
            log.info("the ratios of equal price are those that the interrupted run found")
            return price.Found.of(earlier)
    start = None
    if task.start:
        values = measure_values(settings, task.first, weights, known, session)
        start = tuple(make_plan(settings, task.first, weights.layers, values).ratios.items())
    device = next(iter(weights.visit())).device
    dtype = price_model.search_dtype(settings.price_dtype, device, known.dtypes.compute)
    options = settings.price_options()
    if processes.count() > 1:
        log.info("the first process searches for prices, the others wait for them")

    def search_apart() -> price.Found:
        with processes.single_process():
            windows = known.windows.search
            return session.once(_search_prices, weights, windows, dtype, task.by_magnitude, task.target, start, options)

    found = processes.on_main(search_apart)
    if journal is not None:
        journal.put("prices", key, found._asdict())
    return found


def _search_prices(
    weights: Weights,
    windows: tuple[Tensor, Tensor],
    dtype: torch.dtype | None,
    by_magnitude: bool,
    target: float,
    start: tuple[tuple[str, float], ...] | None,
    options: price.Options,
) -> price.Found:
    effort = options.effort
    model = price_model.LanguagePriceModel(
        weights, windows, effort.windows_per_step, effort.token_stride, dtype, by_magnitude
    )
    return price.search(model, weights.layers, target, start and dict(start), options)


def priced(found: price.Found | None) -> dict:
    """Return the record's entries on the search for prices; empty without one."""
    if found is None:
        return {}
    steps = [step._asdict() for step in found.steps]
    return {"price_search": {"kept": found.kept, "dtype": found.dtype, "held_out_kl": found.held, "steps": steps}}


def draw_prices(settings: Output, task: Task, found: price.Found | None) -> None:
    """Write the plot of the search for prices, if there was one."""
    if found is not None:
        files.save_figure(price.draw(found), Path(settings.save) / f"price_{task.run}.png", dpi=130)


def _scores(
    wants: str, weights: Weights, target: float, multiple: float, windows: Tensor | None, place: str
) -> dict[str, float]:
    enter = partial(hidden.enter_blocks, weights, windows, place)
    return block_scores.measure_scores(wants, weights, target, enter, multiple)


def make_plan(
    settings: Flags,
    task: Task,
    layers: tuple[Layer, ...],
    values: Mapping[str, float] | None,
    epsilon: float | None = None,
) -> SparsityPlan:
    """Return the allocation's plan for ``values``; ``epsilon`` overrides the settings."""
    how = formulas.ALLOCATIONS[task.allocation]
    hyper = {name: getattr(settings, name) for name in how.flags}
    if epsilon is not None and "epsilon" in hyper:
        hyper["epsilon"] = epsilon
    ratios = how.share(layers, task.target, values, **hyper)
    if task.nm is None:
        return SparsityPlan(task.target, ratios)
    nm = dict.fromkeys(ratios, task.nm)
    if task.allocation:
        nm = formulas.mixed_nm(layers, ratios, task.target, task.nm[1])
    return SparsityPlan(task.target, {name: 1 - n / m for name, (n, m) in nm.items()}, nm)


def choose_plan(
    settings: Experiment, task: Task, weights: Weights, known: Prepared, values: Mapping[str, float] | None, dense
) -> tuple[SparsityPlan, list[search.Trial]]:
    """Return the plan, written where requested, and the trials made for it."""
    trials: list[search.Trial] = []
    layers = weights.layers
    if settings.plan:
        plan = plans.load_plan(Path(settings.plan), known.source.name, layers)
    elif settings.epsilon == "auto":
        largest = formulas.largest_epsilon(layers, task.target, values, settings.mapping_type)
        plan_of = partial(make_plan, settings, task, layers, values)
        trials = _search(settings, task, weights, known, plan_of, search.epsilon_grid(largest), dense)
        plan = plan_of(search.best(trials).epsilon)
    else:
        plan = make_plan(settings, task, layers, values)
    _write_plan(settings, task, plan, known)
    return plan, trials


def _search(
    settings: Experiment, task: Task, weights: Weights, known: Prepared, plan_of: Callable, grid: list[float], dense
) -> list[search.Trial]:
    """Try every epsilon of the grid except those that an unfinished run has already tried."""
    journal, tried = known.journal, {}
    if journal is not None:
        windows = [digest(part) for part in known.windows.search]
        key = digest([settings.identity(), windows, known.source.name, weights.fingerprints()])
        tried = _Tried(journal, key)
        if isinstance(weights, Streamed):
            weights.scratch(journal.scratch)
    return search.try_epsilons(weights, plan_of, grid, task.pruner, known.windows.search, dense, tried)


class _Tried(dict):
    """Results of a search by plan, each recorded in the journal as soon as it is known."""

    def __init__(self, journal: Journal, key: str) -> None:
        super().__init__(journal.get("trials", key) or {})
        self._journal, self._key = journal, key

    def __setitem__(self, plan: str, perplexity: float) -> None:
        super().__setitem__(plan, perplexity)
        self._journal.put("trials", self._key, dict(self))


def begin_journal(settings: Experiment, weights: Weights, known: Prepared, plan: SparsityPlan) -> None:
    """Let the journal check whether it holds blocks of this same run; the weights are still dense."""
    if known.journal is None:
        return
    windows = known.windows.calibration
    versions = provenance()["versions"]
    device = next(iter(weights.visit())).device.type
    same = {name: versions[name] for name in ("torch", "transformers")}
    same |= {"device": device, "processes": str(processes.count())}  # whose number is the order of sums
    calibrated = "none" if windows is None else digest(windows)
    known.journal.begin(
        Identity(settings.identity(), digest(plan), calibrated, same, weights.fingerprints())
    )


def searched(trials: list[search.Trial]) -> dict:
    """Return the record's entries on the search for epsilon; empty without one."""
    if not trials:
        return {}
    return {"epsilon": search.best(trials).epsilon, "epsilon_search": [trial._asdict() for trial in trials]}


def _write_plan(settings: Experiment, task: Task, plan: SparsityPlan, known: Prepared) -> None:
    recipe = None
    if settings.export_llmcompressor:
        recipe = plans.llm_compressor_recipe(plan, known.layers, task.pruner_name)
    if settings.save_plan:
        made_by = {"method": task.method, "flags": settings.flags()}
        plans.save_plan(Path(settings.save_plan), plan, known.source.name, known.layers, made_by)
    if recipe:
        files.write_atomically(Path(settings.export_llmcompressor), recipe)


def warn_of_miss(target: float, sparsity: float) -> None:
    """Warn if the measured sparsity misses the target by more than rounding."""
    if abs(sparsity - target) > MISSED:
        text = "the measured sparsity, %.4f, misses the target of %g: per row, Wanda removes a whole number of weights"
        log.warning(text, sparsity, target)


def described(settings: Experiment, task: Task, known: Prepared) -> dict:
    """Return the content of a run's record before anything is measured."""

    def text(name: str, windows: Tensor | None) -> dict | None:
        return None if windows is None else {"text": name, "windows": len(windows), "seqlen": known.seqlen}

    about = {
        "dtype": str(known.dtypes.compute).removeprefix("torch."),
        "parameters": sum(p.numel() for p in known.skeleton.parameters()),
    }
    return {
        "method": task.method,
        "target_sparsity": task.target,
        "sparsity": None,
        "dense_zeros": None,
        "perplexity": None,
        "zero_shot": None,
        "model": known.source._asdict() | about,
        "calibration": text(settings.calib_data, known.windows.calibration),
        "evaluation": text(settings.eval_data, known.windows.evaluation),
        "epsilon": settings.epsilon if task.allocation == "ww" else None,
        "epsilon_search": [],
        "saved_model": None,
        "processes": processes.count(),
        "flags": settings.flags(),
    }
