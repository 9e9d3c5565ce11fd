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
from lib.run.record import explain_failure, run_text
from lora_ft import common


@dataclass(kw_only=True)
class Evaluate(common.Evaluated, ZeroShotFlags):
    _title: ClassVar[str] = "output"

    result_dir: str = flag("results", "where perplexity.txt, .json and zero_shot.txt are written", metavar="DIR")


PARSER = make_parser(Evaluate, "evaluate_ppl.py", "Measure a pruned model's perplexity, with or without an adapter.")


def run(settings: Evaluate) -> None:
    """Measure, write and print the perplexity, then the accuracies if they are asked for."""
    folder = Path(settings.result_dir)
    files.check_writable("result_dir", folder)
    base, windows = common.prepare_evaluation(settings)
    asked = (settings.tasks, settings.include_path, settings.num_fewshot)
    tasks = zero_shot.find_tasks(*asked) if settings.eval_zero_shot else None

    _, sparsity, model = common.load_with_adapter(settings, base)
    record = {"complete": tasks is None, "perplexity": perplexity(model, windows), "zero_shot": None}
    record |= {"sparsity": sparsity} | common.evaluation_record(settings, base, windows)
    name = "wikitext" if settings.dataset == "wikitext2" else settings.dataset  # as the published line calls it
    line = f"perplexity on {name} {record['perplexity']}"
    files.write_atomically(folder / "perplexity.json", run_text(record))
    files.write_atomically(folder / "perplexity.txt", line + "\n")
    print(line, flush=True)
    if tasks is None:
        return
    with explain_failure(lambda: f"the perplexity is in {folder}"):
        cut = (settings.num_fewshot, settings.limit, settings.eval_batch_size)
        answers, table = zero_shot.zero_shot(model, base.tokenizer, tasks, *cut)
        record |= {"complete": True, "zero_shot": answers}
        files.write_atomically(folder / "zero_shot.txt", table)
        files.write_atomically(folder / "perplexity.json", run_text(record))
        print(table, end="")


def main(argv: Sequence[str] | None = None) -> int:
    return command(Evaluate, run, argv, PARSER, out_of_memory=common.OUT_OF_MEMORY)


if __name__ == "__main__":
    sys.exit(main())
