"""Prune a LLaMA-family language model layer by layer and measure its perplexity: python main.py --help"""

import argparse
import json
import logging
import math
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib import (
    UserError,
    allocation,
    data,
    esd,
    eval,
    metrics,
    models,
    plans,
    prune,
    pruners,
    registry,
    results,
    scores,
    search,
)

log = logging.getLogger("main")

METHODS = [f"{p}_{a}" if a else p for a in allocation.ALLOCATIONS for p in pruners.PRUNERS]
METRICS = [*metrics.METRICS, *metrics.WEIGHTWATCHER]
# What the allocations call by another name than the flag, or want for the numbers that they share out.
PARAMETERS = {"mapping": "mapping_type"}
OWN_FLAGS = {"owl": ("owl_m", "owl_lambda"), "dlp": ("dlp_alpha",), "atp": ("atp_beta",)}
METRIC_FLAGS = (
    "ww_metric ww_metric_cache epsilon mapping_type farms farms_rows farms_ratio farms_steps esd_driver".split()
)


class _Note(argparse.Action):
    """Stores a value and notes that it was given: a flag that would do nothing is to be refused."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest, values)
        namespace.given = [*getattr(namespace, "given", []), self.dest]


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Answers a wrong command line with one line."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, formatter_class=_Help, allow_abbrev=False, **kwargs)
        self.register("action", None, _Note)

    def error(self, message: str) -> NoReturn:
        unknown = re.fullmatch(r"unrecognized arguments: (\S+).*", message)
        if unknown:
            message += "." + registry.did_you_mean(unknown[1].split("=")[0], self._option_string_actions)
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def true_or_false(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def _number_or_auto(text: str) -> float | str:
    if text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor auto") from None


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="main.py",
        description="Prune a LLaMA-family model and measure its perplexity. Without --prune_method: the dense model's.",
        epilog="example: python main.py --model smollm2-135m --prune_method wanda_ww --sparsity_ratio 0.5 "
        "--epsilon 0.2 --calib_data wiki_leads --eval_data wiki_leads --seqlen 512 --nsamples 16",
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
    add(
        "--prune_method",
        metavar="METHOD",
        help=f"{{{', '.join(pruners.PRUNERS)}}}, each alone or with a suffix that says how the "
        f"sparsity is shared out, {{{', '.join('_' + a for a in allocation.ALLOCATIONS if a)}}}; _ww: by --ww_metric",
    )
    add("--sparsity_ratio", type=float, default=0.0, metavar="S", help="fraction of the weights to remove, in [0, 1)")
    add(
        "--sparsity_type",
        default="unstructured",
        metavar="TYPE",
        help="unstructured, or N:M (2:4, 4:8 ...): keep N of M",
    )
    add("--use_variant", action="store_true", help="Wanda's variant: one share of each row's score instead of a count")

    add = parser.add_argument_group("allocation").add_argument
    add(
        "--ww_metric",
        default="alpha_peak",
        metavar="METRIC",
        help=f"of each matrix, for _ww: {{{', '.join(METRICS)}}}; "
        "a larger alpha, stable rank or entropy (less heavy-tailed) is pruned more; so is a larger norm, as published",
    )
    add("--ww_metric_cache", metavar="DIR", help="where the metric is kept (default: data/<model's own folder name>)")
    add(
        "--epsilon",
        type=_number_or_auto,
        default=0.3,
        metavar="E",
        help="half width of the map from metric to sparsity "
        "for _ww, in [0, 1], or auto: the best one on held-out calibration text",
    )
    add("--mapping_type", default="block_wise", metavar="TYPE", help=f"for _ww: {{{','.join(allocation.MAPPINGS)}}}")
    add(
        "--esd_driver",
        default="exact",
        metavar="NAME",
        help=f"{{{','.join(esd.DRIVERS)}}}; exact: float32 SVD, as published; "
        "fast: eigenvalues of the float64 Gram matrix",
    )
    add("--farms", action="store_true", help="spectra of windows of one aspect ratio (FARMS) instead of whole matrices")
    add("--farms_rows", type=int, default=2000, metavar="N", help="rows of a window; at most the matrix's shorter side")
    add("--farms_ratio", type=float, default=1.0, metavar="Q", help="columns of a window over its rows")
    add("--farms_steps", type=int, default=15, metavar="K", help="windows in each direction, a count")
    add("--metrics_only", action="store_true", help="compute the metric, keep it, show it, and end")
    add(
        "--owl_m", type=float, default=5.0, metavar="M", help="for _owl: outliers exceed M times the block's mean score"
    )
    add(
        "--owl_lambda",
        type=float,
        default=0.08,
        metavar="L",
        help="for _owl: half width of the map, a sparsity in [0, 1]",
    )
    add(
        "--dlp_alpha",
        type=float,
        default=0.15,
        metavar="A",
        help="for _dlp: half width of the map, a sparsity in [0, 1]",
    )
    add(
        "--atp_beta", type=float, default=0.005, metavar="B", help="for _atp: from block to block, a sparsity in [0, 1]"
    )
    add("--plan", metavar="FILE", help="take the layers' ratios from a file that --save_plan wrote")
    add("--save_plan", metavar="FILE", help="write the layers' ratios, by name, as JSON")
    add("--export_llmcompressor", metavar="FILE", help="write the layers' ratios as an llm-compressor recipe (YAML)")

    add = parser.add_argument_group("evaluation").add_argument
    add("--eval_data", default="wikitext2", metavar="TEXT", help=f"evaluation text: {texts}")
    add("--eval_windows", type=int, metavar="N", help="windows to evaluate, a count (default: all)")
    add("--eval_wikitext", type=true_or_false, nargs="?", const=True, default=True, metavar="{true,false}",
        help="measure the perplexity on --eval_data")  # fmt: skip
    add("--eval_zero_shot", action="store_true", help="answer --tasks with lm-eval and measure the accuracy")
    add_zero_shot_flags(add)

    add = parser.add_argument_group("output").add_argument
    add("--save", default="results", metavar="DIR", help="where the run's figures are written")
    add("--save_model", metavar="DIR", help="write the pruned model to DIR/{method}_{ratio}")
    return parser


def add_zero_shot_flags(add: Callable) -> None:
    add("--tasks", default=",".join(eval.ZERO_SHOT_TASKS), metavar="A,B", help="lm-eval's names of tasks or groups")
    add("--num_fewshot", type=int, default=0, metavar="N", help="worked examples before each question, a count")
    add("--limit", type=int, metavar="N", help="questions per task, a count (default: all)")
    add("--eval_batch_size", default="auto", metavar="N", help="choices at a time; auto: what a GPU holds, 8 on a CPU")
    add("--include_path", metavar="DIR", help="folder of more lm-eval task files, such as data/tasks")


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
    registry.check_name("--ww_metric", args.ww_metric, METRICS)
    registry.check_name("--esd_driver", args.esd_driver, esd.DRIVERS)
    data.check_text("--calib_data", args.calib_data)
    data.check_text("--eval_data", args.eval_data)
    if not 0 <= args.sparsity_ratio < 1:
        raise UserError(f"--sparsity_ratio {args.sparsity_ratio}: must be at least 0 and below 1")
    if args.epsilon != "auto" and not 0 <= args.epsilon <= 1:
        raise UserError(f"--epsilon {args.epsilon}: must be between 0 and 1, or auto")
    for flag in ("owl_lambda", "dlp_alpha", "atp_beta"):
        if not 0 <= getattr(args, flag) <= 1:
            raise UserError(f"--{flag} {getattr(args, flag)}: must be between 0 and 1")
    for flag in ("owl_m", "farms_ratio"):
        if not 0 < getattr(args, flag) < math.inf:
            raise UserError(f"--{flag} {getattr(args, flag)}: must be above 0")
    for flag in ("nsamples", "seqlen", "eval_windows", "farms_rows", "farms_steps"):
        value, least = getattr(args, flag), 2 if flag == "farms_rows" or flag == "seqlen" and args.eval_wikitext else 1
        if value is not None and value < least:
            raise UserError(f"--{flag} {value}: must be at least {least}")
    check_zero_shot(args)
    _check_metric(args)
    task = _check_metrics_only(args) if args.metrics_only else _check_method(args)
    _check_unused(args, task)
    return task


def flags_of(args: argparse.Namespace) -> dict[str, object]:
    """Return every flag and its value, as a run's record keeps them."""
    return {name: value for name, value in vars(args).items() if name != "given"}


