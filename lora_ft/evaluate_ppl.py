"""Perplexity of a pruned model, with or without its LoRA adapter: python lora_ft/evaluate_ppl.py --help"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib.cli.command import command, make_parser
from lib.cli.flags import flag
from lib.cli.settings import ZeroShotFlags
from lib.core import files
from lib.evaluation import zero_shot
from lib.evaluation.perplexity import perplexity
from lib.models import load
from lib.run.record import explain_failure, run_text
from lora_ft import common


@dataclass(kw_only=True)
class Evaluate(common.PrunedModel, common.Dataset, ZeroShotFlags):
    """The flags of evaluate_ppl.py."""

    _title: ClassVar[str] = "adapter and output"

    lora_weights: str | None = flag(
        None, "the adapter: finetune_lm.py's --output_dir (default: the model alone)", metavar="DIR"
    )
    result_dir: str = flag(
        "results", "where perplexity.txt, perplexity.json and zero_shot.txt are written", metavar="DIR"
    )


PARSER = make_parser(
    Evaluate, "evaluate_ppl.py", "Measure the perplexity of a pruned model, with its LoRA adapter or without."
)


def run(settings: Evaluate) -> None:
    """Measure, write and print the perplexity, then the accuracies if they are asked for."""
    folder = Path(settings.result_dir)
    files.check_writable("result_dir", folder)
    base = common.find_base(settings)
    if settings.lora_weights is not None:
        common.check_adapter(settings.lora_weights, base)
    windows = common.perplexity_windows(settings, base)
    tasks = None
    if settings.eval_zero_shot:
        tasks = zero_shot.find_tasks(settings.task_names(), settings.include_path, settings.num_fewshot)

    dtype = load.choose_dtypes(settings.dtype, base.skeleton).compute
    weights = common.load_base(base, dtype, settings.ctx_length)
    sparsity, model = weights.sparsity(), weights.model
    if settings.lora_weights is not None:
        common.check_base("lora_weights", Path(settings.lora_weights), base, weights)
        model = common.attach(settings.lora_weights, model)
    record = {
        "complete": tasks is None,
        "perplexity": perplexity(model, windows),
        "zero_shot": None,
        "model": base.source.anywhere,
        "sparsity": sparsity,
        "lora_weights": settings.lora_weights,
        "evaluation": {"text": settings.dataset, "windows": len(windows), "seqlen": settings.ctx_length},
        "flags": settings.flags(),
    }
    name = "wikitext" if settings.dataset == "wikitext2" else settings.dataset  # as the published line calls it
    line = f"perplexity on {name} {record['perplexity']}"
    files.write_atomically(folder / "perplexity.json", run_text(record))
    files.write_atomically(folder / "perplexity.txt", line + "\n")
    print(line, flush=True)
    if tasks is None:
        return
    with explain_failure(lambda: f"the perplexity is in {folder}"):
        cut = (settings.num_fewshot, settings.limit, settings.eval_batch_size)
        answers = zero_shot.zero_shot(model, base.tokenizer, tasks, *cut)
        record |= {"complete": True, "zero_shot": {"means": answers.means, "lm_eval": answers.full}}
        files.write_atomically(folder / "zero_shot.txt", answers.table)
        files.write_atomically(folder / "perplexity.json", run_text(record))
        print(answers.table, end="")


def main(argv: Sequence[str] | None = None) -> int:
    return command(Evaluate, run, argv, PARSER, out_of_memory="lower --ctx_length, or use more GPUs")


if __name__ == "__main__":
    sys.exit(main())
