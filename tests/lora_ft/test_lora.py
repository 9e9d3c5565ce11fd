"""LoRA recovery on a tiny pruned LLaMA: training, resumption, evaluation, merging; errors in one line."""

import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, error_line, everything, fast, saved_tensors, tiny_llama, tiny_sentences
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer

import main
from lib.calibration import texts
from lib.cli.command import parse
from lib.evaluation import zero_shot
from lib.evaluation.perplexity import perplexity
from lib.models import load
from lib.models.layers import prunable_layers
from lib.models.weights import weights_of
from lora_ft import evaluate_ppl, finetune_lm, merge
from lora_ft.training import parse_arguments

BLOCK = 32
MODULES = {"finetune": finetune_lm, "evaluate": evaluate_ppl, "merge": merge}
EVALUATE = f"--model pruned --lora_weights adapter --dataset val.txt --ctx_length {BLOCK}"
GOOD = {
    "finetune": f"--model_name_or_path pruned --train_file train.txt --validation_file val.txt --block_size {BLOCK} "
    "--max_train_samples 4 --batch_size 2 --do_train True --do_eval True --output_dir out",
    "evaluate": f"{EVALUATE} --result_dir out",
    "merge": f"{EVALUATE} --save out",
}
# Six steps, which improve the model, instead of two.
SIX_STEPS = "--max_train_samples 24 --batch_size 4 --learning_rate 0.01 --logging_steps 1 --eval_steps 3 --save_steps 2"
TWO_STEPS = "--output_dir stopped --max_steps 2 --save_steps 1 --batch_size 1"
RESUME = f"{TWO_STEPS} --resume_from_checkpoint"  # of the run that was stopped in its second step


def words(program: str, changed: str = "") -> list[str]:
    """Return a good command line of ``program`` with flags ``changed``; ``--flag -`` takes one out."""
    pairs = re.findall(r"(--\S+)(?: (?!--)(\S+))?", f"{GOOD[program]} {changed}")
    flags = {flag: value for flag, value in dict(pairs).items() if value != "-"}
    return [word for pair in flags.items() for word in pair if word]


def run(program: str, changed: str = "") -> int:
    return MODULES[program].main(words(program, changed))


def record(path) -> dict:
    return json.loads(Path(path).read_text())


def weights(adapter) -> dict[str, torch.Tensor]:
    return load_file(Path(adapter) / "adapter_model.safetensors")


def worst(a: dict, b: dict) -> float:
    """Return the largest difference between two adapters, relative to the largest entry of each matrix."""
    assert a.keys() == b.keys()
    return max(((a[key] - b[key]).abs().max() / a[key].abs().max()).item() for key in a)


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def interrupt(patch: pytest.MonkeyPatch, call: int) -> list:
    """Press Ctrl-C in the ``call``-th training step, once; return a list that grows with each."""
    step, calls = Trainer.training_step, []

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    patch.setattr(Trainer, "training_step", interrupted)
    return calls


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_tokenizer) -> Path:
    """Return a folder with a pruned model, its adapter, a run that was stopped, texts, and wrong things."""
    folder = tmp_path_factory.mktemp("lora")
    pruned = tiny_llama()
    for block in weights_of(pruned).visit(write=True):
        for linear in block.linears.values():
            weight = linear.weight.data
            weight[weight.abs() < weight.abs().median(dim=1, keepdim=True).values] = 0
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    few = LlamaForCausalLM(LlamaConfig(vocab_size=20, max_position_embeddings=128, **sizes))
    narrow = LlamaForCausalLM(LlamaConfig(vocab_size=300, max_position_embeddings=128, **sizes))
    for name, model in {"pruned": pruned, "dense": tiny_llama(), "narrow": narrow, "few": few}.items():
        model.save_pretrained(folder / name)
        tiny_tokenizer.save_pretrained(folder / name)
    pruned.save_pretrained(folder / "pruned_bare")
    shutil.copytree(folder / "pruned", folder / "packed")
    (folder / "packed/model.safetensors").rename(folder / "packed/model-block-00000.packed.safetensors")
    for name, sentences, seed in (("train", 30, 1), ("val", 20, 2), ("longer", 40, 7)):
        (folder / f"{name}.txt").write_text(tiny_sentences(sentences, seed))
    (folder / "short.txt").write_text("Ab de.")
    (folder / "full").mkdir()
    (folder / "full/notes.txt").write_text("mine")

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run("finetune", f"{SIX_STEPS} --output_dir adapter") == 0
        interrupt(patch, 2)
        assert run("finetune", TWO_STEPS) == 130
    tensors, config = weights(folder / "adapter"), record(folder / "adapter/adapter_config.json")
    for name, changed, matrices in (
        ("prefix", {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 2}, tensors),
        ("biased", {"bias": "all"}, tensors),
        ("lacking", {}, {name: tensor for name, tensor in tensors.items() if "layers.2" not in name}),
    ):
        shutil.copytree(folder / "adapter", folder / name)
        (folder / name / "adapter_config.json").write_text(json.dumps(config | changed))
        save_file(matrices, folder / name / "adapter_model.safetensors")
    shutil.copytree(folder / "adapter", folder / "anyones")
    (folder / "anyones/base_model.json").unlink()
    return folder


