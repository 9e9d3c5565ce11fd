"""Merging of a LoRA adapter into pruned weights without filling in their zeros: python lora_ft/merge.py --help"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console

from lib.calibration import texts
from lib.cli.command import command, make_parser
from lib.cli.flags import Flags, flag
from lib.core import files
from lib.core.errors import UserError
from lib.core.lazy import torch
from lib.evaluation import perplexity as evaluation
from lib.models import load, memory
from lib.models.weights import Weights
from lib.pruning import walk
from lib.run import report as tables
from lib.run.record import run_text
from lora_ft import common

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

PRUNED, BESIDE, PLAINLY, KEPT = STATES = ("pruned", "adapter beside it", "merged without masking", "merged, zeros kept")


@dataclass(kw_only=True)
class Adapter(Flags):
    _title: ClassVar[str] = "adapter"

    lora_weights: str = flag(common.MISSING, "the adapter: finetune_lm.py's --output_dir", metavar="DIR")
    keep_dense: bool = flag(False, "let the adapter fill the zeros of the layers it changes")
    save: str = flag(common.MISSING, "where the merged model is written; a new folder", metavar="DIR")

    def check(self) -> None:
        super().check()
        out = Path(self.save)
        if out.is_dir() and any(out.iterdir()):
            raise UserError("save", f"{out}: is not empty; give a new folder")


@dataclass(kw_only=True)
class Merge(common.PrunedModel, Adapter, common.Dataset):
    """The flags of merge.py."""


PARSER = make_parser(Merge, "merge.py", "Merge a LoRA adapter into the pruned weights without filling their zeros.")


class Row(NamedTuple):
    """A state of the model, its ``sparsity`` over the layers in the blocks, and its perplexity, None until known."""

    state: str
    sparsity: float
    perplexity: float | None = None


class Report:
    """Rows of merge.json, beside the merged model, rewritten whenever a row is added."""

    def __init__(self, settings: Merge, about: dict) -> None:
        self.settings, self.about = settings, about
        self.rows: dict[str, Row] = {}

    def add(self, *rows: Row) -> None:
        """Add rows, replacing those of the same states, and write."""
        self.rows |= {row.state: row for row in rows}
        self.write()

    def write(self, complete: bool = False) -> None:
        rows = [row._asdict() for row in self.sorted()]
        files.write_atomically(
            Path(self.settings.save) / "merge.json", run_text({"complete": complete, "rows": rows} | self.about)
        )

    def sorted(self) -> list[Row]:
        return [self.rows[state] for state in STATES if state in self.rows]


def run(settings: Merge, console: Console) -> list[Row]:
    """Merge, write the merged model, then report the effect of each step on sparsity and perplexity."""
    out = Path(settings.save)
    base = common.find_base(settings.model, settings.config_name, settings.cache_dir)
    common.check_length("ctx_length", settings.ctx_length, base.skeleton)
    common.check_adapter(settings.lora_weights, base)
    dtypes = load.choose_dtypes(settings.dtype, base.skeleton)
    files.check_writable("save", out, memory.saved_bytes(base.skeleton, base.source, dtypes.stored))
    cut = (settings.ctx_length, settings.eval_windows)
    windows = texts.evaluation_windows(settings.dataset, base.tokenizer, *cut, field="dataset")
    common.check_vocabulary(base, windows)

    weights = common.load_base(base, dtypes.compute, settings.ctx_length, stored=dtypes.stored)
    pruned = weights.sparsity()
    model = common.load_adapter(settings.lora_weights, weights, base)
    adapted = common.adapted_layers(model)
    before = {name: layer.weight.detach().to("cpu", copy=True) for name, layer in adapted.items()}
    state = PLAINLY if settings.keep_dense else KEPT
    merge(model, weights, before if state == KEPT else None)
    merged = weights.sparsity()
    load.save_llm(weights.model, base.tokenizer, out, dtypes.stored)  # before whatever may still fail
    walk.check_saved(out, weights, merged)

    measure = f"python lora_ft/evaluate_ppl.py --model {out} --dataset {settings.dataset}"
    saved = f"the merged model is saved in {out}, the figures so far in {out}/merge.json"
    with common.kept(f"{saved}; measure it with: {measure} --ctx_length {settings.ctx_length}"):
        evaluated = {"text": settings.dataset, "windows": len(windows), "seqlen": settings.ctx_length}
        about = {"written": state, "model": common.identity(base.source), "lora_weights": settings.lora_weights}
        report = Report(settings, about | {"evaluation": evaluated, "flags": settings.flags()})
        report.add(Row(PRUNED, pruned), Row(state, merged))
        report.add(Row(state, merged, evaluation.perplexity(weights.model, windows)))
        for name, layer in adapted.items():
            layer.weight.data.copy_(before[name])
        evaluate_others(report, weights, windows)
        report.write(complete=True)
    show(console, report, state)
    return report.sorted()


def merge(model: PeftModel, weights: Weights, before: Mapping[str, Tensor] | None) -> None:
    """Add each adapter's product to its layer's weight, in place, and remove the adapters.

    The sums are rounded to the dtype in which they are saved, so that the weights measured are the weights saved.

    Args:
        before: the layers' weights without the adapter, whose zeros are kept; None to let them be filled in.

    Raises:
        UserError: a merged weight is not finite.
    """
    adapted = common.adapted_layers(model)
    model.merge_and_unload()
    for name, layer in adapted.items():
        weight = layer.weight.data
        if before is not None:
            weight.masked_fill_(before[name].to(weight.device) == 0, 0)
        if weights.stored is not None:
            weight.copy_(weight.to(weights.stored))
        if not torch.isfinite(weight).all():
            text = f"its product added to {name} is not finite; train it again, or try --dtype bfloat16"
            raise UserError("lora_weights", text)


def evaluate_others(report: Report, weights: Weights, windows: Tensor) -> None:
    """Measure the states before the merge, and the merge that fills in the zeros unless that is the one written.

    ``weights`` do not include the adapter.
    """
    rows, adapter = report.rows, report.settings.lora_weights
    report.add(rows[PRUNED]._replace(perplexity=evaluation.perplexity(weights.model, windows)))
    model = common.attach(adapter, weights)
    report.add(Row(BESIDE, rows[PRUNED].sparsity, evaluation.perplexity(model, windows)))
    if PLAINLY not in rows:
        merge(model, weights, None)
        report.add(Row(PLAINLY, weights.sparsity(), evaluation.perplexity(weights.model, windows)))


def show(console: Console, report: Report, state: str) -> None:
    """Print the rows and the merged model's path."""
    settings = report.settings
    title = f"{settings.lora_weights} in {settings.model}, perplexity on {settings.dataset}"
    rows = [(row.state, f"{row.sparsity:.4f}", f"{row.perplexity:.4f}") for row in report.sorted()]
    tables.show(console, title, ("model", "sparsity", "perplexity"), rows)
    sparsity = report.rows[state].sparsity
    tables.line(console, f"written: {settings.save}, {state}, with a sparsity of {sparsity:.4f}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit status: 0, or 2 for an error that the user can fix."""
    fix = "lower --ctx_length, or use more GPUs"
    return command(Merge, partial(_run, console=Console()), argv, PARSER, out_of_memory=fix)


def _run(settings: Merge, console: Console) -> None:
    run(settings, console)


if __name__ == "__main__":
    sys.exit(main())