def _given(args: argparse.Namespace) -> list[str]:
    return [*getattr(args, "given", []), *(["farms"] if getattr(args, "farms", False) else [])]


def _check_metric(args: argparse.Namespace) -> None:
    windows = [flag for flag in _given(args) if flag.startswith("farms_")]
    if windows and not args.farms:
        raise UserError(f"--{windows[0]} without --farms does nothing; add --farms")
    if args.ww_metric in metrics.WEIGHTWATCHER:
        if args.farms or args.esd_driver != "exact":
            flag = "--farms" if args.farms else f"--esd_driver {args.esd_driver}"
            raise UserError(
                f"{flag} with --ww_metric {args.ww_metric}: that metric goes through weightwatcher's own spectrum"
            )


def _check_metrics_only(args: argparse.Namespace) -> Task:
    for flag in (
        "prune_method",
        "sparsity_ratio",
        "eval_zero_shot",
        "save_model",
        "plan",
        "save_plan",
        "export_llmcompressor",
    ):
        if getattr(args, flag):
            raise UserError(f"--{flag} with --metrics_only: nothing is pruned then; leave one of them out")
    return Task("metrics", None, "ww", 0.0, None)


def _check_unused(args: argparse.Namespace, task: Task) -> None:
    """Refuse flags of an allocation that is not asked for.

    Those of _ww are let pass with a uniform method: published command lines give them there too.
    """
    odd = [flag for flag in _given(args) if flag.startswith("farms") or flag == "esd_driver"]
    if odd and task.allocation != "ww":
        raise UserError(f"--{odd[0]} does nothing with {task.method}; it is for the methods with _ww")
    for suffix, flags in OWN_FLAGS.items():
        for flag in flags:
            if flag in _given(args) and suffix != task.allocation:
                raise UserError(f"--{flag} does nothing with {task.method}; it is for the methods with _{suffix}")
    if task.allocation not in ("", "ww") or args.plan:
        for flag in METRIC_FLAGS:
            if flag in _given(args):
                raise UserError(f"--{flag} does nothing with {task.method}; it is for the methods with _ww")
    if args.epsilon == "auto":
        if task.allocation != "ww" or args.metrics_only:
            raise UserError(f"--epsilon auto with {task.method}: needs a --prune_method with _ww")
        same = (
            args.calib_data not in data.DATASETS and Path(args.calib_data).resolve() == Path(args.eval_data).resolve()
        )
        if same and args.eval_wikitext:
            raise UserError(
                "--epsilon auto: --calib_data and --eval_data are one file, so that the choice would see the "
                "evaluation text; give two"
            )


