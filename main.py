"""Prune a LLaMA-family language model layer by layer and measure its perplexity: python main.py --help"""

import argparse
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

from rich.console import Console
from rich.table import Table

from lib import UserError, allocation, data, eval, metrics, models, prune, pruners, registry, results

log = logging.getLogger("main")

METHODS = [f"{p}_{a}" if a else p for a in allocation.ALLOCATIONS for p in pruners.PRUNERS]
# Names of the published code that are not built yet: refused with a line of their own.
LATER_METRICS = (
    "alpha spectral_norm log_spectral_norm log_norm norm stable_rank entropy mp_softrank random_distance"
).split()


class _Parser(argparse.ArgumentParser):
    """Answers a wrong command line with one line."""

    def error(self, message: str) -> NoReturn:
        unknown = re.fullmatch(r"unrecognized arguments: (\S+).*", message)
        if unknown:
            message += "." + registry.did_you_mean(unknown[1].split("=")[0], self._option_string_actions)
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def _true_or_false(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="main.py",
        description="Prune a LLaMA-family model and measure its perplexity. Without --prune_method: the dense model's.",
        epilog="example: python main.py --model smollm2-135m --prune_method wanda_ww --sparsity_ratio 0.5 "
        "--epsilon 0.2 --calib_data wiki_leads --eval_data wiki_leads --seqlen 512 --nsamples 16",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument_group("model").add_argument
    add("--model", required=True, help=f"hub id, local folder, .gguf file, or {models.SMOLLM2}")
    add("--cache_dir", default="llm_weights", metavar="DIR", help="where weights from the hub or from GGUF are kept")
    add("--dtype", default="auto", help=f"{{{','.join(models.DTYPES)}}}; auto: float16 on CUDA, float32 on CPU")
    add("--seed", type=int, default=0, help="of the calibration draws, an integer")

    add = parser.add_argument_group("data").add_argument
    texts = f"{{{','.join(data.DATASETS)}}} or a .txt, .json or .jsonl file (field `text`)"
    add("--calib_data", default="c4", metavar="TEXT", help=f"calibration text: {texts}")
    add("--nsamples", type=int, default=128, metavar="N", help="calibration windows, a count")
    add("--seqlen", type=int, default=2048, metavar="N", help="window length, tokens; at most the model's context")

    add = parser.add_argument_group("pruning").add_argument
    add("--prune_method", metavar="METHOD", help=f"{{{','.join(METHODS)}}}; _ww: layer-wise sparsity by --ww_metric")
    add("--sparsity_ratio", type=float, default=0.0, metavar="S", help="fraction of the weights to remove, in [0, 1)")
    add("--sparsity_type", default="unstructured", metavar="TYPE", help="unstructured, or N:M (2:4, 4:8 ...): keep N of M")
    add("--use_variant", action="store_true", help="Wanda's variant: one share of each row's score instead of a count")

    add = parser.add_argument_group("allocation (methods with _ww)").add_argument
    add("--ww_metric", default="alpha_peak", metavar="METRIC", help=f"{{{','.join(metrics.METRICS)}}} of each matrix")
    add("--ww_metric_cache", metavar="DIR", help="where the metric is kept (default: data/<model's own folder name>)")
    add("--epsilon", type=float, default=0.3, metavar="E", help="half width of the map from metric to sparsity, in [0, 1]")
    add("--mapping_type", default="block_wise", metavar="TYPE", help=f"{{{','.join(allocation.MAPPINGS)}}}")

    add = parser.add_argument_group("evaluation").add_argument
    add("--eval_data", default="wikitext2", metavar="TEXT", help=f"evaluation text: {texts}")
    add("--eval_windows", type=int, metavar="N", help="windows to evaluate, a count (default: all)")
    add("--eval_wikitext", type=_true_or_false, nargs="?", const=True, default=True, metavar="{true,false}",
        help="measure the perplexity on --eval_data")  # fmt: skip
    add("--eval_zero_shot", action="store_true", help="answer --tasks with lm-eval and measure the accuracy")
    add("--tasks", default=",".join(eval.ZERO_SHOT_TASKS), metavar="A,B", help="lm-eval's names of tasks or groups")
    add("--num_fewshot", type=int, default=0, metavar="N", help="worked examples before each question, a count")
    add("--limit", type=int, metavar="N", help="questions per task, a count (default: all)")
    add("--eval_batch_size", default="auto", metavar="N", help="choices at a time; auto: what a GPU holds, 8 on a CPU")
    add("--include_path", metavar="DIR", help="folder of more lm-eval task files, such as data/tasks")

    add = parser.add_argument_group("output").add_argument
    add("--save", default="results", metavar="DIR", help="where the run's figures are written")
    add("--save_model", metavar="DIR", help="write the pruned model to DIR/{method}_{ratio}")
    return parser


class Task(NamedTuple):
    """What the flags ask for: names in registries, the sparsity they imply, and N:M."""

    method: str  # "dense" without pruning
    pruner: pruners.Pruner | None
    allocation: str
    target: float
    nm: tuple[int, int] | None

    @property
    def run(self) -> str:
        return f"{self.method}_sparsity_{self.target}"


def check_args(args: argparse.Namespace) -> Task:
    """Find every contradiction that needs no model, and return what is asked for."""
    registry.check_name("--dtype", args.dtype, models.DTYPES)
    registry.check_name("--mapping_type", args.mapping_type, allocation.MAPPINGS)
    if args.ww_metric in LATER_METRICS:
        raise UserError(f"--ww_metric {args.ww_metric}: not built yet; choose from: {', '.join(metrics.METRICS)}")
    registry.check_name("--ww_metric", args.ww_metric, metrics.METRICS)
    data.check_text("--calib_data", args.calib_data)
    data.check_text("--eval_data", args.eval_data)
    if not 0 <= args.sparsity_ratio < 1:
        raise UserError(f"--sparsity_ratio {args.sparsity_ratio}: must be at least 0 and below 1")
    if not 0 <= args.epsilon <= 1:
        raise UserError(f"--epsilon {args.epsilon}: must be between 0 and 1")
    for flag in ("nsamples", "seqlen", "eval_windows"):
        value, least = getattr(args, flag), 2 if flag == "seqlen" and args.eval_wikitext else 1
        if value is not None and value < least:
            raise UserError(f"--{flag} {value}: must be at least {least}")
    _check_zero_shot(args)
    return _check_method(args)


def _check_zero_shot(args: argparse.Namespace) -> None:
    if not args.eval_zero_shot:
        parser = make_parser()
        for flag in ("tasks", "num_fewshot", "limit", "eval_batch_size", "include_path"):
            if getattr(args, flag) != parser.get_default(flag):
                raise UserError(f"--{flag} {getattr(args, flag)} without --eval_zero_shot does nothing")
    if not any(args.tasks.split(",")):
        raise UserError(f"--tasks {args.tasks!r}: names no task; give lm-eval's names with commas between them")
    if args.num_fewshot < 0:
        raise UserError(f"--num_fewshot {args.num_fewshot}: must be at least 0")
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit {args.limit}: must be at least 1")
    if args.eval_batch_size != "auto" and not re.fullmatch(r"[1-9]\d*", args.eval_batch_size):
        raise UserError(f"--eval_batch_size {args.eval_batch_size}: must be auto or at least 1")


def _check_method(args: argparse.Namespace) -> Task:
    nm = None if args.sparsity_type == "unstructured" else _parse_nm(args.sparsity_type)
    if args.prune_method is None:
        if args.sparsity_ratio or nm:
            what = f"--sparsity_type {args.sparsity_type}" if nm else f"--sparsity_ratio {args.sparsity_ratio}"
            raise UserError(f"{what} without a method; add --prune_method, one of: {', '.join(METHODS)}")
        if args.save_model or args.use_variant:
            raise UserError(f"--{'save_model' if args.save_model else 'use_variant'} without --prune_method does nothing")
        return Task("dense", None, "", 0.0, None)
    method = registry.check_name("--prune_method", args.prune_method, METHODS)
    name, _, suffix = method.partition("_")
    if args.use_variant and name not in pruners.VARIANTS:
        raise UserError(f"--use_variant with --prune_method {method}: only {', '.join(pruners.VARIANTS)} has a variant")
    target = args.sparsity_ratio
    if nm:
        if suffix:
            raise UserError(f"--sparsity_type {args.sparsity_type} with {method}: not built yet; use --prune_method {name}")
        if args.use_variant:
            raise UserError(f"--use_variant with --sparsity_type {args.sparsity_type}: the variant is unstructured only")
        implied = 1 - nm[0] / nm[1]
        if target and abs(target - implied) > 1e-9:
            raise UserError(
                f"--sparsity_ratio {target} with --sparsity_type {args.sparsity_type}: that type removes {implied:g}; "
                f"leave --sparsity_ratio out or give {implied:g}"
            )
        target = implied
    elif not target:
        raise UserError(f"--prune_method {method} without a sparsity; add --sparsity_ratio (or --sparsity_type N:M)")
    table = pruners.VARIANTS if args.use_variant else pruners.PRUNERS
    return Task(method, table[name], suffix, target, nm)


def _parse_nm(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if not found:
        hint = registry.did_you_mean(text, ["unstructured"])
        raise UserError(f"--sparsity_type {text}: must be unstructured or N:M such as 2:4.{hint}")
    keep, group = int(found[1]), int(found[2])
    if not 0 < keep < group:
        raise UserError(f"--sparsity_type {text}: N:M keeps N of M, so N must be at least 1 and below M")
    return keep, group


def _check_divisible(layers: list[models.PrunableLayer], nm: tuple[int, int]) -> None:
    for layer in layers:
        if layer.module.in_features % nm[1]:
            raise UserError(
                f"--sparsity_type {nm[0]}:{nm[1]}: {layer.name} has {layer.module.in_features} columns, "
                f"which {nm[1]} does not divide"
            )


def _seqlen(asked: int, context: int | None) -> int:
    if context is None or asked <= context:
        return asked
    log.warning("--seqlen %d is more than the model's context; using %d", asked, context)
    return context


def _once(kept: dict | None, make: Callable, *args):
    """Return ``make(*args)``, or what it returned for the same arguments when ``kept`` was last used."""
    if kept is None:
        return make(*args)
    if (make, args) not in kept:
        kept[make, args] = make(*args)
    return kept[make, args]


def run(args: argparse.Namespace, console: Console, kept: dict | None = None) -> dict:
    """Do what ``args`` ask for, in the order in which it happens, and return the run's record.

    Several runs of one process may share a dict ``kept``: texts and the model are then loaded once, and the model has
    its dense weights again at the start of each.
    """
    task = check_args(args)
    save = Path(args.save)
    results.prepare("--save", save)
    stages = results.Stages()

    # Whatever can be known without the weights is found out first: 13 GB take a while to load.
    with stages.stage("text"):
        source = models.locate(args.model, args.cache_dir)
        skeleton = _once(kept, models.load_skeleton, source)
        sparse = [] if task.pruner is None else models.prunable_layers(skeleton)
        if task.nm:
            _check_divisible(sparse, task.nm)
        cache = Path(args.ww_metric_cache or Path("data") / source.name)
        if task.allocation:
            metrics.read_cache(cache, args.ww_metric, source.name, sparse)
            results.prepare("--ww_metric_cache", cache)
        target_folder = Path(args.save_model or "") / f"{task.method}_{task.target}"
        if args.save_model:
            size = sum(p.numel() for p in skeleton.parameters()) * (4 if args.dtype == "float32" else 2)
            results.prepare("--save_model", target_folder.parent, size)
        seqlen = _seqlen(args.seqlen, models.context_length(skeleton))
        tokenizer = _once(kept, models.load_tokenizer, source)
        calibration = evaluation = None
        if task.pruner and task.pruner.statistic:
            draws = (args.calib_data, tokenizer, args.nsamples, seqlen, args.seed)
            calibration = _once(kept, data.calibration_windows, *draws)
        if args.eval_wikitext:
            evaluation = _once(kept, data.evaluation_windows, args.eval_data, tokenizer, seqlen, args.eval_windows)
    questions = None
    if args.eval_zero_shot:
        with stages.stage("tasks"):
            names = tuple(dict.fromkeys(filter(None, args.tasks.split(","))))
            questions = _once(kept, eval.find_tasks, names, args.include_path, args.num_fewshot)

    with stages.stage("load"):
        if kept is None or (models.load_llm, (source, args.dtype)) not in kept:
            log.info("loading %s", source.path)
        model = _once(kept, models.load_llm, source, args.dtype)
        blocks = models.find_blocks(model)[1]
        layers = models.prunable_layers(model)
        if kept is not None:
            prune.set_weights(blocks, layers, _once(kept, prune.copy_weights, blocks, tuple(layers)))
    dense_zeros = sum(prune.count_zeros(blocks, layers))

    rows, metric, ratios = [], None, {}
    if task.pruner:
        if task.allocation:
            with stages.stage("metric"):
                metric = metrics.load_or_measure(cache, args.ww_metric, source.name, layers, blocks).values
        share = allocation.ALLOCATIONS[task.allocation]
        ratios = share(layers, task.target, values=metric, epsilon=args.epsilon, mapping=args.mapping_type)
        plan = allocation.SparsityPlan(task.target, ratios, task.nm)
        with stages.stage("prune"):
            rows = prune.prune_model(model, blocks, layers, plan, task.pruner, calibration, metric)

    total = sum(layer.module.weight.numel() for layer in layers)
    measured = sum(prune.count_zeros(blocks, layers)) / total
    perplexity = None
    if evaluation is not None:
        with stages.stage("evaluate"):
            perplexity = eval.perplexity(model, evaluation)
    if args.save_model:
        with stages.stage("save"):
            models.save_llm(model, tokenizer, target_folder)
            written = prune.checkpoint_sparsity(target_folder, [layer.name for layer in layers])
            if written != measured:
                raise RuntimeError(f"{target_folder}: holds a sparsity of {written}, the model has {measured}")
    zero_shot = None
    if questions is not None:
        with stages.stage("zero_shot"):
            batch = args.eval_batch_size if args.eval_batch_size == "auto" else int(args.eval_batch_size)
            zero_shot = eval.zero_shot(model, tokenizer, questions, args.num_fewshot, args.limit, batch)

    record = {
        "complete": True,
        "method": task.method,
        "target_sparsity": task.target,
        "sparsity": measured,
        "dense_zeros": dense_zeros / total,
        "perplexity": perplexity,
        "zero_shot": None if zero_shot is None else {"means": zero_shot.means, "lm_eval": zero_shot.full},
        "model": source._asdict() | {"dtype": str(model.dtype).removeprefix("torch."), "parameters": model.num_parameters()},
        "calibration": None if calibration is None else {"text": args.calib_data, "windows": len(calibration), "seqlen": seqlen},
        "evaluation": None if evaluation is None else {"text": args.eval_data, "windows": len(evaluation), "seqlen": seqlen},
        "saved_model": str(target_folder) if args.save_model else None,
        "stages": stages.table,
        "flags": vars(args),
    }
    files = {}
    if perplexity is not None:
        files[f"perplexity_{task.run}.txt"] = results.perplexity_text(task.method, measured, perplexity)
    table = ""
    if zero_shot is not None:
        table = results.zero_shot_table(zero_shot.scores, zero_shot.means)
        files[f"zero_shot_{task.run}.txt"] = results.zero_shot_text(task.method, table)
    if rows:
        files[f"layers_{task.run}.tsv"] = results.layers_text(rows)
    files[f"run_{task.run}.json"] = results.run_text(record)  # last: it says that the run is complete
    earlier = results.read_run(save, task.run)
    if earlier and earlier.get("flags") != json.loads(json.dumps(vars(args))):  # --seed 1, 2:4 ... : the same file names
        log.warning("%s/*_%s.* of a run with other flags are replaced", save, task.run)
    results.write_files(save, files)
    if table:
        console.print(table, highlight=False, soft_wrap=True)
    _print_table(console, record, save, task)
    return record


def _print_table(console: Console, record: dict, save: Path, task: Task) -> None:
    table = Table(title=f"{record['model']['given']}: {task.method}", title_justify="left")
    for heading in ("method", "target", "sparsity", "perplexity", "seconds", "peak memory"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    seconds = sum(stage["seconds"] for stage in record["stages"].values())
    peak = max(stage["peak_rss_mb"] for stage in record["stages"].values())
    ppl = "-" if record["perplexity"] is None else f"{record['perplexity']:.4f}"
    row = (f"{task.target:g}", f"{record['sparsity']:.4f}", ppl, f"{seconds:.1f}", f"{peak} MB")
    table.add_row(task.method, *row)
    console.print(table)
    console.print(f"written: {save}/*_{task.run}.*", highlight=False)
    if record["saved_model"]:
        console.print(f"model:   {record['saved_model']}", highlight=False)


def quiet() -> None:
    """Leave the terminal to our own lines: the libraries' chatter is not the user's."""
    import transformers

    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("lib").setLevel(logging.INFO)
    log.setLevel(logging.INFO)
    for name in ("huggingface_hub", "lm_eval"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def main(argv: list[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit status: 0, or 2 for something that the user can mend."""
    args = make_parser().parse_args(argv)
    quiet()
    try:
        run(args, Console())
    except UserError as error:
        print(f"main.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
