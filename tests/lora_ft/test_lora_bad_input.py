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

from lib.evaluation import perplexity as evaluation
from lib.models import load
from lib.models.weights import weights_of
from lora_ft import common, evaluate_ppl, finetune_lm, merge

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
    for name in ("pruned", "bare"):
        model.save_pretrained(folder / name)
    tiny_tokenizer.save_pretrained(folder / "pruned")
    tiny_llama().save_pretrained(folder / "dense")
    tiny_tokenizer.save_pretrained(folder / "dense")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    small = LlamaConfig(vocab_size=300, max_position_embeddings=128, **sizes)
    LlamaForCausalLM(small).save_pretrained(folder / "narrow")
    tiny_tokenizer.save_pretrained(folder / "narrow")
    few = LlamaConfig(vocab_size=20, max_position_embeddings=128, **sizes)
    for name in ("few", "few_bare"):
        LlamaForCausalLM(few).save_pretrained(folder / name)
    tiny_tokenizer.save_pretrained(folder / "few")
    shutil.copytree(folder / "pruned", folder / "packed")
    (folder / "packed/model.safetensors").rename(folder / "packed/model-block-00000.packed.safetensors")
    (folder / "packed_bare").mkdir()
    (folder / "packed_bare/model-block-00000.packed.safetensors").touch()
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
    shutil.copytree(folder / "adapter", folder / "few_adapter")
    narrow = {name: t[:, :16].contiguous() if "lora_A" in name else t[:16] for name, t in tensors.items()}
    save_file(narrow, folder / "few_adapter/adapter_model.safetensors")
    (folder / "few_adapter/base_model.json").unlink()
    config = json.loads((folder / "adapter/adapter_config.json").read_text())
    other = {"prefix": {"peft_type": "PREFIX_TUNING"}, "more": {"modules_to_save": ["lm_head"]}}
    for name, about in (other | {"biased": {"bias": "all"}}).items():
        shutil.copytree(folder / "adapter", folder / name)
        (folder / name / "adapter_config.json").write_text(json.dumps(config | about))
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
    ("finetune", "--model_name_or_path no/such/folder", "--model_name_or_path no/such/folder: folder not found"),
    ("finetune", "--model_name_or_path full", "--model_name_or_path full: the folder holds no config.json"),
    ("finetune", "--model_name_or_path adapter", "it holds a LoRA adapter"),
    ("finetune", "--model_name_or_path bare", "--config_name NAME"),
    ("finetune", "--model_name_or_path bare --config_name ./nowhere", "--config_name ./nowhere: folder not found"),
    ("finetune", "--model_name_or_path -", "required: --model_name_or_path"),
    ("finetune", "--train_file no.txt", "--train_file no.txt: file not found"),
    ("finetune", "--train_file -", "give --dataset_name, one of c4, wikitext2, wiki_leads, or --train_file"),
    ("finetune", "--train_file - --dataset_name wiki_lead", "Did you mean 'wiki_leads'"),
    ("finetune", "--train_file empty.txt", "--train_file empty.txt: the file is empty"),
    ("finetune", "--train_file blank.txt", "--train_file blank.txt: too short, it has"),
    ("finetune", "--validation_file short.txt", "--validation_file short.txt: too short, it has"),
    ("finetune", "--block_size 129", "--block_size 129: is more than the model's context; give at most 128"),
    ("finetune", "--block_size 1", "--block_size 1: must be at least 2"),
    ("finetune", "--block_size x", "--block_size: invalid int value: 'x'"),
    ("finetune", "--block-size 129", "--block_size 129: is more than"),
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
    ("finetune", "--output_dir -", "required: --output_dir"),
    ("finetune", "--output_dir file/x", "--output_dir file/x: cannot be written"),
    ("finetune", "--output_dir full", "add --overwrite_output_dir"),
    ("finetune", "--output_dir full --resume_from_checkpoint", "--output_dir full: the folder holds no checkpoint"),
    ("finetune", "--output_dir full --resume_from_checkpoint full", "full: is no checkpoint"),
    ("finetune", "--output_dir adapter --resume_from_checkpoint --do_train -", "add --do_train"),
    ("finetune", "--output_dir adapter --resume_from_checkpoint --lora_r 4", "--lora_r 4: the run of adapter/check"),
    ("finetune", "--output_dir adapter --resume_from_checkpoint --lora_target_modules o_proj", "with q_proj,v_proj"),
    ("finetune", "--logging_steps 0", "--logging_steps 0.0: must be above 0"),
    ("finetune", "--learning_rate nan", "--learning_rate nan: must be above 0"),
    ("finetune", "--warmup_steps inf", "--warmup_steps inf: must be at least 0 and below inf"),
    ("finetune", "--warmup_steps -1", "--warmup_steps -1.0: must be at least 0"),
    ("finetune", "--seed -1", "--seed -1: must be between 0 and 4294967295"),
    ("finetune", "--data_seed 4294967296", "--data_seed 4294967296: must be between"),
    ("finetune", "--adam_beta1 2", "--adam_beta1 2.0: must be at least 0 and below 1"),
    ("finetune", "--adam_epsilon nan", "--adam_epsilon nan: must be at least 0"),
    ("finetune", "--weight_decay -1", "--weight_decay -1.0: must be at least 0"),
    ("finetune", "--dataloader_num_workers -1", "--dataloader_num_workers -1: must be at least 0"),
    ("finetune", "--dataloader_persistent_workers True", "add --dataloader_num_workers N"),
    ("finetune", "--per_device_eval_batch_size 0", "--per_device_eval_batch_size 0: must be at least 1"),
    ("finetune", "--max_steps -7", "--max_steps -7: must be at least 1; leave it out for as many steps as --num_tr"),
    ("finetune", "--max_steps 0", "--max_steps 0: must be at least 1"),
    ("finetune", "--report_to wandb", "--report_to wandb: its package is not installed"),
    ("finetune", "--report_to wandbb", "Did you mean 'wandb'"),
    ("finetune", "--optim adamw_bnb_8bit", "training cannot be set up ("),
    ("finetune", "--optim adamw_torhc", "adamw_torhc"),
    ("finetune", "--optim_args betas", "training cannot be set up ("),
    ("finetune", '--lr_scheduler_type polynomial --lr_scheduler_kwargs {"no":1}', "training cannot be set up (get"),
    ("finetune", "--lr_scheduler_type inverse", "inverse"),
    ("finetune", "--train_sampling_strategy group_by_length", "training cannot be set up ("),
    ("finetune", "--load_best_model_at_end True --save_strategy no", "save"),
    ("finetune", "--deepspeed no.json", "deepspeed"),
    ("finetune", "--label_names x", "--label_names x: the labels are the text; leave the flag out"),
    ("finetune", "--load_best_model_at_end True --metric_for_best_model bleu", "bleu: only the loss is measured"),
    ("finetune", "--use_liger_kernel True", "--use_liger_kernel needs liger-kernel, which is not installed"),
    ("finetune", "--dataloader_drop_last True --per_device_train_batch_size 8 --batch_size 8", "leaves nothing of 4"),
    ("finetune", "--fsdp full_shard", "--fsdp works with several processes"),
    ("finetune", '--gradient_checkpointing True --gradient_checkpointing_kwargs {"a":1}', "cannot be set up (Unexp"),
    ("finetune", "--output_dir adapter --overwrite_output_dir --seed -1", "--seed -1"),
    ("finetune", "--grad_checkpointing True", "Did you mean '--gradient_checkpointing'"),
    ("finetune", "--fp16 True --bf16 True --use_cpu True", "fp16 and bf16"),
    ("evaluate", "--model nowhere/", "--model nowhere/: folder not found"),
    ("evaluate", "--lora_weights nowhere", "--lora_weights nowhere: folder not found"),
    ("evaluate", "--lora_weights pruned", "holds no adapter_config.json; it holds a model, not an adapter"),
    ("evaluate", "--lora_weights prefix", "PREFIX_TUNING"),
    ("evaluate", "--lora_weights more", "more: changes more than its own matrices"),
    ("merge", "--lora_weights biased", "biased: changes more than its own matrices"),
    ("evaluate", "--model narrow", "does not fit narrow, model.layers.0.self_attn.q_proj has 16 columns"),
    ("evaluate", "--dataset empty.txt", "--dataset empty.txt: the file is empty"),
    ("evaluate", "--dataset short.txt", "--dataset short.txt: too short, it has"),
    ("evaluate", "--ctx_length 129", "give at most 128"),
    ("evaluate", "--eval_windows 0", "--eval_windows 0"),
    ("evaluate", "--tasks boolq", "--tasks does nothing without --eval_zero_shot; add --eval_zero_shot"),
    ("evaluate", "--eval_zero_shot --tasks winogrand", "Did you mean 'winogrande'"),
    ("evaluate", "--result_dir file/x", "--result_dir file/x: cannot be written"),
    ("merge", "--save full", "--save full: is not empty"),
    ("merge", "--lora_weights -", "required: --lora_weights"),
    ("merge", "--model narrow", "does not fit narrow"),
    ("finetune", "--model_name_or_path few", "--model_name_or_path few: its tokenizer gives token"),
    ("finetune", "--model_name_or_path few_bare --config_name few", "--config_name few: its tokenizer gives token"),
    ("evaluate", "--model few --lora_weights -", "--model few: its tokenizer gives token"),
    ("merge", "--model few_bare --config_name pruned --lora_weights few_adapter", "--config_name pruned: its token"),
    ("finetune", "--model_name_or_path packed", "packed: is packed, which is for running it; unpack it first: python"),
    ("evaluate", "--model packed", "unpack it first: python scripts/speedup/pack.py packed --unpack --save DIR"),
    ("evaluate", "--model packed_bare --config_name pruned", "packed_bare: is packed, which is for running it"),
    ("merge", "--model packed", "unpack it first: python scripts/speedup/pack.py packed --unpack --save DIR"),
]


