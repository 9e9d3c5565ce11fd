"""LoRA recovery: training, resumption, several processes, evaluation and merging, on a tiny pruned LLaMA."""

import copy
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
from conftest import ROOT, fast, tiny_llama, tiny_sentences
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, Trainer

import main
from lib.calibration import texts as data
from lib.calibration.texts import evaluation_windows
from lib.cli.command import parse
from lib.evaluation import zero_shot
from lib.evaluation.perplexity import perplexity
from lib.models.layers import prunable_layers
from lib.models.weights import weights_of
from lora_ft import evaluate_ppl, finetune_lm, merge
from lora_ft.training import parse_arguments

BLOCK = 32


def prune_half(model) -> None:
    """Zero the smaller half of each row of every linear layer in the blocks."""
    for block in weights_of(model).visit(write=True):
        for linear in block.linears.values():
            weight = linear.weight.data
            weight[weight.abs() < weight.abs().median(dim=1, keepdim=True).values] = 0


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_tokenizer) -> Path:
    """Return a folder with a pruned model, a text to train on and another to evaluate on."""
    folder = tmp_path_factory.mktemp("lora")
    model = tiny_llama()
    prune_half(model)
    model.save_pretrained(folder / "pruned")
    tiny_tokenizer.save_pretrained(folder / "pruned")
    (folder / "train.txt").write_text(tiny_sentences(30, seed=1))
    (folder / "val.txt").write_text(tiny_sentences(20, seed=2))
    return folder


def words(place: Path, out, **changed) -> list[str]:
    """Return finetune_lm.py's command line: six steps of four blocks, with flags changed; None takes one out."""
    flags = {
        "model_name_or_path": place / "pruned",
        "train_file": place / "train.txt",
        "validation_file": place / "val.txt",
        "block_size": BLOCK,
        "max_train_samples": 24,
        "batch_size": 4,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "eval_steps": 3,
        "save_steps": 2,
        "do_train": True,
        "do_eval": True,
        "output_dir": out,
    } | changed
    return [str(word) for name, value in flags.items() if value is not None for word in (f"--{name}", value)]


def finetune(place: Path, out, **changed) -> int:
    return finetune_lm.main(words(place, out, **changed))


def record(path: Path) -> dict:
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def adapter(place) -> Path:
    """Return the folder of an adapter that was trained in one go."""
    assert finetune(place, place / "adapter") == 0
    return place / "adapter"


def weights(adapter: Path) -> dict[str, torch.Tensor]:
    return load_file(adapter / "adapter_model.safetensors")


def worst(a: dict, b: dict) -> float:
    """Return the largest difference between two adapters, relative to the largest entry of each matrix."""
    assert a.keys() == b.keys()
    return max(((a[key] - b[key]).abs().max() / a[key].abs().max()).item() for key in a)


