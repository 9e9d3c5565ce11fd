"""Merging of a LoRA adapter into pruned weights without filling in their zeros: python lora_ft/merge.py --help"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib.cli.command import command, make_parser
from lib.cli.flags import flag
from lib.core import files
from lib.core.errors import UserError, flag_name
from lib.core.lazy import torch
from lib.evaluation.perplexity import perplexity
from lib.models import load, memory
from lib.models.weights import Weights, is_finite
from lib.pruning import walk
from lib.run import report
from lib.run.card import write_card
from lib.run.record import explain_failure, provenance, run_text
from lora_ft import common

PLAINLY, KEPT = "merged without masking", "merged, zeros kept"


@dataclass(kw_only=True)
class Merge(common.Evaluated):
    _title: ClassVar[str] = "adapter"

    lora_weights: str = flag(MISSING, "the adapter: finetune_lm.py's --output_dir", metavar="DIR")
    keep_dense: bool = flag(False, "let the adapter fill the zeros of the layers it changes")
    save: str = flag(MISSING, "where the merged model is written; a new folder", metavar="DIR")

    def check(self) -> None:
        super().check()
        out = Path(self.save)
        if out.is_dir() and any(out.iterdir()):
            raise UserError("save", out, "is not empty", "give a new folder")


PARSER = make_parser(Merge, "merge.py", "Merge a LoRA adapter into the pruned weights without filling their zeros.")


def run(settings: Merge) -> None:
    """Merge, write the merged model, then report the effect of each step on sparsity and perplexity."""
    out = Path(settings.save)
    base, windows = common.prepare_evaluation(settings)
    dtypes = load.choose_dtypes(settings.dtype, base.skeleton)
    files.check_writable("save", out, memory.saved_bytes(base.skeleton, base.source.path, dtypes.save))

    weights, pruned, model = common.load_with_adapter(settings, base)
    layers = {name: weights.model.get_submodule(name) for name in model.base_model.targeted_module_names}
    before = {name: layer.get_base_layer().weight.detach().to("cpu", copy=True) for name, layer in layers.items()}
    merge(model, weights, before)
    if not settings.keep_dense:
        restore_zeros(weights, before)
    merged, state = weights.sparsity(), PLAINLY if settings.keep_dense else KEPT
    load.save_llm(weights.model, base.tokenizer, out, dtypes.save)  # before whatever may still fail
    walk.check_saved(out, weights, merged)
    rows: list[dict] = []
    record = common.evaluation_record(settings, base, windows) | {"written": state, "rows": rows}

    def measure(name: str, sparsity: float, measured: torch.nn.Module) -> None:
        rows.append({"state": name, "sparsity": sparsity, "perplexity": perplexity(measured, windows)})
        record["complete"] = name == state
        files.write_atomically(out / "merge.json", run_text(record))
        card = {"model": base.source._asdict(), "method": "merged", "sparsity": merged, "merged": rows}
        write_card(out, record | card | provenance())

    again = f"python lora_ft/evaluate_ppl.py --model {out} --dataset {settings.dataset}"
    saved = f"the merged model is saved in {out}, the figures so far in {out}/merge.json"
    with explain_failure(lambda: f"{saved}; measure it with: {again} --ctx_length {settings.ctx_length}"):
        for name, weight in before.items():
            weights.model.get_submodule(name).weight.data.copy_(weight)
        measure("pruned", pruned, weights.model)
        model = common.attach(settings.lora_weights, weights.model)
        measure("adapter beside it", pruned, model)
        merge(model, weights, before)
        measure(PLAINLY, weights.sparsity(), weights.model)
        if not settings.keep_dense:
            restore_zeros(weights, before)
            measure(KEPT, merged, weights.model)
    title = f"{settings.lora_weights} in {settings.model}, perplexity on {settings.dataset}"
    cells = [(row["state"], f"{row['sparsity']:.4f}", f"{row['perplexity']:.4f}") for row in rows]
    report.show(title, ("model", "sparsity", "perplexity"), cells)
    report.line(f"written: {out}, {state}, with a sparsity of {merged:.4f}")


def merge(model: torch.nn.Module, weights: Weights, names: Iterable[str]) -> None:
    """Add each adapter's product to the weight of its layer, one of ``names``, in place, and remove the adapters.

    The sums are rounded to the dtype in which they are saved, so that the weights measured are the weights saved.

    Raises:
        UserError: a merged weight is not finite.
    """
    model.merge_and_unload()
    for name in names:
        weight = weights.model.get_submodule(name).weight.data
        weight.copy_(weight.to(weights.save_dtype))
        if not is_finite(weight):
            fix = f"train it again, or try {flag_name('dtype')} bfloat16"
            raise UserError("lora_weights", None, f"makes weights of {name} infinite or not a number", fix)


def restore_zeros(weights: Weights, before: Mapping[str, torch.Tensor]) -> None:
    """Set to zero what was zero ``before``, in the layers that it holds by name."""
    for name, pruned in before.items():
        weight = weights.model.get_submodule(name).weight.data
        weight.masked_fill_(pruned.to(weight.device) == 0, 0)


def main(argv: Sequence[str] | None = None) -> int:
    resume = "the same command starts again, if nothing was written to --save yet"
    return command(Merge, run, argv, PARSER, resume, out_of_memory=common.OUT_OF_MEMORY)


if __name__ == "__main__":
    sys.exit(main())