def check_zero_shot(args: argparse.Namespace) -> None:
    """Find contradictions among the flags of ``add_zero_shot_flags``."""
    for flag in ("tasks", "num_fewshot", "limit", "eval_batch_size", "include_path"):
        if flag in _given(args) and not args.eval_zero_shot:
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
        for flag in ("save_model", "use_variant", "plan", "save_plan", "export_llmcompressor"):
            if getattr(args, flag):
                raise UserError(f"--{flag} without --prune_method does nothing")
        return Task("dense", None, "", 0.0, None)
    method = registry.check_name("--prune_method", args.prune_method, METHODS)
    name, _, suffix = method.partition("_")
    if args.use_variant and name not in pruners.VARIANTS:
        raise UserError(f"--use_variant with --prune_method {method}: only {', '.join(pruners.VARIANTS)} has a variant")
    if args.export_llmcompressor and name not in plans.LLM_COMPRESSOR:
        raise UserError(f"--export_llmcompressor with {method}: for {' and '.join(plans.LLM_COMPRESSOR)} only")
    target = args.sparsity_ratio
    if args.plan:
        target = _check_plan(args, method)
        method = f"{name}_plan"
    elif nm:
        if args.use_variant:
            raise UserError(
                f"--use_variant with --sparsity_type {args.sparsity_type}: the variant is unstructured only"
            )
        if suffix and nm[0] == 1:
            more = f"{2 * nm[0]}:{2 * nm[1]}"
            raise UserError(
                f"--sparsity_type 1:{nm[1]} with {method}: every layer keeps at least one of {nm[1]}: nothing can be "
                f"shared out; use {more}"
            )
        if suffix and args.export_llmcompressor:
            raise UserError(
                f"--export_llmcompressor with --sparsity_type {args.sparsity_type} and {method}: "
                "llm-compressor has one N:M for all layers"
            )
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


