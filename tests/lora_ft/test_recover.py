"""Recovery by command: main.py --recover and recover.py agree, resume, and refuse in one line what cannot work."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import fast, saved_tensors, tiny_llama, tiny_sentences
from transformers import LlamaConfig, LlamaForCausalLM

import main
from lib import sparse
from lib.recovery import distill
from lib.recovery.distill import BY, Distillation
from lib.run import language
from lora_ft import recover

TEXTS = "--calib_data train.txt --eval_data val.txt --seqlen 16 --eval_windows 8"
TOKENS = 4 * 2 * 16 * 4  # sixteen steps, or four of each block's epochs
PRUNE = f"--model tiny-llama {TEXTS} --nsamples 4 --prune_method wanda --sparsity_ratio 0.5"
RECOVER = f"--model pruned/wanda_0.5 {TEXTS} --tokens {TOKENS} --save_model recovered"


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_folder, tiny_tokenizer) -> Path:
    """Return a folder with a dense model, a pruned one, texts, and wrong things."""
    folder = tmp_path_factory.mktemp("recover")
    shutil.copytree(tiny_folder, folder / "tiny-llama")
    for name, sentences, seed in (("train", 60, 1), ("val", 20, 2)):
        (folder / f"{name}.txt").write_text(tiny_sentences(sentences, seed))
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    for name, width in (("narrow", 16), ("wide", 32)):
        LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes | {"hidden_size": width})).save_pretrained(folder / name)
    other = tiny_llama()
    other.model.layers[1].mlp.up_proj.weight.data.mul_(1.5)
    other.save_pretrained(folder / "other")
    for name in ("narrow", "wide", "other"):
        tiny_tokenizer.save_pretrained(folder / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main.main([*PRUNE.split(), "--save_model", "pruned", "--save", "first"]) == 0
    shutil.copytree(folder / "pruned/wanda_0.5", folder / "unnamed")
    (folder / "unnamed/pruning.json").unlink()
    (folder / "packed").mkdir()
    sparse.pack_files(folder / "pruned/wanda_0.5", folder / "packed")
    (folder / "full").mkdir()
    (folder / "full/notes.txt").write_text("mine")
    return folder


@pytest.fixture
def place(made, tmp_path, monkeypatch) -> Path:
    """Return the working folder: a copy of what was ``made``."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_record(folder: str) -> dict:
    (path,) = Path(folder).glob("run_*.json")
    return json.loads(path.read_text())


