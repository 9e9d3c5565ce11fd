"""Train LoRA adapters on a pruned model to win back its perplexity: python lora_ft/finetune_lm.py --help"""

import json
import math
import os
import re
import shutil
import sys
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed

import main as pruning
from lib import UserError, data, models, registry, results
from lora_ft import common

# The published settings, each a flag; what is not here is transformers' default.
PUBLISHED = {
    "learning_rate": 1e-4,
    "num_train_epochs": 1.0,
    "per_device_train_batch_size": 1,
    "warmup_steps": 5,
    "optim": "adamw_torch",
    "logging_steps": 10,
    "save_steps": 50,
    "eval_steps": 50,
}
BATCH = 128  # blocks to an optimizer step, published
# Decided in ``settle`` unless a flag says otherwise.
OPEN = ("bf16", "fp16", "eval_strategy", "gradient_accumulation_steps")
WRITTEN = ("train_results.json", "eval_results.json", "loss_curve.png")  # beside the adapter
LAST = "last"  # --resume_from_checkpoint without a folder
# lib speaks of main.py's flags
FLAGS = {
    "--model": "--model_name_or_path",
    "--seqlen": "--block_size",
    "--calib_data": "--train_file",
    "--eval_data": "--validation_file",
}


@dataclass
class LoraArguments:
    """What the Trainer's own arguments do not cover."""

    _argument_group_name = "LoRA"

    model_name_or_path: str = field(metadata={"help": "the pruned model: folder or hub id"})
    config_name: str | None = field(
        default=None, metadata={"help": "folder or hub id that lends the tokenizer or config the model lacks"}
    )
    cache_dir: str = field(default=common.CACHE, metadata={"help": "where weights from the hub are kept"})
    dtype: str = field(
        default="auto",
        metadata={"help": f"of the frozen weights: {','.join(models.DTYPES)}; auto: as --bf16 and --fp16"},
    )
    dataset_name: str | None = field(
        default=None,
        metadata={"help": f"text: {','.join(data.DATASETS)}, or a .txt, .json, .jsonl file (field `text`)"},
    )
    train_file: str | None = field(default=None, metadata={"help": "training text, instead of --dataset_name's"})
    validation_file: str | None = field(default=None, metadata={"help": "evaluation text, instead of --dataset_name's"})
    block_size: int = field(default=2048, metadata={"help": "tokens of a training sample; at most the model's context"})
    max_train_samples: int | None = field(default=None, metadata={"help": "blocks to train on (default: all)"})
    max_eval_samples: int | None = field(default=None, metadata={"help": "blocks to evaluate on (default: all)"})
    batch_size: int | None = field(
        default=None, metadata={"help": f"blocks to a step, over all devices and accumulation steps; None: {BATCH}"}
    )
    lora_r: int = field(default=8, metadata={"help": "rank of the adapters"})
    lora_alpha: int = field(default=16, metadata={"help": "scale of the adapters, divided by their rank"})
    lora_dropout: float = field(default=0.05, metadata={"help": "of the adapters' input, in [0, 1)"})
    lora_target_modules: str = field(
        default="q_proj,v_proj", metadata={"help": "layers that get an adapter, by commas; or all-linear"}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "replace the adapter and the checkpoints in --output_dir"}
    )


class Parser(pruning.Parser, HfArgumentParser):
    """The Trainer's own arguments, and answers of one line."""


class CheckedTrainer(Trainer):
    """Stops at a loss that is not finite; the Trainer would leave it out of its log and go on."""

    def training_step(self, *args, **kwargs) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise _not_finite("the training loss", loss.item(), self.state.global_step + 1)
        return loss

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        metrics = super().evaluate(*args, **kwargs)
        if not math.isfinite(metrics["eval_loss"]):
            raise _not_finite("the evaluation loss", metrics["eval_loss"], self.state.global_step)
        return metrics


def _not_finite(what: str, loss: float, step: int) -> UserError:
    return UserError(f"{what} is {loss} at step {step}, so training stops; lower --learning_rate, or try --bf16")


def make_parser() -> Parser:
    parser = Parser((LoraArguments, TrainingArguments), prog="finetune_lm.py", description=__doc__)
    parser.set_defaults(output_dir=None, **PUBLISHED, **dict.fromkeys(OPEN))
    resume = parser._option_string_actions["--resume_from_checkpoint"]
    resume.nargs, resume.const = "?", LAST
    resume.help = "go on from a checkpoint's folder; without one, from the last checkpoint in --output_dir"
    return parser


# ----------------------------------------------------------------------------------------------------- arguments


