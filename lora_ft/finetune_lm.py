"""LoRA fine-tuning of a pruned model to recover its perplexity: python lora_ft/finetune_lm.py --help"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib.calibration import texts
from lib.cli.command import Parser, answer, make_parser, parse
from lib.cli.flags import Flags, flag
from lib.cli.settings import TEXTS
from lib.core import files, processes
from lib.core.errors import UserError, first_line
from lib.core.lazy import torch, transformers
from lib.core.names import check_name
from lib.models import load
from lib.models.layers import prunable_layers
from lib.models.weights import Weights
from lib.run.record import run_text
from lora_ft import common, rehearsal, resumption

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

BATCH = 128  # blocks to an optimizer step, published
# Decided in ``settle`` unless set by a flag.
OPEN = ("bf16", "fp16", "eval_strategy")
WRITTEN = ("train_results.json", "eval_results.json", "loss_curve.png")  # beside the adapter
RESUME = "the same command with --resume_from_checkpoint resumes from the last checkpoint in --output_dir"

# An update this many times larger than its layer's weight: in float32 sums nothing of the weight's share is left.
DROWNED = 2.0**23
# Times the loss at the start, and that of equal chances for all tokens: in perplexity, the square.
RUINED = 2.0


@dataclass(kw_only=True)
class Lora(Flags):
    _title: ClassVar[str] = "model and adapter"

    model: str = flag(MISSING, "the pruned model: folder or hub id", aliases=["model"])
    config_name: str | None = flag(
        None, "folder or hub id that lends the tokenizer or config the model lacks", metavar="NAME"
    )
    cache_dir: str = flag(
        "llm_weights", "where weights from the hub are kept", in_repository=True, metavar="DIR"
    )
    dtype: str = flag(
        "auto", "{choices} of the frozen weights; auto: as --bf16 and --fp16", choices=load.DTYPES, metavar="NAME"
    )
    lora_r: int = flag(8, "rank of the adapters", least=1, metavar="R")
    lora_alpha: int = flag(16, "scale of the adapters, divided by their rank", least=1, metavar="A")
    lora_dropout: float = flag(0.05, "of the adapters' input, a share in [0, 1)", least=0, below=1, metavar="P")
    lora_target_modules: str = flag(
        "q_proj,v_proj", "layers that get an adapter, by commas; or all-linear", metavar="L,L"
    )


@dataclass(kw_only=True)
class Texts(Flags):
    _title: ClassVar[str] = "data"

    dataset_name: str | None = flag(None, f"text: {TEXTS}", metavar="TEXT")
    train_file: str | None = flag(None, "training text, instead of --dataset_name's", metavar="FILE")
    validation_file: str | None = flag(None, "evaluation text, instead of --dataset_name's", metavar="FILE")
    block_size: int = flag(
        2048, "tokens of a training sample; at most the model's context", least=2, metavar="N"
    )
    max_train_samples: int | None = flag(None, "blocks to train on, a count (default: all)", least=1, metavar="N")
    max_eval_samples: int | None = flag(None, "blocks to evaluate on, a count (default: all)", least=1, metavar="N")
    batch_size: int | None = flag(
        None,
        f"blocks to a step, over all devices and accumulation steps (default: {BATCH})",
        least=1,
        metavar="N",
    )


@dataclass(kw_only=True)
class Training(Flags):
    """Flags of transformers' Trainer whose published values differ from its defaults, or that select the steps."""

    _title: ClassVar[str] = "training, by transformers' Trainer"

    do_train: bool = flag(False, "train", nargs="?")
    do_eval: bool = flag(False, "evaluate, at the end and while training", nargs="?")
    output_dir: str = flag(MISSING, "where the adapter, checkpoints and figures are written", metavar="DIR")
    resume_from_checkpoint: str | None = flag(
        None,
        "resume from a checkpoint's folder; without one, from the last checkpoint in --output_dir",
        nargs="?",
        const=resumption.LAST,
        only="do_train",
        metavar="DIR",
    )
    learning_rate: float = flag(1e-4, "peak learning rate", above=0, metavar="X")
    num_train_epochs: float = flag(1.0, "passes over the training blocks", above=0, metavar="N")
    per_device_train_batch_size: int = flag(1, "blocks at once on each device", least=1, metavar="N")
    gradient_accumulation_steps: int | None = flag(
        None, "forward passes to a step (default: what --batch_size needs)", least=1, metavar="N"
    )
    warmup_steps: float = flag(5, "steps, or a share of all steps below 1", least=0, below=math.inf, metavar="N")
    optim: str = flag("adamw_torch", "optimizer, by the Trainer's name", metavar="NAME")
    logging_steps: float = flag(10, "steps from one log line to the next", above=0, metavar="N")
    save_steps: float = flag(50, "steps from one checkpoint to the next", above=0, metavar="N")
    eval_steps: float = flag(50, "steps from one evaluation to the next", above=0, metavar="N")