def _check_plan(args: argparse.Namespace, method: str) -> float:
    """Return the target of the plan that is to be used."""
    if "_" in method:
        raise UserError(
            f"--plan with --prune_method {method}: the plan is the allocation; use {method.partition('_')[0]}"
        )
    if args.sparsity_type != "unstructured" or args.save_plan:
        flag = "save_plan" if args.save_plan else f"sparsity_type {args.sparsity_type}"
        raise UserError(f"--plan with --{flag}: the plan says all of that already; leave one of them out")
    content = plans.read_plan(Path(args.plan))
    if args.export_llmcompressor and len({str(row.get("nm")) for row in content["layers"].values()}) > 1:
        raise UserError("--export_llmcompressor with a plan of mixed N:M: llm-compressor has one N:M for all layers")
    if args.sparsity_ratio and abs(args.sparsity_ratio - content["target"]) > 1e-9:
        raise UserError(
            f"--sparsity_ratio {args.sparsity_ratio} with --plan {args.plan}: that plan is for {content['target']}"
        )
    if args.use_variant and any("nm" in row for row in content["layers"].values()):
        raise UserError("--use_variant with a plan of N:M: the variant is unstructured only")
    return content["target"]


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


class Texts(NamedTuple):
    """Windows of token ids, [windows, seqlen]; None where nothing needs them."""

    calibration: Tensor | None = None
    evaluation: Tensor | None = None
    search: tuple[Tensor, Tensor] | None = None  # of calibration and held out, for --epsilon auto


class Loaded(NamedTuple):
    """The model and what is asked of it again and again."""

    model: PreTrainedModel
    blocks: nn.ModuleList
    layers: tuple[models.PrunableLayer, ...]
    name: str


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
    _warn_of_replacement(args, task)
    stages = results.Stages()

    # Whatever can be known without the weights is found out first: 13 GB take a while to load.
    with stages.stage("text"):
        source = models.locate(args.model, args.cache_dir)
        skeleton = _once(kept, models.load_skeleton, source)
        _check_against(args, task, source, skeleton)
        seqlen = _seqlen(args.seqlen, models.context_length(skeleton))
        tokenizer = _once(kept, models.load_tokenizer, source)
        texts = _read_texts(args, task, tokenizer, seqlen, kept)
        _check_vocabulary(args, skeleton, texts)
    with stages.stage("tasks"):
        questions = zero_shot_tasks(args, kept)

    with stages.stage("load"):
        if kept is None or (models.load_llm, (source, args.dtype)) not in kept:
            log.info("loading %s", source.path)
        model = _once(kept, models.load_llm, source, args.dtype)
        blocks, layers = models.find_blocks(model)[1], tuple(models.prunable_layers(model))
        loaded = Loaded(model, blocks, layers, source.name)
        if kept is not None:
            prune.restore(blocks, layers, _once(kept, prune.snapshot, blocks, layers))
    dense_zeros = sum(prune.count_zeros(blocks, layers))
    if args.metrics_only:
        with stages.stage("metric"):
            values = _metric(args, loaded)
        _print_metric(console, args, layers, values, metric_folder(args, source.name))
        return {"method": task.method, "metric": values, "stages": stages.table}

    rows, trials, epsilon = [], [], None
    if task.pruner:
        values = _values(args, task, loaded, texts.calibration, stages, kept)
        plan_of = partial(_plan, args, task, layers, values)
        if args.epsilon == "auto":
            with stages.stage("search"):
                trials = _search(args, task, loaded, texts, values, plan_of)
            _print_trials(console, trials)
        epsilon = search.best(trials).epsilon if trials else args.epsilon
        plan = plans.load_plan(Path(args.plan), source.name, layers) if args.plan else plan_of(epsilon)
        _write_plan(args, task, plan, loaded)
        with stages.stage("prune"):
            rows = prune.prune_model(model, blocks, layers, plan, task.pruner, texts.calibration, values)

    total = sum(layer.module.weight.numel() for layer in layers)
    measured = sum(prune.count_zeros(blocks, layers)) / total
    perplexity = None
    if texts.evaluation is not None:
        with stages.stage("evaluate"):
            perplexity = eval.perplexity(model, texts.evaluation)
    if args.save_model:
        with stages.stage("save"):
            models.save_llm(model, tokenizer, _model_folder(args, task))
            prune.check_saved(_model_folder(args, task), layers, measured)

    def about(name: str, windows: Tensor | None) -> dict | None:
        return None if windows is None else {"text": name, "windows": len(windows), "seqlen": seqlen}

    record = {
        "complete": questions is None,
        "method": task.method,
        "target_sparsity": task.target,
        "sparsity": measured,
        "dense_zeros": dense_zeros / total,
        "perplexity": perplexity,
        "zero_shot": None,
        "model": source._asdict()
        | {"dtype": str(model.dtype).removeprefix("torch."), "parameters": model.num_parameters()},
        "calibration": about(args.calib_data, texts.calibration),
        "evaluation": about(args.eval_data, texts.evaluation),
        "epsilon": epsilon if task.allocation == "ww" else None,
        "epsilon_search": [trial._asdict() for trial in trials],
        "saved_model": str(_model_folder(args, task)) if args.save_model else None,
        "stages": stages.table,
        "flags": flags_of(args),
    }
    files = {}
    if perplexity is not None:
        files[f"perplexity_{task.run}.txt"] = results.perplexity_text(task.method, measured, perplexity)
    if rows:
        files[f"layers_{task.run}.tsv"] = results.layers_text(rows)
    files[f"run_{task.run}.json"] = results.run_text(record)  # last: it says that the run is complete
    results.write_files(save, files)
    if questions is not None:  # takes hours: what is known before is on disk by now
        with stages.stage("zero_shot"):
            answers = zero_shot(args, model, tokenizer, questions)
        record |= {"complete": True, "zero_shot": {"means": answers.means, "lm_eval": answers.full}}
        table = results.zero_shot_table(answers.scores, answers.means)
        text = {f"zero_shot_{task.run}.txt": results.zero_shot_text(task.method, table)}
        results.write_files(save, text | {f"run_{task.run}.json": results.run_text(record)})
        console.print(table, highlight=False, soft_wrap=True)
    _print_table(console, record, save, task, rows)
    return record


