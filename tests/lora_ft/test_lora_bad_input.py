"""LoRA recovery, bad input: one line that says what was given and what to type, exit status 2, and nothing written."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama, tiny_sentences
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer

from lib.models import load
from lib.models.weights import weights_of
from lora_ft import evaluate_ppl, finetune_lm, merge

FINETUNE = {
    "--model_name_or_path": "pruned",
    "--train_file": "long.txt",
    "--validation_file": "other.txt",
    "--block_size": "32",
    "--max_train_samples": "4",
    "--batch_size": "2",
    "--do_train": "True",
    "--do_eval": "True",
    "--output_dir": "out",
}
EVALUATE = {"--model": "pruned", "--lora_weights": "adapter", "--dataset": "other.txt", "--ctx_length": "32"}
PROGRAMS = {
    "finetune": (finetune_lm, FINETUNE),
    "evaluate": (evaluate_ppl, EVALUATE | {"--result_dir": "out"}),
    "merge": (merge, EVALUATE | {"--save": "out"}),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_tokenizer) -> Path:
    """Return a folder with a pruned model, its adapter, texts, and a few wrong things."""
    folder = tmp_path_factory.mktemp("bad")
    model = tiny_llama()
    for block in weights_of(model).visit(write=True):
        for linear in block.linears.values():
            linear.weight.data[:, ::2] = 0
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    few = LlamaForCausalLM(LlamaConfig(vocab_size=20, max_position_embeddings=128, **sizes))
    narrow = LlamaForCausalLM(LlamaConfig(vocab_size=300, max_position_embeddings=128, **sizes))
    for name, saved in {"pruned": model, "dense": tiny_llama(), "narrow": narrow, "few": few}.items():
        saved.save_pretrained(folder / name)
        saved.save_pretrained(folder / f"{name}_bare")
        tiny_tokenizer.save_pretrained(folder / name)
    shutil.copytree(folder / "pruned", folder / "packed")
    (folder / "packed/model.safetensors").rename(folder / "packed/model-block-00000.packed.safetensors")
    (folder / "packed_bare").mkdir()
    (folder / "packed_bare/model-block-00000.packed.safetensors").touch()
    for name, text in {"long": tiny_sentences(20, seed=1), "other": tiny_sentences(20, seed=2)}.items():
        (folder / f"{name}.txt").write_text(text)
    for name, text in {"longer": tiny_sentences(30, seed=7), "empty": "", "blank": " \n \n", "short": "Ab de."}.items():
        (folder / f"{name}.txt").write_text(text)
    (folder / "full").mkdir()
    (folder / "full/notes.txt").write_text("mine")
    (folder / "file").write_text("a file")

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert finetune_lm.main([*good("finetune"), "--output_dir", "adapter"]) == 0
        interrupt(patch, 2)
        assert finetune_lm.main([*good("finetune"), "--output_dir", "stopped", *RESUMED.split()]) == 130
    tensors = load_file(folder / "adapter/adapter_model.safetensors")
    config = json.loads((folder / "adapter/adapter_config.json").read_text())
    few_layers = {name: tensor for name, tensor in tensors.items() if "layers.2" not in name}
    more_layers = tensors | {name.replace("layers.2", "layers.3"): tensor.clone() for name, tensor in tensors.items()}
    for name, changed, weights in (
        ("prefix", {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 2}, tensors),
        ("more", {"modules_to_save": ["lm_head"]}, tensors),
        ("biased", {"bias": "all"}, tensors),
        ("rank", {"r": 4}, tensors),
        ("lacking", {}, few_layers),
        ("excessive", {}, more_layers),
    ):
        shutil.copytree(folder / "adapter", folder / name)
        (folder / name / "adapter_config.json").write_text(json.dumps(config | changed))
        save_file(weights, folder / name / "adapter_model.safetensors")
    shutil.copytree(folder / "adapter", folder / "anyones")
    (folder / "anyones/base_model.json").unlink()
    return folder


def good(program: str) -> list[str]:
    return [word for item in PROGRAMS[program][1].items() for word in item]


def interrupt(patch: pytest.MonkeyPatch, call: int) -> None:
    """Press Ctrl-C in the ``call``-th training step, once."""
    step, done = Trainer.training_step, []

    def interrupted(self, *args, **kwargs):
        done.append(1)
        if len(done) == call:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    patch.setattr(Trainer, "training_step", interrupted)


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
    return tmp_path / "here"


@pytest.fixture
def unloaded(monkeypatch) -> None:
    """Let no model be loaded."""
    monkeypatch.setattr(load, "load_llm", lambda *_: pytest.fail("the model was loaded"))


def everything(folder: Path) -> set[tuple]:
    return {(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def status_and_line(program: str, changed: str, capsys) -> tuple[int, str]:
    """Run a good command line of ``program`` with flags ``changed``; ``--flag -`` takes one out."""
    module, flags = PROGRAMS[program][0], dict(PROGRAMS[program][1])
    words = changed.split()
    while words:
        flag = words.pop(0)
        flags[flag] = words.pop(0) if words and not words[0].startswith("--") else None
    argv = [word for flag, value in flags.items() if value != "-" for word in (flag, value) if word is not None]
    capsys.readouterr()
    status = module.main(argv)
    return status, capsys.readouterr().err.strip()


# ------------------------------------------------------------------------------------------------- before loading

RESUMED = "--max_steps 2 --save_steps 1 --batch_size 1"
RESUME = f"--output_dir stopped {RESUMED} --resume_from_checkpoint"

# What is typed -> what the line must say. All of this is known before the weights are loaded.
BEFORE_LOADING = [
    ("finetune", "--model_name_or_path no/such/folder", "--model_name_or_path no/such/folder: folder not found"),
    ("finetune", "--model_name_or_path full", "--model_name_or_path full: the folder holds no config.json"),
    ("finetune", "--model_name_or_path adapter", "it holds a LoRA adapter"),
    ("finetune", "--model_name_or_path pruned_bare", "--config_name NAME"),
    ("finetune", "--model_name_or_path pruned_bare --config_name ./nowhere", "--config_name ./nowhere: folder not"),
    ("finetune", "--model_name_or_path few", "--model_name_or_path few: its tokenizer gives token"),
    ("finetune", "--model_name_or_path few_bare --config_name few", "--config_name few: its tokenizer gives token"),
    ("finetune", "--model_name_or_path packed", "packed: is packed, which is for running it; unpack it first: python"),
    ("finetune", "--model_name_or_path -", "required: --model_name_or_path"),
    ("finetune", "--train_file no.txt", "--train_file no.txt: file not found"),
    ("finetune", "--train_file -", "give --dataset_name, one of c4, wikitext2, wiki_leads, or --train_file"),
    ("finetune", "--train_file - --dataset_name wiki_lead", "Did you mean 'wiki_leads'"),
    ("finetune", "--train_file blank.txt", "--train_file blank.txt: too short, it has"),
    ("finetune", "--validation_file short.txt", "--validation_file short.txt: too short, it has"),
    ("finetune", "--block_size 129", "--block_size 129: is more than the model's context; give at most 128"),
    ("finetune", "--blok_size 32", "unrecognized arguments: --blok_size 32. Did you mean '--block_size'"),
    ("finetune", "--grad_checkpointing True", "Did you mean '--gradient_checkpointing'"),
    ("finetune", "--learning 1", "unrecognized arguments: --learning 1"),
    ("finetune", "--batch_size 3 --per_device_train_batch_size 2", "--batch_size 3: is not made of 2 blocks at once"),
    ("finetune", "--batch_size 4 --gradient_accumulation_steps 2", "makes 2 blocks to a step; leave one of the two"),
    ("finetune", "--lora_r 0", "--lora_r 0: must be at least 1"),
    ("finetune", "--lora_target_modules q_prj", "Did you mean 'q_proj'"),
    ("finetune", "--do_train - --do_eval -", "nothing to do; add --do_train, --do_eval or both"),
    ("finetune", "--do_predict True", "--do_predict does nothing here"),
    ("finetune", "--output_dir -", "required: --output_dir"),
    ("finetune", "--output_dir file/x", "--output_dir file/x: cannot be written"),
    ("finetune", "--output_dir full", "--output_dir full: is not empty; add --overwrite_output_dir"),
    ("finetune", "--output_dir full --resume_from_checkpoint", "--resume_from_checkpoint finds no checkpoint in full"),
    ("finetune", "--output_dir full --resume_from_checkpoint full", "full: is no checkpoint of a LoRA run"),
    ("finetune", "--output_dir adapter --resume_from_checkpoint --do_train -", "add --do_train"),
    ("finetune", "--logging_steps 0", "--logging_steps 0.0: must be above 0"),
    ("finetune", "--learning_rate nan", "--learning_rate nan: must be above 0"),
    ("finetune", "--warmup_steps -1", "training cannot be set up with these flags (Got warmup_steps = -1.0"),
    ("finetune", "--optim adamw_torhc", "(adamw_torhc is not a valid OptimizerNames, please select one of"),
    ("finetune", "--lr_scheduler_type inverse", "invalid choice: 'inverse'"),
    ("finetune", "--fp16 True --bf16 True --use_cpu True", "At most one of fp16 and bf16 can be True"),
    ("finetune", "--gradient_checkpointing_kwargs {a", "training cannot be set up with these flags (Expecting"),
    ("finetune", f"{RESUME} --learning_rate 1e-3", "--learning_rate 0.001: the run of stopped/checkpoint-1 was start"),
    ("finetune", f"{RESUME} --block_size 16", "--block_size 16: the run of stopped/checkpoint-1 was started with 32"),
    ("finetune", f"{RESUME} --batch_size 2", "--batch_size 2: the run of stopped/checkpoint-1 was started with 1; g"),
    ("finetune", f"{RESUME} --data_seed 1", "stopped/checkpoint-1 was started without it; leave it out"),
    ("finetune", f"{RESUME} --max_steps 3", "--max_steps 3: the run of stopped/checkpoint-1 was started with 2"),
    ("finetune", f"{RESUME} --dtype bfloat16", "--dtype bfloat16: the run of stopped/checkpoint-1 was started with"),
    ("finetune", f"{RESUME} --lora_r 4", "--lora_r 4: the run of stopped/checkpoint-1 was started with 8; give that"),
    ("finetune", f"{RESUME} --max_train_samples -", "--max_train_samples left out: the run of stopped/checkpoint-1 "),
    ("finetune", f"{RESUME} --train_file longer.txt", "--train_file longer.txt (tokens "),
    ("finetune", f"{RESUME} --model_name_or_path dense", "was trained on other weights than those of --model dense"),
    ("evaluate", "--model nowhere/", "--model nowhere/: folder not found"),
    ("evaluate", "--lora_weights nowhere", "--lora_weights nowhere: holds no adapter; give finetune_lm.py's --outp"),
    ("evaluate", "--lora_weights pruned", "--lora_weights pruned: holds no adapter, but a model"),
    ("evaluate", "--lora_weights prefix", "prefix: is PREFIX_TUNING"),
    ("evaluate", "--lora_weights more", "only LoRA alone is supported"),
    ("merge", "--lora_weights biased", "only LoRA alone is supported"),
    ("evaluate", "--lora_weights rank", "rank: is damaged, or of another model (Error(s) in loading state_dict for P"),
    ("evaluate", "--lora_weights lacking", "lacking: lacks 4 matrices, first base_model.model.model.layers.2.self"),
    ("evaluate", "--lora_weights excessive", "excessive: has in excess 4 matrices, first base_model.model.model.la"),
    ("evaluate", "--model dense", "trained on other weights than those of --model dense (see model.layers.0.self_att"),
    ("merge", "--model narrow", "was trained on other weights than those of --model narrow"),
    ("merge", "--model narrow --lora_weights anyones", "anyones: is damaged, or of another model ("),
    ("evaluate", "--dataset empty.txt", "--dataset empty.txt: the file is empty"),
    ("evaluate", "--ctx_length 129", "--ctx_length 129: is more than the model's context; give at most 128"),
    ("evaluate", "--eval_windows 0", "--eval_windows 0"),
    ("evaluate", "--tasks boolq", "--tasks without --eval_zero_shot does nothing; add --eval_zero_shot"),
    ("evaluate", "--result_dir file/x", "--result_dir file/x: cannot be written"),
    ("evaluate", "--model packed_bare --config_name pruned", "packed_bare: is packed, which is for running it"),
    ("merge", "--save full", "--save full: is not empty"),
    ("merge", "--lora_weights -", "required: --lora_weights"),
]


@pytest.mark.parametrize(("program", "changed", "says"), BEFORE_LOADING, ids=lambda value: str(value)[:60])
def test_refused_before_loading(program, changed, says, here, unloaded, capsys):
    before = everything(here)
    status, line = status_and_line(program, changed, capsys)
    assert status == 2 and says in line, line
    assert line.splitlines()[-1].startswith(f"{PROGRAMS[program][0].__name__.split('.')[1]}.py: error: ")
    assert len([x for x in line.splitlines() if "WARNING" not in x and not x.startswith("tokenising")]) == 1, line
    assert everything(here) == before


def cut_off(path: str) -> None:
    """Cut a file to half its size."""
    os.truncate(path, Path(path).stat().st_size // 2)


DAMAGED = [
    ("evaluate", "", "adapter/base_model.json", cut_off, "adapter/base_model.json: is damaged ("),
    ("evaluate", "", "adapter/adapter_config.json", cut_off, "adapter: is damaged, or of another model ("),
    ("merge", "", "adapter/adapter_model.safetensors", cut_off, "adapter: is damaged, or of another model ("),
    ("finetune", RESUME, "stopped/base_model.json", cut_off, "stopped/base_model.json: is damaged ("),
    ("finetune", RESUME, "stopped/checkpoint-1/optimizer.pt", cut_off, "checkpoint-1/optimizer.pt: is missing (--sav"),
    ("finetune", RESUME, "stopped/checkpoint-1/scheduler.pt", os.remove, "checkpoint-1/scheduler.pt: is missing (--s"),
]


@pytest.mark.parametrize(("program", "changed", "path", "damage", "says"), DAMAGED)
def test_damage_is_refused_before_loading(program, changed, path, damage, says, place, unloaded, capsys):
    damage(path)
    before = everything(place)
    status, line = status_and_line(program, changed, capsys)
    assert status == 2 and says in line and len(line.splitlines()) == 1, line
    assert everything(place) == before


# ------------------------------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapter_of_weights_that_were_fine_tuned(dtype, place, unloaded, capsys):
    # One matrix changed by a rank-8 update of 2 % of its norm, where it is not pruned; saved as it is, or rounded.
    model = AutoModelForCausalLM.from_pretrained("pruned")
    weight = model.model.layers[1].mlp.up_proj.weight.data
    draw = torch.Generator().manual_seed(3)
    update = torch.randn(weight.shape[0], 8, generator=draw) @ torch.randn(8, weight.shape[1], generator=draw)
    update[weight == 0] = 0
    weight += update * (0.02 * weight.norm() / update.norm())
    shutil.copytree("pruned", "tuned")
    model.to(getattr(torch, dtype)).save_pretrained("tuned")
    status, line = status_and_line("evaluate", "--model tuned", capsys)
    assert status == 2 and "(see model.layers.1.mlp.up_proj)" in line and not Path("out").exists()
    assert "give the model it was trained on, /" in line and line.endswith("/pruned")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_adapter_of_weights_that_were_rounded(dtype, place, caplog, capsys):
    shutil.copytree("pruned", "half")
    AutoModelForCausalLM.from_pretrained("pruned", dtype=getattr(torch, dtype)).save_pretrained("half")
    assert status_and_line("evaluate", "--model half", capsys)[0] == 0
    assert "cannot be checked" not in caplog.text


@pytest.mark.parametrize("model", ["pruned", "dense"])
def test_model_whose_files_do_not_name_its_layers_is_checked_when_loaded(model, place, capsys):
    path = Path(model, "model.safetensors")
    torch.save(load_file(path), Path(model, "pytorch_model.bin"))
    path.unlink()
    status, line = status_and_line("evaluate", f"--model {model}", capsys)
    assert status == (0 if model == "pruned" else 2) and ("on other weights than those of" in line) == bool(status)


def test_warnings(place, caplog, capsys):
    assert status_and_line("evaluate", "--lora_weights anyones", capsys)[0] == 0
    assert "anyones: has no base_model.json: whether it was trained on pruned cannot be checked" in caplog.text
    assert "is dense" not in caplog.text
    same = "--output_dir same --validation_file long.txt"
    assert status_and_line("finetune", f"--model_name_or_path dense {same}", capsys)[0] == 0
    assert "the model dense is dense, not pruned: its sparsity is 0.0000" in caplog.text
    assert "long.txt is both trained and evaluated on" in caplog.text
    few = "--do_train - --max_eval_samples 1000 --output_dir evaluated"
    assert status_and_line("finetune", few, capsys)[0] == 0
    assert "and not the 1000 that were asked for" in caplog.text


# ------------------------------------------------------------------------------------------- training that goes wrong

TRAINER_REFUSES = [
    ("--seed -1", "Seed must be between 0 and 2**32 - 1"),  # as the Trainer is made
    ("--adam_beta1 2", "Invalid beta parameter"),  # as its optimizer is made
    ('--lr_scheduler_type polynomial --lr_scheduler_kwargs {"no":1}', "unexpected keyword argument 'no'"),
]


@pytest.mark.parametrize(("changed", "says"), TRAINER_REFUSES)
def test_flags_that_the_trainer_refuses(changed, says, place, capsys):
    status, line = status_and_line("finetune", changed, capsys)
    assert status == 2 and "training cannot be set up with these flags (" in line and says in line, line
    assert not Path("out").exists() or not any(Path("out").iterdir())


def test_learning_rate_that_ruins_the_adapter(place, capsys):
    # Whether the loss is no longer a number, or is that of equal chances since a norm of infinity divides all by
    # itself to zero, depends on the order of the processor's sums. Neither may pass for an adapter.
    status, line = status_and_line("finetune", "--learning_rate 1e30 --warmup_steps 0 --max_train_samples 8", capsys)
    last = line.splitlines()[-1]
    assert status == 2 and "lower --learning_rate" in last and (" at step " in last or "is ruined after step" in last)
    assert not list(Path("out").glob("adapter*"))
    assert "--resume_from_checkpoint" not in line  # nothing is left to resume


@pytest.mark.parametrize(("value", "status"), [(float("nan"), 2), (1e30, 2), (1.0, 0)])
def test_adapter_that_is_ruined_is_not_saved(value, status, place, capsys, monkeypatch):
    train = Trainer.train

    def spoils(self, *args, **kwargs):
        result = train(self, *args, **kwargs)
        for name, weight in self.model.named_parameters():
            if "layers.1.self_attn.v_proj.lora" in name:
                weight.data[:] = value  # of which the loss of the last step cannot tell
        return result

    monkeypatch.setattr(Trainer, "train", spoils)
    result, line = status_and_line("finetune", "", capsys)
    assert result == status, line
    assert ("ruined after step 2, its update of model.layers.1.self_attn.v_proj is" in line) == bool(status)
    assert len(list(Path("out").glob("adapter*"))) == (0 if status else 2)


@pytest.mark.parametrize(("factor", "status"), [(1.5, 0), (10, 2)])
def test_loss_far_above_that_of_equal_chances(factor, status, place, capsys, monkeypatch):
    # The second of two steps has its loss multiplied. Its true value is close to the first step's, which is that of a
    # random model of 300 tokens: between ln(300) = 5.7 and twice that.
    calls, loss = [], Trainer.compute_loss

    def spoils(self, model, *args, **kwargs):
        calls.append(1)
        return loss(self, model, *args, **kwargs) * (factor if len(calls) > 2 else 1)  # two blocks to a step

    monkeypatch.setattr(Trainer, "compute_loss", spoils)
    result, line = status_and_line("finetune", "--do_eval -", capsys)
    assert result == status and len(calls) == 4, line
    assert ("for equal chances" in line and "5.704" in line) == bool(status)
    assert len(list(Path("out").glob("adapter*"))) == (0 if status else 2)


def test_memory_that_does_not_suffice(place, capsys, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Trainer, "training_step", full)
    status, line = status_and_line("finetune", "", capsys)
    assert status == 2 and "--gradient_checkpointing" in line.splitlines()[-1] and "Traceback" not in line
    assert not list(Path("out").glob("adapter*"))


# ------------------------------------------------------------------------------------------------------- resumption


@pytest.mark.parametrize(("call", "says"), [(1, "the same command starts again"), (2, "--resume_from_checkpoint res")])
def test_interrupted_training_says_how_it_goes_on(call, says, place, capsys, monkeypatch):
    interrupt(monkeypatch, call)
    words = "--batch_size 1 --save_steps 1"
    status, line = status_and_line("finetune", words, capsys)
    assert status == 130 and says in line.splitlines()[-1]
    again = words if call == 1 else f"{words} --resume_from_checkpoint"
    assert status_and_line("finetune", again, capsys)[0] == 0


def test_text_that_changed_since_is_refused(place, unloaded, capsys):
    Path("long.txt").write_text(tiny_sentences(20, seed=7))
    status, line = status_and_line("finetune", RESUME, capsys)
    assert status == 2 and "--train_file long.txt (tokens " in line and "was started with long.txt (tokens " in line


def test_what_does_not_change_the_training_may_change(place, capsys):
    shutil.copytree("stopped/checkpoint-1", "stopped/checkpoint-best")  # which is none of the run's
    changed = "--save_steps 2 --logging_steps 2 --validation_file long.txt --max_eval_samples 1"
    status, line = status_and_line("finetune", f"{RESUME} {changed}", capsys)
    assert status == 0, line
    assert json.loads(Path("stopped/train_results.json").read_text())["flags"]["logging_steps"] == 2
    state = json.loads(Path("stopped/checkpoint-2/trainer_state.json").read_text())
    assert (state["logging_steps"], state["save_steps"]) == (2, 2)  # the Trainer's own are those of the first run
    assert [row["step"] for row in state["log_history"] if "loss" in row] == [2]


@pytest.mark.parametrize(("more", "status"), [("", 0), (" --lr_scheduler_type linear", 2), (" --max_steps 1", 2)])
def test_a_longer_run_goes_on_if_its_learning_rates_are_the_same(more, status, place, capsys):
    words = "--output_dir flat --do_eval - --batch_size 1 --save_steps 1 --lr_scheduler_type constant_with_warmup"
    assert status_and_line("finetune", f"{words} --max_steps 2", capsys)[0] == 0
    result, line = status_and_line("finetune", f"{words} --max_steps 3 --resume_from_checkpoint{more}", capsys)
    assert result == status, line
    if status == 0:
        assert status_and_line("finetune", f"{words} --max_steps 3 --output_dir whole", capsys)[0] == 0
        resumed, whole = (load_file(f"{out}/adapter_model.safetensors") for out in ("flat", "whole"))
        assert all(torch.equal(resumed[name], whole[name]) for name in whole)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), torch.OutOfMemoryError("CUDA out of memory.")], ids=str)
def test_old_adapter_is_kept_until_there_is_something_to_save(error, place, capsys, monkeypatch):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(Trainer, "training_step", fails)
    before = everything(place)
    words = "--output_dir adapter --overwrite_output_dir --learning_rate 1"
    assert status_and_line("finetune", words, capsys)[0] in (2, 130)
    assert everything(place) == before


def test_checkpoint_of_another_folder_replaces_a_run_only_if_told(place, capsys):
    elsewhere = f"{RESUME} stopped/checkpoint-1 --output_dir adapter"
    before = everything(place)
    status, line = status_and_line("finetune", elsewhere, capsys)
    assert status == 2 and "--output_dir adapter: is not empty" in line and everything(place) == before
    assert status_and_line("finetune", f"{elsewhere} --overwrite_output_dir", capsys)[0] == 0
    assert {path.name for path in Path("adapter").glob("checkpoint-*")} == {"checkpoint-2"}
    assert Path("stopped/checkpoint-1").is_dir()


# ---------------------------------------------------------------------------------------------------------- merging


def test_merged_model_that_cannot_be_written(place, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", full)
    status, line = status_and_line("merge", "", capsys)
    assert status == 2 and "No space left" in line.splitlines()[-1] and not Path("out").exists()


FAILURES = [(1, torch.OutOfMemoryError("no memory"), 2), (4, KeyboardInterrupt(), 130)]


@pytest.mark.parametrize(("call", "error", "status"), FAILURES)
def test_merged_model_outlives_a_failed_evaluation(call, error, status, place, caplog, capsys, monkeypatch):
    assert status_and_line("merge", "--save whole", capsys)[0] == 0
    calls, perplexity = [], merge.perplexity

    def fails(*args):
        calls.append(1)
        if len(calls) == call:
            raise error
        return perplexity(*args)

    monkeypatch.setattr(merge, "perplexity", fails)
    result, line = status_and_line("merge", "", capsys)
    assert result == status and "the merged model is saved in out" in line + caplog.text
    assert "python lora_ft/evaluate_ppl.py --model out --dataset other.txt --ctx_length 32" in line + caplog.text
    assert Path("out/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()
    whole = json.loads(Path("whole/merge.json").read_text())
    assert whole["complete"] is True and len(whole["rows"]) == 4
    if call > 1:
        cut = json.loads(Path("out/merge.json").read_text())
        assert cut["complete"] is False and len(cut["rows"]) == call - 1
        assert all(row in whole["rows"] for row in cut["rows"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_merged_model_keeps_the_dtype_and_the_zeros(dtype, place, capsys):
    AutoModelForCausalLM.from_pretrained("pruned", dtype=getattr(torch, dtype)).save_pretrained("pruned")
    before, bytes_before = load_file("pruned/model.safetensors"), Path("pruned/model.safetensors").read_bytes()
    assert status_and_line("merge", "", capsys)[0] == 0
    assert Path("pruned/model.safetensors").read_bytes() == bytes_before
    after = load_file("out/model.safetensors")
    assert before.keys() == after.keys() and {w.dtype for w in after.values()} == {getattr(torch, dtype)}
    changed = [name for name in after if not torch.equal(after[name], before[name])]
    assert changed and all("q_proj" in name or "v_proj" in name for name in changed)
    assert all((after[name][before[name] == 0] == 0).all() for name in after)
    # What was measured is what was saved: the same folder gives the same perplexity.
    merged = json.loads(Path("out/merge.json").read_text())["rows"][-1]
    assert status_and_line("evaluate", "--model out --lora_weights - --result_dir res", capsys)[0] == 0
    measured = json.loads(Path("res/perplexity.json").read_text())
    assert (measured["perplexity"], measured["sparsity"]) == (merged["perplexity"], merged["sparsity"])
    assert status_and_line("merge", "--dtype float32 --save plain", capsys)[0] == 0
    assert {w.dtype for w in load_file("plain/model.safetensors").values()} == {torch.float32}