@dataclass(kw_only=True)
class Replace(Flags):
    _title: ClassVar[str] = Training._title

    overwrite_output_dir: bool = flag(False, "replace the adapter and the checkpoints in --output_dir", nargs="?")


@dataclass(kw_only=True)
class Finetune(Lora, Texts, Training, Replace):
    """The flags of finetune_lm.py, except those known only to the Trainer."""

    _spelled: ClassVar[dict[str, str]] = {"model": "model_name_or_path"}

    def check(self) -> None:
        super().check()
        if not self.do_train and not self.do_eval:
            raise UserError(None, "nothing to do; add --do_train, --do_eval or both")
        for split, do in (("train", self.do_train), ("validation", self.do_eval)):
            if do:
                texts.check_text(*text_of(self, split))
        if self.do_train and self.do_eval and text_of(self, "train")[1] == text_of(self, "validation")[1]:
            name = text_of(self, "train")[1]
            if name not in texts.DATASETS:
                text = "%s is both trained and evaluated on; give another text: --validation_file FILE"
                common.log.warning(text, name)
        if self.lora_target_modules != "all-linear" and not all(self.lora_target_modules.split(",")):
            raise UserError("lora_target_modules", f"{self.lora_target_modules!r}: holds an empty name")


PARSER = make_parser(
    Finetune,
    "finetune_lm.py",
    "Train LoRA adapters on a pruned model to recover its perplexity.",
    "Every other field of transformers' TrainingArguments is a flag too, such as --gradient_checkpointing, --bf16 or "
    "--per_device_eval_batch_size: https://huggingface.co/docs/transformers/main_classes/trainer",
)


def text_of(settings: Texts, split: str) -> tuple[str, str]:
    """Return the field that names the text of ``split`` ("train" or "validation"), and the text's name."""
    field = f"{split}_file"
    if getattr(settings, field) is not None:
        return field, getattr(settings, field)
    if settings.dataset_name is None:
        raise UserError(None, f"no text; give --dataset_name, one of {', '.join(texts.DATASETS)}, or --{field} FILE")
    return "dataset_name", settings.dataset_name


# ----------------------------------------------------------------------------------------------------- arguments


def read(argv: Sequence[str] | None) -> tuple[Finetune, dict]:
    """Return the settings of the command line ``argv``, checked, and the Trainer's other arguments by name.

    The settings are checked first: transformers takes seconds to import.
    """
    rest: list[str] = []
    words = [_underscored(word) for word in (sys.argv[1:] if argv is None else argv)]
    settings = parse(Finetune, words, PARSER, rest)
    _check_output(settings)
    other = vars(trainer_parser().parse_args(rest))
    if other["do_predict"]:
        raise UserError("do_predict", "does nothing here; use --do_eval, or lora_ft/evaluate_ppl.py on the adapter")
    return settings, other


def _underscored(word: str) -> str:
    """Return ``--a_b`` for ``--a-b``, which transformers' own parser accepts as well."""
    name, equals, value = word.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if name.startswith("--") else word


