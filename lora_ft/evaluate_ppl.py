"""Measure the perplexity of a pruned model, with its LoRA adapter or without: python lora_ft/evaluate_ppl.py --help"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import main as pruning
from lib import UserError, data, eval, models, registry, results
from lora_ft import common

# lib speaks of main.py's flags
FLAGS = {"--seqlen": "--ctx_length", "--eval_data": "--dataset", "--calib_data": "--dataset"}


def make_parser() -> argparse.ArgumentParser:
    parser = pruning.Parser(
        prog="evaluate_ppl.py",
        description=__doc__,
    )
    add_model_flags(parser)
    add = parser.add_argument
    add("--lora_weights", metavar="DIR", help="the adapter: finetune_lm.py's --output_dir; without it the model alone")
    add_text_flags(parser)
    add("--eval_zero_shot", action="store_true", help="answer --tasks with lm-eval and measure the accuracy")
    pruning.add_zero_shot_flags(add)
    add(
        "--result_dir",
        default="results",
        metavar="DIR",
        help="where perplexity.txt, perplexity.json and zero_shot.txt are written",
    )
    return parser


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, help="the pruned model: folder or hub id")
    add("--config_name", metavar="NAME", help="folder or hub id that lends the tokenizer or config the model lacks")
    add("--cache_dir", default=common.CACHE, metavar="DIR", help="where weights from the hub are kept")
    add("--dtype", default="auto", help=f"{{{','.join(models.DTYPES)}}}; auto: float16 on CUDA, float32 on CPU")


def add_text_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    texts = f"{{{','.join(data.DATASETS)}}} or a .txt, .json or .jsonl file (field `text`)"
    add("--dataset", default="wikitext2", metavar="TEXT", help=f"evaluation text: {texts}")
    add("--ctx_length", type=int, default=2048, metavar="N", help="window length, tokens; at most the model's context")
    add("--eval_windows", type=int, metavar="N", help="windows to evaluate, a count (default: all)")


def check_args(args: argparse.Namespace) -> None:
    """Find every contradiction that needs no model."""
    pruning.check_zero_shot(args)
    check_text_args(args)
    results.prepare("--result_dir", Path(args.result_dir))


def check_text_args(args: argparse.Namespace) -> None:
    registry.check_name("--dtype", args.dtype, models.DTYPES)
    data.check_text("--dataset", args.dataset)
    if args.eval_windows is not None and args.eval_windows < 1:
        raise UserError(f"--eval_windows {args.eval_windows}: must be at least 1")


def run(args: argparse.Namespace) -> dict:
    """Measure, write and print the perplexity, and return the record."""
    check_args(args)
    base = common.find_base(args.model, args.config_name, args.cache_dir)
    common.check_length("--ctx_length", args.ctx_length, base.skeleton)
    if args.lora_weights is not None:
        common.check_adapter(args.lora_weights, base)
    windows = data.evaluation_windows(args.dataset, base.tokenizer, args.ctx_length, args.eval_windows)
    tasks = pruning.zero_shot_tasks(args)

    loaded = common.load_base(base, args.dtype)
    model = loaded.model if args.lora_weights is None else common.load_adapter(args.lora_weights, loaded, base)
    perplexity = eval.perplexity(model, windows)
    zero_shot = None if tasks is None else pruning.zero_shot(args, model, base.tokenizer, tasks)

    record = {
        "perplexity": perplexity,
        "zero_shot": None if zero_shot is None else {"means": zero_shot.means, "lm_eval": zero_shot.full},
        "model": common.identity(base.source),
        "sparsity": loaded.sparsity,
        "lora_weights": args.lora_weights,
        "evaluation": {"text": args.dataset, "windows": len(windows), "seqlen": args.ctx_length},
        "flags": pruning.flags_of(args),
    }
    folder = Path(args.result_dir)
    name = "wikitext" if args.dataset == "wikitext2" else args.dataset  # the published line's name for it
    line = f"perplexity on {name} {perplexity}"
    files = {"perplexity.json": results.run_text(record), "perplexity.txt": line + "\n"}
    if zero_shot is not None:
        files["zero_shot.txt"] = results.zero_shot_table(zero_shot.scores, zero_shot.means)
    results.write_files(folder, files)
    print(line)
    print(files.get("zero_shot.txt", ""), end="")
    return record


def main(argv: list[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit status: 0, or 2 for something that the user can mend."""
    args = make_parser().parse_args(argv)
    common.quiet()
    try:
        with common.renamed(FLAGS):
            run(args)
    except UserError as error:
        print(f"evaluate_ppl.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
