"""Generated text of a model folder, packed or dense, with tokens per second and resident memory."""

from __future__ import annotations

import signal
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import MISSING, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import ClassVar

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lib import sparse
from lib.cli.command import command, make_parser
from lib.cli.flags import Flags, flag
from lib.core import cpu
from lib.core.errors import UserError
from lib.core.lazy import torch, transformers
from lib.models.load import check_vocabulary, context_length, load_llm, load_skeleton, load_tokenizer
from lib.models.locate import locate

ROUNDS = 5  # of --compare: each model as many times, in turns


@dataclass(kw_only=True)
class Generation(Flags):
    _title: ClassVar[str] = "generation"

    model: str = flag(MISSING, "a folder, packed or not, a .gguf file, smollm2-135m", positional=True, metavar="MODEL")
    prompt: str = flag(MISSING, "the text to continue", positional=True, metavar="PROMPT")
    tokens: int = flag(64, "new tokens at most", least=2, metavar="N")
    compare: str | None = flag(None, "run this model, too, in turns, and print the ratio", metavar="DENSE")
    threads: int = flag(0, "threads (0: as many as torch takes)", least=0, most=len(cpu.usable()), metavar="N")
    cache_dir: str | None = flag(None, "where models are kept (default: the repository's llm_weights)", metavar="DIR")


PARSER = make_parser(Generation, "generate.py", __doc__)


def resident_mb() -> int:
    """Return the resident memory of this process, including mapped files, in MB."""
    return psutil.Process().memory_info().rss // 10**6


class Timing:
    """A streamer for ``generate`` that passes tokens on to a ``printer``, if any, and records when each one arrives."""

    def __init__(self, printer: transformers.TextStreamer | None = None) -> None:
        self.printer, self.times = printer, []

    def put(self, ids: torch.Tensor) -> None:
        self.times.append(time.perf_counter())  # the first call brings the prompt, before it is read
        if self.printer:
            self.printer.put(ids)

    def end(self) -> None:
        if self.printer:
            self.printer.end()


class Runner:
    """A model of a packed folder, or a dense one in bfloat16 on the CPU, and its tokenizer."""

    def __init__(self, model: str, settings: Generation) -> None:
        from lib.sparse import loading  # noqa: F401  (with transformers, before the memory is measured)

        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.settings, self.before = settings, resident_mb()
        source = locate(model, settings.cache_dir)
        self.tokenizer = load_tokenizer(source)
        packed = sparse.is_packed(Path(source.path))
        on_cpu = torch.device("cpu")
        self.model = sparse.load_packed(source.path) if packed else load_llm(source, torch.bfloat16, on_cpu)

    def generate(self, show: bool) -> dict[str, float]:
        """Return speed and memory of one greedy run; ``show`` prints its text, else it is always as long."""
        ids = self.tokenizer(self.settings.prompt, return_tensors="pt").input_ids
        timing = Timing(transformers.TextStreamer(self.tokenizer) if show else None)
        limits = {"max_new_tokens": self.settings.tokens} | ({} if show else {"min_new_tokens": self.settings.tokens})
        with torch.inference_mode():
            self.model.generate(ids, attention_mask=torch.ones_like(ids), streamer=timing, do_sample=False, **limits)
        start, first, *rest = timing.times
        return {
            "prompt_tokens_per_second": ids.shape[1] / (first - start),
            "tokens_per_second": len(rest) / (rest[-1] - first) if rest else 0.0,
            "resident_mb": resident_mb(),
            "model_mb": resident_mb() - self.before,
        }


DESCRIPTION = (
    "{tokens_per_second:.1f} tokens/s, prompt {prompt_tokens_per_second:.1f} tokens/s, {resident_mb:.0f} MB resident "
    "({model_mb:.0f} MB more than before the model was loaded)"
)
_runner: Runner  # of a process that compare() started


def _start(model: str, settings: Generation) -> None:
    global _runner
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends this process without a traceback
    _runner = Runner(model, settings)


def _run() -> dict[str, float]:
    return _runner.generate(show=False)


def compare(settings: Generation) -> None:
    """Run the model and the dense one in turns, each in a process of its own, and print both and the ratio."""
    names, runs = (settings.model, settings.compare), ([], [])
    with ExitStack() as stack:
        new_pool = partial(ProcessPoolExecutor, 1, get_context("spawn"), _start)
        pools = [stack.enter_context(new_pool((name, settings))) for name in names]
        for turn in range(1 + ROUNDS):  # the first warms up
            for name, pool, runs_of_model in zip(names, pools, runs, strict=True):
                try:
                    run = pool.submit(_run).result()
                except BrokenProcessPool as error:
                    raise UserError(None, name, "could not be run", "see above") from error
                if turn:
                    runs_of_model.append(run)
    ours, dense = ({key: statistics.median(run[key] for run in ones) for key in ones[0]} for ones in runs)
    print(f"\n{settings.model}: {DESCRIPTION.format(**ours)}\n{settings.compare}: {DESCRIPTION.format(**dense)}")
    ratios = [ours[key] / dense[key] for key in ("tokens_per_second", "prompt_tokens_per_second", "model_mb")]
    print("ratio: {:.2f} times the tokens/s, {:.2f} of a prompt's, {:.2f} of the memory".format(*ratios), end="; ")
    print(f"medians of {ROUNDS} turns, {torch.get_num_threads()} threads")


def check_model(model: str, settings: Generation) -> None:
    """Refuse a model that cannot continue the prompt by as many tokens, as far as its files tell without weights."""
    source = locate(model, settings.cache_dir)
    skeleton, tokenizer = load_skeleton(source), load_tokenizer(source)
    ids = tokenizer(settings.prompt, return_tensors="pt", verbose=False).input_ids
    count, context = ids.shape[1], context_length(skeleton)
    if not count:
        raise UserError(None, model, "its tokenizer finds no token in the prompt", "give a longer one")
    check_vocabulary(model, skeleton, ids)
    if context is not None and count + settings.tokens > context:
        problem = f"the prompt has {count} tokens and {model} a context of {context}"
        raise UserError("tokens", settings.tokens, problem, "give fewer, or a shorter prompt")


def run(settings: Generation) -> None:
    """Generate, and compare if asked."""
    for model in filter(None, (settings.model, settings.compare)):  # both before the first one is loaded
        check_model(model, settings)
    print("\n" + DESCRIPTION.format(**Runner(settings.model, settings).generate(show=True)))
    if settings.compare:
        compare(settings)


def main(argv: Sequence[str] | None = None) -> int:
    return command(Generation, run, argv, PARSER, out_of_memory="use the CPU")


if __name__ == "__main__":
    sys.exit(main())