def trainer_parser() -> Parser:
    """Return the parser of all Trainer arguments, with None for those that ``settle`` decides."""

    class TrainerParser(Parser, transformers.HfArgumentParser):
        def error(self, message: str):
            self._option_string_actions |= PARSER._option_string_actions  # for "did you mean"
            super().error(message)

    parser = TrainerParser(transformers.TrainingArguments, prog=PARSER.prog, allow_abbrev=False)
    parser.set_defaults(**dict.fromkeys(OPEN))
    return parser


def _check_output(settings: Finetune) -> None:
    """Refuse an --output_dir that cannot take this run, and find the checkpoint to resume from."""
    folder = Path(settings.output_dir).expanduser()
    if settings.resume_from_checkpoint:
        found = resumption.find_checkpoint(folder, settings.resume_from_checkpoint)
        settings.resume_from_checkpoint = str(found)
    if not processes.speaks():
        return  # what the first process of several does here, the others would find half done
    files.prepare("output_dir", folder)
    taken = folder.is_dir() and any(folder.iterdir())
    resumed = settings.resume_from_checkpoint and _is_in(Path(settings.resume_from_checkpoint), folder)
    if taken and not (settings.overwrite_output_dir or resumed):
        fix = "add --overwrite_output_dir to start again, --resume_from_checkpoint to resume, or give another folder"
        raise UserError("output_dir", f"{folder}: is not empty; {fix}")


def settle(settings: Finetune, other: dict) -> TrainingArguments:
    """Return the Trainer's arguments, with open ones decided.

    Raises:
        UserError: arguments that contradict each other.
    """
    rehearsal.check_ranges(other)
    other = dict(other)
    if other["bf16"] is None and other["fp16"] is None and torch.cuda.is_available() and not other["use_cpu"]:
        other["bf16"] = torch.cuda.is_bf16_supported(including_emulation=False)
        other["fp16"] = not other["bf16"]
    other |= {name: bool(other[name]) for name in ("bf16", "fp16")}
    if other["eval_strategy"] is None:
        other["eval_strategy"] = "steps" if settings.do_train and settings.do_eval else "no"
    if other["label_names"] is None:
        other["label_names"] = ["labels"]  # the Trainer cannot read them off a model inside adapters
    if other["ddp_find_unused_parameters"] is None:
        other["ddp_find_unused_parameters"] = False  # every adapter is used in every step; a search costs time
    if other["disable_tqdm"] is None:
        other["disable_tqdm"] = not sys.stderr.isatty()
    other["dataloader_pin_memory"] &= torch.cuda.is_available()
    other["prediction_loss_only"] = True  # all logits of the evaluation would be kept otherwise
    other["logging_nan_inf_filter"] = False  # it waits for the GPU after every forward pass; CheckedTrainer looks
    own = {item.name: getattr(settings, item.name) for item in fields(Training) if item.name != "given"}
    try:
        training = transformers.TrainingArguments(**other | own | {"gradient_accumulation_steps": 1})
    except Exception as error:  # of any class: what a wrong flag leads to
        raise UserError(None, first_line(error)) from error
    rehearsal.check_arguments(training)
    if training.n_gpu > 1:
        training._n_gpu = 1  # one process spreads the model over its GPUs, and not the batch
    training.gradient_accumulation_steps = _accumulation(settings, training)
    rehearsal.rehearse(training)
    return training


def _accumulation(settings: Finetune, training: TrainingArguments) -> int:
    """Return the accumulation steps that give --batch_size blocks per step, or the requested number."""
    batch, steps = settings.batch_size, settings.gradient_accumulation_steps
    at_once = training.per_device_train_batch_size * training.world_size
    if steps is not None:
        if batch not in (None, steps * at_once):
            made = f"makes {steps * at_once} blocks to a step; leave one of the two out"
            raise UserError("batch_size", f"{batch} with --gradient_accumulation_steps {steps}: that {made}")
        return steps
    if (batch or BATCH) % at_once:
        share = f"{training.per_device_train_batch_size} blocks on each of {training.world_size} devices"
        raise UserError("batch_size", f"{batch or BATCH}: is not made of {share}; give a multiple of {at_once}")
    return (batch or BATCH) // at_once


