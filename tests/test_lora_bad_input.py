"""LoRA recovery, bad input: one line that says what was given and what to type, exit status 2, and nothing written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama, tiny_sentences
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer

from lib import models
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
    "merge": (merge, EVALUATE | {"--out": "out"}),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_tokenizer) -> Path:
    """Return a folder with a pruned model, its adapter, texts, and a few wrong things."""
    folder = tmp_path_factory.mktemp("bad")
    model = tiny_llama()
    for layer in models.prunable_layers(model):
        layer.module.weight.data[:, ::2] = 0
    for name in ("pruned", "bare"):
        model.save_pretrained(folder / name)
    tiny_tokenizer.save_pretrained(folder / "pruned")
    tiny_llama().save_pretrained(folder / "dense")
    tiny_tokenizer.save_pretrained(folder / "dense")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    small = LlamaConfig(vocab_size=300, max_position_embeddings=128, **sizes)
    LlamaForCausalLM(small).save_pretrained(folder / "narrow")
    tiny_tokenizer.save_pretrained(folder / "narrow")
    (folder / "long.txt").write_text(tiny_sentences(20, seed=1))
    (folder / "other.txt").write_text(tiny_sentences(20, seed=2))
    (folder / "empty.txt").write_text("")
    (folder / "blank.txt").write_text(" \n \n")
    (folder / "short.txt").write_text("Ab de.")
    (folder / "full").mkdir()
    (folder / "full/notes.txt").write_text("mine")
    (folder / "file").write_text("a file")
    flags = FINETUNE | {"--model_name_or_path": str(folder / "pruned"), "--output_dir": str(folder / "adapter")}
    flags |= {"--train_file": str(folder / "long.txt"), "--validation_file": str(folder / "other.txt")}
    assert finetune_lm.main([word for item in flags.items() for word in item]) == 0
    shutil.copytree(folder / "adapter", folder / "cut")
    tensors = load_file(folder / "cut/adapter_model.safetensors")
    some = {name: tensor for name, tensor in tensors.items() if "layers.2" not in name}
    save_file(some, folder / "cut/adapter_model.safetensors")
    shutil.copytree(folder / "adapter", folder / "prefix")
    config = json.loads((folder / "prefix/adapter_config.json").read_text())
    (folder / "prefix/adapter_config.json").write_text(json.dumps(config | {"peft_type": "PREFIX_TUNING"}))
    return folder


@pytest.fixture
def place(made, tmp_path, monkeypatch) -> Path:
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def everything(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def status_and_line(program: str, text: str, capsys) -> tuple[int, str]:
    """Run a good command line of ``program`` with the flags in ``text`` put over it; ``--flag -`` takes one out."""
    module, good = PROGRAMS[program]
    flags = dict(good)
    words = text.split()
    while words:
        flag = words.pop(0)
        value = words.pop(0) if words and not words[0].startswith("--") else None
        flags[flag] = value
    argv = [word for flag, value in flags.items() if value != "-" for word in (flag, value) if word is not None]
    capsys.readouterr()
    try:
        status = module.main(argv)
    except SystemExit as error:
        status = error.code
    return status, capsys.readouterr().err.strip()


# What is typed -> what the line must say. All of this is known before the weights are loaded.
BEFORE_LOADING = [
    ("finetune", "--model_name_or_path no/such/folder", "--model_name_or_path no/such/folder: there is no such folder"),
    ("finetune", "--model_name_or_path full", "--model_name_or_path full: the folder holds no config.json"),
    ("finetune", "--model_name_or_path adapter", "it holds a LoRA adapter"),
    ("finetune", "--model_name_or_path bare", "--config_name NAME"),
    ("finetune", "--model_name_or_path bare --config_name ./nowhere", "--config_name ./nowhere: there is no such"),
    ("finetune", "--model_name_or_path -", "required: --model_name_or_path"),
    ("finetune", "--train_file no.txt", "--train_file no.txt: there is no such file"),
    ("finetune", "--train_file -", "give --dataset_name, one of c4, wikitext2, wiki_leads, or --train_file"),
    ("finetune", "--train_file - --dataset_name wiki_lead", "Did you mean 'wiki_leads'"),
    ("finetune", "--train_file empty.txt", "--train_file empty.txt: the file is empty"),
    ("finetune", "--train_file blank.txt", "too short, it has"),
    ("finetune", "--validation_file short.txt", "lower --block_size"),
    ("finetune", "--block_size 129", "--block_size 129: is more than the model's context; give at most 128"),
    ("finetune", "--block_size 1", "--block_size 1: must be at least 2"),
    ("finetune", "--block_size x", "--block_size/--block-size: invalid int value: 'x'"),
    ("finetune", "--blok_size 32", "unrecognized arguments: --blok_size 32. Did you mean '--block_size'"),
    ("finetune", "--batch_size 0", "--batch_size 0"),
    ("finetune", "--batch_size 3 --per_device_train_batch_size 2", "give a multiple of 2"),
    ("finetune", "--batch_size 4 --gradient_accumulation_steps 2", "that makes 2 blocks to a step; leave one of"),
    ("finetune", "--max_train_samples 0", "--max_train_samples 0"),
    ("finetune", "--lora_r 0", "--lora_r 0"),
    ("finetune", "--lora_dropout 1", "--lora_dropout 1"),
    ("finetune", "--lora_target_modules q_prj", "Did you mean 'q_proj'"),
    ("finetune", "--dtype half", "--dtype half"),
    ("finetune", "--do_train - --do_eval -", "add --do_train, --do_eval or both"),
    ("finetune", "--do_predict True", "--do_predict"),
    ("finetune", "--output_dir -", "--output_dir is missing"),
    ("finetune", "--output_dir file/x", "--output_dir file/x: cannot be written"),
    ("finetune", "--output_dir full", "add --overwrite_output_dir"),
    ("finetune", "--output_dir full --resume_from_checkpoint", "full holds no checkpoint"),
    ("finetune", "--output_dir full --resume_from_checkpoint full", "full: is no checkpoint"),
    ("finetune", "--output_dir adapter --resume_from_checkpoint --do_train -", "add --do_train"),
    ("finetune", "--output_dir adapter --resume_from_checkpoint --lora_r 4", "--lora_r 4: the run of adapter/check"),
    ("finetune", "--output_dir adapter --resume_from_checkpoint --lora_target_modules o_proj", "with q_proj,v_proj"),
    ("finetune", "--logging_steps 0", "--logging_steps"),
    ("finetune", "--fp16 True --bf16 True --use_cpu True", "fp16 and bf16"),
    ("evaluate", "--model nowhere/", "--model nowhere/: there is no such folder"),
    ("evaluate", "--lora_weights nowhere", "--lora_weights nowhere: there is no such folder"),
    ("evaluate", "--lora_weights pruned", "holds no adapter_config.json; it holds a model, not an adapter"),
    ("evaluate", "--lora_weights prefix", "PREFIX_TUNING"),
    ("evaluate", "--model narrow", "does not fit narrow, model.layers.0.self_attn.q_proj has 16 columns"),
    ("evaluate", "--dataset empty.txt", "--dataset empty.txt: the file is empty"),
    ("evaluate", "--dataset short.txt", "lower --ctx_length"),
    ("evaluate", "--ctx_length 129", "give at most 128"),
    ("evaluate", "--eval_windows 0", "--eval_windows 0"),
    ("evaluate", "--tasks boolq", "--tasks boolq without --eval_zero_shot"),
    ("evaluate", "--eval_zero_shot --tasks winogrand", "Did you mean 'winogrande'"),
    ("evaluate", "--result_dir file/x", "--result_dir file/x: cannot be written"),
    ("merge", "--out full", "--out full: is not empty"),
    ("merge", "--lora_weights -", "required: --lora_weights"),
    ("merge", "--model narrow", "does not fit narrow"),
]


@pytest.mark.parametrize(("program", "text", "says"), BEFORE_LOADING, ids=lambda value: str(value)[:60])
def test_before_loading(program, text, says, place, capsys, monkeypatch):
    monkeypatch.setattr(models, "load_llm", lambda *_: pytest.fail("the model was loaded"))
    before = everything(place)
    status, line = status_and_line(program, text, capsys)
    assert status == 2 and says in line, line
    assert line.splitlines()[-1].startswith(f"{PROGRAMS[program][0].__name__.split('.')[1]}.py: error: ")
    assert len([x for x in line.splitlines() if "WARNING" not in x and not x.startswith("tokenising")]) == 1, line
    assert everything(place) == before


@pytest.mark.parametrize("program", ["evaluate", "merge"])
def test_adapter_of_other_weights_of_the_same_shape(program, place, capsys):
    before = everything(place)
    status, line = status_and_line(program, "--model dense", capsys)
    assert status == 2 and "was trained on other weights than those of --model dense" in line.splitlines()[-1]
    assert str(place.parent) not in line and "/pruned" in line.splitlines()[-1]  # where it was trained on
    assert everything(place) == before


def test_adapter_that_lacks_weights(place, capsys):
    status, line = status_and_line("evaluate", "--lora_weights cut", capsys)
    assert status == 2 and "lacks weights that its config names" in line.splitlines()[-1]
    assert not Path("out").exists()


def test_adapter_that_does_not_say_what_it_belongs_to(place, caplog, capsys):
    Path("adapter/base_model.json").unlink()
    assert status_and_line("evaluate", "", capsys)[0] == 0
    assert "cannot be checked" in caplog.text


def test_dense_model_is_warned_of(place, caplog, capsys):
    assert status_and_line("finetune", "", capsys)[0] == 0
    assert "dense" not in caplog.text
    assert status_and_line("finetune", "--model_name_or_path dense --output_dir out2", capsys)[0] == 0
    assert "--model dense: is dense, not pruned: its sparsity is 0.0000" in caplog.text


def test_text_that_is_both_trained_and_evaluated_on_is_warned_of(place, caplog, capsys):
    assert status_and_line("finetune", "--validation_file long.txt --max_train_samples 1000", capsys)[0] == 0
    assert "long.txt is both trained and evaluated on" in caplog.text
    assert "and not the 1000 that were asked for" in caplog.text


def test_learning_rate_that_ruins_the_adapter(place, capsys):
    status, line = status_and_line("finetune", "--learning_rate 1e30 --warmup_steps 0 --max_train_samples 8", capsys)
    assert status == 2 and "the training loss is nan at step" in line.splitlines()[-1]
    assert not list(Path("out").glob("adapter*"))


def test_memory_that_does_not_suffice(place, capsys, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Trainer, "training_step", full)
    status, line = status_and_line("finetune", "", capsys)
    assert status == 2 and "--gradient_checkpointing" in line.splitlines()[-1] and "Traceback" not in line
    assert not list(Path("out").glob("adapter*"))


def test_merged_model_that_cannot_be_written(place, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", full)
    status, line = status_and_line("merge", "", capsys)
    assert status == 2 and "No space left" in line.splitlines()[-1]
    assert not Path("out").exists()


def test_base_weights_are_never_written_to(place, capsys):
    before = Path("pruned/model.safetensors").read_bytes()
    assert status_and_line("merge", "", capsys)[0] == 0
    assert Path("pruned/model.safetensors").read_bytes() == before
    assert torch.equal(*(AutoModelForCausalLM.from_pretrained(m).lm_head.weight for m in ("pruned", "out")))
