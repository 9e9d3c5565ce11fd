"""Recovery stage of a run: the dense model is opened again and distilled into the pruned weights, which are saved."""

from __future__ import annotations

import json
from contextlib import closing, nullcontext
from pathlib import Path

from lib.calibration import texts
from lib.cli.settings import Experiment
from lib.cli.task import Task
from lib.core import cpu, files, processes
from lib.core.digests import digest, first_difference
from lib.core.errors import UserError
from lib.core.lazy import torch
from lib.models import load, locate, memory
from lib.models.layers import prunable_layers
from lib.models.safetensors_io import checkpoint_entries
from lib.models.streamed import Streamed
from lib.models.weights import Block
from lib.recovery.block_walk import search_dtype
from lib.recovery.distill import HELD_OUT, Distillation, RecoveryReport, draw_losses
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


def prepare_recovery(subject: LanguageModel, settings: Experiment, task: Task, dense: str | None) -> None:
    """Read the text to train on, and refuse what cannot work, before the weights are loaded, if a run recovers.

    Args:
        dense: the dense model: hub id or folder; None trains on the text alone.
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
    subject.recovery = texts.recovery_windows(settings.calib_data, subject.tokenizer, counts, seqlen, settings.seed)
    subject.dense_source = None
    if dense is not None:
        subject.dense_source = source = processes.on_main(lambda: locate.locate(dense, settings.cache_dir))
        checkpoint_entries(locate.local_copy(source))  # refuses what cannot be read block by block
        theirs = load.load_skeleton(source)
        sizes = [tuple(model.get_input_embeddings().weight.shape) for model in (theirs, subject.skeleton)]
        if sizes[0] != sizes[1] or prunable_layers(theirs) != subject.layers:
            problem = f"is another model than the pruned one: its embedding is {sizes[0]}, the other's {sizes[1]}"
            raise UserError("dense", dense, problem, "give the model that was pruned")


def recover(record: Record, subject: LanguageModel, settings: Experiment, task: Task, unmeasured: bool) -> None:
    """Recover the subject's weights as a stage of a run, save them, and add what it did to the record.

    ``unmeasured`` is the argument of the ``Journal`` in which unfinished training is stored.
    """
    content, target = record.content, settings.recovered_folder(task)
    pruned = manifest(Path(content["saved_model"] or settings.model))
    with record.stage("recover"):
        perplexity = subject.perplexity() if subject.evaluation is not None else None
        distillation = _prepared(subject, settings, pruned)
        journal = Journal(target, settings.restart, unmeasured) if target else None
        with closing(journal) if journal else nullcontext():
            if journal:
                identity = {"model": pruned.get("model", subject.name), "flags": settings.recovery_identity()}
                identity["source"] = subject.dense_source and subject.dense_source.anywhere
                identity |= {"versions": machine(subject.weights), "calibration": digest(subject.recovery[0])}
                identity["fingerprints"] = (distillation.dense or subject.weights).fingerprints()
                journal.begin(identity | {"plan": digest(subject.weights.fingerprints())})
                report = _train(subject, journal, distillation)
                content["saved_model"] = str(subject.save(journal, settings.packed, content["sparsity"]))
            else:
                report = distillation.run(None, lambda *_: None, {})
    before = {"perplexity_before": perplexity, "sparsity_before": content["sparsity"]}
    content |= {"recovery": report._asdict() | before, "sparsity": subject.weights.sparsity()}
    content["method"] += "_recovered" if task.pruner else ""
    files.save_figure(draw_losses(report), record.folder / f"recovery_{record.run}.png", dpi=130)


def _prepared(subject: LanguageModel, settings: Experiment, pruned: dict) -> Distillation:
    """Return the distillation of the dense model, whose weights are opened, into the ``pruned`` one's."""
    source, dense = subject.dense_source, None
    device = next(iter(subject.weights.visit())).device
    if source is not None:
        place = processes.device() or (device if cpu.gpus() else torch.device("cpu"))
        dense = Streamed(locate.local_copy(source), subject.dtypes, place)
        if "fingerprints" in pruned and (layer := first_difference(pruned["fingerprints"], dense.fingerprints())):
            problem = f"is not the model that was pruned (see {layer})"
            raise UserError("dense", source.given, problem, "give that one, or none")
    subject.loaded_as = None  # norms and biases are trained as well, and ``restore`` knows the matrices alone
    how = (subject.hidden_states, search_dtype("auto", device, subject.dtypes.compute))
    return Distillation(subject.weights, dense, settings.recovery_options(), subject.recovery, *how)


def _train(subject: LanguageModel, journal: Journal, distillation: Distillation) -> RecoveryReport:
    """Train, or go on with what an earlier run has stored in the journal, and store the result there."""
    weights, state = subject.weights, journal.folder / "recovery.state"
    stored = journal.get("recovery", "report")
    if stored and len(journal.finished) == len(weights.modules):
        for block in weights.visit(write=True):
            weights.load_block(block.index, journal.path(block.index))
        for name, values in stored["behind"].items():
            weights.model.get_parameter(name).data.copy_(torch.tensor(values))
        return RecoveryReport(**stored["report"])

    def keep(block: Block, losses: list[float]) -> None:
        journal.put("losses", str(block.index), losses)
        journal.add(block.index, weights.tensors(block.index), subject.dtypes.save, [])
        weights.set_block_file(block.index, journal.path(block.index))

    finished = {index: (journal.path(index), journal.get("losses", str(index))) for index in journal.finished}
    report = distillation.run(state, keep, finished)
    behind = {name: weights.model.get_parameter(name).tolist() for name in distillation.behind}
    journal.put("recovery", "report", {"report": report._asdict(), "behind": behind})
    processes.on_main(lambda: state.unlink(missing_ok=True))
    return report