def _frozen_dtype(settings: Finetune, training: TrainingArguments) -> torch.dtype:
    if settings.dtype != "auto":
        return getattr(torch, settings.dtype)
    return torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32


def _check_targets(given: str, skeleton: PreTrainedModel) -> str | list[str]:
    if given == "all-linear":
        return given
    names = [*dict.fromkeys(layer.name.rpartition(".")[2] for layer in prunable_layers(skeleton)), "all-linear"]
    return [check_name("lora_target_modules", name.strip(), names) for name in given.split(",")]


# ------------------------------------------------------------------------------------------------------- the run


def run(settings: Finetune, other: dict) -> None:
    """Carry out the run step by step."""
    training = settle(settings, other)
    checkpoint = Path(training.resume_from_checkpoint) if training.resume_from_checkpoint else None
    started = {"flags": _training_flags(settings, training)}
    if checkpoint:
        if not training.deepspeed and not training.fsdp:  # which save an optimizer's shards in their own way
            resumption.check_parts(checkpoint)
        resumption.check_flags(checkpoint, started["flags"])
    base = common.find_base(settings.model, settings.config_name, settings.cache_dir)
    common.check_length("block_size", settings.block_size, base.skeleton)
    targets = _check_targets(settings.lora_target_modules, base.skeleton)
    if checkpoint:
        resumption.check_same_adapter(checkpoint, settings, targets, base.skeleton)
        with common.lent_by("model"):
            common.check_base_files(str(checkpoint.parent), base)
    train = _blocks(settings, "train", base) if training.do_train else None
    if train is not None:
        field, name = text_of(settings, "train")
        started["text"] = resumption.training_text(name, settings.max_train_samples, train)
        if checkpoint:
            resumption.check_text(checkpoint, field, started["text"])
    evaluation = _blocks(settings, "validation", base) if training.do_eval else None
    common.check_vocabulary(base, train, evaluation)
    at_once = training.per_device_train_batch_size * training.world_size
    if train is not None and training.dataloader_drop_last and len(train) < at_once:
        text = f"leaves nothing of {len(train)} blocks, {at_once} at once; leave it out"
        raise UserError("dataloader_drop_last", text)
    if evaluation is not None and training.world_size > 1:
        training.per_device_eval_batch_size = _even_batch(len(evaluation), training)
    prepared = Prepared(training, base, targets, train, evaluation)
    _train_and_evaluate(settings, prepared, settings.flags() | _differing(other), started)


class Prepared(NamedTuple):
    """Everything known before the weights are loaded; ``train`` and ``evaluation`` are blocks, if they are needed."""

    training: TrainingArguments
    base: common.Base
    targets: str | list[str]
    train: Tensor | None
    evaluation: Tensor | None


def _train_and_evaluate(settings: Finetune, known: Prepared, flags: dict, started: dict) -> None:
    """Load the model, train and evaluate.

    Args:
        flags: as stored in the records of the results.
        started: what a resumption has to have in common with this run.
    """
    training, base = known.training, known.base
    alone = training.world_size == 1 and not training.use_cpu
    device = None if alone else training.device
    weights = common.load_base(base, _frozen_dtype(settings, training), settings.block_size, device)
    transformers.set_seed(training.seed)
    model = _with_adapter(weights, base, settings, known.targets)
    trainer = checked_trainer(model, training, _collate, known.train, known.evaluation)
    about = {"model": common.identity(base.source), "sparsity": weights.sparsity(), "flags": flags}
    if training.do_train:
        if training.resume_from_checkpoint:
            _check_base(Path(training.resume_from_checkpoint).parent, weights, base)
        record = common.describe_base(weights, base, about["sparsity"]) | {"training": started}
        with common.kept(partial(_how_to_go_on, trainer), unless=Ruined):
            train_adapter(trainer, about, record)
    if training.do_eval:
        saved = f"the adapter is saved in {training.output_dir}" if training.do_train else "nothing was written"
        with common.kept(f"{saved}; measure it with: python lora_ft/evaluate_ppl.py"):
            _evaluate(trainer, about, text_of(settings, "validation")[1])
    if training.should_save:
        print(f"written: {training.output_dir}")