def same(a: str, b: str) -> bool:
    one, two = saved_tensors(Path(a)), saved_tensors(Path(b))
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    "flags", ["", "--by block", *fast(["--train low_rank --rank 4", "--stream always --by block"], 0)]
)
def test_both_commands_do_the_same(flags, place, capsys):
    assert main.main([*PRUNE.split(), "--recover", str(TOKENS), "--save_model", "both", *flags.split()]) == 0
    assert recover.main([*RECOVER.split(), *flags.split(), "--save", "figures"]) == 0
    assert same("both/wanda_0.5_recovered", "recovered") and same("both/wanda_0.5", "pruned/wanda_0.5")
    mine, theirs = run_record("results"), run_record("figures")
    assert mine["recovery"] | {"seconds": 0} == theirs["recovery"] | {"seconds": 0}
    assert mine["perplexity"] == theirs["perplexity"] != mine["recovery"]["perplexity_before"]
    assert mine["sparsity"] == theirs["sparsity"] == mine["recovery"]["sparsity_before"]
    assert mine["recovery"]["held_after"] < mine["recovery"]["held_before"]
    pruned, recovered = saved_tensors(Path("pruned/wanda_0.5")), saved_tensors(Path("recovered"))
    for name, tensor in pruned.items():
        if "proj" in name:
            assert torch.equal(tensor == 0, recovered[name] == 0) and not torch.equal(tensor, recovered[name]), name
    assert Path("figures/recovery_recovered_sparsity_0.5.png").stat().st_size > 1000
    assert "held-out loss" in capsys.readouterr().out and not list(Path("recovered").glob("*.state"))
    # What is recovered can be recovered again, from the same dense model, and is called by the same sparsity; a folder
    # may have the name of a choice (--by model).
    again = [*RECOVER.split(), "--model", "recovered", "--save_model", "model", *flags.split()]
    assert recover.main(again) == 0 and Path("results/run_recovered_sparsity_0.5.json").is_file()


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("stopped", fast(["at work", "when saving", "when measured"], 1))
def test_a_stopped_run_resumes_with_the_same_bits(by, stopped, place, monkeypatch):
    flags = [*RECOVER.split(), "--by", by]
    assert recover.main([*flags, "--save_model", "unbroken", "--save", "1"]) == 0
    monkeypatch.setattr(distill, "STORE_EVERY", -1)
    calls = []

    def interrupt(real, at):
        def interrupted(*args):
            calls.append(1)
            if len(calls) == at:
                raise KeyboardInterrupt
            return real(*args)

        return interrupted

    owner, name, at = {
        "at work": (Distillation, "_step", 7 if by == "model" else 21),
        "when saving": (language.Journal, "add", 2),
        "when measured": (recover.LanguageModel, "perplexity", 2),
    }[stopped]
    monkeypatch.setattr(owner, name, interrupt(getattr(owner, name), at))
    assert recover.main([*flags, "--save", "2"]) == 130 and calls
    before = len(calls)
    assert recover.main([*flags, "--save", "2"]) == 0
    assert same("unbroken", "recovered")
    one, two = run_record("1")["recovery"], run_record("2")["recovery"]
    assert one | {"seconds": 0} == two | {"seconds": 0}
    if stopped == "at work":
        assert len(calls) - before < len(one["losses"])
    assert not Path(".recovered.partial").exists()


def interrupt(*_):
    raise KeyboardInterrupt


def test_one_command_resumes_in_its_recovery(place, monkeypatch):
    flags = [*PRUNE.split(), "--recover", str(TOKENS)]
    assert main.main([*flags, "--save_model", "unbroken", "--save", "1"]) == 0
    monkeypatch.setattr(distill, "STORE_EVERY", -1)
    step, prune, calls = Distillation._step, main.pipeline.walk._prune_block, []
    monkeypatch.setattr(Distillation, "_step", lambda *args: step(*args) if args[4] < 7 else interrupt())
    assert main.main([*flags, "--save_model", "stopped", "--save", "2"]) == 130
    monkeypatch.setattr(Distillation, "_step", lambda *args: calls.append(1) or step(*args))
    monkeypatch.setattr(main.pipeline.walk, "_prune_block", lambda *args: calls.append("again") or prune(*args))
    assert main.main([*flags, "--save_model", "stopped", "--save", "2"]) == 0
    assert calls == [1] * 9, "nothing is pruned again, and seven steps of sixteen were stored"
    assert same("unbroken/wanda_0.5_recovered", "stopped/wanda_0.5_recovered")


def test_a_packed_run_resumes_in_its_recovery(place, monkeypatch):
    flags = [*PRUNE.split(), "--recover", str(TOKENS), "--packed", "int8"]
    step = Distillation._step
    monkeypatch.setattr(Distillation, "_step", interrupt)
    assert main.main([*flags, "--save_model", "stopped", "--save", "1"]) == 130
    monkeypatch.setattr(Distillation, "_step", step)
    assert main.main([*flags, "--save_model", "stopped", "--save", "1"]) == 0
    assert main.main([*flags, "--save_model", "unbroken", "--save", "2"]) == 0
    assert same("stopped/wanda_0.5_recovered", "unbroken/wanda_0.5_recovered")
    assert sparse.holds_int8(Path("stopped/wanda_0.5_recovered"))
    assert not sparse.holds_int8(Path("stopped/wanda_0.5")), "what a resumed run starts from is exact"