@pytest.fixture
def here(made, monkeypatch) -> Path:
    """Return the folder with everything, to be read only, and work in it."""
    monkeypatch.chdir(made)
    return made


@pytest.fixture
def place(made, tmp_path, monkeypatch) -> Path:
    """Return a copy of the folder with everything, and work in it."""
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(finetune_lm.files, "save_figure", lambda *_, **__: None)  # which takes as long as six steps
    return tmp_path / "here"


@pytest.fixture
def unloaded(monkeypatch) -> None:
    """Let no model be loaded."""
    monkeypatch.setattr(load, "load_llm", lambda *_: pytest.fail("the model was loaded"))


@pytest.fixture
def windows(made, tiny_tokenizer):
    return texts.evaluation_windows(str(made / "val.txt"), tiny_tokenizer, BLOCK)


# ------------------------------------------------------------------------------------------------------ training


def test_what_a_run_leaves_behind(here):
    adapter = here / "adapter"
    names = {path.name for path in adapter.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "base_model.json", "train_results.json",
                     "eval_results.json", "loss_curve.png", "checkpoint-2", "checkpoint-4", "checkpoint-6",
                     "README.md", "training_args.bin"}  # fmt: skip
    assert (adapter / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    assert record(adapter / "adapter_config.json")["base_model_name_or_path"] == str(here / "pruned")
    train = record(adapter / "train_results.json")
    assert train["train_samples"] == 24 and train["flags"]["learning_rate"] == 0.01 and train["versions"]["torch"]
    assert math.isfinite(train["train_loss"])


def test_perplexity_is_that_of_lib_and_better_than_before(here, windows):
    model = loaded("pruned")
    before = perplexity(model, windows)
    after = perplexity(PeftModel.from_pretrained(model, "adapter").eval(), windows)
    results = record("adapter/eval_results.json")
    assert results["eval_samples"] == len(windows)
    assert results["perplexity"] == pytest.approx(after, rel=1e-5)  # batches of eight against one window at a time
    assert after < 0.95 * before


@pytest.mark.parametrize("targets", ["q_proj,v_proj", "all-linear"])
def test_only_the_adapter_is_trained(targets, place):
    assert run("finetune", f"--lora_target_modules {targets}") == 0
    layers = [layer.name for layer in prunable_layers(tiny_llama())]
    expected = {name for name in layers if targets == "all-linear" or name.endswith(("q_proj", "v_proj"))}
    assert {name.removeprefix("base_model.model.").split(".lora_")[0] for name in weights("out")} == expected
    assert {tensor.shape[0] for name, tensor in weights("out").items() if "lora_A" in name} == {8}
    assert all(tensor.abs().max() > 0 for tensor in weights("out").values())
    assert record("out/adapter_config.json")["lora_alpha"] == 16


@pytest.mark.parametrize("how", fast(["--per_device_train_batch_size 4", "--gradient_checkpointing"], 1))
def test_other_ways_to_the_same_adapter(how, place):
    # Without dropout, four blocks at once or one after the other, activations kept or computed again, are the same
    # sum: the difference is float32 rounding, which Adam enlarges where a gradient is close to zero.
    same = f"{SIX_STEPS} --lora_dropout 0 --max_train_samples 8 --do_eval -"
    for out, changed in {"a": "", "b": how, "c": "--seed 1"}.items():
        assert run("finetune", f"{same} {changed} --output_dir {out}") == 0
    assert worst(weights("a"), weights("b")) < 1e-3
    assert worst(weights("a"), weights("c")) > 0.1  # what the tolerance would have to miss


def test_evaluation_without_training_is_that_of_the_pruned_model(place, windows):
    assert run("finetune", "--do_train -") == 0
    assert {path.name for path in Path("out").iterdir()} == {"eval_results.json"}
    expected = perplexity(loaded("pruned"), windows)
    assert record("out/eval_results.json")["perplexity"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_two_processes_make_the_adapter_of_one(place, monkeypatch):
    # The same four blocks to a step, two in each process. --multi_gpu is what makes the launcher start several
    # processes; --use_cpu keeps them off the GPUs. From lora_ft/, as some type it. 19: no block is evaluated twice.
    same = f"{SIX_STEPS} --lora_dropout 0 --max_train_samples 12 --max_eval_samples 19"
    assert run("finetune", same) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = f"-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --main_process_port {port}"
    launch += " --mixed_precision no --dynamo_backend no finetune_lm.py"
    paths = " ".join(f"--{name} {place / path}" for name, path in {
        "model_name_or_path": "pruned", "train_file": "train.txt", "validation_file": "val.txt", "output_dir": "two",
    }.items())  # fmt: skip
    flags = words("finetune", f"{same} {paths} --use_cpu --ddp_backend gloo --gradient_checkpointing")
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launch.split(), *flags]
    done = subprocess.run(command, cwd=ROOT / "lora_ft", env=env, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("written: ") == 1
    assert worst(weights("out"), weights("two")) < 1e-3
    one, two = (record(f"{out}/eval_results.json")["perplexity"] for out in ("out", "two"))
    assert one == pytest.approx(two, rel=1e-5)


def test_published_command(here, tiny_tokenizer, tmp_path, monkeypatch):
    # The pruned folder holds weights alone; config and tokenizer come from --config_name, a folder in the hub's place.
    monkeypatch.chdir(tmp_path)
    documents = [tiny_sentences(5, seed) for seed in range(4)]
    monkeypatch.setitem(texts.DATASETS, "c4", lambda split: texts.Text(records=documents))
    monkeypatch.setattr(finetune_lm.files, "save_figure", lambda *_, **__: None)
    Path("PRUNED").mkdir()
    shutil.copy(here / "pruned/model.safetensors", "PRUNED")
    shutil.copytree(here / "pruned", "meta-llama/Llama-2-7b-hf")
    command = (
        "--model_name_or_path PRUNED --config_name meta-llama/Llama-2-7b-hf --dataset_name c4 --num_train_epochs 1 "
        "--block_size 2048 --per_device_train_batch_size 1 --per_device_eval_batch_size 8 --do_train --do_eval "
        "--max_train_samples 100000 --max_eval_samples 128 --learning_rate 1e-4 --overwrite_output_dir --output_dir OUT"
    )
    lora = parse(finetune_lm.Finetune, command.split(), finetune_lm.PARSER)
    arguments = parse_arguments(lora.rest, finetune_lm.PARSER, do_train=True, do_eval=True, output_dir="OUT")
    assert (lora.lora_r, lora.lora_alpha, lora.lora_dropout, lora.lora_target_modules) == (8, 16, 0.05, "q_proj,v_proj")
    assert (arguments.gradient_accumulation_steps, arguments.batch_size, arguments.eval_strategy) == (128, 128, "steps")
    published = re.findall(r"--(\w+) ([\w.]+)", finetune_lm.PARSER.epilog.partition("Published")[2])
    assert len(published) == 8 and all(str(arguments.to_dict()[name]) == value for name, value in published)
    assert finetune_lm.main(command.replace("2048", "32").split()) == 0  # the tiny model's context is 128
    assert record("OUT/adapter_config.json")["base_model_name_or_path"] == str(tmp_path / "PRUNED")
    assert {path.name for path in Path("PRUNED").iterdir()} == {"model.safetensors"}

    flags = "--model PRUNED --config_name meta-llama/Llama-2-7b-hf --lora_weights OUT --ctx_length 32 --dataset"
    assert evaluate_ppl.main([*flags.split(), str(here / "val.txt")]) == 0
    assert merge.main([*flags.split(), str(here / "val.txt"), "--save", "MERGED"]) == 0
    assert {"config.json", "tokenizer.json"} <= {path.name for path in Path("MERGED").iterdir()}


# -------------------------------------------------------------------------------------------- refused before loading

# What is typed -> what the line must say. All of this is known before the weights are loaded.
REFUSED = [
    ("finetune", "--model_name_or_path adapter", "it holds a LoRA adapter"),
    ("finetune", "--model_name_or_path pruned_bare", "--config_name NAME"),
    ("finetune", "--model_name_or_path few", "--model_name_or_path few: its tokenizer gives token"),
    ("finetune", "--model_name_or_path packed", "packed: is packed, which is for running it; unpack it first: python"),
    ("finetune", "--train_file no.txt", "--train_file no.txt: file not found"),
    ("finetune", "--train_file -", "give --dataset_name, one of c4, wikitext2, wiki_leads, or --train_file"),
    ("finetune", "--validation_file short.txt", "--validation_file short.txt: too short, it has"),
    ("finetune", "--block_size 129", "--block_size 129: is more than the model's context; give at most 128"),
    ("finetune", "--blok_size 32", "unrecognized arguments: --blok_size 32. Did you mean '--block_size'"),
    ("finetune", "--batch_size 3 --per_device_train_batch_size 2", "--batch_size 3: is not made of 2 blocks at once"),
    ("finetune", "--batch_size 4 --gradient_accumulation_steps 2", "makes 2 blocks to a step; leave one of the two"),
    ("finetune", "--lora_target_modules q_prj", "Did you mean 'q_proj'"),
    ("finetune", "--do_train - --do_eval -", "nothing to do; add --do_train, --do_eval or both"),
    ("finetune", "--do_predict", "--do_predict does nothing here"),
    ("finetune", "--output_dir full", "--output_dir full: is not empty; add --overwrite_output_dir"),
    ("finetune", "--output_dir full --resume_from_checkpoint", "--resume_from_checkpoint finds no checkpoint in full"),
    ("finetune", "--optim adamw_torhc", "(adamw_torhc is not a valid OptimizerNames, please select one of"),
    ("finetune", f"{RESUME} --learning_rate 1e-3", "--learning_rate 0.001: was 0.0001 when the run of"),
    ("finetune", f"{RESUME} --data_seed 1", "--data_seed 1: was left out when the run of stopped/checkpoint-1"),
    ("finetune", f"{RESUME} --max_train_samples -", "when the run of stopped/checkpoint-1 was started; give it as"),
    ("finetune", f"{RESUME} --train_file longer.txt", "--train_file longer.txt (tokens "),
    ("evaluate", "--lora_weights nowhere", "--lora_weights nowhere: holds no adapter; give finetune_lm.py's --outp"),
    ("evaluate", "--lora_weights pruned", "--lora_weights pruned: holds no adapter, but a model"),
    ("evaluate", "--lora_weights prefix", "prefix: is not an adapter of LoRA's matrices alone"),
    ("merge", "--lora_weights biased", "biased: is not an adapter of LoRA's matrices alone"),
    ("evaluate", "--lora_weights lacking", "lacking: lacks 4 matrices, first base_model.model.model.layers.2.self"),
    ("merge", "--model narrow --lora_weights anyones", "anyones: is damaged, or of another model ("),
    ("merge", "--save full", "--save full: is not empty"),
]


@pytest.mark.parametrize(("program", "changed", "says"), REFUSED, ids=lambda value: str(value)[:60])
def test_refused_before_loading(program, changed, says, here, unloaded, capsys):
    before = everything(here)
    assert run(program, changed) == 2
    lines = [line for line in capsys.readouterr().err.strip().splitlines() if not line.startswith("tokenising")]
    assert len(lines) == 1 and says in lines[0], lines
    assert lines[0].startswith(f"{MODULES[program].__name__.split('.')[1]}.py: error: ")
    assert everything(here) == before


def cut_off(path: str) -> None:
    os.truncate(path, Path(path).stat().st_size // 2)


def rewrite(path: str) -> None:
    Path(path).write_text(tiny_sentences(30, seed=9))


DAMAGED = [
    ("evaluate", "", "adapter/adapter_config.json", cut_off, "adapter: is damaged, or of another model ("),
    ("merge", "", "adapter/adapter_model.safetensors", cut_off, "adapter: is damaged, or of another model ("),
    ("finetune", RESUME, "stopped/base_model.json", cut_off, "stopped/base_model.json: is damaged ("),
    ("finetune", RESUME, "stopped/checkpoint-1/optimizer.pt", cut_off, "checkpoint-1/optimizer.pt: is missing (--sav"),
    ("finetune", RESUME, "train.txt", rewrite, "was train.txt (tokens "),
]


@pytest.mark.parametrize(("program", "changed", "path", "damage", "says"), DAMAGED)
def test_damage_is_refused_before_loading(program, changed, path, damage, says, place, unloaded, capsys):
    damage(path)
    before = everything(place)
    assert run(program, changed) == 2 and says in capsys.readouterr().err
    assert everything(place) == before


OTHER_BASES = [
    ("finetune", f"{RESUME} --model_name_or_path dense", "stopped: was trained on other weights than those of --mod"),
    ("merge", "--model dense", "trained on other weights than those of --model dense (see model.layers.0.self_attn.q"),
    ("evaluate", "--model tuned", "(see model.layers.1.mlp.up_proj); give the model it was trained on, /"),
]


@pytest.mark.parametrize(("program", "changed", "says"), OTHER_BASES)
def test_adapter_of_other_weights(program, changed, says, place, capsys):
    # One matrix changed by a rank-8 update of 2 % of its norm, where it is not pruned; saved rounded.
    model = loaded("pruned")
    weight = model.model.layers[1].mlp.up_proj.weight.data
    draw = torch.Generator().manual_seed(3)
    update = torch.randn(weight.shape[0], 8, generator=draw) @ torch.randn(8, weight.shape[1], generator=draw)
    update[weight == 0] = 0
    weight += update * (0.02 * weight.norm() / update.norm())
    shutil.copytree("pruned", "tuned")
    model.to(torch.bfloat16).save_pretrained("tuned")
    before = everything(place)
    assert run(program, changed) == 2
    assert says in capsys.readouterr().err
    assert everything(place) == before


def test_adapter_of_weights_that_were_rounded(place, caplog):
    shutil.copytree("pruned", "half")
    AutoModelForCausalLM.from_pretrained("pruned", dtype=torch.bfloat16).save_pretrained("half")
    assert run("evaluate", "--model half") == 0 and "cannot be checked" not in caplog.text


def test_warnings(place, caplog):
    assert run("evaluate", "--lora_weights anyones") == 0
    assert "anyones: has no base_model.json: whether it was trained on pruned cannot be checked" in caplog.text
    assert "is dense" not in caplog.text
    dense = "--model_name_or_path dense --do_train - --output_dir dense_out"
    assert run("finetune", f"{dense} --max_eval_samples 1000") == 0
    assert "the model dense is dense, not pruned: its sparsity is 0.0000" in caplog.text
    assert "and not the 1000 that were asked for" in caplog.text
    assert run("finetune", "--validation_file train.txt --output_dir same") == 0
    assert "train.txt is both trained and evaluated on" in caplog.text


# ------------------------------------------------------------------------------------------- training that goes wrong


def test_flags_that_the_trainer_refuses(place, capsys):
    line = error_line(capsys, run("finetune", "--seed -1"))
    assert "training cannot be set up with these flags (Seed must be between 0 and" in line
    assert not any(Path("out").glob("*"))


def test_loss_that_is_not_finite(place, capsys, monkeypatch):
    calls, loss = [], Trainer.compute_loss

    def spoils(self, model, *args, **kwargs):
        calls.append(1)
        return loss(self, model, *args, **kwargs) * (math.nan if len(calls) > 2 else 1)  # two blocks to a step

    monkeypatch.setattr(Trainer, "compute_loss", spoils)
    assert run("finetune", "--do_eval - --logging_steps 1") == 2 and len(calls) == 4
    assert "the training loss is nan at step 2; lower --learning_rate" in capsys.readouterr().err
    assert not any(Path("out").glob("*"))


# ------------------------------------------------------------------------------------------------------- resumption


def test_resumption_ends_where_the_unbroken_run_ends(place, monkeypatch, capsys):
    calls = interrupt(monkeypatch, 4 * 4 + 2)  # in the fifth of six steps, after the checkpoint of the fourth
    assert run("finetune", SIX_STEPS) == 130
    assert "interrupted; with --resume_from_checkpoint" in capsys.readouterr().err
    Path("out/checkpoint-6").mkdir()  # a checkpoint whose writing was cut off
    assert not Path("out/adapter_config.json").exists()
    assert run("finetune", f"{SIX_STEPS} --resume_from_checkpoint") == 0
    assert len(calls) == 4 * 4 + 2 + 2 * 4  # two steps were left
    assert worst(weights("adapter"), weights("out")) == 0
    for name in ("eval_loss", "perplexity"):
        assert record("out/eval_results.json")[name] == record("adapter/eval_results.json")[name]
    history = [record(f"{out}/checkpoint-6/trainer_state.json")["log_history"] for out in ("adapter", "out")]
    losses = [[row["loss"] for row in rows if "loss" in row] for rows in history]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_what_does_not_change_the_training_may_change(place):
    shutil.copytree("stopped/checkpoint-1", "stopped/checkpoint-best")  # which is none of the run's
    assert run("finetune", f"{RESUME} --save_steps 2 --logging_steps 2 --validation_file train.txt") == 0
    assert record("stopped/train_results.json")["flags"]["logging_steps"] == 2
    state = record("stopped/checkpoint-2/trainer_state.json")
    assert (state["logging_steps"], state["save_steps"]) == (2, 2)  # the Trainer's own are those of the first run
    assert [row["step"] for row in state["log_history"] if "loss" in row] == [2]


FAILURES = [
    (KeyboardInterrupt(), "checkpoint, else it starts again"),
    (torch.OutOfMemoryError("CUDA"), "--gradient_chec"),
]


@pytest.mark.parametrize(("error", "says"), FAILURES, ids=str)
def test_old_adapter_is_kept_until_there_is_something_to_save(error, says, place, capsys, monkeypatch):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(Trainer, "training_step", fails)
    before = everything(place)
    assert run("finetune", "--output_dir adapter --overwrite_output_dir --learning_rate 1") in (2, 130)
    assert everything(place) == before and says in capsys.readouterr().err.strip().splitlines()[-1]


def test_checkpoint_of_another_folder_replaces_a_run_only_if_told(place, capsys):
    Path("adapter/notes.txt").write_text("mine")
    elsewhere = f"{RESUME} stopped/checkpoint-1 --output_dir adapter"
    before = everything(place)
    assert run("finetune", elsewhere) == 2 and "--output_dir adapter: is not empty" in capsys.readouterr().err
    assert everything(place) == before
    assert run("finetune", f"{elsewhere} --overwrite_output_dir") == 0
    assert {path.name for path in Path("adapter").glob("checkpoint-*")} == {"checkpoint-2"}
    assert Path("stopped/checkpoint-1").is_dir() and Path("adapter/notes.txt").read_text() == "mine"


# ---------------------------------------------------------------------------------------------------------- evaluating


@pytest.mark.usefixtures("few_tasks")
def test_evaluate_ppl_answers_tasks_with_the_adapter_on(place, monkeypatch):
    models, real = [], zero_shot.zero_shot
    monkeypatch.setattr(zero_shot, "zero_shot", lambda model, *rest: models.append(model) or real(model, *rest))
    tasks = f"--eval_zero_shot --tasks capital_cities --include_path {ROOT / 'data' / 'tasks'} --limit 6"
    assert run("evaluate", tasks) == 0
    answers = record("out/perplexity.json")["zero_shot"]
    scores = answers["lm_eval"]["results"]["capital_cities"]
    assert scores["acc,none"] == answers["means"]["acc"] and 0 <= scores["acc,none"] <= 1
    assert "capital_cities" in Path("out/zero_shot.txt").read_text()
    assert isinstance(models[0], PeftModel)


def test_evaluate_ppl_is_main_and_writes_the_published_line(place, windows, monkeypatch, capsys):
    monkeypatch.setitem(texts.DATASETS, "wikitext2", lambda split: texts.Text(stream=Path("val.txt").read_text()))
    flags = f"--model pruned --eval_data val.txt --seqlen {BLOCK} --save save"
    assert main.main(flags.split()) == 0
    dense = record("save/run_dense_sparsity_0.0.json")
    capsys.readouterr()
    assert run("evaluate", "--dataset wikitext2 --lora_weights -") == 0
    alone = record("out/perplexity.json")
    assert alone["perplexity"] == dense["perplexity"] and alone["sparsity"] == dense["sparsity"]
    line = f"perplexity on wikitext {alone['perplexity']}\n"
    assert Path("out/perplexity.txt").read_text() == line == capsys.readouterr().out

    assert run("evaluate") == 0
    beside = record("out/perplexity.json")
    assert beside["perplexity"] == perplexity(PeftModel.from_pretrained(loaded("pruned"), "adapter").eval(), windows)
    assert beside["evaluation"] == {"text": "val.txt", "windows": len(windows), "seqlen": BLOCK}


# ------------------------------------------------------------------------------------------------------------- merging


@pytest.mark.parametrize("keep_dense", [False, True])
def test_merge(keep_dense, place, windows, capsys):
    assert run("merge", "--keep_dense" * keep_dense) == 0
    before, after = load_file("pruned/model.safetensors"), saved_tensors(Path("out"))
    plain, matrices = dict(before), weights("adapter")  # W + alpha/r BA
    for key in [key for key in matrices if "lora_A" in key]:
        name = key.removeprefix("base_model.model.").replace(".lora_A", "")
        plain[name] = before[name] + 16 / 8 * matrices[key.replace("lora_A", "lora_B")] @ matrices[key]
    assert sum(not torch.equal(plain[name], before[name]) for name in before) == 6 and before.keys() == after.keys()
    for name, weight in after.items():
        expected = plain[name] if keep_dense else plain[name].masked_fill(before[name] == 0, 0)
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6)  # the order of eight products and one sum
        assert keep_dense or torch.equal(weight == 0, before[name] == 0)

    layers = [f"{layer.name}.weight" for layer in prunable_layers(tiny_llama())]
    total = sum(before[name].numel() for name in layers)
    sparse, filled = (sum((tensors[name] == 0).sum().item() for name in layers) / total for tensors in (before, plain))
    assert filled < sparse - 0.05  # or nothing would be shown here
    model, written = loaded("pruned"), perplexity(loaded("out"), windows)
    expected = {"pruned": (sparse, perplexity(model, windows))}
    beside = perplexity(PeftModel.from_pretrained(model, "adapter").eval(), windows)
    expected |= {"adapter beside it": (sparse, beside), "merged without masking": (filled, beside)}
    if not keep_dense:
        expected["merged, zeros kept"] = (sparse, written)
        assert written < expected["pruned"][1]
    rows = {row["state"]: (row["sparsity"], row["perplexity"]) for row in record("out/merge.json")["rows"]}
    assert list(rows) == list(expected) and record("out/merge.json")["complete"] is True
    for state, (sparsity, value) in expected.items():
        assert rows[state] == (sparsity, pytest.approx(value, rel=1e-5)), state
    assert f"with a sparsity of {filled if keep_dense else sparse:.4f}" in capsys.readouterr().out
    card = ModelCard.load(Path("out/README.md"))
    assert card.data.to_dict()["sparsity"] == round(filled if keep_dense else sparse, 4)
    words = " ".join(card.text.split())
    assert all(f"| {state} | {value:.2f} |" in words for state, (_, value) in rows.items())


@pytest.mark.parametrize(("call", "error"), [(2, torch.OutOfMemoryError("no memory")), (4, KeyboardInterrupt())])
def test_merged_model_outlives_a_failed_evaluation(call, error, place, caplog, capsys, monkeypatch):
    assert run("merge", "--save whole") == 0
    calls = []

    def fails(*args):
        calls.append(1)
        if len(calls) == call:
            raise error
        return perplexity(*args)

    monkeypatch.setattr(merge, "perplexity", fails)
    assert run("merge") in (2, 130)
    said = capsys.readouterr().err + caplog.text
    assert "the merged model is saved in out" in said
    assert f"python lora_ft/evaluate_ppl.py --model out --dataset val.txt --ctx_length {BLOCK}" in said
    contents = [[path.read_bytes() for path in sorted(Path(name).glob("*.safetensors"))] for name in ("out", "whole")]
    assert contents[0] and contents[0] == contents[1]
    assert record("out/merge.json")["complete"] is False and len(record("out/merge.json")["rows"]) == call - 1
    assert all(row in record("whole/merge.json")["rows"] for row in record("out/merge.json")["rows"])


@pytest.mark.parametrize("dtype", fast(["bfloat16", "float16"], 1))
def test_merged_model_keeps_the_dtype_and_the_zeros(dtype, place):
    AutoModelForCausalLM.from_pretrained("pruned", dtype=getattr(torch, dtype)).save_pretrained("pruned")
    stored, before = Path("pruned/model.safetensors").read_bytes(), load_file("pruned/model.safetensors")
    assert run("merge") == 0
    assert Path("pruned/model.safetensors").read_bytes() == stored
    after = saved_tensors(Path("out"))
    assert before.keys() == after.keys() and {weight.dtype for weight in after.values()} == {getattr(torch, dtype)}
    changed = [name for name in after if not torch.equal(after[name], before[name])]
    assert changed and all("q_proj" in name or "v_proj" in name for name in changed)
    assert all((after[name][before[name] == 0] == 0).all() for name in after)
    # What was measured is what was saved: the same folder gives the same perplexity.
    merged = record("out/merge.json")["rows"][-1]
    assert run("evaluate", "--model out --lora_weights - --result_dir res") == 0
    measured = record("res/perplexity.json")
    assert (measured["perplexity"], measured["sparsity"]) == (merged["perplexity"], merged["sparsity"])
    assert run("merge", "--dtype float32 --save plain") == 0
    assert {weight.dtype for weight in saved_tensors(Path("plain")).values()} == {torch.float32}
