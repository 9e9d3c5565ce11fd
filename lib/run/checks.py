"""Checks before the weights are loaded: places that are written, shapes, devices, and what streaming allows."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from lib import sparse
from lib.cli.settings import Experiment
from lib.cli.task import Task
from lib.core import files, processes
from lib.core.errors import UserError, flag_name
from lib.models.layers import Layer
from lib.pruning import plan as plans
from lib.run.journal import MANIFEST, PROGRESS, can_reopen, partial_folder
from lib.run.pipeline import make_plan
from lib.run.record import INPUTS, has_flags, read_run
from lib.spectra import spectrum
from lib.spectra.cache import Measurement, MetricCache

log = logging.getLogger("main")


def check_output(
    save: Path, run: str, targets: Sequence[Path], flags: Mapping, paths: Mapping[str, Path], mark: str = MANIFEST
) -> None:
    """Refuse output that cannot be written or would destroy something; warn of earlier runs that will be replaced.

    Published file names contain neither seed nor N:M nor epsilon, so that two runs may have the same ones. The figures
    of the ``run`` go to ``save``, its models to ``targets``, where an earlier one is known by the file ``mark``.
    ``paths`` are the files and folders that the ``flags`` name, by field.
    """
    files.check_writable("save", save)
    earlier = read_run(save, run)
    if earlier and not has_flags(earlier, flags):
        log.warning("%s/*_%s.* of a run with other flags will be replaced", save, run)
    for target in targets:
        files.check_folder("save_model", target)
        for name, path in paths.items():
            if name != "save_model" and path.resolve().is_relative_to(target.resolve()):
                problem = f"{flag_name(name)} {path} lies in {target}, which would be replaced"
                raise UserError("save_model", paths.get("save_model"), problem, "give another folder")
        inside = list(target.iterdir()) if target.is_dir() else []
        # A saved model has no folder in it.
        strange = [path.name for path in inside if path.is_dir() or target / mark not in inside]
        if strange:
            problem = f"{target} would be replaced, and no pruning wrote {strange[0]} in it"
            raise UserError("save_model", paths.get("save_model"), problem, "move it away, or give another folder")
        if target.exists() and not (target / PROGRESS).is_file():
            hint = "; lora_ft/recover.py recovers it as it is" if target != targets[-1] else ""
            log.warning("%s already exists and will be replaced, with every file in it%s", target, hint)
    for name in sorted(paths.keys() & {"save_plan", "save_calib", "export_llmcompressor"}):
        if paths[name].exists() and not paths[name].is_file():
            raise UserError(name, paths[name], "is a folder, or no ordinary file", "give another file")
        for read in paths.keys() & {*INPUTS}:
            if paths[name].resolve().is_relative_to(paths[read].resolve()):
                raise UserError(name, paths[name], f"would be written over {flag_name(read)}", "give another file")
        files.check_writable(name, paths[name].parent)


def check_disk(targets: Sequence[Path], size: int, restart: bool) -> None:
    """Refuse a disk that has no room for ``size`` bytes of models in ``targets``, less what is written already."""
    for target in targets:
        # A packed folder is unpacked beside itself.
        folder = target if can_reopen(target, restart) and not sparse.is_packed(target) else partial_folder(target)
        size -= sum(path.stat().st_size for path in folder.glob("*") if path.is_file())
    files.check_writable("save_model", targets[0].parent, size)


def check_layers(
    task: Task, name: str, layers: Sequence[Layer], measured: Sequence[Layer], measurement: Measurement
) -> None:
    """Refuse contradictions between the flags and the shapes of the model ``name``, and a cache that cannot be used.

    The ``layers`` are pruned; a metric is ``measured`` on others, where a classifier's differ.
    """
    if not any(layer.expert for layer in layers):
        for flag, value in task.mixture.items():
            raise UserError(flag, value, f"{name} is no mixture of experts", "leave it out")
    for layer in layers if task.nm else ():
        if layer.shape[1] % task.nm[1]:
            problem = f"{layer.name} has {layer.shape[1]} columns, which {task.nm[1]} does not divide"
            raise UserError("sparsity_type", "{}:{}".format(*task.nm), problem)
    if task.allocation == "ww":
        if MetricCache(measurement, name, measured).read() is None:
            files.check_writable("ww_metric_cache", measurement.folder)
        for layer in measured if measurement.farms else ():
            try:
                spectrum.farms_windows(layer.shape, measurement.farms)
            except spectrum.NoFit as error:
                fix = "lower --farms_rows or --farms_ratio"
                raise UserError("farms", None, f"with {layer.name}: {error}", fix) from error
    if task.plan:
        plans.load_plan(Path(task.plan), name, layers)
    elif task.pruner and task.needs is None:  # from shapes alone: it is met, or refused here
        make_plan(task, layers, None)


def must_stream(task: Task, settings: Experiment, fits: bool) -> bool:
    """Return whether the weights are read block by block from disk; ``fits``: all have room beside the run's work.

    If a streamed model cannot do what is asked for, or several processes have no room for a model each, it is a
    UserError.
    """
    stream = settings.stream
    if stream == "never" and processes.count() > 1 and not fits:
        problem = f"each of the {processes.count()} processes holds the whole model, for which there is no room"
        raise UserError("stream", "never", problem, "leave it out, or start one process, which uses all GPUs")
    if stream == "never" or (stream == "auto" and fits):
        return False
    why = "the model " + ("is streamed (--stream always)" if fits else "does not fit into memory beside the work")
    if task.needs == "price":
        raise UserError("prune_method", task.method, f"{why}, and a streamed model has no prices", "use a --plan")
    if settings.eval_zero_shot and not fits:
        raise UserError("eval_zero_shot", None, f"{why}, where lm-eval needs it", "leave it out, or use more GPUs")
    if task.pruner and settings.packed:
        raise UserError("packed", None, f"{why}, and is streamed unpacked", "use scripts/speedup/pack.py afterwards")
    if task.pruner and not settings.save_model:
        raise UserError("stream", stream, f"{why}, so that pruned blocks go to disk", "add --save_model DIR")
    return True