def _training_flags(settings: Finetune, training: TrainingArguments) -> dict:
    dtype = str(_frozen_dtype(settings, training)).removeprefix("torch.")
    return resumption.training_flags(training, settings.block_size, dtype)


def _check_base(folder: Path, weights: Weights, base: common.Base) -> None:
    """Refuse to go on with a run in ``folder`` that was started on other weights."""
    if "fingerprints" in common.recorded(folder):
        with common.lent_by("model"):
            common.check_base(str(folder), weights, base)


def train_adapter(trainer: Trainer, about: dict, record: dict) -> None:
    """Train, and write the adapter, the figures and the loss curve.

    Args:
        about: what the figures are stored with.
        record: of the weights and the flags, to be written beside the checkpoints.
    """
    args, out = trainer.args, Path(trainer.args.output_dir)
    trainer.first_save = partial(_begin, args, record)
    blocks, size = trainer.train_dataset.shape
    common.log.info("training %d of %d parameters on %d blocks of %d tokens, %d to a step",
                    *trainer.model.get_nb_trainable_parameters(), blocks, size,
                    args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size)  # fmt: skip
    metrics = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint).metrics
    check_adapter(trainer)
    _save_adapter(trainer, out)
    if args.should_save:
        files.write_atomically(out / "train_results.json", run_text(metrics | {"train_samples": blocks} | about))
        _plot(trainer.state.log_history, out / "loss_curve.png")


def _begin(args: TrainingArguments, record: dict) -> None:
    """Make --output_dir this run's: remove an earlier run's files, and record what a resumption has to share.

    Not before there is something to save: until then, what an earlier run left is worth more.
    """
    out, checkpoint = Path(args.output_dir), args.resume_from_checkpoint
    if not args.should_save:
        return
    if not (checkpoint and _is_in(Path(checkpoint), out)):
        _clear(out)
    files.write_atomically(out / common.BASE, json.dumps(record, indent=1) + "\n")


def _how_to_go_on(trainer: Trainer) -> str:
    """Return what to type after training was stopped."""
    out, checkpoint = Path(trainer.args.output_dir), trainer.args.resume_from_checkpoint
    resumed = checkpoint and _is_in(Path(checkpoint), out)
    return RESUME if resumed or trainer.first_save is None else "nothing was saved yet; the same command starts again"


def _is_in(checkpoint: Path, folder: Path) -> bool:
    return checkpoint.resolve().parent == folder.expanduser().resolve()


def _evaluate(trainer: Trainer, about: dict, text: str) -> None:
    """Evaluate, and write and print the perplexity."""
    metrics = trainer.evaluate()
    # math.exp raises where this is inf
    perplexity = torch.tensor(metrics["eval_loss"], dtype=torch.float64).exp().item()
    metrics |= {"perplexity": perplexity, "eval_samples": len(trainer.eval_dataset)}
    if trainer.args.should_save:
        path = Path(trainer.args.output_dir) / "eval_results.json"
        files.write_atomically(path, run_text(metrics | about))
        print(f"perplexity on {text} {perplexity:.4f}")


