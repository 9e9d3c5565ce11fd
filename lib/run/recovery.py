"""Recovery stage of a run: the dense model is opened again and distilled into the pruned weights, which are saved."""

from __future__ import annotations

import json
import logging
from contextlib import closing, nullcontext
from pathlib import Path

from lib.calibration import texts
from lib.cli.settings import Experiment
from lib.cli.task import Task
from lib.core import cpu, files, processes
from lib.core.digests import digest, first_difference
from lib.core.errors import UserError, first_line
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

log = logging.getLogger("main")

# The state of unfinished training, in the journal's folder.
_STATE = "recovery.state"


def manifest(folder: Path) -> dict:
    """Return what made the pruned model in ``folder``, as main.py wrote it there; empty if it wrote nothing."""
    path = folder / MANIFEST
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise UserError("model", path, f"is damaged ({first_line(error)})") from error


def prepare_recovery(subject: LanguageModel, settings: Experiment, task: Task, dense: str | None) -> None:
    """Read the text to train on, and refuse what cannot work, before the weights are loaded, if a run recovers.

    Args:
        dense: the dense model: hub id or folder; None trains on the text alone.
    """
    if not settings.recover:
        return
    options, seqlen = settings.recovery_options(), subject.seqlen
    groups = options.windows(seqlen) // options.batch
    if not groups:
        needed = options.least_tokens(seqlen)
        raise UserError("recover", options.tokens, f"is too few for a step, which takes {needed}")
    if options.batch < processes.count():
        raise UserError("batch", options.batch, f"is too few for {processes.count()} processes", "give one for each")
    if subject.streamed and options.by == "model":
        raise UserError("by", "model", "the model is streamed, and needs to be in memory as a whole", "use --by block")
    if options.by == "block" and dense is None:
        raise UserError("by", "block", "aims at the dense model's blocks, and there is none", "use --by model")
    if settings.save_model:
        left = [round(layer.size * (1 - task.target)) for layer in subject.layers]
        pairs = zip(subject.layers, left, strict=True)
        state = sum(memory.trained_bytes(layer, n, options.train, options.rank, options.states) for layer, n in pairs)
        size = memory.saved_bytes(subject.skeleton, subject.source.path, subject.dtypes.save)
        read = {name: path for name, path in settings.paths().items() if name != "save_model"}
        checks.check_target(settings.recovered_folder(task), read)
        files.check_writable("save_model", settings.recovered_folder(task).parent, size + state)

    counts = (groups * options.batch, max(HELD_OUT, processes.count()))
    subject.recovery = texts.recovery_windows(settings.calib_data, subject.tokenizer, counts, seqlen, settings.seed)
    subject.dense_source = None
    if dense is not None:
        subject.dense_source = source = processes.on_main(lambda: locate.locate(dense, settings.cache_dir))
        checkpoint_entries(locate.local_copy(source))  # refuses what cannot be read block by block
        theirs = load.load_skeleton(source)
        sizes = [tuple(model.get_input_embeddings().weight.shape) for model in (theirs, subject.skeleton)]
        if sizes[0] != sizes[1] or prunable_layers(theirs) != prunable_layers(subject.whole):
            problem = f"is another model than the pruned one: its embedding is {sizes[0]}, the other's {sizes[1]}"
            raise UserError("dense", dense, problem, "give the model that was pruned")


def add_to(record: Record, subject: LanguageModel, settings: Experiment, task: Task, unmeasured: bool) -> None:
    """Recover the subject's weights as a stage of a run, and add what it did to the record."""
    content, saved = record.content, Path(record.content["saved_model"] or settings.model)
    with record.stage("recover"):
        before = subject.perplexity() if subject.evaluation is not None else None
        report, folder = _recover(subject, settings, settings.recovered_folder(task), unmeasured, manifest(saved))
    content["recovery"] = report._asdict() | {"perplexity_before": before, "sparsity_before": content["sparsity"]}
    content["method"] += "_recovered" if task.pruner else ""
    content |= {
        "sparsity": subject.weights.sparsity(),
        "saved_model": str(folder) if folder else content["saved_model"],
    }
    files.save_figure(draw_losses(report), record.folder / f"recovery_{record.run}.png", dpi=130)


def _recover(
    subject: LanguageModel, settings: Experiment, target: Path | None, unmeasured: bool, pruned: dict
) -> tuple[RecoveryReport, Path | None]:
    """Recover the subject's pruned weights in place and save them; return the report and the folder, if any.

    Args:
        target, unmeasured: of the journal, in which unfinished training is stored; see ``Journal``.
        pruned: the ``manifest`` of the pruned model.
    """
    journal = Journal(target, settings.restart, unmeasured) if target else None
    weights, source, dense = subject.weights, subject.dense_source, None
    device = next(iter(weights.visit())).device
    with closing(journal) if journal else nullcontext():
        if source is not None:
            place = processes.device() or (device if cpu.gpus() else torch.device("cpu"))
            dense = Streamed(locate.local_copy(source), subject.dtypes, place)
            same = "fingerprints" in pruned and not subject.dropping  # else experts have other numbers
            if same and (layer := first_difference(pruned["fingerprints"], dense.fingerprints())):
                problem = f"is not the model that was pruned (see {layer})"
                raise UserError("dense", source.given, problem, "give that one, or none")
        dtype = search_dtype("auto", device, subject.dtypes.compute)
        place = subject.hidden_states
        distillation = Distillation(weights, dense, settings.recovery_options(), subject.recovery, place, dtype)
        sparsity = weights.sparsity()
        subject.loaded_as = None  # norms and biases are trained as well, and ``restore`` knows the matrices alone
        if journal is None:
            return distillation.run(None, lambda *_: None, {}), None

        journal.begin(
            {
                "model": pruned.get("model", subject.name), "source": source and source.anywhere,
                "flags": settings.recovery_identity(),
                "versions": machine(weights), "calibration": digest(subject.recovery[0]),
                "fingerprints": (dense or weights).fingerprints(), "plan": digest(weights.fingerprints()),
            }
        )  # fmt: skip
        report = _finished(subject, journal) or _train(subject, journal, distillation)
        return report, subject.save(journal, settings.packed, sparsity)


def _train(subject: LanguageModel, journal: Journal, distillation: Distillation) -> RecoveryReport:
    """Train, or go on with unfinished training, and store the result in the journal."""
    weights, state = subject.weights, journal.folder / _STATE
    finished = {index: (journal.path(index), journal.get("losses", str(index))) for index in journal.finished}

    def keep(block: Block, losses: list[float]) -> None:
        if losses:
            journal.put("losses", str(block.index), losses)
        journal.add(block.index, weights.tensors(block.index), weights.save_dtypes(block.index), [])
        weights.set_block_file(block.index, journal.path(block.index))

    report = distillation.run(state, keep, finished)
    behind = {name: weights.model.get_parameter(name).tolist() for name in distillation.behind}
    journal.put("recovery", "report", {"report": report._asdict(), "behind": behind})
    processes.on_main(lambda: state.unlink(missing_ok=True))
    return report


def _finished(subject: LanguageModel, journal: Journal) -> RecoveryReport | None:
    """Return the report of training that was finished, with its weights in place; None if it was not."""
    weights, stored = subject.weights, journal.get("recovery", "report")
    if stored is None or len(journal.finished) < len(weights.modules):
        return None
    for block in weights.visit(write=True):
        weights.load_block(block.index, journal.path(block.index))
    for name, values in stored["behind"].items():
        parameter = weights.model.get_parameter(name)
        parameter.data.copy_(torch.tensor(values, dtype=parameter.dtype))
    return RecoveryReport(**stored["report"])