def loaded(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture
def windows(place, tiny_tokenizer):
    return evaluation_windows(str(place / "val.txt"), tiny_tokenizer, BLOCK)


# ------------------------------------------------------------------------------------------------------ training


def test_what_a_run_leaves_behind(place, adapter):
    names = {path.name for path in adapter.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "base_model.json", "train_results.json",
                     "eval_results.json", "loss_curve.png", "checkpoint-2", "checkpoint-4", "checkpoint-6"}  # fmt: skip
    assert (adapter / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    assert record(adapter / "adapter_config.json")["base_model_name_or_path"] == str(place / "pruned")
    train = record(adapter / "train_results.json")
    assert train["train_samples"] == 24 and train["flags"]["learning_rate"] == 0.01 and train["versions"]["torch"]
    assert math.isfinite(train["train_loss"])


def test_perplexity_is_that_of_lib_and_better_than_before(place, adapter, windows):
    model = loaded(place / "pruned")
    before = perplexity(model, windows)
    after = perplexity(PeftModel.from_pretrained(model, adapter).eval(), windows)
    found = record(adapter / "eval_results.json")
    assert found["eval_samples"] == len(windows)
    assert found["perplexity"] == pytest.approx(after, rel=1e-5)  # batches of eight against one window at a time
    assert after < 0.95 * before


def test_only_the_adapter_is_trained(place, adapter):
    model = PeftModel.from_pretrained(loaded(place / "pruned"), adapter)
    names = {name.split(".lora_")[0] for name in weights(adapter)}
    assert names == {f"base_model.model.model.layers.{i}.self_attn.{p}_proj" for i in range(3) for p in "qv"}
    assert {tuple(w.shape) for name, w in weights(adapter).items() if "lora_A" in name} == {(8, 32)}
    assert all(w.abs().max() > 0 for w in weights(adapter).values())
    assert model.peft_config["default"].lora_alpha == 16


def test_all_linear(place, tmp_path):
    assert finetune(place, tmp_path / "out", lora_target_modules="all-linear", lora_r=2, max_train_samples=4) == 0
    layers = {layer.name for layer in prunable_layers(tiny_llama())}
    assert {name.removeprefix("base_model.model.").split(".lora_")[0] for name in weights(tmp_path / "out")} == layers


OTHER_WAYS = [{"per_device_train_batch_size": 4}, {"gradient_checkpointing": True}]


@pytest.mark.parametrize("how", fast(OTHER_WAYS, 1), ids=str)
def test_other_ways_to_the_same_adapter(how, place, tmp_path):
    # Without dropout, four blocks at once or one after the other, activations kept or computed again, are the same
    # sum: the difference is float32 rounding, which Adam enlarges where a gradient is close to zero.
    same = {"lora_dropout": 0, "max_train_samples": 12}
    assert finetune(place, tmp_path / "a", **same) == finetune(place, tmp_path / "b", **same, **how) == 0
    assert worst(weights(tmp_path / "a"), weights(tmp_path / "b")) < 1e-3
    assert finetune(place, tmp_path / "c", **same, seed=1) == 0
    assert worst(weights(tmp_path / "a"), weights(tmp_path / "c")) > 0.1  # what the tolerance would have to miss


def test_resumption_ends_where_the_unbroken_run_ends(place, adapter, tmp_path, monkeypatch, capsys):
    class Killed(BaseException):
        pass

    calls, step = [], Trainer.training_step

    def dies(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 4 * 4 + 2:  # in the fifth step, after the checkpoint of the fourth
            raise Killed
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", dies)
    with pytest.raises(Killed):
        finetune(place, tmp_path / "out")
    (tmp_path / "out" / "checkpoint-6").mkdir()  # a checkpoint whose writing was cut off
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    assert finetune(place, tmp_path / "out") == 2
    assert "--resume_from_checkpoint" in capsys.readouterr().err

    assert finetune_lm.main([*words(place, tmp_path / "out"), "--resume_from_checkpoint"]) == 0
    assert len(calls) == 4 * 4 + 2 + 2 * 4  # two steps were left
    assert worst(weights(adapter), weights(tmp_path / "out")) == 0
    for name in ("eval_loss", "perplexity"):
        assert record(tmp_path / "out" / "eval_results.json")[name] == record(adapter / "eval_results.json")[name]
    history = [record(out / "checkpoint-6/trainer_state.json")["log_history"] for out in (adapter, tmp_path / "out")]
    losses = [[row["loss"] for row in rows if "loss" in row] for rows in history]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_overwriting_removes_the_old_checkpoints(place, adapter, tmp_path):
    out = shutil.copytree(adapter, tmp_path / "out")
    (out / "notes.txt").write_text("mine")
    assert finetune(place, out, max_train_samples=8, overwrite_output_dir=True) == 0
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-2"}
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_loss_that_is_not_finite_names_its_step(bad, place, tmp_path, monkeypatch, capsys):
    calls, loss = [], Trainer.compute_loss

    def spoils(self, *args, **kwargs):
        calls.append(1)
        return loss(self, *args, **kwargs) * (bad if len(calls) == 7 else 1)  # four to a step: in the second

    monkeypatch.setattr(Trainer, "compute_loss", spoils)
    assert finetune(place, tmp_path / "out") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"training loss is {bad} at step 2" in error and "--learning_rate" in error
    assert not list((tmp_path / "out").glob("*.json")) and not list((tmp_path / "out").glob("*.safetensors"))


def test_evaluation_without_training_is_that_of_the_pruned_model(place, tmp_path, windows):
    assert finetune(place, tmp_path / "out", do_train=None) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"eval_results.json"}
    expected = perplexity(loaded(place / "pruned"), windows)
    assert record(tmp_path / "out" / "eval_results.json")["perplexity"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_two_processes_make_the_adapter_of_one(place, tmp_path):
    # The same four blocks to a step, two in each process. --multi_gpu is what makes the launcher start several
    # processes; --use_cpu keeps them off the GPUs. From lora_ft/, as some type it.
    same = {"lora_dropout": 0, "max_train_samples": 12, "max_eval_samples": 19}  # 19: none is evaluated twice
    assert finetune(place, tmp_path / "one", **same) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = f"-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --main_process_port {port}"
    launch += " --mixed_precision no --dynamo_backend no finetune_lm.py"
    flags = words(place, tmp_path / "two", **same, use_cpu=True, ddp_backend="gloo", gradient_checkpointing=True)
    command = [sys.executable, *launch.split(), *flags]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT / "lora_ft", env=env, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("written: ") == 1
    assert worst(weights(tmp_path / "one"), weights(tmp_path / "two")) < 1e-3
    results = [record(tmp_path / out / "eval_results.json")["perplexity"] for out in ("one", "two")]
    assert results[0] == pytest.approx(results[1], rel=1e-5)


# ------------------------------------------------------------------------------------------- texts and lent parts


@pytest.fixture
def documents(monkeypatch, tiny_tokenizer):
    """Put eight documents in C4's place and return them, and the list of those that get tokenised."""
    texts = [tiny_sentences(count, seed) for seed, count in enumerate([1, 30, 2, 25, 1, 40, 3, 60])]
    monkeypatch.setitem(data.DATASETS, "c4", lambda split: data.Text(texts if split == "train" else texts[:2]))
    monkeypatch.setattr(data, "_DOCUMENTS_AT_ONCE", 2)
    seen = []
    tokenise = type(tiny_tokenizer).__call__

    def noted(self, text, **kwargs):
        seen.extend(text if isinstance(text, list) else [text])
        return tokenise(self, text, **kwargs)

    monkeypatch.setattr(type(tiny_tokenizer), "__call__", noted)
    return texts, seen


@pytest.fixture
def with_bos(tiny_tokenizer):
    """Return a tokenizer that begins every text with <s>, as LLaMA's does."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def test_blocks_of_documents(documents, with_bos):
    texts, seen = documents
    joined = [token for text in texts for token in [1, *with_bos(text, add_special_tokens=False).input_ids]]
    seen.clear()
    blocks = data.training_blocks("dataset_name", "c4", "train", with_bos, 50)
    assert blocks.flatten().tolist() == joined[: len(joined) // 50 * 50] and seen == texts
    seen.clear()
    few = data.training_blocks("dataset_name", "c4", "train", with_bos, 50, most=3)
    assert torch.equal(few, blocks[:3]) and seen == texts[:2]  # the first two hold enough


def test_blocks_of_a_stream(monkeypatch, with_bos, tmp_path):
    text = tiny_sentences(120)
    (tmp_path / "text.txt").write_text(text)
    monkeypatch.setattr(data, "_PIECE", 500)
    assert "".join(data._pieces(text)) == text and len(data._pieces(text)) > 5
    blocks = data.training_blocks("train_file", str(tmp_path / "text.txt"), "train", with_bos, 50)
    whole = with_bos(text, verbose=False).input_ids
    assert blocks.flatten().tolist() == whole[: len(whole) // 50 * 50]


def test_published_command(place, documents, tiny_tokenizer, tmp_path, monkeypatch):
    # The pruned folder holds weights alone; config and tokenizer come from --config_name, a folder in the hub's place.
    monkeypatch.chdir(tmp_path)
    bare, lender = tmp_path / "PRUNED", tmp_path / "meta-llama/Llama-2-7b-hf"
    bare.mkdir()
    shutil.copy(place / "pruned/model.safetensors", bare)
    tiny_llama().config.save_pretrained(lender)
    tiny_tokenizer.save_pretrained(lender)
    shutil.copy(place / "pruned/model.safetensors", lender)
    command = (
        "--model_name_or_path PRUNED --config_name meta-llama/Llama-2-7b-hf --dataset_name c4 --num_train_epochs 1 "
        "--block_size 2048 --per_device_train_batch_size 1 --per_device_eval_batch_size 8 --do_train --do_eval "
        "--max_train_samples 100000 --max_eval_samples 128 --learning_rate 1e-4 --overwrite_output_dir --output_dir OUT"
    )
    words: list[str] = []
    lora = parse(finetune_lm.Finetune, command.split(), finetune_lm.PARSER, words)
    training = parse_arguments(words, finetune_lm.PARSER, do_train=True, do_eval=True, output_dir="OUT")
    assert (lora.lora_r, lora.lora_alpha, lora.lora_dropout, lora.lora_target_modules) == (8, 16, 0.05, "q_proj,v_proj")
    assert (training.gradient_accumulation_steps, training.batch_size, training.eval_strategy) == (128, 128, "steps")
    published = re.findall(r"--(\w+) ([\w.]+)", finetune_lm.PARSER.epilog.partition("Published")[2])
    assert len(published) == 8 and all(str(training.to_dict()[name]) == value for name, value in published)
    assert finetune_lm.main(command.replace("2048", "32").split()) == 0  # the tiny model's context is 128
    assert record(tmp_path / "OUT/adapter_config.json")["base_model_name_or_path"] == str(bare)
    assert not {path.name for path in bare.iterdir()} - {"model.safetensors"}

    flags = "--model PRUNED --config_name meta-llama/Llama-2-7b-hf --lora_weights OUT --ctx_length 32 --dataset "
    assert evaluate_ppl.main([*flags.split(), str(place / "val.txt")]) == 0
    assert merge.main([*flags.split(), str(place / "val.txt"), "--save", "MERGED"]) == 0
    assert {"config.json", "tokenizer.json"} <= {path.name for path in (tmp_path / "MERGED").iterdir()}


# ---------------------------------------------------------------------------------------------- evaluating, merging


def evaluated(place, tmp_path, *more: str) -> dict:
    flags = f"--dataset {place / 'val.txt'} --ctx_length {BLOCK} --result_dir {tmp_path / 'res'}"
    assert evaluate_ppl.main([*flags.split(), *more]) == 0
    return record(tmp_path / "res/perplexity.json")


def test_evaluate_ppl_answers_tasks_with_the_adapter_on(place, adapter, tmp_path, monkeypatch):
    seen = []
    real = zero_shot.zero_shot
    monkeypatch.setattr(zero_shot, "zero_shot", lambda model, *rest: seen.append(model) or real(model, *rest))
    tasks = f"--eval_zero_shot --tasks capital_cities --include_path {ROOT / 'data' / 'tasks'} --limit 6".split()
    found = evaluated(place, tmp_path, "--model", str(place / "pruned"), "--lora_weights", str(adapter), *tasks)
    scores = found["zero_shot"]["lm_eval"]["results"]["capital_cities"]
    assert scores["acc,none"] == found["zero_shot"]["means"]["acc"] and 0 <= scores["acc,none"] <= 1
    assert "capital_cities" in (tmp_path / "res/zero_shot.txt").read_text()
    assert isinstance(seen[0], PeftModel)


def test_evaluate_ppl_is_main_and_writes_the_published_line(place, adapter, tmp_path, windows):
    pruned = str(place / "pruned")
    flags = f"--model {pruned} --eval_data {place / 'val.txt'} --seqlen {BLOCK} --save {tmp_path / 'save'}"
    assert main.main(flags.split()) == 0
    dense = record(tmp_path / "save/run_dense_sparsity_0.0.json")
    found = evaluated(place, tmp_path, "--model", pruned)
    assert found["perplexity"] == dense["perplexity"] and found["sparsity"] == dense["sparsity"]
    assert (tmp_path / "res/perplexity.txt").read_text() == f"perplexity on {place / 'val.txt'} {found['perplexity']}\n"

    found = evaluated(place, tmp_path, "--model", pruned, "--lora_weights", str(adapter))
    expected = perplexity(PeftModel.from_pretrained(loaded(place / "pruned"), adapter).eval(), windows)
    assert found["perplexity"] == expected
    assert found["evaluation"] == {"text": str(place / "val.txt"), "windows": len(windows), "seqlen": BLOCK}


def test_wikitext2_has_the_published_name(place, tmp_path, monkeypatch, capsys):
    text = (place / "val.txt").read_text()
    monkeypatch.setitem(data.DATASETS, "wikitext2", lambda split: data.Text(stream=text))
    flags = f"--model {place / 'pruned'} --ctx_length {BLOCK} --result_dir {tmp_path}"
    assert evaluate_ppl.main(flags.split()) == 0
    assert capsys.readouterr().out.startswith("perplexity on wikitext ")
    assert (tmp_path / "perplexity.txt").read_text().startswith("perplexity on wikitext ")


def merge_flags(place, adapter, out, *more: str) -> list[str]:
    flags = f"--model {place / 'pruned'} --lora_weights {adapter} --save {out}"
    return [*flags.split(), "--dataset", str(place / "val.txt"), "--ctx_length", str(BLOCK), *more]


def merged_by_hand(place, adapter: Path) -> dict[str, torch.Tensor]:
    """Return W + alpha/r BA of every layer that has an adapter."""
    before, delta = load_file(place / "pruned/model.safetensors"), weights(adapter)
    return {
        (name := key.removeprefix("base_model.model.").replace(".lora_A", "")): before[name]
        + 16 / 8 * delta[key.replace("lora_A", "lora_B")] @ delta[key]
        for key in delta
        if "lora_A" in key
    }


@pytest.mark.parametrize("keep_dense", [False, True])
def test_merge(keep_dense, place, adapter, tmp_path, windows, capsys):
    assert merge.main(merge_flags(place, adapter, tmp_path / "out", *["--keep_dense"] * keep_dense)) == 0
    before = load_file(place / "pruned/model.safetensors")
    after = load_file(tmp_path / "out/model.safetensors")
    by_hand = merged_by_hand(place, adapter)
    assert before.keys() == after.keys() and len(by_hand) == 6
    for name, weight in after.items():
        expected = by_hand.get(name, before[name])
        expected = expected if keep_dense else expected.masked_fill(before[name] == 0, 0)
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6)  # the order of eight products and one sum
        if name in by_hand and not keep_dense:
            assert torch.equal(weight == 0, before[name] == 0)

    layers = [f"{layer.name}.weight" for layer in prunable_layers(tiny_llama())]
    total = sum(before[name].numel() for name in layers)
    zeros = {key: sum((tensors[name] == 0).sum().item() for name in layers) / total
             for key, tensors in {"before": before, "plain": before | by_hand}.items()}  # fmt: skip
    pruned = loaded(place / "pruned")
    expected = {"pruned": (zeros["before"], perplexity(pruned, windows))}
    beside = perplexity(PeftModel.from_pretrained(pruned, adapter).eval(), windows)
    expected |= {"adapter beside it": (zeros["before"], beside), "merged without masking": (zeros["plain"], beside)}
    written = perplexity(loaded(tmp_path / "out"), windows)
    if not keep_dense:
        expected["merged, zeros kept"] = (zeros["before"], written)
    rows = {row["state"]: (row["sparsity"], row["perplexity"]) for row in record(tmp_path / "out/merge.json")["rows"]}
    assert rows.keys() == expected.keys()
    for state, (sparsity, value) in expected.items():
        assert rows[state] == (sparsity, pytest.approx(value, rel=1e-5)), state
    assert zeros["plain"] < zeros["before"] - 0.05  # or nothing would be shown here
    out = capsys.readouterr().out
    assert f"with a sparsity of {zeros['plain' if keep_dense else 'before']:.4f}" in out
    assert rows["adapter beside it"][1] < rows["pruned"][1]
    if not keep_dense:
        assert written < rows["pruned"][1]
