"""Recovery stage of a run: the dense model is read again and distilled into the pruned weights, which are saved."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from lib.calibration import texts
from lib.cli.settings import Experiment
from lib.cli.task import Task
from lib.core import files, processes
from lib.core.digests import digest, first_difference
from lib.core.errors import UserError
from lib.core.lazy import torch
from lib.models import locate, memory
from lib.models.layers import prunable_layers
from lib.models.streamed import Streamed
from lib.models.weights import Block
from lib.recovery.block_walk import search_dtype
from lib.recovery.distill import HELD_OUT, Distillation, draw_losses
from lib.run import checks
from lib.run.journal import MANIFEST, Journal
from lib.run.language import LanguageModel
from lib.run.pipeline import machine
from lib.run.record import Record


def manifest(folder: Path) -> dict:
    """Return what made the pruned model in ``folder``, as main.py wrote it there; empty if it wrote nothing."""
    path = folder / MANIFEST
    with files.reading(path, field="model"):
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def prepare_recovery(
    subject: LanguageModel, settings: Experiment, task: Task, dense: str | None, fingerprints: Mapping | None = None
) -> None:
    """Take up text and teacher, and refuse what cannot work, before the weights are loaded, if a run recovers.

    Args:
        dense: the teacher, the dense model: hub id or folder; None trains on the text alone.
        fingerprints: of the model that was pruned, if they are known.
    """
    if not settings.recover:
        return
    options, seqlen = settings.recovery_options(), subject.seqlen
    least = options.least_tokens(seqlen)
    if options.tokens < least:
        raise UserError("recover", options.tokens, f"is too few for a step, which takes {least}")
    if options.batch < processes.count():
        raise UserError("batch", options.batch, f"is too few for {processes.count()} processes", "give one for each")
    if subject.streamed and options.by == "model":
        raise UserError("by", "model", "the model is streamed, and needs to be in memory as a whole", "use --by block")
    if options.by == "block" and dense is None:
        raise UserError("by", "block", "aims at the dense model's blocks, and there is none", "use --by model")
    if target := settings.recovered_folder(task):
        size = memory.saved_bytes(subject.skeleton, subject.source.path, subject.dtypes.save)
        how = (options.train, options.rank, options.states)
        size += memory.trained_bytes(subject.layers, 1 - task.target, *how)
        checks.check_target(target, {name: path for name, path in settings.paths().items() if name != "save_model"})
        checks.check_disk(target, size, settings.restart, unmeasured=False)

    counts = (options.tokens // least * options.batch, max(HELD_OUT, processes.count()))
    subject.recovery = texts.recovery_windows(subject.calib_data, subject.tokenizer, counts, seqlen, settings.seed)
    subject.teacher = subject.teacher_name = None
    if dense is None:
        return
    source = processes.on_main(lambda: locate.locate(dense, settings.cache_dir))
    device = processes.device() or memory.freest()
    subject.teacher = teacher = Streamed(locate.local_copy(source), subject.dtypes, device)
    subject.teacher_name = source.anywhere
    sizes = [tuple(model.get_input_embeddings().weight.shape) for model in (teacher.model, subject.skeleton)]
    if sizes[0] != sizes[1] or [*teacher.layers] != [*prunable_layers(subject.whole)]:
        problem = f"is another model than the pruned one: its embedding is {sizes[0]}, the other's {sizes[1]}"
        raise UserError("dense", dense, problem, "give the model that was pruned")
    # All of the model is read for them, once.
    subject.teacher_fingerprints = teacher.fingerprints() if fingerprints or target else {}
    if fingerprints and (layer := first_difference(fingerprints, subject.teacher_fingerprints)):
        raise UserError("dense", dense, f"is not the model that was pruned (see {layer})", "give that one, or none")


def recover(record: Record, subject: LanguageModel, settings: Experiment, task: Task, unmeasured: bool) -> None:
    """Recover the subject's weights as a stage of a run, save them, and add what it did to the record.

    ``unmeasured`` is the argument of the ``Journal`` in which unfinished training is stored.
    """
    content, target, weights = record.content, settings.recovered_folder(task), subject.weights
    with record.stage("recover"):
        before = subject.perplexity() if subject.evaluation is not None else None
        subject.loaded_as = None  # norms and biases are trained as well, and ``restore`` knows the matrices alone
        dtype = search_dtype("auto", weights.device, subject.dtypes.compute)
        how = (settings.recovery_options(), subject.recovery, subject.hidden_states, dtype)
        distillation = Distillation(weights, subject.teacher, *how)
        if target is None:
            report = distillation.run(None, lambda *_: None, {})
        else:
            with closing(Journal(target, settings.restart, unmeasured)) as journal:
                identity = {"model": subject.name, "source": subject.teacher_name, "versions": machine(weights)}
                identity |= {"flags": settings.recovery_identity(), "calibration": digest(subject.recovery[0])}
                identity["fingerprints"] = subject.teacher_fingerprints if subject.teacher else weights.fingerprints()
                journal.begin(identity | {"plan": digest(weights.fingerprints())})
                report = _train(subject, journal, distillation)
                content["saved_model"] = str(subject.save(journal, settings.packed, content["sparsity"]))
    content["recovery"] = report | {"perplexity_before": before, "sparsity_before": content["sparsity"]}
    content["sparsity"] = weights.sparsity()
    content["method"] += "_recovered" if task.pruner else ""
    files.save_figure(draw_losses(report), record.folder / f"recovery_{record.run}.png", dpi=130)


def _train(subject: LanguageModel, journal: Journal, distillation: Distillation) -> dict:
    """Train, or go on with what an earlier run has stored in the journal, and store the result there."""
    weights, state = subject.weights, journal.folder / "recovery.state"
    stored = journal.get("recovery", "report")
    if stored and len(journal.finished) == len(weights.modules):
        for block in weights.visit(write=True):
            weights.load_block(block.index, journal.path(block.index))
        for name, values in stored["behind"].items():
            weights.model.get_parameter(name).data.copy_(torch.tensor(values))
        return stored["report"]

    def keep(block: Block, losses: list[float]) -> None:
        journal.put("losses", str(block.index), losses)
        journal.add(block.index, weights.tensors(block.index), weights.save_dtypes(block.index), [])
        weights.set_block_file(block.index, journal.path(block.index))

    finished = {index: (journal.path(index), journal.get("losses", str(index))) for index in journal.finished}
    report = distillation.run(state, keep, finished)
    behind = {name: weights.model.get_parameter(name).tolist() for name in distillation.gains if weights.in_memory}
    journal.put("recovery", "report", {"report": report, "behind": behind})
    processes.on_main(lambda: state.unlink(missing_ok=True))
    return report