def _blocks(settings: Finetune, split: str, base: common.Base) -> Tensor:
    """Return the blocks of ``split`` ("train" or "validation"), [blocks, block_size] int32."""
    most = settings.max_train_samples if split == "train" else settings.max_eval_samples
    of_text = "train" if split == "train" else "test"
    field, name = text_of(settings, split)
    blocks = texts.training_blocks(field, name, of_text, base.tokenizer, settings.block_size, most)
    if most and len(blocks) < most:
        text = "%s has %d blocks of %d tokens, and not the %d that were asked for"
        common.log.warning(text, name, len(blocks), settings.block_size, most)
    return blocks


def _even_batch(blocks: int, training: TrainingArguments) -> int:
    """Return the largest evaluation batch that leaves no process with a partly filled batch.

    The Trainer pads such a batch with blocks that it has already seen, and they would count in the mean loss.
    """
    asked = training.per_device_eval_batch_size
    even = (batch for batch in range(asked, 1, -1) if blocks % (batch * training.world_size) == 0)
    batch = next(even, 1)  # batches of one are filled up too, but whole, and those are left out again
    if batch < asked:
        text = "--per_device_eval_batch_size is %d, so that %d blocks go evenly into %d processes"
        common.log.info(text, batch, blocks, training.world_size)
    return batch


def _with_adapter(weights: Weights, base: common.Base, settings: Lora, targets: str | list[str]) -> PeftModel:
    """Return the model with fresh adapters, which change nothing yet, around the target layers."""
    from peft import LoraConfig, get_peft_model

    common.quiet_peft()
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=targets,
    )
    model = get_peft_model(weights.model, config)
    config.base_model_name_or_path = common.identity(base.source)
    return model


def _collate(rows: list[Tensor]) -> dict[str, Tensor]:
    ids = torch.stack(rows).long()  # [batch, block_size]
    return {"input_ids": ids, "labels": ids.clone()}  # the model shifts the labels itself


# ----------------------------------------------------------------------------------------- training that goes wrong


class Ruined(UserError):
    """An error after which nothing is left to resume."""


def checked_trainer(
    model: PeftModel, training: TrainingArguments, collate, train: Tensor | None, evaluation: Tensor | None
) -> Trainer:
    """Return a Trainer that stops at a non-finite loss and keeps the first and last loss of a step.

    The attributes are ``first_loss`` and ``last_loss``, means over this process's blocks of a step, nats per token.
    It calls its ``first_save``, if that is set, before it saves anything.
    """

    class CheckedTrainer(transformers.Trainer):
        first_loss = last_loss = first_save = None
        _so_far: Tensor | float = 0.0

        def training_step(self, *args, **kwargs) -> Tensor:
            loss = super().training_step(*args, **kwargs)  # this pass's share of the step's mean
            self._so_far = self._so_far + loss
            if self.accelerator.sync_gradients:  # the last pass of a step: each look waits for the GPU
                self.last_loss, self._so_far = float(self._so_far), 0.0
                if not math.isfinite(self.last_loss):
                    raise _not_finite("the training loss", self.last_loss, self.state.global_step + 1)
                if self.first_loss is None:
                    self.first_loss = self.last_loss
            return loss

        def save_model(self, *args, **kwargs) -> None:  # of every checkpoint too, before the rest of it
            begin, self.first_save = self.first_save, None
            if begin:
                begin()
                self.accelerator.wait_for_everyone()  # the others' parts of a checkpoint would be cleared as well
            super().save_model(*args, **kwargs)

        def evaluate(self, *args, **kwargs) -> dict[str, float]:
            metrics = super().evaluate(*args, **kwargs)
            if not math.isfinite(metrics["eval_loss"]):
                raise _not_finite("the evaluation loss", metrics["eval_loss"], self.state.global_step)
            return metrics

    options = {"train_dataset": train, "eval_dataset": evaluation, "callbacks": [_own_steps()]}
    return CheckedTrainer(model, training, collate, **options)


def _own_steps() -> TrainerCallback:
    """Return a callback that lets a resumed run log, save and evaluate at the steps that its own flags name.

    The Trainer takes those of the run that is resumed, whatever is typed.
    """

    class OwnSteps(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, **_) -> None:
            state.compute_steps(args, state.max_steps)

    return OwnSteps()