def test_packed_folders_hold_the_same_weights(place):
    flags = [*RECOVER.split(), "--save", "1"]
    assert recover.main(flags) == 0 and recover.main([*flags, "--save_model", "packed", "--packed"]) == 0
    assert main.main(["--model", "packed", *TEXTS.split()[2:], "--save", "2"]) == 0
    # A packed model is computed in bfloat16 here.
    assert run_record("2")["perplexity"] == pytest.approx(run_record("1")["perplexity"], rel=0.02)
    assert run_record("2")["sparsity"] == run_record("1")["sparsity"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--tokens 16", "--tokens 16: is too few for a step, which takes 32"),
        ("--tokens 100000", r"windows of 16 tokens and 6250 + 8 are needed; give at most"),
        ("--by block --dense none", "--by block: aims at the dense model's blocks"),
        ("--dense narrow", "--dense narrow: is another model than the pruned one: its embedding is (300, 16)"),
        ("--dense wide", "pruned one: its model.layers.2.mlp.down_proj is (32, 24), the other's (32, 48)"),
        ("--model packed", "--model packed: is packed, which is for running it; unpack it"),
        ("--dense other", "--dense other: is not the model that was pruned (see model.layers.1.mlp.up_proj)"),
        ("--model unnamed", "--dense is needed: unnamed does not say what it was pruned from"),
        ("--model tiny-llama --dense none", "is not pruned"),
        ("--stream always", "--by model: the model is streamed"),
        ("--rank 8", "--rank does nothing"),
        ("--train norm", "Did you mean 'norms'"),
        ("--eval_data train.txt", "--calib_data train.txt: is --eval_data's file, too"),
        ("--save_model full", "no pruning wrote"),
        ("--states 8bits", "Did you mean '8bit'"),
    ],
)
def test_what_cannot_work_is_one_line(flags, said, place, capsys):
    assert recover.main([*RECOVER.split(), *flags.split()]) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(err) == 1 and said in err[0], err
    assert not Path("recovered").exists() and not Path(".recovered.partial").exists()


def test_flags_of_recovery_need_it(place, capsys):
    for flags in ("--batch 2", "--train norms", "--by block", "--states 8bit", "--learning_rate 1"):
        assert main.main([*PRUNE.split(), *flags.split()]) == 2
        assert f"{flags.split()[0]} does nothing" in capsys.readouterr().err
    assert main.main(["--model", "tiny-llama", "--recover", "9"]) == 2
    assert "--recover does nothing" in capsys.readouterr().err


def test_another_run_is_not_mixed_in(place, capsys, monkeypatch):
    monkeypatch.setattr(Distillation, "_store", interrupt)
    monkeypatch.setattr(distill, "STORE_EVERY", -1)
    assert recover.main(RECOVER.split()) == 130
    monkeypatch.undo()
    monkeypatch.chdir(place)
    assert recover.main([*RECOVER.split(), "--learning_rate", "0.01"]) == 2
    assert "--learning_rate was None and is 0.01 now; add --restart" in capsys.readouterr().err
    assert recover.main([*RECOVER.split(), "--learning_rate", "0.01", "--restart"]) == 0


def test_text_alone_recovers_too(place):
    assert recover.main([*RECOVER.split(), "--model", "unnamed", "--dense", "none"]) == 0
    record = run_record("results")
    assert record["perplexity"] < record["recovery"]["perplexity_before"]
    # What pruning.json says of it now is not the dense model's.
    again = [*RECOVER.split(), "--model", "recovered", "--save_model", "twice"]
    assert recover.main([*again, "--dense", "tiny-llama"]) == 0
    assert recover.main(again) == 2


def test_a_run_is_named_by_its_target_where_a_plan_gave_it(place):
    plan = [*PRUNE.split(), "--save_plan", "plan.json"]
    assert main.main(plan) == 0
    at = plan.index("--sparsity_ratio")
    assert main.main([*plan[:at], "--plan", "plan.json", "--save_model", "planned"]) == 0
    assert recover.main([*RECOVER.split(), "--model", "planned/wanda_plan_0.5", "--save", "1"]) == 0
    assert run_record("1")["target_sparsity"] == 0.5