@pytest.mark.parametrize(("program", "text", "says"), BEFORE_LOADING, ids=lambda value: str(value)[:60])
def test_before_loading(program, text, says, place, capsys, monkeypatch, request):
    if "--eval_zero_shot" in text:
        request.getfixturevalue("few_tasks")
    monkeypatch.setattr(load, "load_llm", lambda *_: pytest.fail("the model was loaded"))
    before = everything(place)
    status, line = status_and_line(program, text, capsys)
    assert status == 2 and says in line, line
    assert line.splitlines()[-1].startswith(f"{PROGRAMS[program][0].__name__.split('.')[1]}.py: error: ")
    assert len([x for x in line.splitlines() if "WARNING" not in x and not x.startswith("tokenising")]) == 1, line
    assert everything(place) == before


def cut_off(path: str) -> None:
    """Cut a file to half its size."""
    os.truncate(path, Path(path).stat().st_size // 2)


def writes(text: str):
    return lambda path: Path(path).write_text(text)


def fingerprints_of(text: str):
    def change(path: str) -> None:
        about = json.loads(Path(path).read_text())
        about["fingerprints"] = dict.fromkeys(about["fingerprints"], text)
        Path(path).write_text(json.dumps(about))

    return change


DAMAGED = [
    ("base_model.json", cut_off, "adapter/base_model.json: cannot be read (", "remove it to go on without"),
    ("base_model.json", writes("[]"), "adapter/base_model.json: holds no JSON object", "restore it"),
    ("base_model.json", writes('{"fingerprints": 1}'), "its fingerprints are damaged", "restore it"),
    ("base_model.json", fingerprints_of("no hex"), "its fingerprints are damaged", "restore it"),
    ("base_model.json", fingerprints_of("00" * 8), "its fingerprints are damaged", "restore it"),
    ("adapter_config.json", writes("[]"), "adapter/adapter_config.json: holds no JSON object", "train the adapter"),
    ("adapter_config.json", cut_off, "adapter/adapter_config.json: cannot be read (", "train the adapter again"),
    ("adapter_model.safetensors", cut_off, "adapter_model.safetensors: cannot be read (", "train the adapter again"),
]


@pytest.mark.parametrize("program", ["evaluate", "merge"])
@pytest.mark.parametrize(("name", "damage", "says", "fix"), DAMAGED)
def test_damaged_adapter_is_refused_before_loading(program, name, damage, says, fix, place, capsys, monkeypatch):
    monkeypatch.setattr(load, "load_llm", lambda *_: pytest.fail("the model was loaded"))
    damage(f"adapter/{name}")
    status, line = status_and_line(program, "", capsys)
    assert status == 2 and says in line and len(line.splitlines()) == 1, line
    assert fix in line and not Path("out").exists()


def test_config_of_another_rank_is_refused(place, capsys):
    about = json.loads(Path("adapter/adapter_config.json").read_text())
    Path("adapter/adapter_config.json").write_text(json.dumps(about | {"r": 4}))
    status, line = status_and_line("evaluate", "", capsys)
    assert status == 2 and "adapter: its config does not fit its weights (" in line.splitlines()[-1], line


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


@pytest.mark.parametrize("program", ["evaluate", "merge"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapter_of_weights_that_were_fine_tuned(program, dtype, place, capsys):
    # One matrix changed by a rank-8 update of 2 % of its norm, where it is not pruned; saved as it is, or rounded.
    model = AutoModelForCausalLM.from_pretrained("pruned")
    weight = model.model.layers[1].mlp.up_proj.weight.data
    draw = torch.Generator().manual_seed(3)
    update = torch.randn(weight.shape[0], 8, generator=draw) @ torch.randn(8, weight.shape[1], generator=draw)
    update[weight == 0] = 0
    weight += update * (0.02 * weight.norm() / update.norm())
    shutil.copytree("pruned", "tuned")
    model.to(getattr(torch, dtype)).save_pretrained("tuned")
    status, line = status_and_line(program, "--model tuned", capsys)
    assert status == 2 and "on other weights than those of --model tuned" in line.splitlines()[-1]
    assert "(see model.layers.1.mlp.up_proj)" in line and not Path("out").exists()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_adapter_of_weights_that_were_rounded(dtype, place, caplog, capsys):
    shutil.copytree("pruned", "half")
    AutoModelForCausalLM.from_pretrained("pruned", dtype=getattr(torch, dtype)).save_pretrained("half")
    assert status_and_line("evaluate", "--model half", capsys)[0] == 0
    assert "cannot be checked" not in caplog.text


def test_adapter_that_does_not_say_what_it_belongs_to(place, caplog, capsys):
    Path("adapter/base_model.json").unlink()
    assert status_and_line("evaluate", "", capsys)[0] == 0
    assert "adapter: has no base_model.json: whether it was trained on pruned cannot be checked" in caplog.text


@pytest.mark.parametrize("program", ["evaluate", "merge"])
def test_adapter_of_an_older_version_is_accepted_with_one_line(program, place, caplog, capsys):
    about = json.loads(Path("adapter/base_model.json").read_text())
    layers = about.pop("fingerprints")
    Path("adapter/base_model.json").write_text(json.dumps(about | {"mean_abs": dict.fromkeys(layers, 0.05)}))
    assert status_and_line(program, "", capsys)[0] == 0
    assert caplog.text.count("cannot be checked") == 1 and "an older version's, without fingerprints" in caplog.text


def test_dense_model_is_warned_of(place, caplog, capsys):
    assert status_and_line("finetune", "", capsys)[0] == 0
    assert "dense" not in caplog.text
    assert status_and_line("finetune", "--model_name_or_path dense --output_dir out2", capsys)[0] == 0
    assert "the model dense is dense, not pruned: its sparsity is 0.0000" in caplog.text


def test_text_that_is_both_trained_and_evaluated_on_is_warned_of(place, caplog, capsys):
    assert status_and_line("finetune", "--validation_file long.txt --max_train_samples 1000", capsys)[0] == 0
    assert "long.txt is both trained and evaluated on" in caplog.text
    assert "and not the 1000 that were asked for" in caplog.text


def test_learning_rate_that_ruins_the_adapter(place, capsys):
    # Whether the loss is no longer a number, or is that of equal chances since a norm of infinity divides all by
    # itself to zero, depends on the order of the processor's sums. Neither may pass for an adapter.
    status, line = status_and_line("finetune", "--learning_rate 1e30 --warmup_steps 0 --max_train_samples 8", capsys)
    last = line.splitlines()[-1]
    assert status == 2 and "lower --learning_rate" in last and (" at step " in last or "is ruined after step" in last)
    assert not list(Path("out").glob("adapter*"))
    assert "--resume_from_checkpoint" not in line  # nothing is left to resume


def trained_then(change, monkeypatch) -> None:
    """Let ``change`` spoil the Trainer's model after training has ended well."""
    train = Trainer.train

    def spoils(self, *args, **kwargs):
        result = train(self, *args, **kwargs)
        change(self)
        return result

    monkeypatch.setattr(Trainer, "train", spoils)


def scale_b(trainer, factor: float) -> None:
    for name, weight in trainer.model.named_parameters():
        if "layers.1.self_attn.v_proj.lora_B" in name:
            assert weight.abs().max() > 0
            weight.data *= factor


@pytest.mark.parametrize(
    ("factor", "says"),
    [
        (1e30, "model.layers.1.self_attn.v_proj is"),  # finite: the step's loss cannot tell
        (float("nan"), "weights for model.layers.1.self_attn.v_proj are not finite"),
        (float("inf"), "weights for model.layers.1.self_attn.v_proj are not finite"),
    ],
)
def test_adapter_that_is_ruined_is_not_saved(factor, says, place, capsys, monkeypatch):
    trained_then(lambda trainer: scale_b(trainer, factor), monkeypatch)
    status, line = status_and_line("finetune", "", capsys)
    assert status == 2 and says in line.splitlines()[-1] and "lower --learning_rate" in line.splitlines()[-1]
    assert not list(Path("out").glob("adapter*"))


def test_large_update_is_not_taken_for_a_ruin(place, capsys, monkeypatch):
    trained_then(lambda trainer: scale_b(trainer, 1000), monkeypatch)
    assert status_and_line("finetune", "", capsys)[0] == 0


@pytest.mark.parametrize(("factor", "status"), [(1.5, 0), (10, 2)])
def test_loss_far_above_that_of_equal_chances(factor, status, place, capsys, monkeypatch):
    # The second of two steps has its loss multiplied. Its true value is close to the first step's, which is that of a
    # random model of 300 tokens: between ln(300) = 5.7 and twice that.
    calls, loss = [], Trainer.compute_loss

    def spoils(self, model, *args, **kwargs):
        calls.append(1)
        return loss(self, model, *args, **kwargs) * (factor if len(calls) > 2 else 1)  # two blocks to a step

    monkeypatch.setattr(Trainer, "compute_loss", spoils)
    found, line = status_and_line("finetune", "--do_eval -", capsys)
    assert found == status and len(calls) == 4, line
    assert ("for equal chances" in line and "5.704" in line) == bool(status)
    assert len(list(Path("out").glob("adapter*"))) == (0 if status else 2)


def test_norm_of_an_update():
    # W + 2 BA written out, for numbers that a pencil can check: B A = [[3, 4], [0, 0]], its norm 5, times 16 / 8.
    from peft import LoraConfig, get_peft_model

    class Tiny(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 2, bias=False)

    model = get_peft_model(Tiny(), LoraConfig(r=8, lora_alpha=16, target_modules=["layer"]))
    (layer,) = common.lora_layers(model).values()
    a, b = torch.zeros(8, 2), torch.zeros(2, 8)
    a[0], b[0, 0] = torch.tensor([3.0, 4.0]), 1.0
    layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = a, b
    assert finetune_lm.update_norm(layer) == 10
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(8, 2, generator=draw), torch.randn(2, 8, generator=draw)
    layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = a, b
    by_hand = (2 * b.double() @ a.double()).norm().item()
    assert finetune_lm.update_norm(layer) == pytest.approx(by_hand, rel=1e-12)  # float64, sixteen terms to a sum


def interrupt(patch: pytest.MonkeyPatch, call: int) -> None:
    """Press Ctrl-C in the ``call``-th training step, once."""
    step, done = Trainer.training_step, []

    def interrupted(self, *args, **kwargs):
        done.append(1)
        if len(done) == call:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    patch.setattr(Trainer, "training_step", interrupted)


@pytest.mark.parametrize(
    ("calls", "says"),
    [
        (1, "nothing was saved yet; the same command starts again"),
        (2, "the same command with --resume_from_checkpoint resumes"),
    ],
)
def test_interrupted_training_says_how_it_goes_on(calls, says, place, capsys, monkeypatch):
    interrupt(monkeypatch, calls)
    words = "--batch_size 1 --save_steps 1"
    status, line = status_and_line("finetune", words, capsys)
    assert status == 130 and says in line.splitlines()[-1]
    again = words if calls == 1 else f"{words} --resume_from_checkpoint"
    assert status_and_line("finetune", again, capsys)[0] == 0


def test_training_resumes_on_its_own_model_only(place, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, 2)
        once = "--output_dir new --max_steps 2 --save_steps 1 --batch_size 1"
        assert status_and_line("finetune", once, capsys)[0] == 130
    before = everything(place)
    again = f"{once} --resume_from_checkpoint"
    status, line = status_and_line("finetune", f"{again} --model_name_or_path dense", capsys)
    assert status == 2 and "new: was trained on other weights" in line.splitlines()[-1], line
    assert "--model_name_or_path" in line.splitlines()[-1] or "--model " in line.splitlines()[-1]
    assert everything(place) == before
    assert status_and_line("finetune", again, capsys)[0] == 0


@pytest.fixture(scope="module")
def stopped(made, tmp_path_factory) -> Path:
    """Return the folder of a run that was stopped in the second of its two steps."""
    out = tmp_path_factory.mktemp("stopped") / "stopped"
    flags = FINETUNE | RESUMED | {"--model_name_or_path": str(made / "pruned"), "--output_dir": str(out)}
    flags |= {"--train_file": str(made / "long.txt"), "--validation_file": str(made / "other.txt")}
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, 2)
        assert finetune_lm.main([word for item in flags.items() for word in item]) == 130
    return out


RESUMED = {"--max_steps": "2", "--save_steps": "1", "--batch_size": "1", "--max_train_samples": "4"}


@pytest.fixture
def resumed(stopped, place) -> str:
    """Return the flags that resume a copy of ``stopped`` in the current folder, which holds its training text."""
    shutil.copytree(stopped, place / "stopped")
    about = json.loads((place / "stopped/base_model.json").read_text())
    about["training"]["text"]["name"] = str(place / "long.txt")
    (place / "stopped/base_model.json").write_text(json.dumps(about))
    words = " ".join(word for item in RESUMED.items() for word in item)
    return f"--output_dir stopped {words} --resume_from_checkpoint"


# What is typed beside the flags of the run that is resumed -> what the line must say.
OTHER_TRAINING = [
    ("--learning_rate 1e-3", "--learning_rate 0.001: the run of stopped/checkpoint-1 was started with 0.0001; give"),
    ("--block_size 16", "--block_size 16: the run of stopped/checkpoint-1 was started with 32; give that"),
    ("--batch_size 2", "--batch_size 2: the run of stopped/checkpoint-1 was started with 1; give that"),
    ("--seed 1", "--seed 1: the run of stopped/checkpoint-1 was started with 42"),
    ("--data_seed 1", "--data_seed 1: the run of stopped/checkpoint-1 was started without it; leave it out"),
    ("--lr_scheduler_type cosine", "--lr_scheduler_type cosine: the run of stopped/checkpoint-1 was started with lin"),
    ("--warmup_steps 1", "--warmup_steps 1.0: the run of stopped/checkpoint-1 was started with 5"),
    ("--max_steps 3", "--max_steps 3: the run of stopped/checkpoint-1 was started with 2"),
    ("--max_steps -", "--max_steps -1: the run of stopped/checkpoint-1 was started with 2"),
    ("--dtype bfloat16", "--dtype bfloat16: the run of stopped/checkpoint-1 was started with float32"),
    ("--max_train_samples 3", "--max_train_samples 3: the run of stopped/checkpoint-1 was started with 4; give that"),
    ("--max_train_samples -", "--max_train_samples left out: the run of stopped/checkpoint-1 was started with 4"),
    ("--train_file longer.txt --validation_file long.txt", "/longer.txt: the run of stopped/checkpoint-1 was start"),
    ("--lora_target_modules all-linear", "all-linear: the run of stopped/checkpoint-1 was started with q_proj,v_proj"),
    ("--model_name_or_path dense", "stopped: was trained on other weights than those of --model dense"),
]


@pytest.mark.parametrize(("text", "says"), OTHER_TRAINING, ids=lambda value: str(value)[:40])
def test_resuming_with_another_training_is_refused_before_loading(text, says, resumed, place, capsys, monkeypatch):
    monkeypatch.setattr(load, "load_llm", lambda *_: pytest.fail("the model was loaded"))
    Path("longer.txt").write_text(tiny_sentences(30, seed=7))
    before = everything(place)
    status, line = status_and_line("finetune", f"{resumed} {text}", capsys)
    assert status == 2 and says in line.splitlines()[-1], line
    assert everything(place) == before


CHECKPOINT = [
    ("adapter_config.json", cut_off, "adapter_config.json: cannot be read ("),
    ("adapter_config.json", writes("[]"), "adapter_config.json: holds no JSON object"),
    ("trainer_state.json", cut_off, "trainer_state.json: cannot be read ("),
    ("trainer_state.json", writes("{}"), "its trainer_state.json names no step"),
    ("adapter_model.safetensors", cut_off, "its adapter_model.safetensors cannot be read ("),
    ("optimizer.pt", cut_off, "its optimizer.pt is damaged or cut off"),
    ("scheduler.pt", os.remove, "holds no scheduler.pt (--save_only_model?)"),
    ("rng_state.pth", cut_off, "its rng_state.pth is damaged or cut off"),
    ("../base_model.json", cut_off, "base_model.json: cannot be read ("),
]


@pytest.mark.parametrize(("name", "damage", "says"), CHECKPOINT)
def test_damaged_checkpoint_is_refused_before_loading(name, damage, says, resumed, place, capsys, monkeypatch):
    monkeypatch.setattr(load, "load_llm", lambda *_: pytest.fail("the model was loaded"))
    shutil.copytree("stopped/checkpoint-1", "stopped/checkpoint-2")
    damage(f"stopped/checkpoint-2/{name}")
    before = everything(place)
    status, line = status_and_line("finetune", resumed, capsys)
    assert status == 2 and says in line and len(line.splitlines()) == 1, line
    if ".." not in name:
        assert "resume from the one before: --resume_from_checkpoint stopped/checkpoint-1" in line
    assert everything(place) == before


def test_other_folders_beside_checkpoints_are_none(resumed, capsys):
    shutil.copytree("stopped/checkpoint-1", "stopped/checkpoint-best")
    status, line = status_and_line("finetune", resumed, capsys)
    assert status == 0, line


def test_text_that_changed_since_is_refused(resumed, capsys):
    Path("long.txt").write_text(tiny_sentences(20, seed=7))
    status, line = status_and_line("finetune", resumed, capsys)
    assert status == 2 and "long.txt: the text or the tokenizer has changed since the run of stopped/" in line


def test_what_does_not_change_the_training_may_change(resumed, capsys):
    text = f"{resumed} --save_steps 2 --logging_steps 2 --validation_file long.txt --max_eval_samples 1"
    status, line = status_and_line("finetune", text, capsys)
    assert status == 0, line
    assert json.loads(Path("stopped/train_results.json").read_text())["flags"]["logging_steps"] == 2
    state = json.loads(Path("stopped/checkpoint-2/trainer_state.json").read_text())
    assert (state["logging_steps"], state["save_steps"]) == (2, 2)  # the Trainer's own are those of the first run
    assert [row["step"] for row in state["log_history"] if "loss" in row] == [2]


@pytest.mark.parametrize(("more", "status"), [("", 0), (" --lr_scheduler_type linear", 2), (" --max_steps 1", 2)])
def test_a_longer_run_goes_on_if_its_learning_rates_are_the_same(more, status, place, capsys):
    words = "--output_dir flat --do_eval - --batch_size 1 --save_steps 1 --lr_scheduler_type constant_with_warmup"
    assert status_and_line("finetune", f"{words} --max_steps 2", capsys)[0] == 0
    again = f"{words} --max_steps 3 --resume_from_checkpoint{more}"
    found, line = status_and_line("finetune", again, capsys)
    assert found == status, line
    if status == 0:
        assert status_and_line("finetune", f"{words} --max_steps 3 --output_dir whole", capsys)[0] == 0
        ours, whole = (load_file(f"{out}/adapter_model.safetensors") for out in ("flat", "whole"))
        assert all(torch.equal(ours[name], whole[name]) for name in whole)


def test_checkpoint_of_an_older_version_resumes_with_one_warning(resumed, caplog, capsys):
    path = Path("stopped/base_model.json")
    about = json.loads(path.read_text())
    del about["training"]
    path.write_text(json.dumps(about))
    assert status_and_line("finetune", f"{resumed} --learning_rate 1e-3", capsys)[0] == 0
    assert caplog.text.count("has no record of its start") == 1 and caplog.text.count("cannot be checked") == 1
    assert "training" in json.loads(path.read_text())


@pytest.mark.parametrize("error", [KeyboardInterrupt(), torch.OutOfMemoryError("CUDA out of memory.")], ids=str)
def test_old_adapter_is_kept_until_there_is_something_to_save(error, place, capsys, monkeypatch):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(Trainer, "training_step", fails)
    before = everything(place)
    words = "--output_dir adapter --overwrite_output_dir"
    assert status_and_line("finetune", f"{words} --learning_rate 1", capsys)[0] in (2, 130)
    assert everything(place) == before
    status, line = status_and_line("finetune", f"{words} --learning_rate 1 --resume_from_checkpoint", capsys)
    assert status == 2 and "--learning_rate 1.0: the run of adapter/checkpoint-2 was started with 0.0001" in line


def test_checkpoint_of_another_folder_replaces_a_run_only_if_told(resumed, place, capsys):
    elsewhere = f"{resumed} stopped/checkpoint-1 --output_dir adapter"
    before = everything(place)
    status, line = status_and_line("finetune", elsewhere, capsys)
    assert status == 2 and "--output_dir adapter: is not empty" in line and everything(place) == before
    assert status_and_line("finetune", f"{elsewhere} --overwrite_output_dir", capsys)[0] == 0
    assert {path.name for path in Path("adapter").glob("checkpoint-*")} == {"checkpoint-2"}
    assert Path("stopped/checkpoint-1").is_dir()


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


@pytest.mark.parametrize(
    ("error", "status"), [(torch.OutOfMemoryError("CUDA out of memory."), 2), (KeyboardInterrupt(), 130)], ids=str
)
@pytest.mark.parametrize("call", [1, 2, 4])
def test_merged_model_outlives_a_failed_evaluation(call, error, status, place, caplog, capsys, monkeypatch):
    assert status_and_line("merge", "--save whole", capsys)[0] == 0
    calls, perplexity = [], evaluation.perplexity

    def fails(*args):
        calls.append(1)
        if len(calls) == call:
            raise error
        return perplexity(*args)

    monkeypatch.setattr(evaluation, "perplexity", fails)
    found, line = status_and_line("merge", "", capsys)
    assert found == status
    said = line + caplog.text
    assert "the merged model is saved in out" in said
    assert "python lora_ft/evaluate_ppl.py --model out --dataset other.txt --ctx_length 32" in said
    assert Path("out/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()
    about, whole = (json.loads(Path(out, "merge.json").read_text()) for out in ("out", "whole"))
    assert whole["complete"] is True and about["complete"] is False
    had = [row["perplexity"] is not None for row in about["rows"]]
    assert sum(had) == call - 1
    by_state = {row["state"]: row for row in whole["rows"]}
    for row in about["rows"]:
        expected = by_state[row["state"]]
        assert row == (expected if row["perplexity"] is not None else expected | {"perplexity": None})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_merged_model_keeps_the_dtype_and_the_zeros(dtype, place, capsys):
    AutoModelForCausalLM.from_pretrained("pruned", dtype=getattr(torch, dtype)).save_pretrained("pruned")
    before = load_file("pruned/model.safetensors")
    assert status_and_line("merge", "", capsys)[0] == 0
    after = load_file("out/model.safetensors")
    assert before.keys() == after.keys() and {w.dtype for w in after.values()} == {getattr(torch, dtype)}
    changed = [name for name in after if not torch.equal(after[name], before[name])]
    assert changed and all("q_proj" in name or "v_proj" in name for name in changed)
    assert all((after[name][before[name] == 0] == 0).all() for name in after)
    # What was measured is what was saved: the same folder gives the same perplexity.
    merged = json.loads(Path("out/merge.json").read_text())["rows"][-1]
    assert status_and_line("evaluate", "--model out --lora_weights - --result_dir res", capsys)[0] == 0
    found = json.loads(Path("res/perplexity.json").read_text())
    assert (found["perplexity"], found["sparsity"]) == (merged["perplexity"], merged["sparsity"])
    assert status_and_line("merge", "--dtype float32 --save plain", capsys)[0] == 0
    assert {w.dtype for w in load_file("plain/model.safetensors").values()} == {torch.float32}


def test_base_weights_are_never_written_to(place, capsys):
    before = Path("pruned/model.safetensors").read_bytes()
    assert status_and_line("merge", "", capsys)[0] == 0
    assert Path("pruned/model.safetensors").read_bytes() == before
    assert torch.equal(*(AutoModelForCausalLM.from_pretrained(m).lm_head.weight for m in ("pruned", "out")))