def _not_finite(what: str, loss: float, step: int) -> UserError:
    return Ruined(None, f"{what} is {loss} at step {step}; lower --learning_rate, or try --bf16")


def check_adapter(trainer: Trainer) -> None:
    """Refuse an adapter that training has certainly ruined, before it is saved.

    Its weights are not finite; or an update is so much larger than its layer's weight that the weight vanishes in the
    sum of the two; or the last loss is far above both that of the first step and ln(vocabulary), the loss of a model
    that assigns all tokens equal probability.

    Raises:
        Ruined: as described above.
    """
    step, fix = trainer.state.global_step, "lower --learning_rate"
    for name, layer in common.lora_layers(trainer.model).items():
        update, weight = update_norm(layer), layer.get_base_layer().weight.detach().float().norm().item()
        if not math.isfinite(update):
            text = f"the adapter's weights for {name} are not finite after step {step}; {fix}, or try --bf16"
            raise Ruined(None, text)
        if weight > 0 and update > DROWNED * weight:
            size = f"its update of {name} is {update / weight:.1e} times as large as the layer's weight"
            raise Ruined(None, f"the adapter is ruined after step {step}, {size}; {fix}")
    first, last = trainer.first_loss, trainer.last_loss
    chance = math.log(trainer.model.get_input_embeddings().num_embeddings)
    if last is not None and last > RUINED * max(first, chance):
        known = f"{first:.4g} at its start and {chance:.4g} for equal chances"
        text = f"the training loss is {last:.4g} nats per token, against {known}"
        raise Ruined(None, f"the adapter is ruined after step {step}, {text}; {fix}")


def update_norm(layer) -> float:
    """Return the Frobenius norm of alpha / r B A, the adapter's update of its layer's weight [out, in].

    Not finite if A [r, in] or B [out, r] is not. Computed from two r x r products in float64, so that it is cheap and
    does not overflow: ||BA||^2 = trace(B'B AA').
    """
    (adapter,) = layer.active_adapters
    a, b = (part[adapter].weight.detach().double() for part in (layer.lora_A, layer.lora_B))
    squared = ((b.T @ b) * (a @ a.T)).sum().item()
    return layer.scaling[adapter] * math.sqrt(max(squared, 0.0)) if math.isfinite(squared) else squared


# ------------------------------------------------------------------------------------------------ output


def _clear(folder: Path) -> None:
    """Remove the files of an earlier run: a later resumption would mistake its checkpoints for this run's."""
    for path in resumption.checkpoints(folder).values():
        shutil.rmtree(path)
    for name in ("adapter_config.json", "adapter_model.safetensors", common.BASE, *WRITTEN):
        (folder / name).unlink(missing_ok=True)


def _save_adapter(trainer: Trainer, out: Path) -> None:
    """Write the adapter beside the checkpoints, its config last, so that a folder with a config is complete."""
    tmp = out / ".adapter"
    trainer.save_model(str(tmp))  # by all processes: sharded weights are gathered
    if not trainer.args.should_save:
        return
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (tmp / name).replace(out / name)
    shutil.rmtree(tmp)


def _differing(other: Mapping[str, object]) -> dict:
    """Return the Trainer's other arguments that differ from their defaults."""
    plain = vars(trainer_parser().parse_args([]))
    return {name: value for name, value in other.items() if value != plain[name]}


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
    if axes.lines:  # none where the run is shorter than --logging_steps
        axes.legend()
    files.save_figure(figure, path, dpi=120)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit status: 0, or 2 for an error that the user can fix."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # a training text is long
    fix = "lower --per_device_train_batch_size or --block_size, or add --gradient_checkpointing"
    return answer(PARSER.prog, Finetune, lambda: run(*read(argv)), "the same command starts again", True, fix)


if __name__ == "__main__":
    sys.exit(main())
