"""Answers of pruned models beside the dense one's: their length, whether they end, how they repeat, perplexity."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lib import sparse
from lib.calibration import own_text
from lib.calibration.hidden import entry_device
from lib.cli.command import command, make_parser
from lib.cli.flags import Flags, flag
from lib.cli.settings import TEXTS
from lib.core import files
from lib.core.errors import UserError
from lib.core.lazy import torch
from lib.models import load, locate, memory
from lib.run import report
from lib.run.record import run_text

HEADINGS = ("model", "tokens", "ended", "repeated 4-grams", "perplexity of dense answers")


@dataclass(kw_only=True)
class Comparison(Flags):
    _title: ClassVar[str] = "answers"

    dense: str = flag(MISSING, "the dense model: folder, hub id, .gguf, smollm2-135m", positional=True, metavar="DENSE")
    pruned: list = flag(MISSING, "pruned models of it, packed or not", positional=True, nargs="+", metavar="PRUNED")
    prompt_data: str = flag("c4", f"text whose test split's first sentences are the prompts: {TEXTS}", metavar="TEXT")
    prompts: str | None = flag(None, "prompts instead, as for main.py", metavar="FILE")
    count: int = flag(32, "prompts, a count", least=1)
    tokens: int = flag(256, "of an answer at most", least=4)
    seed: int = flag(0, "random seed of prompts and sampling")
    save: str = flag("results/answers", "where figures, histogram and dense answers are written", metavar="DIR")
    cache_dir: str | None = flag(None, "where models are kept (default: the repository's llm_weights)", metavar="DIR")

    def check(self) -> None:
        super().check()
        if self.prompts and "prompt_data" in self.given:
            raise UserError("prompt_data", self.prompt_data, "does nothing with --prompts", "leave one of them out")


PARSER = make_parser(Comparison, "answers.py", __doc__)


def repeated(answer: Sequence[int]) -> float:
    """Return the share of the 4-grams of an answer that occurred in it before."""
    grams = [tuple(answer[i : i + 4]) for i in range(len(answer) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def answers_perplexity(model: torch.nn.Module, answers: Sequence[own_text.Answer]) -> float:
    """Return exp of the mean loss of the tokens of ``answers`` after their prompts."""
    total, count = 0.0, 0
    for prompt, answer, _ in answers:
        with torch.inference_mode():
            ids = torch.tensor([prompt + answer], device=entry_device(model))
            logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        targets = ids[0, len(prompt) :].to(logits.device)
        total += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        count += len(answer)
    return math.exp(total / count)


def run(settings: Comparison) -> None:
    """Let each model answer, write figures, histogram and the dense answers, and print the table."""
    folder, rows, lengths, dense = Path(settings.save), [], {}, []
    files.check_writable("save", folder)
    field, seed = ("prompts", None) if settings.prompts else ("prompt_data", settings.seed)
    prompts = own_text.read_prompts(field, getattr(settings, field), "test", seed)[: settings.count]
    sources = [locate.locate(name, settings.cache_dir) for name in (settings.dense, *settings.pruned)]
    skeletons = [load.load_skeleton(source) for source in sources]
    if len({skeleton.get_input_embeddings().num_embeddings for skeleton in skeletons}) > 1:
        raise UserError(None, None, "the models' vocabularies have different sizes", "give models of one origin")
    tokenizers = [load.load_tokenizer(source) for source in sources]
    asked = [[own_text.prompt_tokens(tokenizer, messages) for messages in prompts] for tokenizer in tokenizers]
    for source, skeleton, ids in zip(sources, skeletons, asked, strict=True):
        load.check_vocabulary(source.given, skeleton, *ids)
        context, longest = load.context_length(skeleton), max(map(len, ids))
        if context and longest + settings.tokens > context:
            problem = f"is, with prompts of up to {longest} tokens, more than {source.given}'s context, {context}"
            raise UserError("tokens", settings.tokens, problem, "lower it, or give shorter prompts")
    for source, skeleton, tokenizer, ids in zip(sources, skeletons, tokenizers, asked, strict=True):
        name, dtypes = source.given, load.choose_dtypes("auto", skeleton)
        packed = sparse.is_packed(source.path)
        room = memory.working_set(skeleton, dtypes.compute, False, settings.count, 2 * settings.tokens)
        model = sparse.load_packed(source.path) if packed else load.load_llm(source, dtypes.compute, reserve=room)
        written = own_text.write_answers(model, tokenizer, ids, settings.tokens, settings.seed)
        answers = [answer for batch in written for answer in batch]
        if not dense:
            dense = answers
            lines = [json.dumps({"marked": tokenizer.decode(prompt + answer)}) for prompt, answer, _ in dense]
            files.write_atomically(folder / "dense.jsonl", "\n".join(lines) + "\n")
        lengths[name] = [len(answer.answer) for answer in answers]
        figures = (lengths[name], [one.ended for one in answers], [repeated(one.answer) for one in answers])
        means = [sum(column) / len(answers) for column in figures]
        rows.append((name, *means, answers_perplexity(model, dense)))
        record = {"flags": settings.flags(), "models": [dict(zip(HEADINGS, row, strict=True)) for row in rows]}
        files.write_atomically(folder / "answers.json", run_text(record))
        del model, written  # before the next one is loaded

    figure, (axes,) = files.new_figure(6, 3)
    axes.hist([*lengths.values()], bins=16, range=(0, settings.tokens), label=[*lengths])
    axes.set(xlabel=f"length of an answer, tokens (limit {settings.tokens})", ylabel="answers")
    axes.legend()
    files.save_figure(figure, folder / "answers.png")
    cells = [(name, f"{long:.0f}", f"{end:.0%}", f"{again:.1%}", f"{ppl:.2f}") for name, long, end, again, ppl in rows]
    report.show(f"answers to {len(prompts)} prompts", HEADINGS, cells)
    print(f"written: {folder}/answers.json, answers.png, dense.jsonl")


def main(argv: Sequence[str] | None = None) -> int:
    return command(Comparison, run, argv, PARSER)


if __name__ == "__main__":
    sys.exit(main())