def zero_shot_tasks(args: argparse.Namespace, kept: dict | None = None) -> eval.Tasks | None:
    """Return the tasks that ``args`` ask for, their data loaded; None without --eval_zero_shot."""
    if not args.eval_zero_shot:
        return None
    names = tuple(dict.fromkeys(filter(None, args.tasks.split(","))))
    return _once(kept, eval.find_tasks, names, args.include_path, args.num_fewshot)


def zero_shot(
    args: argparse.Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: eval.Tasks
) -> eval.ZeroShot:
    """Return what the model answers to ``tasks``."""
    batch = args.eval_batch_size if args.eval_batch_size == "auto" else int(args.eval_batch_size)
    return eval.zero_shot(model, tokenizer, tasks, args.num_fewshot, args.limit, batch)


def _warn_of_replacement(args: argparse.Namespace, task: Task) -> None:
    """Say what will be replaced: published names hold neither the seed nor N:M nor epsilon."""
    earlier = results.read_run(Path(args.save), task.run)
    if earlier and earlier.get("flags") != json.loads(json.dumps(flags_of(args))):
        log.warning("%s/*_%s.* of a run with other flags will be replaced", args.save, task.run)
    if args.save_model and _model_folder(args, task).exists():
        log.warning("%s is there already and will be replaced", _model_folder(args, task))


def metric_folder(args: argparse.Namespace, name: str) -> Path:
    """Return where the metrics of the model ``name`` are kept."""
    return Path(args.ww_metric_cache or Path("data") / name)


def _model_folder(args: argparse.Namespace, task: Task) -> Path:
    return Path(args.save_model) / f"{task.method}_{task.target}"


def _settings(args: argparse.Namespace) -> metrics.Settings:
    farms = esd.Farms(args.farms_rows, args.farms_ratio, args.farms_steps) if args.farms else None
    return metrics.Settings(args.esd_driver, farms, args.seed)


