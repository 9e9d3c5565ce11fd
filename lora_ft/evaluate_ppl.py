"""Perplexity of a pruned model, with or without its LoRA adapter: python lora_ft/evaluate_ppl.py --help"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib.calibration import texts as data
from lib.cli.command import command, make_parser
from lib.cli.flags import Flags, flag
from lib.cli.settings import ZeroShot
from lib.core import files
from lib.evaluation import perplexity, zero_shot
from lib.models import load
from lib.run.record import run_text, zero_shot_table
from lora_ft import common


@dataclass(kw_only=True)
class Adapter(Flags):
    _title: ClassVar[str] = "model"

    lora_weights: str | None = flag(
        None, "the adapter: finetune_lm.py's --output_dir (default: the model alone)", metavar="DIR"
    )


@dataclass(kw_only=True)
class Output(Flags):
    _title: ClassVar[str] = "output"

    result_dir: str = flag(
        "results", "where perplexity.txt, perplexity.json and zero_shot.txt are written", metavar="DIR"
    )


@dataclass(kw_only=True)
class Evaluate(common.PrunedModel, Adapter, common.Dataset, ZeroShot, Output):
    """The flags of evaluate_ppl.py."""


PARSER = make_parser(
    Evaluate, "evaluate_ppl.py", "Measure the perplexity of a pruned model, with its LoRA adapter or without."
)


def run(settings: Evaluate) -> dict:
    """Measure, write and print the perplexity and the accuracies, and return the record."""
    folder = Path(settings.result_dir)
    files.prepare("result_dir", folder)
    base = common.find_base(settings.model, settings.config_name, settings.cache_dir)
    common.check_length("ctx_length", settings.ctx_length, base.skeleton)
    if settings.lora_weights is not None:
        common.check_adapter(settings.lora_weights, base)
    cut = (settings.ctx_length, settings.eval_windows)
    windows = data.evaluation_windows(settings.dataset, base.tokenizer, *cut, field="dataset")
    common.check_vocabulary(base, windows)
    tasks = None
    if settings.eval_zero_shot:
        tasks = zero_shot.find_tasks(settings.task_names(), settings.include_path, settings.num_fewshot)

    dtype = load.choose_dtypes(settings.dtype, base.skeleton).compute
    weights = common.load_base(base, dtype, settings.ctx_length)
    record = {
        "perplexity": None,
        "zero_shot": None,
        "model": common.identity(base.source),
        "sparsity": weights.sparsity(),
        "lora_weights": settings.lora_weights,
        "evaluation": {"text": settings.dataset, "windows": len(windows), "seqlen": settings.ctx_length},
        "flags": settings.flags(),
    }
    adapter = settings.lora_weights
    model = weights.model if adapter is None else common.load_adapter(adapter, weights, base)
    record["perplexity"] = perplexity.perplexity(model, windows)
    name = "wikitext" if settings.dataset == "wikitext2" else settings.dataset  # the published line's name for it
    line = f"perplexity on {name} {record['perplexity']}"
    texts = {"perplexity.json": run_text(record | {"complete": tasks is None}), "perplexity.txt": line + "\n"}
    files.write_files(folder, texts)
    print(line, flush=True)
    if tasks is not None:
        with common.kept(f"the perplexity is in {folder}; the same command starts again"):
            record["zero_shot"] = _answer(settings, model, base, tasks, record)
    return record


def _answer(settings: Evaluate, model, base: common.Base, tasks: zero_shot.Tasks, record: dict) -> dict:
    """Run the tasks, write and print the accuracies, and return them."""
    cut = (settings.num_fewshot, settings.limit, settings.batch_size())
    answers = zero_shot.zero_shot(model, base.tokenizer, tasks, *cut)
    found = {"means": answers.means, "lm_eval": answers.full}
    table = zero_shot_table(answers.scores, answers.means)
    texts = {"zero_shot.txt": table, "perplexity.json": run_text(record | {"zero_shot": found, "complete": True})}
    files.write_files(Path(settings.result_dir), texts)
    print(table, end="")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit status: 0, or 2 for an error that the user can fix."""
    return command(Evaluate, run, argv, PARSER, out_of_memory="lower --ctx_length, or use more GPUs")


if __name__ == "__main__":
    sys.exit(main())