def check_args(args: Namespace) -> None:
    """Find every contradiction that needs no model."""
    registry.check_name("--dtype", args.dtype, models.DTYPES)
    if not args.do_train and not args.do_eval:
        raise UserError("nothing to do; add --do_train, --do_eval or both")
    if args.do_predict:
        raise UserError("--do_predict: does nothing here; use --do_eval, or lora_ft/evaluate_ppl.py on the adapter")
    if args.resume_from_checkpoint and not args.do_train:
        raise UserError("--resume_from_checkpoint without --do_train does nothing; add --do_train")
    for flag in ("batch_size", "lora_r", "lora_alpha", "max_train_samples", "max_eval_samples"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise UserError(f"--{flag} {getattr(args, flag)}: must be at least 1")
    if not 0 <= args.lora_dropout < 1:
        raise UserError(f"--lora_dropout {args.lora_dropout}: must be at least 0 and below 1")
    for split, do in (("train", args.do_train), ("validation", args.do_eval)):
        if do:
            data.check_text(*text_of(args, split))
    if args.do_train and args.do_eval and text_of(args, "train")[1] == text_of(args, "validation")[1]:
        name = text_of(args, "train")[1]
        if name not in data.DATASETS:
            common.log.warning("%s is both trained and evaluated on; give another text: --validation_file FILE", name)
    _check_output(args)


def text_of(args: Namespace, split: str) -> tuple[str, str]:
    """Return the flag that gives the text of ``split`` ("train" or "validation"), and the text's name."""
    flag = f"{split}_file"
    if getattr(args, flag) is not None:
        return f"--{flag}", getattr(args, flag)
    if args.dataset_name is None:
        raise UserError(f"no text; give --dataset_name, one of {', '.join(data.DATASETS)}, or --{flag} FILE")
    return "--dataset_name", args.dataset_name


def _check_output(args: Namespace) -> None:
    if args.output_dir is None:
        raise UserError("--output_dir is missing; give the folder that the adapter goes to")
    folder = Path(args.output_dir).expanduser()
    if args.resume_from_checkpoint:
        args.resume_from_checkpoint = str(_checkpoint(folder, args.resume_from_checkpoint))
    if int(os.environ.get("RANK", 0)) > 0:
        return  # what the first process of several does here, the others would find half done
    results.prepare("--output_dir", folder)
    if folder.is_dir() and any(folder.iterdir()) and not (args.overwrite_output_dir or args.resume_from_checkpoint):
        mend = "add --overwrite_output_dir to start anew, --resume_from_checkpoint to go on, or give another folder"
        raise UserError(f"--output_dir {folder}: is not empty; {mend}")


def _checkpoint(folder: Path, given: str) -> Path:
    """Return the checkpoint to go on from; of those in ``folder`` the last that was written to its end."""
    last, parts = "trainer_state.json", ("trainer_state.json", "adapter_config.json")
    if given != LAST:
        path = Path(given).expanduser()
        lacking = [part for part in parts if not (path / part).is_file()]
        if lacking:
            raise UserError(
                f"--resume_from_checkpoint {given}: is no checkpoint of a LoRA run, it holds no {lacking[0]}"
            )
        return path
    found = {int(path.parent.name.split("-")[1]): path.parent for path in folder.glob(f"checkpoint-*/{last}")}
    if not found:
        raise UserError(f"--resume_from_checkpoint: {folder} holds no checkpoint; leave the flag out to start anew")
    return found[max(found)]


def settle(args: Namespace) -> tuple[LoraArguments, TrainingArguments]:
    """Return the two groups of arguments, with what was left open decided."""
    if args.bf16 is None and args.fp16 is None and torch.cuda.is_available() and not args.use_cpu:
        args.bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        args.fp16 = not args.bf16
    args.bf16, args.fp16 = bool(args.bf16), bool(args.fp16)
    if args.eval_strategy is None:
        args.eval_strategy = "steps" if args.do_train and args.do_eval else "no"
    if args.label_names is None:
        args.label_names = ["labels"]  # the Trainer cannot read them off a model inside adapters
    if args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = False  # every adapter is used in every step; looking for others costs time
    if args.disable_tqdm is None:
        args.disable_tqdm = not sys.stderr.isatty()
    args.dataloader_pin_memory &= torch.cuda.is_available()
    args.prediction_loss_only = True  # all logits of the evaluation would be kept otherwise
    accumulate, args.gradient_accumulation_steps = args.gradient_accumulation_steps, 1
    try:
        lora, training = Parser((LoraArguments, TrainingArguments)).parse_dict(vars(args))
    except (ValueError, ImportError) as error:
        raise UserError(str(error).strip().splitlines()[0]) from error
    if training.n_gpu > 1:
        training._n_gpu = 1  # one process spreads the model over its GPUs, and not the batch
    training.gradient_accumulation_steps = _accumulation(lora.batch_size, accumulate, training)
    if lora.dtype == "auto":
        lora.dtype = "bfloat16" if training.bf16 else "float16" if training.fp16 else "float32"
    return lora, training


def _accumulation(batch: int | None, steps: int | None, training: TrainingArguments) -> int:
    """Return the accumulation steps that make ``batch`` blocks to a step, or the ``steps`` that were asked for."""
    at_once = training.per_device_train_batch_size * training.world_size
    if steps is not None:
        if batch not in (None, steps * at_once):
            made = f"makes {steps * at_once} blocks to a step; leave one of the two out"
            raise UserError(f"--batch_size {batch} with --gradient_accumulation_steps {steps}: that {made}")
        return steps
    if (batch or BATCH) % at_once:
        share = f"{training.per_device_train_batch_size} blocks on each of {training.world_size} devices"
        raise UserError(f"--batch_size {batch or BATCH}: is not made of {share}; give a multiple of {at_once}")
    return (batch or BATCH) // at_once


def _check_targets(given: str, skeleton) -> str | list[str]:
    if given == "all-linear":
        return given
    names = [*dict.fromkeys(layer.name.rpartition(".")[2] for layer in models.prunable_layers(skeleton)), "all-linear"]
    return [registry.check_name("--lora_target_modules", name.strip(), names) for name in given.split(",")]


# ------------------------------------------------------------------------------------------------------- the run


def run(args: Namespace) -> None:
    """Do what ``args`` ask for, in the order in which it happens."""
    check_args(args)
    lora, training = settle(args)
    base = common.find_base(lora.model_name_or_path, lora.config_name, lora.cache_dir)
    common.check_length("--block_size", lora.block_size, base.skeleton)
    targets = _check_targets(lora.lora_target_modules, base.skeleton)
    if training.resume_from_checkpoint:
        _check_same_adapter(Path(training.resume_from_checkpoint), lora, targets)
    train = _blocks(args, "train", base) if training.do_train else None
    evaluation = _blocks(args, "validation", base) if training.do_eval else None
    if evaluation is not None and training.world_size > 1:
        training.per_device_eval_batch_size = _even_batch(len(evaluation), training)

    alone = training.world_size == 1 and not training.use_cpu
    loaded = common.load_base(base, lora.dtype, None if alone else training.device)
    set_seed(training.seed)
    model = _with_adapter(loaded, base, lora, targets)
    trainer = CheckedTrainer(model, training, _collate, train_dataset=train, eval_dataset=evaluation)
    about = {"model": common.identity(base.source), "sparsity": loaded.sparsity, "flags": _given(args)}
    if training.do_train:
        _train(trainer, about, loaded, base)
    if training.do_eval:
        _evaluate(trainer, about, text_of(args, "validation")[1])
    if training.should_save:
        print(f"written: {training.output_dir}")


def _train(trainer: Trainer, about: dict, loaded: common.Loaded, base: common.Base) -> None:
    """Train, and write the adapter, the figures and the loss curve."""
    args, out = trainer.args, Path(trainer.args.output_dir)
    if args.should_save and not args.resume_from_checkpoint:
        _clear(out)
    blocks, size = trainer.train_dataset.shape
    common.log.info("training %d of %d parameters on %d blocks of %d tokens, %d to a step",
                    *trainer.model.get_nb_trainable_parameters(), blocks, size,
                    args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size)  # fmt: skip
    metrics = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint).metrics
    _save_adapter(trainer, out, loaded, base)
    if args.should_save:
        record = metrics | {"train_samples": blocks} | about
        results.write_atomically(out / "train_results.json", results.run_text(record))
        _plot(trainer.state.log_history, out / "loss_curve.png")