def _check_against(args: argparse.Namespace, task: Task, source: models.Source, skeleton: PreTrainedModel) -> None:
    """Find every contradiction between the flags and the model's shapes, and every place that cannot be written."""
    layers = models.prunable_layers(skeleton)
    if task.nm:
        _check_divisible(layers, task.nm)
    if task.allocation == "ww":
        settings = _settings(args)
        metrics.read_cache(metric_folder(args, source.name), args.ww_metric, source.name, layers, settings)
        results.prepare("--ww_metric_cache", metric_folder(args, source.name))
        for layer in layers if args.farms else ():
            try:
                esd.farms_windows(tuple(layer.module.weight.shape), settings.farms)
            except esd.NoFit as error:
                raise UserError(f"--farms: {layer.name}, {error}; lower --farms_rows or --farms_ratio") from error
    if args.plan:
        plans.load_plan(Path(args.plan), source.name, layers)
    for flag in ("save_plan", "export_llmcompressor"):
        if getattr(args, flag):
            if Path(getattr(args, flag)).is_dir():
                raise UserError(f"--{flag} {getattr(args, flag)}: is a folder; give a file")
            results.prepare(f"--{flag}", Path(getattr(args, flag)).parent)
    if args.save_model:
        size = models.saved_bytes(skeleton, args.dtype)
        results.prepare("--save_model", _model_folder(args, task).parent, size)


def _read_texts(
    args: argparse.Namespace, task: Task, tokenizer: PreTrainedTokenizerBase, seqlen: int, kept: dict | None
) -> Texts:
    if args.metrics_only:
        return Texts()
    calibration = evaluation = held_out = None
    wants = allocation.ALLOCATIONS[task.allocation].wants
    if task.pruner and (task.pruner.statistic or wants in BLOCK_SCORES):
        draws = (args.calib_data, tokenizer, args.nsamples, seqlen, args.seed)
        calibration = _once(kept, data.calibration_windows, *draws)
    if args.epsilon == "auto":
        draws = (args.calib_data, tokenizer, search.WINDOWS, seqlen, args.seed)
        held_out = _once(kept, data.search_windows, *draws)
    if args.eval_wikitext:
        evaluation = _once(kept, data.evaluation_windows, args.eval_data, tokenizer, seqlen, args.eval_windows)
    return Texts(calibration, evaluation, held_out)


def _check_vocabulary(args: argparse.Namespace, skeleton: PreTrainedModel, texts: Texts) -> None:
    most = skeleton.get_input_embeddings().num_embeddings
    found = max([int(w.max()) for w in (texts.calibration, texts.evaluation) if w is not None], default=0)
    if found >= most:
        raise UserError(
            f"--model {args.model}: its tokenizer gives token {found} and the model has {most} embeddings; they do not "
            "belong together"
        )


def _metric(args: argparse.Namespace, loaded: Loaded) -> dict[str, float]:
    folder = metric_folder(args, loaded.name)
    return metrics.load_or_measure(
        folder, args.ww_metric, loaded.name, loaded.layers, loaded.blocks, _settings(args)
    ).values


def _values(
    args: argparse.Namespace,
    task: Task,
    loaded: Loaded,
    calibration: Tensor | None,
    stages: results.Stages,
    kept: dict | None,
) -> dict[str, float] | None:
    """Return what the allocation wants to know of each layer."""
    wants = None if args.plan else allocation.ALLOCATIONS[task.allocation].wants
    if wants is None:
        return None
    model, blocks, layers, _ = loaded
    with stages.stage("metric"):
        if wants == "metric":
            return _metric(args, loaded)
        if wants == "outlier_ratio":
            return _once(kept, _outlier_ratios, model, blocks, layers, calibration, args.owl_m)
        if wants == "median_score":
            return _once(kept, prune.score_blocks, model, blocks, layers, calibration, scores.median_score)
        return scores.shares_below(blocks, layers, task.target, WEIGHT_SCORES[wants])


def _outlier_ratios(
    model: PreTrainedModel,
    blocks: nn.ModuleList,
    layers: tuple[models.PrunableLayer, ...],
    calibration: Tensor,
    multiple: float,
) -> dict[str, float]:
    return prune.score_blocks(model, blocks, layers, calibration, partial(scores.outlier_ratio, multiple=multiple))


# What an allocation may want, by Allocation.wants.
BLOCK_SCORES = ("outlier_ratio", "median_score")
WEIGHT_SCORES = {"lamp_score": scores.lamp_score, "magnitude_score": scores.magnitude_score}


