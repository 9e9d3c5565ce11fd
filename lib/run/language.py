"""Language model as the subject of a run: its source, tokenizer, windows of text, dtypes, and where its weights are."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import closing, nullcontext
from functools import cache
from pathlib import Path

from lib import sparse
from lib.allocation import block_scores, epsilon, price, price_model
from lib.calibration import hidden, own_text, texts
from lib.cli.settings import Experiment, RecoveryFlags, TextFlags
from lib.cli.task import Task
from lib.core import cpu, files, processes
from lib.core.digests import digest, first_difference
from lib.core.errors import UserError
from lib.core.lazy import torch
from lib.evaluation import perplexity, zero_shot
from lib.models import load, locate, memory
from lib.models.layers import prunable_layers, published_layout, refuse_experts
from lib.models.safetensors_io import checkpoint_entries
from lib.models.streamed import Streamed
from lib.models.weights import Packed, Weights, weights_of, with_fewer_experts
from lib.pruning import drop, walk
from lib.recovery.block_walk import fast_dtype
from lib.recovery.distill import HELD_OUT, Distillation
from lib.run import checks
from lib.run.journal import Journal
from lib.run.pipeline import machine
from lib.run.record import Record, inputs_of
from lib.spectra import measure

log = logging.getLogger("main")


class LanguageModel:
    """Language model with the texts that a run reads.

    A sweep passes one subject to all of its runs: each takes over the texts and the loaded model if they are the same,
    and starts from the dense weights again. ``planned`` are the settings of these runs: the model is loaded once, and
    must leave room on each GPU for the most demanding of them.

    Attributes (and those of ``lib.run.pipeline.Subject``):
        calibration, evaluation: windows of token ids, [windows, seqlen]; None if the run reads none.
        search: windows to search on and held-out ones, for --epsilon auto and _price.
        questions: zero-shot tasks with their data.
        reserve: bytes of each GPU, or of the CPU, that are left for the work.
        loaded_as: how the dense weights in memory were loaded, None if they are others.
        calib_data: the text for calibration, a file if the model wrote it itself.
        recovery: windows to recover on and held-out ones.
        teacher, teacher_name, teacher_fingerprints: the model that is distilled.
        streamed: folder from which the weights are streamed, None if they are loaded.
    """

    source: load.Source | None = None
    dropping: tuple[float, str] | None = None
    weights: Weights | None = None

    def __init__(self, planned: Sequence[Experiment] = ()) -> None:
        self.planned = tuple(planned)

    def prepare(self, settings: Experiment, task: Task) -> None:
        """Take up what a run needs besides the weights, and refuse what cannot work: 13 GB take a while to load."""
        source = processes.on_main(lambda: locate.locate(settings.model, settings.cache_dir))
        packed = sparse.is_packed(source.path)
        if task.pruner or settings.recover or settings.metrics_only or settings.stream == "always":
            sparse.refuse_packed(source)
        dropping = (settings.drop_experts, settings.drop_by) if settings.drop_experts else None
        if (source, dropping) != (self.source, self.dropping):
            self._inspect(source, dropping)
        self.settings, self.name, self.hidden_states = settings, settings.name_of(source.name), settings.hidden_states
        dtype, options = settings.dtype, settings.recovery_options()
        self.dtypes = sparse.packed_dtypes(source, dtype) if packed else load.choose_dtypes(dtype, self.skeleton)

        checks.check_layers(task, self.name, self.layers, self.layers, settings.measurement(self.name))
        self.calib_dtype = getattr(torch, settings.calib_dtype) if settings.calib_dtype else None
        if self.calib_dtype and self.dtypes.compute != torch.float32:
            problem = f"the model is computed in {str(self.dtypes.compute).removeprefix('torch.')}, which is as fast"
            raise UserError("calib_dtype", settings.calib_dtype, problem, "leave it out, or use --dtype float32")
        if settings.hidden_states == "gpu" and not cpu.gpus():
            raise UserError("hidden_states", "gpu", "there is no GPU that torch can use", "use cpu or disk")
        for name, trait in (("nsamples", "calibration"), ("batch", "recover")):
            if trait in task.traits and getattr(settings, name) < processes.count():
                fix = f"give one for each of {processes.count()} processes"
                raise UserError(name, getattr(settings, name), "is too few to share", fix)
        if settings.packed:
            refuse_experts("packed", None, self.layers)
        if targets := settings.folders(task):
            published_layout(self.skeleton)  # refuses what could not be saved
            size = memory.saved_bytes(self.skeleton, self.source.path, self.dtypes.save)
            state = memory.trained_bytes(self.layers, 1 - task.target, options) if settings.recover else 0
            checks.check_disk(targets, size * len(targets) + state, settings.restart)

        context = load.context_length(self.skeleton)
        self.seqlen = min(settings.seqlen, context or settings.seqlen)
        if self.seqlen < settings.seqlen and task.traits & {"calibration", "evaluation"}:
            log.warning("--seqlen %d is more than the model's context; using %d", settings.seqlen, context)
        self.reserve = max(self._needed_memory(run) for run in (settings, *self.planned))
        if self.fits is None:  # asked once, before the model itself takes the memory
            searched = any(run.task().hyper.get("epsilon") == "auto" for run in (settings, *self.planned))
            copied = self.layers if searched or self.planned else ()  # the dense weights, which are restored
            fits = memory.fits_in_memory(self.whole, self.dtypes.compute, self.reserve, copied)
            self.fits = all(processes.gathered(fits))
        self._read_texts(settings, task)
        self.streamed = None
        if not packed and checks.must_stream(task, settings, self.fits):
            self.streamed = locate.local_copy(source)
            checkpoint_entries(self.streamed)  # refuses what cannot be streamed
        if settings.recover:
            self._prepare_recovery(settings, task)

    def _inspect(self, source: load.Source, dropping: tuple[float, str] | None) -> None:
        """Take up a model's shapes, less those of the experts that will be dropped, and its tokenizer."""
        self.weights = self.dense = self.fits = self.loaded_as = None
        self.scores = {}
        self._once = cache(lambda work, *how: work(*how))  # keeps what was read for an earlier run
        self.skeleton = self.whole = load.load_skeleton(source)
        self.given = source.anywhere
        if dropping:
            self.experts_left = drop.remaining_experts(self.whole, dropping[0])
            self.skeleton = with_fewer_experts(self.whole, self.experts_left)
        self.layers = prunable_layers(self.skeleton)
        self.tokenizer = load.load_tokenizer(source)
        self.source, self.dropping = source, dropping

    def _read_texts(self, settings: Experiment, task: Task) -> None:
        self.calibration = self.evaluation = self.search = self.questions = None
        self.calibration_digest, self.search_digests = "none", []
        self.calib_data = settings.calib_data
        if settings.calib_data == "self" and task.traits & {"calibration", "search", "recover"}:
            self.calib_data = self._own_text(settings, task)
        calibration = (self.calib_data, self.tokenizer)
        if "calibration" in task.traits:
            if "evaluation" in task.traits and settings.one_file():
                text = "%s is both calibrated and evaluated on; give another text: --eval_data FILE"
                self._once(log.warning, text, settings.calib_data)
            how = (settings.nsamples, self.seqlen, settings.seed)
            self.calibration = self._once(texts.calibration_windows, *calibration, *how)
            self.calibration_digest = digest(self.calibration)

        if "search" in task.traits:
            flag, how = "_price" if task.needs == "price" else "--epsilon auto", self._search_windows(settings, task)
            self.search = self._once(texts.search_windows, *calibration, *how, settings.seed, flag)
            self.search_digests = [digest(windows) for windows in self.search]

        if "evaluation" in task.traits:
            how = (self.seqlen, settings.eval_windows)
            self.evaluation = self._once(texts.evaluation_windows, settings.eval_data, self.tokenizer, *how)
        load.check_vocabulary(settings.model, self.skeleton, self.calibration, self.evaluation)
        if settings.eval_zero_shot:
            how = (settings.tasks, settings.include_path, settings.num_fewshot)
            self.questions = self._once(zero_shot.find_tasks, *how)

    def _search_windows(self, settings: Experiment, task: Task) -> tuple[tuple[int, int], int]:
        """Return the counts of windows to search on and held out, and their length, tokens."""
        if task.needs != "price":
            return (epsilon.WINDOWS, epsilon.WINDOWS), self.seqlen
        options = settings.price_options()
        return (price.FIT_WINDOWS, options.held_out_windows), options.length(self.seqlen)

    def _own_text(self, settings: Experiment, task: Task) -> str:
        """Return the file of text that the dense model wrote itself for this run."""
        if not self.fits:
            fix = "have it written on another machine (--save_calib FILE), and give that FILE"
            raise UserError("calib_data", "self", "the model does not fit into memory beside the work", fix)
        field, seed = ("prompts", None) if settings.prompts else ("prompt_data", settings.seed)
        windows = [settings.nsamples] if "calibration" in task.traits else []
        windows += [settings.recover // self.seqlen + max(HELD_OUT, processes.count())] if settings.recover else []
        counts, length = self._search_windows(settings, task) if "search" in task.traits else ((0,), 0)
        needed = (max(windows, default=0) * self.seqlen, max(counts) * length)
        folder = settings.measurement(self.source.name, whole=True).folder
        prompts = (field, getattr(settings, field), "train", seed)
        path = self._once(self._write_text, prompts, settings.seed, self.seqlen, needed, folder)
        log.info("the model's own text: %s", path)
        if settings.save_calib:
            files.write_atomically(Path(settings.save_calib), texts.file_content("calib_data", path))
        return str(path)

    def _write_text(self, named: tuple, seed: int, seqlen: int, needed: tuple[int, int], folder: Path) -> Path:
        """Return the file in ``folder`` of the answers to the prompts that are ``named``, written if it is missing."""
        prompts = own_text.read_prompts(*named)
        self.weights = self.dense = self.loaded_as = None  # of an earlier run
        model = load.load_llm(self.source, self.dtypes.compute, processes.device(), self.reserve)
        how = {"seed": seed, "seqlen": seqlen, "tokens": needed, "prompts": digest(prompts)}
        how |= {"model": self.source.name, "fingerprints": digest(weights_of(model).fingerprints())}
        how |= {"sampling": model.generation_config.to_json_string(), "template": self.tokenizer.chat_template}
        path = folder / f"self_{digest(how)[:16]}.jsonl"
        if not processes.on_main(path.is_file):
            records = own_text.own_text(model, self.tokenizer, prompts, seqlen, needed, seed)
            lines = [{"marked": records[0], "written_by": how}, *({"marked": record} for record in records[1:])]
            files.write_atomically(path, "".join(f"{json.dumps(line)}\n" for line in lines))
            processes.gathered(None)  # the others read it
        return path

    def _prepare_recovery(self, settings: Experiment, task: Task) -> None:
        """Take up text and teacher of a recovery, and refuse what cannot work."""
        options = settings.recovery_options()
        least, dense = options.least_tokens(self.seqlen), settings.pruned_from()
        if options.tokens < least:
            raise UserError("recover", options.tokens, f"is too few for a step, which takes {least}")
        if self.streamed and options.by == "model":
            raise UserError("by", "model", "the model is streamed, and has to be in memory", "use --by block")
        if options.by == "block" and dense["source"] is None:
            raise UserError("by", "block", "aims at the dense model's blocks, and there is none", "use --by model")

        counts = (options.tokens // least * options.batch, max(HELD_OUT, processes.count()))
        self.recovery = texts.recovery_windows(self.calib_data, self.tokenizer, counts, self.seqlen, settings.seed)
        self.teacher, self.teacher_name, self.teacher_fingerprints = None, None, {}
        if dense["source"] is None:
            return
        source = processes.on_main(lambda: locate.locate(dense["source"], settings.cache_dir))
        teacher = Streamed(locate.local_copy(source), self.dtypes, processes.device() or memory.freest())
        self.teacher, self.teacher_name = teacher, source.anywhere
        # Where experts were dropped, those that stay have new numbers.
        others = [{x.name: x.shape for x in layers if not x.expert} for layers in (teacher.layers, self.layers)]
        sizes = [tuple(model.get_input_embeddings().weight.shape) for model in (teacher.model, self.skeleton)]
        theirs, ours = (shapes | {"embedding": size} for shapes, size in zip(others, sizes, strict=True))
        fix = "give the model that was pruned"
        if differs := [name for name in theirs | ours if theirs.get(name) != ours.get(name)]:
            problem = f"its {differs[-1]} is {theirs.get(differs[-1])}, the other's {ours.get(differs[-1])}"
            raise UserError("dense", source.given, f"is another model than the pruned one: {problem}", fix)
        # All of the model is read for them, once.
        expected = dense.get("fingerprints") or {}
        self.teacher_fingerprints = teacher.fingerprints() if expected or settings.save_model else {}
        compared = {name: x for name, x in expected.items() if name in others[0] or teacher.layers == self.layers}
        if expected and (layer := first_difference(self.teacher_fingerprints, compared)):
            raise UserError("dense", source.given, f"is not the model that was pruned (see {layer})", fix)

    def _needed_memory(self, settings: Experiment) -> int:
        """Return the bytes of each GPU, or of the CPU, that a run needs besides the weights, from shapes alone."""
        task, dtype = settings.task(), self.dtypes.compute
        hessians = bool(task.pruner) and task.pruner.statistic == "hessian"
        held = "calibration" in task.traits and settings.hidden_states != "disk"
        windows = -(-settings.nsamples // processes.count()) if held else 0
        copies = task.pruner.copies if task.pruner else 0
        needed = memory.working_set(self.skeleton, dtype, hessians, windows, self.seqlen, copies)
        gpus = 1 if processes.device() else max(1, cpu.gpus())
        if settings.recover:
            options, step = settings.recovery_options(), (self.seqlen, settings.batch, settings.batch)
            stored = memory.trained_bytes(self.layers, 1 - task.target, options) // gpus if options.by == "model" else 0
            needed = max(needed, stored + memory.price_working_set(self.skeleton, self.layers, dtype, *step))
        if task.needs == "lamp_score":
            return needed + block_scores.LAMP_BYTES * max(layer.size for layer in self.layers)
        if task.needs != "price":
            return needed
        options = settings.price_options()
        ranks = memory.rank_bytes(self.layers, task.by_magnitude) // gpus  # each layer's are on its own device
        windows = (options.length(self.seqlen), options.windows_per_step, price.FIT_WINDOWS + options.held_out_windows)
        return max(needed, ranks + memory.price_working_set(self.skeleton, self.layers, dtype, *windows))

    def describe(self, task: Task) -> dict:
        """Return what a run's record says of its task, model and texts; figures are None until they are measured."""
        flags = self.settings.flags()
        model = self.source._asdict() | {"dtype": str(self.dtypes.compute).removeprefix("torch.")}
        model["parameters"] = sum(p.numel() for p in self.skeleton.parameters())
        windows = {"calibration": ("calib_data", self.calibration), "evaluation": ("eval_data", self.evaluation)}
        described = {
            name: None if cut is None else {"text": flags[flag], "windows": len(cut), "seqlen": self.seqlen}
            for name, (flag, cut) in windows.items()
        }
        described |= dict.fromkeys(("sparsity", "dense_zeros", "perplexity", "zero_shot", "saved_model"))
        described |= {"method": task.method, "target_sparsity": task.target, "epsilon_search": []}
        described["epsilon"] = task.hyper["epsilon"] if task.allocation == "ww" else None
        return described | {"model": model, "processes": processes.count(), "flags": flags, "inputs": inputs_of(flags)}

    def load(self) -> None:
        """Load the dense weights, or restore those of an earlier run."""
        key = (self.dtypes, self.streamed, self.dropping and (self.settings.seed, self.calibration_digest))
        if self.loaded_as == key:
            self.weights.restore(self.dense)
        else:
            self._load()
            self.dense, self.loaded_as = (self.weights.snapshot(), key) if self.planned else (None, None)
        self.weights.expert_weighting = self.settings.expert_weighting

    def _load(self) -> None:
        self.weights = self.dense = self.loaded_as = None
        self.scores.clear()
        source, dtypes = self.source, self.dtypes
        if sparse.is_packed(source.path):
            log.info("loading %s, which is packed", source.path)
            self.weights = Packed(sparse.load_packed(source.path), self.layers)
        elif self.streamed:
            log.info("streaming %s block by block", self.streamed)
            self.weights = Streamed(self.streamed, dtypes, processes.device() or memory.freest())
        else:
            log.info("loading %s", source.path)
            model = load.load_llm(source, dtypes.compute, processes.device(), reserve=self.reserve)
            self.weights = weights_of(model, None if dtypes.save == dtypes.compute else dtypes.save)
        if self.dropping:
            self.weights = self.weights.keeping(self._kept_experts())
        self.measured = self.weights

    def _kept_experts(self) -> dict[str, list[int]]:
        """Return the numbers of the experts that stay, by experts module, for the weights of the whole model."""
        layers, (_, by) = self.weights.layers, self.dropping
        if by == "reap":
            scores = drop.reap_scores(self.weights, self.inputs())
        elif by == "alpha":
            measurement = self.settings.measurement(self.source.name, whole=True)
            values = measure.load_or_measure(measurement, self.source.name, self.weights).values
            scores = drop.alpha_scores(layers, values)
        else:
            scores = drop.random_scores(layers, self.settings.seed)
        return drop.kept_experts(scores, self.experts_left, getattr(self.whole.config, "n_group", 1) or 1)

    def inputs(self) -> hidden.BlockInputs:
        """Return the inputs of the first block for the calibration windows."""
        return hidden.enter_blocks(self.weights, self.calibration, self.hidden_states)

    def price_model(self, options: price.SearchOptions, by_magnitude: bool) -> price.PriceModel:
        """Return the model whose prices are searched, measured on calibration text."""
        dtype = fast_dtype(self.weights.device, self.dtypes.compute)
        return price_model.LanguagePriceModel(self.weights, self.search, options, dtype, by_magnitude)

    def save(self, journal: Journal, packed: str | None, sparsity: float) -> Path:
        """Complete the folder of the pruned blocks and move it into its place, which is returned.

        If it cannot be written, or its measured ``sparsity`` is another when read back, it is a UserError.
        """
        if journal.failure:
            raise journal.failure

        def complete() -> None:
            load.complete_folder(journal.folder, self.weights, self.tokenizer)
            walk.check_saved(journal.folder, self.weights, sparsity)
            journal.finish(packed)

        processes.gathered(None)  # none reads in the folder any more
        processes.on_main(complete)
        for index in journal.finished:
            self.weights.set_block_file(index, journal.target / journal.path(index).name)
        return journal.target

    def recover(self, record: Record, task: Task) -> None:
        """Distil the teacher into the weights as a stage of a run, save them, and add what it did to the ``record``."""
        content, settings, weights = record.content, self.settings, self.weights
        if not content["sparsity"] and (self.teacher is None or self.teacher.layers == weights.layers):
            raise UserError("model", None, "is not pruned, no weight of it is zero", "prune it first")
        targets, options = settings.folders(task), settings.recovery_options()
        stored = closing(Journal(targets[-1], settings.restart)) if targets else nullcontext()
        with record.stage("recover"), stored as journal:
            content["perplexity"] = before = self.perplexity()
            record.write()  # the card of the pruned model, which has its figure now
            self.loaded_as = None  # norms and biases are trained as well, and ``restore`` knows the matrices alone
            dtype = fast_dtype(weights.device, self.dtypes.compute)
            distillation = Distillation(weights, self.teacher, options, self.recovery, self.hidden_states, dtype)
            if journal:
                identity = {"model": self.name, "source": self.teacher_name, "fingerprints": self.teacher_fingerprints}
                identity |= {"calibration": digest(self.recovery[0]), "plan": digest(weights.fingerprints())}
                identity |= {"versions": machine(weights), "target": task.target}
                journal.begin(identity | {"flags": settings.identity(TextFlags, RecoveryFlags)})
                report = _train(weights, journal, distillation)
                record.add_model(self.save(journal, settings.packed, content["sparsity"]))
            else:
                report = distillation.run(None, lambda *_: None, {})
        content["recovery"] = report | {"perplexity_before": before, "sparsity_before": content["sparsity"]}
        content |= {"sparsity": weights.sparsity(), "perplexity": None}
        content["method"] += "_recovered" if task.pruner else ""
        title = "held out: {held_before:.3f} -> {held_after:.3f}".format(**report)
        losses = {"training": (range(1, len(report["losses"]) + 1), report["losses"])}
        files.save_figure(files.draw_losses(losses, title), record.folder / f"recovery_{record.run}.png")

    def perplexity(self) -> float | None:
        """Return the perplexity on the evaluation windows, None without."""
        return None if self.evaluation is None else perplexity.perplexity_by_blocks(self.weights, self.evaluation)

    def zero_shot(self, saved: str | None) -> tuple[dict, str]:
        """Return results and their table; a streamed model is read from where it was ``saved``, if it changed."""
        model = self.weights.model
        if self.weights.streamed:
            if saved is None and self.weights.changed:
                raise UserError("eval_zero_shot", None, "the pruned model is whole in its folder only, which is lost")
            source = self.source if saved is None else locate.locate(saved, self.source.cache_dir)
            model = load.load_llm(source, self.dtypes.compute, processes.device(), reserve=self.reserve)
        how = (self.settings.num_fewshot, self.settings.limit, self.settings.eval_batch_size)
        return zero_shot.zero_shot(model, self.tokenizer, self.questions, *how)


def _train(weights: Weights, journal: Journal, distillation: Distillation) -> dict:
    """Train, or go on with what an earlier run has stored in the journal, and store the result there."""
    state = journal.folder / "recovery.state"
    stored = journal.get("recovery", "report")
    if stored and len(journal.finished) == len(weights.modules):
        for block in weights.visit(write=True):
            weights.load_block(block.index, journal.path(block.index))
        for name, values in stored["behind"].items():
            parameter = weights.model.get_parameter(name).data
            parameter.copy_(parameter.new_tensor(values))
        return stored["report"]

    finished = {index: (journal.path(index), losses) for index, losses in journal.finished.items()}
    report = distillation.run(state, lambda index, losses: journal.add(index, weights, losses), finished)
    behind = {name: weights.model.get_parameter(name).tolist() for name in distillation.gains if weights.in_memory}
    journal.put("recovery", "report", {"report": report, "behind": behind})
    processes.on_main(lambda: state.unlink(missing_ok=True))
    return report
