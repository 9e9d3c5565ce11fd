"""Language model as the subject of a run: its source, tokenizer, windows of text, dtypes, and where its weights are."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lib import sparse
from lib.allocation import block_scores, epsilon, price, price_model
from lib.calibration import hidden, texts
from lib.cli.settings import Experiment
from lib.cli.task import Task
from lib.core import cpu, processes
from lib.core.digests import digest
from lib.core.lazy import torch, transformers
from lib.evaluation import perplexity, zero_shot
from lib.models import load, locate, memory
from lib.models.layers import Layer, prunable_layers
from lib.models.safetensors_io import checkpoint_entries
from lib.models.streamed import Streamed
from lib.models.weights import Packed, Weights, weights_of
from lib.pruning import walk
from lib.run import checks
from lib.run.journal import Journal
from lib.run.record import is_unmeasured

log = logging.getLogger("main")


class LanguageModel:
    """Language model with the texts that a run reads.

    A sweep passes one subject to all of its runs: each takes over the texts and the loaded model if they are the same,
    and starts from the dense weights again.

    Attributes (and those of ``lib.run.pipeline.Subject``):
        planned: settings of all runs of a sweep. The model is loaded once, so it must leave room on each GPU for the
            most demanding of them.
        calibration, evaluation: windows of token ids, [windows, seqlen]; None if the run reads none.
        search: windows to search on and held-out ones, for --epsilon auto and _price.
        questions: zero-shot tasks with their data.
        reserve: bytes of each GPU that are left for the work.
        streamed: folder from which the weights are streamed, None if they are loaded.
    """

    source: load.Source | None = None
    weights: Weights | None = None

    def __init__(self, planned: Sequence[Experiment] = ()) -> None:
        self.planned = tuple(planned)

    # ----------------------------------------------------------------------------------- before the weights are loaded

    def prepare(self, settings: Experiment, task: Task) -> None:
        """Take up what a run needs besides the weights, and refuse what cannot work: 13 GB take a while to load."""
        source = processes.on_main(lambda: locate.locate(settings.model, settings.cache_dir))
        if task.pruner or settings.metrics_only or settings.stream == "always":
            sparse.refuse_packed(source)
        if source != self.source:
            self._forget()
            self.skeleton = load.load_skeleton(source)
            self.layers: tuple[Layer, ...] = prunable_layers(self.skeleton)
            self.source, self.name = source, source.name
        if sparse.is_packed(source.path):
            self.dtypes = sparse.packed_dtypes(source, settings.dtype)
        else:
            self.dtypes = load.choose_dtypes(settings.dtype, self.skeleton)

        checks.check_layers(task, self.name, self.layers, self.layers, settings.measurement(self.name))
        self.calib_dtype = checks.calibration_dtype(settings.calib_dtype, self.dtypes.compute)
        self.hidden_states, self.price_dtype = settings.hidden_states, settings.price_dtype
        if task.is_calibrated:
            checks.check_calibration(settings.hidden_states, settings.nsamples)
        if settings.save_model:
            size = memory.saved_bytes(self.skeleton, source.path, self.dtypes.save)
            unmeasured = is_unmeasured(Path(settings.save), task.run, settings.flags())
            checks.check_disk(settings.model_folder(task), size, settings.restart, unmeasured)

        self._read_texts(settings, task)
        self.reserve = max(self._needed_memory(run) for run in (settings, *self.planned))
        if self.fits is None:  # asked once, before the model itself takes the memory
            fits = memory.fits_in_memory(self.skeleton, self.dtypes.compute, self.reserve)
            self.fits = all(processes.gathered(fits))
        outputs = (settings.eval_zero_shot, settings.packed, bool(settings.save_model))
        self.streamed: Path | None = None
        if not sparse.is_packed(source.path) and checks.must_stream(task, settings.stream, self.fits, *outputs):
            self.streamed = locate.local_copy(source)
            checkpoint_entries(self.streamed)  # refuses what cannot be streamed

    def _forget(self) -> None:
        """Forget an earlier run's model, and what depends on it."""
        self.weights: Weights | None = None
        self.dense: Mapping[str, torch.Tensor] | None = None
        self.tokenizer: transformers.PreTrainedTokenizerBase | None = None
        self.fits: bool | None = None
        self._loaded_as: tuple | None = None
        self._texts: dict[tuple, object] = {}
        self.scores: dict[tuple, object] = {}

    def _read_texts(self, settings: Experiment, task: Task) -> None:
        """Read the windows and questions that the run needs."""
        self.calibration = self.evaluation = self.search = self.questions = None
        self.calibration_digest, self.search_digests = "none", []
        if self.tokenizer is None:
            self.tokenizer = load.load_tokenizer(self.source)
        context = load.context_length(self.skeleton)
        self.seqlen = settings.seqlen if context is None else min(settings.seqlen, context)
        if settings.metrics_only:
            return
        if self.seqlen < settings.seqlen and (settings.eval_wikitext or task.is_calibrated):
            log.warning("--seqlen %d is more than the model's context; using %d", settings.seqlen, context)

        text, seed = settings.calib_data, settings.seed
        if task.is_calibrated:
            cut_before = "calibration_windows" in (key[0] for key in self._texts)
            if settings.eval_wikitext and settings.one_file() and not cut_before:
                log.warning("%s is both calibrated and evaluated on; give another text: --eval_data FILE", text)
            self.calibration = self._windows(texts.calibration_windows, text, settings.nsamples, self.seqlen, seed)
            self.calibration_digest = digest(self.calibration)

        if task.needs == "price":
            effort = settings.price_options().effort
            counts, length = (price.FIT_WINDOWS, effort.held_out_windows), effort.length(self.seqlen)
            self.search = self._windows(texts.search_windows, text, counts, length, seed, "_price")
        elif task.is_searched:
            counts = (epsilon.WINDOWS, epsilon.WINDOWS)
            self.search = self._windows(texts.search_windows, text, counts, self.seqlen, seed, "--epsilon auto")
        self.search_digests = [digest(windows) for windows in self.search or ()]

        if settings.eval_wikitext:
            cut = (self.seqlen, settings.eval_windows)
            self.evaluation = self._windows(texts.evaluation_windows, settings.eval_data, *cut)
        load.check_vocabulary(settings.model, self.skeleton, self.calibration, self.evaluation)
        if settings.eval_zero_shot:
            key = (settings.task_names(), settings.include_path, settings.num_fewshot)
            self.questions = self._texts[key] = self._texts.get(key) or zero_shot.find_tasks(*key)

    def _windows(self, cut: Callable, text: str, *how):
        """Return the windows that ``cut`` makes of a ``text``, or those that an earlier run cut in the same way."""
        key = (cut.__name__, text, *how)
        if key not in self._texts:
            self._texts[key] = cut(text, self.tokenizer, *how)
        return self._texts[key]

    def _needed_memory(self, settings: Experiment) -> int:
        """Return the bytes of each GPU that a run needs besides the weights, from shapes alone."""
        task, dtype = settings.task(), self.dtypes.compute
        hessians = bool(task.pruner) and task.pruner.statistic == "hessian"
        windows = -(-settings.nsamples // processes.count()) if task.is_calibrated else 0
        copies = task.pruner.copies if task.pruner else 0
        needed = memory.working_set(self.skeleton, dtype, hessians, windows, self.seqlen, copies)
        if task.needs == "lamp_score":
            return needed + block_scores.LAMP_BYTES * max(layer.size for layer in self.layers)
        if task.needs != "price":
            return needed
        gpus = 1 if processes.device() else max(1, cpu.gpus())
        effort = settings.price_options().effort
        ranks = memory.rank_bytes(self.layers, task.by_magnitude) // gpus  # each layer's are on its own device
        windows = (effort.length(self.seqlen), effort.windows_per_step, price.FIT_WINDOWS + effort.held_out_windows)
        return max(needed, ranks + memory.price_working_set(self.skeleton, self.layers, dtype, *windows))

    def describe(self, flags: Mapping[str, object]) -> dict:
        """Return what the run's record says of the model and its texts."""

        def windows(flag: str, tensor: torch.Tensor | None) -> dict | None:
            return None if tensor is None else {"text": flags[flag], "windows": len(tensor), "seqlen": self.seqlen}

        model = self.source._asdict() | {
            "dtype": str(self.dtypes.compute).removeprefix("torch."),
            "parameters": sum(p.numel() for p in self.skeleton.parameters()),
        }
        calibration, evaluation = windows("calib_data", self.calibration), windows("eval_data", self.evaluation)
        return {"model": model, "calibration": calibration, "evaluation": evaluation}

    # --------------------------------------------------------------------------------------------------- with weights

    def load(self) -> None:
        """Load the dense weights, or restore those of an earlier run."""
        key = (self.dtypes, self.streamed)
        if self._loaded_as == key:
            self.weights.restore(self.dense)
            return
        self.weights = self.dense = self._loaded_as = None
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
        self.measured = self.weights
        if self.planned:
            self.dense, self._loaded_as = self.weights.snapshot(), key

    def inputs(self) -> hidden.BlockInputs:
        """Return the inputs of the first block for the calibration windows."""
        return hidden.enter_blocks(self.weights, self.calibration, self.hidden_states)

    def price_model(self, effort: price.Effort, by_magnitude: bool) -> price_model.PriceModel:
        """Return the model whose prices are searched, measured on calibration text."""
        device = next(iter(self.weights.visit())).device
        dtype = price_model.search_dtype(self.price_dtype, device, self.dtypes.compute)
        step = (effort.windows_per_step, effort.token_stride)
        return price_model.LanguagePriceModel(self.weights, self.search, *step, dtype, by_magnitude)

    def save(self, journal: Journal, packed: bool, sparsity: float) -> Path:
        """Complete the folder of the pruned blocks and move it into its place, which is returned.

        Raises:
            UserError: it cannot be written, or its measured ``sparsity`` is another when read back.
        """
        if journal.failure:
            raise journal.failure

        def complete() -> None:
            load.complete_folder(journal.folder, self.weights, self.tokenizer, self.dtypes.save)
            walk.check_saved(journal.folder, self.weights, sparsity)
            journal.finish(packed)

        processes.on_main(complete)
        self.weights.rebase_files(journal.folder, journal.target)
        return journal.target

    def perplexity(self) -> float:
        """Return the perplexity on the evaluation windows."""
        return perplexity.perplexity_by_blocks(self.weights, self.evaluation)

    def is_whole(self, saved: str | None) -> bool:
        """Return whether the pruned model can be had in memory, and warn if a streamed one was not ``saved``."""
        if saved is None and self.weights.streamed and self.weights.changed:
            log.warning("no zero-shot accuracy: the pruned model is whole in its folder only, which could not be saved")
            return False
        return True

    def zero_shot(
        self, saved: str | None, num_fewshot: int, limit: int | None, batch: int | str
    ) -> zero_shot.ZeroShotResult:
        """Return the accuracy on the questions; a streamed model, which fits into memory, is read from its folder.

        Args:
            saved: folder of the pruned model, None if nothing was pruned.
        """
        model = self.weights.model
        if self.weights.streamed:
            source = self.source if saved is None else locate.locate(saved, self.source.cache_dir)
            model = load.load_llm(source, self.dtypes.compute, processes.device(), reserve=self.reserve)
        return zero_shot.zero_shot(model, self.tokenizer, self.questions, num_fewshot, limit, batch)