def _evaluate(trainer: Trainer, about: dict, text: str) -> None:
    """Evaluate, and write and print the perplexity."""
    metrics = trainer.evaluate()
    perplexity = (
        torch.tensor(metrics["eval_loss"], dtype=torch.float64).exp().item()
    )  # math.exp raises where this is inf
    metrics |= {"perplexity": perplexity, "eval_samples": len(trainer.eval_dataset)}
    if trainer.args.should_save:
        path = Path(trainer.args.output_dir) / "eval_results.json"
        results.write_atomically(path, results.run_text(metrics | about))
        print(f"perplexity on {text} {perplexity:.4f}")


def _blocks(args: Namespace, split: str, base: common.Base) -> Tensor:
    """Return the blocks of ``split`` ("train" or "validation"), [blocks, block_size] int32."""
    most = args.max_train_samples if split == "train" else args.max_eval_samples
    of_text = "train" if split == "train" else "test"
    blocks = data.training_blocks(*text_of(args, split), of_text, base.tokenizer, args.block_size, most)
    if most and len(blocks) < most:
        common.log.warning("%s has %d blocks of %d tokens, and not the %d that were asked for",
                           text_of(args, split)[1], len(blocks), args.block_size, most)  # fmt: skip
    return blocks


def _even_batch(blocks: int, training: TrainingArguments) -> int:
    """Return the largest evaluation batch that leaves none of several processes with a partly filled one.

    The Trainer fills such a batch up with blocks that it has seen, and they would count in the mean loss.
    """
    asked = training.per_device_eval_batch_size
    even = (batch for batch in range(asked, 1, -1) if blocks % (batch * training.world_size) == 0)
    batch = next(even, 1)  # batches of one are filled up too, but whole, and those are left out again
    if batch < asked:
        common.log.info("--per_device_eval_batch_size is %d, so that %d blocks go evenly into %d processes",
                        batch, blocks, training.world_size)  # fmt: skip
    return batch


