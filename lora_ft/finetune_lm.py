"""LoRA fine-tuning of a pruned model to recover its perplexity: python lora_ft/finetune_lm.py --help"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib.calibration import texts
from lib.cli.command import command, make_parser
from lib.cli.flags import Flags, flag
from lib.cli.settings import TEXTS
from lib.core import files, processes
from lib.core.digests import digest
from lib.core.errors import UserError, check_name
from lib.core.lazy import Lazy, peft, torch, transformers
from lib.models import load
from lib.models.layers import prunable_layers
from lib.run.record import explain_failure, run_text
from lora_ft import common

training = Lazy("lora_ft.training")

# What an earlier run has left in --output_dir, beside its checkpoints.
WRITTEN = """
    adapter_config.json adapter_model.safetensors base_model.json train_results.json eval_results.json loss_curve.png
""".split()


@dataclass(kw_only=True)
class TrainingTexts(Flags):
    _title: ClassVar[str] = "data"

    dataset_name: str | None = flag(None, f"text: {TEXTS}", metavar="TEXT")
    train_file: str | None = flag(None, "training text, instead of --dataset_name's", metavar="FILE")
    validation_file: str | None = flag(None, "evaluation text, instead of --dataset_name's", metavar="FILE")
    block_size: int = flag(2048, "tokens of a training sample; at most the model's context", least=2, metavar="N")
    max_train_samples: int | None = flag(None, "blocks to train on, a count (default: all)", least=1, metavar="N")
    max_eval_samples: int | None = flag(None, "blocks to evaluate on, a count (default: all)", least=1, metavar="N")


@dataclass(kw_only=True)
class Finetune(common.PrunedModel, TrainingTexts):
    """The flags of finetune_lm.py, except those known only to the Trainer (``training.LoraArguments``)."""

    _title: ClassVar[str] = "training"
    _spelled: ClassVar[dict[str, str]] = {"model": "model_name_or_path"}
    _passes_on: ClassVar[bool] = True
    _without: ClassVar[Sequence[str]] = ("seed", "dtype")

    model: str = flag(MISSING, "the pruned model: folder or hub id", aliases=["model"], title="model")
    lora_r: int = flag(8, "rank of the adapters", least=1, metavar="R", title="adapter")
    lora_alpha: int = flag(16, "scale of the adapters, divided by their rank", least=1, metavar="A", title="adapter")
    lora_dropout: float = flag(0.05, "dropped share of their input", least=0, below=1, metavar="P", title="adapter")
    lora_target_modules: str = flag(
        "q_proj,v_proj", "layers that get an adapter, by commas; or all-linear", metavar="L,L", title="adapter"
    )
    do_train: bool = flag(False, "train", nargs="?")
    do_eval: bool = flag(False, "evaluate, at the end and while training", nargs="?")
    batch_size: int | None = flag(
        None, "blocks to a step, over all devices and accumulation steps (default: 128)", least=1, metavar="N"
    )
    output_dir: str = flag(MISSING, "where the adapter, checkpoints and figures are written", metavar="DIR")
    overwrite_output_dir: bool = flag(False, "replace the adapter and the checkpoints in --output_dir", nargs="?")
    resume_from_checkpoint: str | None = flag(
        None, "resume from a checkpoint's folder; without one, from the last checkpoint in --output_dir", nargs="?",
        const="last", only="do_train", metavar="DIR",
    )  # fmt: skip

    def check(self) -> None:
        super().check()
        if not self.do_train and not self.do_eval:
            raise UserError(None, None, "nothing to do", "add --do_train, --do_eval or both")
        named = self.named_texts()
        for field, name in named.values():
            texts.check_text(field, name)
        names = {name for _, name in named.values()}
        if len(named) > len(names) and not any(map(texts.is_split, names)):
            message = "%s is both trained and evaluated on; give another text: --validation_file FILE"
            common.log.warning(message, *names)

    def named_texts(self) -> dict[str, tuple[str, str]]:
        """Return the texts that are read: the field that names it and its name, by split (train, validation)."""
        named = {}
        for split in ["train"] * self.do_train + ["validation"] * self.do_eval:
            field = f"{split}_file" if getattr(self, f"{split}_file") else "dataset_name"
            named[split] = field, getattr(self, field)
            if named[split][1] is None:
                fix = f"give --dataset_name, one of {', '.join(texts.DATASETS)}, or --{split}_file FILE"
                raise UserError(None, None, "no text", fix)
        return named


PARSER = make_parser(
    Finetune,
    "finetune_lm.py",
    "Train LoRA adapters on a pruned model to recover its perplexity.",
    "Every other field of transformers' TrainingArguments is a flag too, such as --gradient_checkpointing, --bf16 or "
    "--per_device_eval_batch_size (https://huggingface.co/docs/transformers/main_classes/trainer). Published, and "
    "therefore default here: --learning_rate 0.0001 --num_train_epochs 1.0 --per_device_train_batch_size 1 "
    "--warmup_steps 5 --optim adamw_torch --logging_steps 10 --save_steps 50 --eval_steps 50",
)


def run(settings: Finetune) -> None:
    """Train the adapters and evaluate them; whatever needs no weights is checked before they are loaded."""
    steered = {name: getattr(settings, name) for name in ("do_train", "do_eval", "output_dir", "batch_size")}
    arguments = training.parse_arguments(settings.rest, PARSER, **steered)
    checkpoint = check_output_dir(settings, sharded=bool(arguments.deepspeed or arguments.fsdp))
    base = common.find_base(settings)
    common.check_length("block_size", settings.block_size, base.skeleton)
    targets = settings.lora_target_modules
    if targets != "all-linear":  # last parts of names
        kinds = dict.fromkeys(layer.name.rpartition(".")[2] for layer in prunable_layers(base.skeleton))
        choices = [*kinds, "all-linear"]
        targets = [check_name("lora_target_modules", name.strip(), choices) for name in targets.split(",")]
    blocks = {split: read_blocks(settings, split, base) for split in settings.named_texts()}
    load.check_vocabulary(base.source.given, base.skeleton, *blocks.values())

    # What determines the training; another text of the same name has other tokens.
    flags = {name: getattr(settings, name) for name in training.ADAPTER_FLAGS}
    flags |= {name: value for name, value in arguments.to_dict().items() if name in training.TRAINER_FLAGS}
    if settings.do_train:
        field, name = settings.named_texts()["train"]
        flags[field] = f"{Path(name).name} (tokens {digest(blocks['train'])[:16]})"
    if checkpoint:
        training.check_same_training(checkpoint, flags)

    # One process spreads the model over all GPUs, of several each has the whole.
    dtype = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else torch.float32
    device = None if arguments.world_size == 1 and not arguments.use_cpu else arguments.device
    weights, sparsity = common.load_base(base, load.Dtypes(dtype, dtype), settings.block_size, device)
    if checkpoint:
        common.check_base(training.FIELD, checkpoint.parent, base, weights)
    record = {"model": base.source.anywhere, "sparsity": sparsity}
    started = record | {"fingerprints": weights.fingerprints(), "training": flags}
    record["flags"] = arguments.to_dict() | settings.flags()

    with training.refusals():
        transformers.set_seed(arguments.seed)
        scale = {"lora_alpha": settings.lora_alpha, "lora_dropout": settings.lora_dropout}
        config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=targets, r=settings.lora_r, **scale)
        model = peft.get_peft_model(weights.model, config)  # fresh adapters change nothing yet
        config.base_model_name_or_path = base.source.anywhere
        train, evaluation = blocks.get("train"), blocks.get("validation")
        trainer = training.LoraTrainer(model, arguments, collate, train, evaluation, callbacks=[training.Watch()])
    if settings.do_train:
        train_adapter(trainer, checkpoint, started, record)
    if settings.do_eval:
        saved = f"the adapter is saved in {settings.output_dir}" if settings.do_train else "nothing was written"
        with explain_failure(lambda: f"{saved}; measure it with: python lora_ft/evaluate_ppl.py"):
            evaluate(trainer, record, settings.named_texts()["validation"][1])
    if arguments.should_save:
        print(f"written: {arguments.output_dir}")


def check_output_dir(settings: Finetune, sharded: bool) -> Path | None:
    """Refuse an --output_dir that cannot take this run, and return the checkpoint to resume from, if any."""
    folder, checkpoint = Path(settings.output_dir), None
    if settings.resume_from_checkpoint:
        checkpoint = training.find_checkpoint(folder, settings.resume_from_checkpoint, sharded)
    if not processes.is_main():
        return checkpoint  # What the first process of several does here, the others would find half done.
    files.check_writable("output_dir", folder)
    resumed = checkpoint and checkpoint.resolve().parent == folder.resolve()
    if folder.is_dir() and any(folder.iterdir()) and not (settings.overwrite_output_dir or resumed):
        fix = "add --overwrite_output_dir to start again, --resume_from_checkpoint to resume, or give another folder"
        raise UserError("output_dir", folder, "is not empty", fix)
    return checkpoint


def read_blocks(settings: Finetune, split: str, base: common.Base) -> torch.Tensor:
    """Return the blocks of ``split`` ("train" or "validation"), [blocks, block_size] int32."""
    field, name = settings.named_texts()[split]
    most, half = (settings.max_train_samples, "train") if split == "train" else (settings.max_eval_samples, "test")
    source = texts.read_text(field, name, half)
    blocks = texts.training_blocks(field, name, base.tokenizer, settings.block_size, most, source)
    if most and len(blocks) < most:
        message = "%s has %d blocks of %d tokens, and not the %d that were asked for"
        common.log.warning(message, name, len(blocks), settings.block_size, most)
    return blocks


def collate(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    ids = torch.stack(rows).long()  # [batch, block_size]
    return {"input_ids": ids, "labels": ids.clone()}  # The model shifts the labels itself.


def train_adapter(trainer, checkpoint: Path | None, started: dict, record: dict) -> None:
    """Train, and write the adapter, the figures with ``record``, the loss curve, and ``started`` with the first."""
    arguments, blocks = trainer.args, len(trainer.train_dataset)
    out = Path(arguments.output_dir)
    trainer.before_first_save = partial(claim_output_dir, arguments, checkpoint, started)
    counts = (*trainer.model.get_nb_trainable_parameters(), *trainer.train_dataset.shape, arguments.batch_size)
    common.log.info("training %d of %d parameters on %d blocks of %d tokens, %d to a step", *counts)
    with training.refusals(trainer):
        results = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint)).metrics
    trainer.save_model()  # All processes call it: weights that they share are gathered. The config is written last.
    if not arguments.should_save:
        return
    files.write_atomically(out / "train_results.json", run_text(results | {"train_samples": blocks} | record))
    curves = {}
    for key, label in (("loss", "training"), ("eval_loss", "evaluation")):
        rows = [row for row in trainer.state.log_history if key in row]
        curves[label] = [row["step"] for row in rows], [row[key] for row in rows]
    files.save_figure(files.draw_losses(curves), out / "loss_curve.png")


def claim_output_dir(arguments, checkpoint: Path | None, started: dict) -> None:
    """Make --output_dir this run's: remove the files of an earlier run, and record how this one was started.

    Not before there is something to save: until then, what an earlier run left is worth more. Its checkpoints have to
    go, since a later resumption would take them for this run's.
    """
    out = Path(arguments.output_dir)
    if not arguments.should_save:
        return
    if not (checkpoint and checkpoint.resolve().parent == out.resolve()):
        for folder in out.glob("checkpoint-*[0-9]"):
            shutil.rmtree(folder)
        for name in WRITTEN:
            (out / name).unlink(missing_ok=True)
    files.write_atomically(out / common.BASE, json.dumps(started, indent=1) + "\n")


def evaluate(trainer, record: dict, name: str) -> None:
    """Evaluate, and write and print the perplexity on the text ``name``."""
    results = trainer.evaluate()
    perplexity = torch.tensor(results["eval_loss"], dtype=torch.float64).exp().item()  # infinite, where math.exp fails
    results |= {"perplexity": perplexity, "eval_samples": len(trainer.eval_dataset)}
    if trainer.args.should_save:
        files.write_atomically(Path(trainer.args.output_dir, "eval_results.json"), run_text(results | record))
        print(f"perplexity on {name} {perplexity:.4f}")


def main(argv: Sequence[str] | None = None) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # A training text is long.
    resume = "with --resume_from_checkpoint the same command resumes from the last checkpoint, else it starts again"
    fix = "lower --per_device_train_batch_size or --block_size, or add --gradient_checkpointing"
    return command(Finetune, run, argv, PARSER, resume, processes=True, out_of_memory=fix)


if __name__ == "__main__":
    sys.exit(main())