def _plan(
    args: argparse.Namespace, task: Task, layers: list[models.PrunableLayer], values: dict | None, epsilon: float
) -> allocation.SparsityPlan:
    how = allocation.ALLOCATIONS[task.allocation]
    given = {name: getattr(args, PARAMETERS.get(name, name)) for name in how.flags}
    if "epsilon" in given:
        given["epsilon"] = epsilon
    ratios = how.share(layers, task.target, values, **given)
    if task.nm is None:
        return allocation.SparsityPlan(task.target, ratios)
    nm = dict.fromkeys(ratios, task.nm)
    if task.allocation:
        nm = allocation.mixed_nm(layers, ratios, task.target, task.nm[1])
    return allocation.SparsityPlan(task.target, {name: 1 - n / m for name, (n, m) in nm.items()}, nm)


def _search(
    args: argparse.Namespace, task: Task, loaded: Loaded, texts: Texts, values: dict, plan_of: Callable
) -> list[search.Trial]:
    model, blocks, layers, _ = loaded
    largest = allocation.largest_epsilon(layers, task.target, values, args.mapping_type)
    grid = search.epsilon_grid(largest)
    return search.try_epsilons(model, blocks, layers, plan_of, grid, task.pruner, texts.search)


def _write_plan(args: argparse.Namespace, task: Task, plan: allocation.SparsityPlan, loaded: Loaded) -> None:
    recipe = None
    if args.export_llmcompressor:
        recipe = plans.llm_compressor_recipe(plan, loaded.layers, task.method.partition("_")[0])
    if args.save_plan:
        made_by = {"method": task.method, "flags": flags_of(args)}
        plans.save_plan(Path(args.save_plan), plan, loaded.name, loaded.layers, made_by)
    if recipe:
        results.write_atomically(Path(args.export_llmcompressor), recipe)


def _print_metric(
    console: Console, args: argparse.Namespace, layers: list[models.PrunableLayer], values: dict, folder: Path
) -> None:
    """Show the metric by type of matrix."""
    kinds: dict[str, list[float]] = {}
    for layer in layers:
        kinds.setdefault(layer.name.rpartition(".")[2], []).append(values[layer.name])
    table = Table(title=f"{args.model}: {args.ww_metric}", title_justify="left")
    for heading in ("matrix", "smallest", "mean", "largest"):
        table.add_column(heading, justify="left" if heading == "matrix" else "right")
    for kind, found in [*kinds.items(), ("all", list(values.values()))]:
        table.add_row(kind, *(f"{x:.4f}" for x in (min(found), sum(found) / len(found), max(found))))
    console.print(table)
    console.print(f"kept in: {folder}/{_settings(args).stem(args.ww_metric)}.npy", highlight=False)


def _print_trials(console: Console, trials: list[search.Trial]) -> None:
    table = Table(title="--epsilon auto: perplexity on held-out calibration text", title_justify="left")
    table.add_column("epsilon", justify="right")
    table.add_column("perplexity", justify="right")
    chosen = search.best(trials)
    for trial in trials:
        table.add_row(f"{trial.epsilon:.2f}", f"{trial.perplexity:.2f}" + (" <- taken" if trial is chosen else ""))
    console.print(table)


def _print_table(console: Console, record: dict, save: Path, task: Task, rows: list[results.LayerReport]) -> None:
    table = Table(title=f"{record['model']['given']}: {task.method}", title_justify="left")
    for heading in ("method", "target", "sparsity", "perplexity", "seconds", "peak memory"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    seconds = sum(stage["seconds"] for stage in record["stages"].values())
    peak = max(stage["peak_rss_mb"] for stage in record["stages"].values())
    ppl = "-" if record["perplexity"] is None else f"{record['perplexity']:.4f}"
    row = (f"{task.target:g}", f"{record['sparsity']:.4f}", ppl, f"{seconds:.1f}", f"{peak} MB")
    table.add_row(task.method, *row)
    console.print(table)
    patterns = Counter("{}:{}".format(*row.nm) for row in rows if row.nm)
    if len(patterns) > 1:
        each = ", ".join(f"{count} at {pattern}" for pattern, count in sorted(patterns.items()))
        console.print(f"layers:  {each} (see the .tsv)", highlight=False)
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
    except torch.OutOfMemoryError as error:
        first = str(error).splitlines()[0]
        print(f"main.py: error: {first}; lower --nsamples or --seqlen, or use more GPUs", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