def _with_adapter(loaded: common.Loaded, base: common.Base, lora: LoraArguments, targets: str | list[str]):
    """Return the model with fresh adapters, which change nothing yet, around the target layers."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.lora_r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=targets,
    )
    model = get_peft_model(loaded.model, config)
    config.base_model_name_or_path = common.identity(base.source)
    return model


def _check_same_adapter(checkpoint: Path, lora: LoraArguments, targets: str | list[str]) -> None:
    before = json.loads((checkpoint / "adapter_config.json").read_text(encoding="utf-8"))
    now = {"r": lora.lora_r, "lora_alpha": lora.lora_alpha, "lora_dropout": lora.lora_dropout}
    for name, value in now.items():
        if before[name] != value:
            flag = f"--{name if name.startswith('lora') else 'lora_' + name}"
            raise UserError(f"{flag} {value}: the run of {checkpoint} was started with {before[name]}; give that")
    if targets != "all-linear" and set(targets) != set(before["target_modules"]):
        was = ",".join(sorted(before["target_modules"]))
        raise UserError(f"--lora_target_modules {','.join(targets)}: the run of {checkpoint} was started with {was}")


def _collate(rows: list[Tensor]) -> dict[str, Tensor]:
    ids = torch.stack(rows).long()  # [batch, block_size]
    return {"input_ids": ids, "labels": ids.clone()}  # the model shifts the labels itself


# ------------------------------------------------------------------------------------------------ what is left behind


def _clear(folder: Path) -> None:
    """Remove what an earlier run left: a later resumption would take its checkpoints for this run's."""
    for path in folder.glob("checkpoint-*"):
        if re.fullmatch(r"checkpoint-\d+", path.name):
            shutil.rmtree(path)
    for name in ("adapter_config.json", "adapter_model.safetensors", common.BASE, *WRITTEN):
        (folder / name).unlink(missing_ok=True)


def _save_adapter(trainer: Trainer, out: Path, loaded: common.Loaded, base: common.Base) -> None:
    """Write the adapter beside the checkpoints, its config last, so that a folder with a config is whole."""
    if not all(torch.isfinite(weight).all() for weight in trainer.model.parameters() if weight.requires_grad):
        step = trainer.state.global_step
        raise UserError(f"the adapter's weights are not finite after step {step}; lower --learning_rate, or try --bf16")
    tmp = out / ".adapter"
    trainer.save_model(str(tmp))  # by all processes: sharded weights are gathered
    if not trainer.args.should_save:
        return
    common.write_base(out, loaded, base)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (tmp / name).replace(out / name)
    shutil.rmtree(tmp)


def _given(args: Namespace) -> dict:
    """Return the arguments that are not transformers' own defaults, the published settings among them."""
    plain = vars(Parser((LoraArguments, TrainingArguments)).parse_args(["--model_name_or_path", ""]))
    return {name: value for name, value in vars(args).items() if value != plain[name]}


def _plot(history: list[dict], path: Path) -> None:
    """Draw the training and the evaluation loss over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for key, label in (("loss", "training"), ("eval_loss", "evaluation")):
        points = [(row["step"], row[key]) for row in history if key in row]
        if points:
            axes.plot(*zip(*points, strict=True), marker=".", label=label)
    axes.set(xlabel="optimizer step", ylabel="loss, nats per token")
    axes.legend()
    results.save_figure(figure, path, dpi=120)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit status: 0, or 2 for something that the user can mend."""
    args = make_parser().parse_args(argv)
    common.quiet()
    try:
        with common.renamed(FLAGS):
            run(args)
    except torch.OutOfMemoryError:
        mend = "lower --per_device_train_batch_size or --block_size, or add --gradient_checkpointing"
        print(f"finetune_lm.py: error: the GPU's memory does not suffice; {mend}", file=sys.stderr)
        return 2
    except UserError as error:
        print(f"finetune_lm.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
