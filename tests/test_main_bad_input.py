"""Bad input: one line that says what was given and what to type, exit status 2, and nothing written."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT

import main
from lib.cli.command import parse
from lib.cli.settings import Experiment
from lib.core import files
from lib.core.errors import UserError
from lib.models import load, locate
from lib.models.layers import prunable_layers


@pytest.fixture
def place(tmp_path, monkeypatch, tiny_folder, tiny_text) -> Path:
    """Return the working folder of a run, with a model, texts and a few wrong things in it."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_folder, "tiny-llama")
    shutil.copy(tiny_text, "long.txt")
    Path("short.txt").write_text("Only a few words.")
    Path("empty.txt").write_text("")
    Path("words.json").write_text('[{"words": "a"}]')
    Path("file").write_text("a file")
    Path("nothing").mkdir()
    for folder in ("old/wanda_0.5/deployment", "strange/wanda_0.5", "linked"):
        Path(folder).mkdir(parents=True)
    Path("old/wanda_0.5/pruning.jsonl").write_text("{}")
    Path("old/wanda_0.5/deployment/decode.onnx").write_text("an export of the weights")
    Path("strange/wanda_0.5/notes.txt").write_text("nobody's")
    Path("linked/wanda_0.5").symlink_to("../old/wanda_0.5")
    Path("plain").mkdir()
    Path("plain/wanda_0.5").write_text("a file")
    Path("other").mkdir()
    Path("other/notes.md").write_text("no model")
    Path("noweights").mkdir()
    shutil.copy(tiny_folder / "config.json", "noweights")
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text("{}")
    Path("broken").mkdir()
    Path("broken/config.json").write_text("{")
    Path("broken/model.safetensors").write_text("")
    Path("bad.gguf").write_text("no GGUF")
    for name, values in {"foreign": 3.0, "longer": 2.0, "bare": 1.0}.items():
        Path(name).mkdir()
        np.save(f"{name}/alpha_peak.npy", np.full(28 if name != "foreign" else 21, values))
    for name in ("archive", "square"):
        Path(name).mkdir()
    np.savez("archive/archive.npz", np.ones(21))
    Path("archive/archive.npz").rename("archive/alpha_peak.npy")
    np.save("square/alpha_peak.npy", np.ones((21, 1)))
    shutil.copytree(tiny_folder, "mismatched")  # half the embeddings that the tokenizer has tokens
    config = json.loads(Path("mismatched/config.json").read_text())
    Path("mismatched/config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    layers = prunable_layers(load.load_skeleton(locate.locate("tiny-llama", "unused")))
    Path("foreign/alpha_peak.json").write_text(json.dumps({"model": "other-model", "fingerprints": {}}))
    Path("earlier").mkdir()
    shutil.copytree("tiny-llama", "earlier/wanda_0.5")
    shutil.copy(tiny_text, "earlier/wanda_0.5/text.txt")
    Path("earlier/wanda_0.5/pruning.jsonl").write_text("{}")
    Path("plans").mkdir()
    rows = {layer.name: {"ratio": 0.5, "shape": list(layer.shape)} for layer in layers}
    good = {"model": "tiny-llama", "target": 0.5, "layers": rows}
    name = "model.layers.1.mlp.down_proj"
    for kind, change in {
        "good": {},
        "other": {"model": "other-model"},
        "short": {"layers": {key: row for key, row in rows.items() if key != name}},
        "extra": {"layers": rows | {"model.layers.9.mlp.down_proj": rows[name]}},
        "shape": {"layers": rows | {name: {"ratio": 0.5, "shape": [1, 2]}}},
        "wide": {"layers": rows | {name: rows[name] | {"ratio": 1.5}}},
        "budget": {"target": 0.6},
        "groups": {"layers": {key: row | {"nm": [4, 7], "ratio": 3 / 7} for key, row in rows.items()}, "target": 3 / 7},
    }.items():
        Path(f"plans/{kind}.json").write_text(json.dumps(good | change))
    return tmp_path


def everything(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def status_of(argv: list[str]) -> int:
    try:
        return main.main(argv)
    except SystemExit as error:
        return error.code


def arguments(text: str) -> list[str]:
    """Return a good command line of the tiny model with the flags in ``text`` over it; ``--flag -`` takes one out."""
    flags = {
        "--model": "tiny-llama",
        "--calib_data": "long.txt",
        "--eval_data": "long.txt",
        "--seqlen": "32",
        "--nsamples": "3",
        "--save": "save",
    }
    words, extra = text.split(), []
    while words:
        word = words.pop(0)
        values = []
        while words and not words[0].startswith("--"):
            values.append(words.pop(0))
        if values == ["-"]:
            flags.pop(word, None)
        elif word in flags and values:
            flags[word] = values[0]
        else:
            extra += [word, *values]
    return [part for item in flags.items() for part in item] + extra


TASKS = ROOT / "data" / "tasks"
WANDA = "--prune_method wanda --sparsity_ratio 0.5"
WW = "--prune_method magnitude_ww --sparsity_ratio 0.5"

# What is typed -> what the line must say, known from the command line alone ...
BY_THE_COMMAND_LINE = {
    # names
    "--prune_method wnda --sparsity_ratio 0.5": "Did you mean 'wanda'",
    "--prune_method Wanda --sparsity_ratio 0.5": "Did you mean 'wanda'",
    "--prune_method wanda_w --sparsity_ratio 0.5": "Did you mean 'wanda_ww'",
    "--prune_method xyzzy --sparsity_ratio 0.5": "magnitude, wanda, sparsegpt",
    f"{WW} --ww_metric alpha_peek": "Did you mean 'alpha_peak'",
    f"{WW} --ww_metric alphamid": "Did you mean 'alpha_mid'",
    f"{WW} --mapping_type blockwise": "Did you mean 'block_wise'",
    f"{WANDA} --dtype float61": "Did you mean 'float16'",
    f"{WANDA} --calib_data wikitext": "Did you mean 'wikitext2'",
    f"{WANDA} --calib_dtype float16": "--calib_dtype float16: invalid choice. Did you mean 'bfloat16'?",
    "--prune_method magnitude --sparsity_ratio 0.5 --calib_dtype bfloat16": "does nothing with magnitude",
    "--prune_method magnitude_owl --sparsity_ratio 0.5 --calib_dtype bfloat16": "does nothing with magnitude",
    "--calib_dtype bfloat16": "--calib_dtype does nothing without --prune_method",
    f"{WANDA} --eval_data wiki_lead": "Did you mean 'wiki_leads'",
    f"{WANDA} --sparsity_type unstructerd": "Did you mean 'unstructured'",
    # numbers
    "--prune_method wanda --sparsity_ratio 1": "--sparsity_ratio 1",
    "--prune_method wanda --sparsity_ratio 1.5": "--sparsity_ratio 1.5",
    "--prune_method wanda --sparsity_ratio=-0.1": "--sparsity_ratio -0.1",
    "--prune_method wanda --sparsity_ratio nan": "--sparsity_ratio nan",
    "--prune_method wanda --sparsity_ratio half": "half",
    f"{WW} --epsilon=-0.1": "--epsilon -0.1",
    f"{WW} --epsilon 1.1": "--epsilon 1.1",
    f"{WW} --epsilon nan": "--epsilon nan",
    f"{WANDA} --nsamples 0": "--nsamples 0",
    f"{WANDA} --nsamples=-3": "--nsamples -3",
    f"{WANDA} --nsamples 1.5": "1.5",
    f"{WANDA} --seqlen 0": "--seqlen 0",
    f"{WANDA} --seqlen=-1": "--seqlen -1",
    f"{WANDA} --eval_windows 0": "--eval_windows 0",
    f"{WANDA} --seed zero": "zero",
    f"{WANDA} --eval_wikitext maybe": "maybe",
    "--prune_method sparsegpt --sparsity_ratio 0.5 --damping 1e300": "must be above 0 and at most 1000",
    "--prune_method alps --sparsity_ratio 0.5 --damping 1e300": "--damping 1e+300: must be",
    # contradictions
    "--prune_method magnitude --sparsity_ratio 0.5 --use_variant": "--use_variant",
    "--prune_method sparsegpt_ww --sparsity_ratio 0.5 --use_variant": "--use_variant",
    "--use_variant": "--use_variant",
    "--prune_method wanda --sparsity_type 2:4 --use_variant": "--use_variant",
    "--prune_method wanda --sparsity_type 2:4 --sparsity_ratio 0.6": "0.5",
    "--prune_method wanda --sparsity_type 1:4 --sparsity_ratio 0.5": "0.75",
    "--prune_method wanda --sparsity_type 4:2": "4:2",
    "--prune_method wanda --sparsity_type 4:4": "4:4",
    "--prune_method wanda --sparsity_type 0:4": "0:4",
    "--prune_method wanda --sparsity_type 2:4:8": "2:4:8",
    "--prune_method wanda --sparsity_type a:b": "a:b",
    "--prune_method wanda": "--sparsity_ratio",
    "--sparsity_ratio 0.5": "--prune_method",
    "--sparsity_type 2:4": "--prune_method",
    "--save_model kept": "--prune_method",
    # flags
    f"{WANDA} --sparsity 0.5": "--sparsity",  # no abbreviations
    f"{WANDA} --nsample 4": "--nsamples",
    f"{WANDA} --epsilom 0.1": "Did you mean '--epsilon'",
    f"{WANDA} more": "more",
    f"{WANDA} --model -": "--model",
    "--prune_method": "--prune_method",
    # allocations
    "--prune_method wanda_owll --sparsity_ratio 0.5": "Did you mean 'wanda_owl'",
    f"{WW} --esd_driver quick": "exact, fast",
    f"{WW} --epsilon automatic": "auto",
    f"{WANDA} --epsilon auto": "_ww",
    f"{WW} --owl_lambda 0.1": "_owl",
    f"{WANDA} --owl_m 4": "_owl",
    f"{WW} --dlp_alpha 0.1": "_dlp",
    "--prune_method wanda_owl --sparsity_ratio 0.5 --atp_beta 0.1": "_atp",
    "--prune_method wanda_owl --sparsity_ratio 0.5 --epsilon 0.1": "_ww",
    "--prune_method wanda_er --sparsity_ratio 0.5 --ww_metric alpha": "_ww",
    "--prune_method wanda_owl --sparsity_ratio 0.5 --owl_lambda 1.5": "--owl_lambda 1.5",
    "--prune_method wanda_owl --sparsity_ratio 0.5 --owl_m 0": "--owl_m 0",
    "--prune_method wanda_dlp --sparsity_ratio 0.5 --dlp_alpha=-0.1": "--dlp_alpha -0.1",
    "--prune_method wanda_atp --sparsity_ratio 0.5 --atp_beta nan": "--atp_beta nan",
    f"{WW} --farms_rows 16": "--farms",
    f"{WW} --farms --farms_rows 1": "--farms_rows 1",
    f"{WW} --farms --farms_ratio 0": "--farms_ratio 0",
    f"{WW} --farms --farms_steps 0": "--farms_steps 0",
    f"{WW} --farms --ww_metric mp_softrank": "weightwatcher",
    f"{WW} --esd_driver fast --ww_metric random_distance": "weightwatcher",
    "--prune_method wanda_owl --sparsity_ratio 0.5 --farms": "_ww",
    f"{WW} --metrics_only": "--metrics_only",
    "--metrics_only --save_plan plan.json": "--metrics_only",
    "--metrics_only --hidden_states cpu": "--hidden_states does nothing with --metrics_only, which prunes and",
    "--metrics_only --eval_wikitext true": "--eval_wikitext does nothing with --metrics_only",
    "--hidden_states cpu": "--hidden_states does nothing without --prune_method",
    "--prune_method magnitude --sparsity_ratio 0.5 --hidden_states cpu": "--hidden_states does nothing with magnitude",
    "--prune_method magnitude --sparsity_ratio 0.5 --statistics pruned": "--statistics does nothing with magnitude",
    "--save_plan plan.json": "--prune_method",
    "--plan plan.json": "--prune_method",
    "--prune_method wanda --plan missing.json": "missing.json",
    "--prune_method wanda --plan words.json": "words.json",
    "--prune_method wanda --plan plans/shape.json": "shape",
    "--prune_method wanda_ww --plan plans/good.json": "use wanda",
    "--prune_method wanda --plan plans/good.json --sparsity_type 2:4": "--sparsity_type",
    "--prune_method wanda --plan plans/good.json --epsilon 0.1": "--epsilon",
    "--prune_method magnitude --sparsity_ratio 0.5 --export_llmcompressor r.yaml": "wanda and sparsegpt",
    "--prune_method wanda_ww --sparsity_type 1:4": "use 2:8",
    "--prune_method wanda_ww --sparsity_type 4:8 --export_llmcompressor r.yaml": "one N:M for all layers",
    f"{WANDA} --farms": "_ww",
    f"{WANDA} --esd_driver fast": "_ww",
    "--farms": "_ww",
    # zero-shot tasks: their data are fetched before the model is loaded, and no test reaches the hub
    f"{WANDA} --eval_zero_shot --tasks ,": "--tasks ','",
    f"{WANDA} --eval_zero_shot --num_fewshot=-1": "--num_fewshot -1",
    f"{WANDA} --eval_zero_shot --limit 0": "--limit 0",
    f"{WANDA} --eval_zero_shot --eval_batch_size 0": "--eval_batch_size 0",
    f"{WANDA} --eval_zero_shot --eval_batch_size all": "--eval_batch_size all",
    f"{WANDA} --tasks boolq": "--eval_zero_shot",
    f"{WANDA} --limit 10": "--eval_zero_shot",
    # texts
    f"{WANDA} --calib_data nothing": "nothing",
    f"{WANDA} --eval_data tiny-llama/model.safetensors": ".txt",
}

# ... and from files and folders, before the weights are loaded.
BEFORE_LOADING = {
    # names
    f"{WANDA} --dtype float16 --calib_dtype bfloat16": "--calib_dtype bfloat16: the model is computed in float16",
    # contradictions
    "--prune_method wanda --sparsity_type 2:5": "2:5",  # 32 columns
    # allocations
    f"{WW} --epsilon auto": "one file",
    f"{WW} --farms --farms_rows 30 --farms_ratio 1.5": "do not fit",
    f"{WANDA} --hidden_states gpu": "--hidden_states gpu: there is no GPU",
    "--prune_method wanda --plan plans/other.json": "other-model",
    "--prune_method wanda --plan plans/short.json": "model.layers.1.mlp.down_proj has shape None there",
    "--prune_method wanda --plan plans/extra.json": "model.layers.9.mlp.down_proj",
    "--prune_method wanda --plan plans/wide.json": "outside [0, 1]",
    "--prune_method wanda --plan plans/budget.json": "add up to",
    "--prune_method wanda --plan plans/good.json --sparsity_ratio 0.6": "0.5",
    f"{WANDA} --save_plan file/plan.json": "file",
    f"{WANDA} --save_plan nothing": "is a folder",
    "--prune_method wanda --plan plans/groups.json": "4:7 does not fit",
    f"{WANDA} --model mismatched": "do not belong together",
    f"{WW} --ww_metric_cache archive": "is damaged",
    f"{WW} --ww_metric_cache square": "values of shape [21, 1]",
    # zero-shot tasks: their data are fetched before the model is loaded, and no test reaches the hub
    f"{WANDA} --eval_zero_shot": "--tasks boolq: cannot be loaded",
    f"{WANDA} --eval_zero_shot --tasks winogrand": "Did you mean 'winogrande'",
    f"{WANDA} --eval_zero_shot --tasks winogrande,capital_cities": "--include_path DIR",
    f"{WANDA} --eval_zero_shot --include_path missing": "--include_path missing",
    f"{WANDA} --eval_zero_shot --include_path nothing": "no lm-eval task files",
    f"{WANDA} --eval_zero_shot --tasks capital_cities --include_path {TASKS} --num_fewshot 1000": "114 to draw from",
    # places
    f"{WANDA} --save file": "--save file",
    f"{WANDA} --save file/below": "--save file/below",
    f"{WANDA} --save /proc/nowhere": "--save /proc/nowhere",
    f"{WANDA} --save_model file": "--save_model file",
    f"{WW} --ww_metric_cache file": "file",
    # what would be replaced
    f"{WANDA} --save_model plain": "plain/wanda_0.5: is not a folder, and would be replaced",
    f"{WANDA} --save_model linked": "linked/wanda_0.5: is a link, and would be replaced",
    f"{WANDA} --save_model strange": "no earlier run wrote it (it holds no pruning.jsonl)",
    f"{WANDA} --save_model old": "and with it the folder deployment, which no pruning wrote; move it away",
    f"{WANDA} --model earlier/wanda_0.5 --save_model earlier": "earlier/wanda_0.5 is --model itself, and",
    f"{WANDA} --model earlier/wanda_0.5/ --save_model ./other/../earlier": "wanda_0.5 is --model itself",
    f"{WANDA} --calib_data earlier/wanda_0.5/text.txt --save_model earlier": "lies in earlier/wanda_0.5",
    f"{WANDA} --save earlier/wanda_0.5/figures --save_model earlier": "--save earlier/wanda_0.5/figures lies in",
    f"{WANDA} --save_plan /dev/null": "/dev/null: is not an ordinary file",
    "--prune_method wanda --plan plans/good.json --export_llmcompressor plans/good.json": "plans/good.json: is --plan",
    f"{WANDA} --save_plan same --export_llmcompressor ./same": "same: is --export_llmcompressor, too",
    f"{WANDA} --save_plan long.txt": "long.txt: is --calib_data, too",
    f"{WANDA} --calib_data words.json --export_llmcompressor long.txt": "long.txt: is --eval_data, too",
    f"{WANDA} --save_plan tiny-llama/config.json": "lies in the folder of --model",
    f"{WANDA} --save_plan save/run_wanda_sparsity_0.5.json": "is where the run's figures are written",
    # models
    f"{WANDA} --model ./missing": "--model ./missing",
    f"{WANDA} --model missing/": "--model missing/",
    f"{WANDA} --model /no/such/folder": "--model /no/such/folder",
    f"{WANDA} --model smollm": "Did you mean 'smollm2-135m'",
    f"{WANDA} --model missing.gguf": "--model missing.gguf",
    f"{WANDA} --model nothing": "empty",
    f"{WANDA} --model other": "config.json",
    f"{WANDA} --model noweights": "no weights",
    f"{WANDA} --model adapter": "adapter",
    f"{WANDA} --model broken": "--model broken",
    f"{WANDA} --model long.txt": "--model long.txt",
    f"{WANDA} --model bad.gguf": "bad.gguf",
    # texts
    f"{WANDA} --calib_data missing.txt": "missing.txt",
    f"{WANDA} --calib_data empty.txt": "empty",
    f"{WANDA} --eval_data empty.txt": "empty",
    f"{WANDA} --calib_data short.txt": "tokens",
    f"{WANDA} --eval_data short.txt": "tokens",
    f"{WANDA} --eval_windows 100000": "tokens",
    f"{WANDA} --calib_data words.json": "`text`",
    # caches
    f"{WW} --ww_metric_cache foreign": "other-model",
    f"{WW} --ww_metric_cache longer": "28",
    f"{WW} --ww_metric_cache bare": "28",
}


def check_one_line(capsys, status: int, say: str) -> str:
    out, err = capsys.readouterr()
    assert status == 2
    assert "Traceback" not in out + err
    lines = [line for line in err.splitlines() if not line.startswith(("INFO: ", "WARNING: "))]
    assert len(lines) == 1 and lines[0].startswith("main.py: error: "), err
    assert say in lines[0]
    return lines[0]


@pytest.mark.parametrize(("typed", "say"), BY_THE_COMMAND_LINE.items(), ids=str)
def test_refused_by_the_command_line(typed, say):
    with pytest.raises(UserError) as error:
        parse(Experiment, arguments(f"--calib_data wiki_leads --eval_data wikitext2 {typed}"), main.PARSER)
    line = error.value.spelled(Experiment.spelling)
    assert say in line and "\n" not in line


@pytest.mark.parametrize(("typed", "say"), BEFORE_LOADING.items(), ids=str)
def test_refused_before_the_model_is_loaded(typed, say, place, capsys, monkeypatch, request):
    if "--eval_zero_shot" in typed:
        request.getfixturevalue("few_tasks")
    monkeypatch.setattr(load, "load_llm", lambda *_, **__: pytest.fail("the model was loaded"))
    before = everything(place)
    check_one_line(capsys, status_of(arguments(typed)), say)
    assert everything(place) == before


@pytest.mark.parametrize("cache", ["/proc/nowhere", "file", "taken"])
def test_a_cache_that_cannot_be_written_is_known_before_the_conversion(cache, place, capsys, monkeypatch):
    Path("taken").mkdir()
    Path("taken/smollm2-135m").write_text("a file")
    monkeypatch.setattr(locate, "_smollm2_gguf", lambda: Path("bad.gguf"))
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda **_: pytest.fail("it is converted"))
    before = everything(place)
    line = check_one_line(capsys, status_of(arguments(f"--model smollm2-135m --cache_dir {cache}")), "--cache_dir")
    assert cache in line and everything(place) == before


def test_the_good_command_line_is_good(place):
    # Otherwise the refusals above might have another reason.
    for typed in (WANDA, WW, ""):
        assert status_of(arguments(typed)) == 0
    assert Path("save").is_dir() and Path("data/tiny-llama/alpha_peak.npy").is_file()


@pytest.mark.parametrize(
    ("typed", "warned"),
    [
        (WANDA, True),
        (f"{WANDA} --calib_data other.txt", False),
        (f"{WANDA} --eval_wikitext false", False),
        ("--prune_method magnitude --sparsity_ratio 0.5", False),  # which reads no calibration text
    ],
)
def test_a_text_both_calibrated_and_evaluated_on_is_a_warning(typed, warned, place, caplog):
    shutil.copy("long.txt", "other.txt")
    assert status_of(arguments(typed)) == 0
    assert caplog.text.count("long.txt is both calibrated and evaluated on; give another text") == warned


@pytest.mark.parametrize(
    ("typed", "unused"),
    [
        (WANDA, None),
        (f"{WANDA} --eval_wikitext false --eval_windows 2", "--eval_data, --eval_windows"),
        ("--prune_method magnitude --sparsity_ratio 0.5", "--calib_data, --nsamples"),
        ("--prune_method magnitude_owl --sparsity_ratio 0.5 --hidden_states cpu", None),
        ("--metrics_only --eval_windows 2", "--calib_data, --nsamples, --seqlen, --eval_data, --eval_windows"),
        ("", "--calib_data, --nsamples"),
    ],
)
def test_flags_of_texts_that_nothing_reads_are_a_warning(typed, unused, place, caplog):
    assert status_of(arguments(typed)) == 0
    lines = [text for text in caplog.messages if "no effect in this run" in text]
    assert lines == ([f"no effect in this run, which reads no such text: {unused}"] if unused else [])


def test_hub_that_cannot_be_reached(place, capsys, monkeypatch):
    def unreachable(*_, **__):
        raise OSError("We couldn't connect to 'https://huggingface.co' to load the files, and couldn't find them\nmore")

    monkeypatch.setattr(load, "check_hub", lambda: None)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", unreachable)
    before = everything(place)
    line = check_one_line(capsys, status_of(arguments(f"{WANDA} --model meta-llama/Llama-2-7b-hf")), "--model DIR")
    assert "meta-llama/Llama-2-7b-hf" in line and everything(place) == before


def test_hub_text_that_cannot_be_reached(place, capsys, monkeypatch):
    import datasets

    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr("lib.calibration.texts.check_hub", lambda: None)
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    monkeypatch.setattr(load, "load_llm", lambda *_, **__: pytest.fail("the model was loaded"))
    before = everything(place)
    for typed in (f"{WANDA} --calib_data c4", f"{WANDA} --eval_data wikitext2"):
        line = check_one_line(capsys, status_of(arguments(typed)), "give wiki_leads")
        assert ".txt" in line and "--calib_data" not in line  # which a dense run does not use
    assert everything(place) == before


def test_model_that_is_not_supported(place, capsys, monkeypatch):
    transformers.GPT2Config(
        vocab_size=300, n_embd=32, n_layer=2, n_head=4, architectures=["GPT2LMHeadModel"]
    ).save_pretrained("gpt2")
    Path("gpt2/model.safetensors").write_bytes(b"")
    monkeypatch.setattr(load, "load_llm", lambda *_, **__: pytest.fail("the model was loaded"))
    check_one_line(capsys, status_of(arguments(f"{WANDA} --model gpt2")), "GPT2LMHeadModel")
    assert not Path("save").exists()


# --------------------------------------------------------------------------------------------------- the disk is full


def full(*_, **__):
    raise OSError(28, "No space left on device")


def test_disk_that_is_too_full_is_known_before_loading(place, capsys, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    monkeypatch.setattr(load, "load_llm", lambda *_, **__: pytest.fail("the model was loaded"))
    before = everything(place)
    check_one_line(capsys, status_of(arguments(f"{WANDA} --save_model kept")), "full")
    assert everything(place) == before


@pytest.mark.parametrize("block", ["block-00001", "edges-00000"])
@pytest.mark.parametrize("stream_it", ["never", "always"])
def test_disk_full_while_the_model_is_saved(block, stream_it, place, capsys, monkeypatch):
    write = os.fsync

    def until_full(descriptor: int) -> None:
        if block in os.readlink(f"/proc/self/fd/{descriptor}"):
            full()
        write(descriptor)

    monkeypatch.setattr(os, "fsync", until_full)
    flags = f"{WANDA} --save_model kept --stream {stream_it}"
    check_one_line(capsys, status_of(arguments(flags)), "No space left")
    assert not Path("kept/wanda_0.5").exists() and not list(Path("kept").rglob("*.tmp"))
    figures = {path.name.partition("_")[0] for path in Path("save").glob("*")}
    lost = stream_it == "always" and "edges" not in block  # a streamed block has no other place: the run ends there
    assert figures == (set() if lost else {"layers", "perplexity", "run"})
    # and the same command resumes once there is room
    monkeypatch.setattr(os, "fsync", write)
    assert status_of(arguments(flags)) == 0
    assert Path("kept/wanda_0.5/config.json").is_file()


@pytest.mark.parametrize("save", ["config", "tokenizer"])
def test_disk_full_while_the_small_files_are_saved(save, place, capsys, monkeypatch):
    def full_for_rust(*_, **__):
        raise Exception("No space left on device (os error 28)")  # as the library of tokenizers says it

    owner = {"config": transformers.PreTrainedConfig, "tokenizer": transformers.PreTrainedTokenizerBase}[save]
    with monkeypatch.context() as patched:
        patched.setattr(owner, "save_pretrained", full if save == "config" else full_for_rust)
        line = check_one_line(capsys, status_of(arguments(f"{WANDA} --save_model kept")), "No space left")
    assert ".partial: cannot be written" in line
    assert json.loads(Path("save/run_wanda_sparsity_0.5.json").read_text())["perplexity"] > 1, "it is measured"
    assert status_of(arguments(f"{WANDA} --save_model kept")) == 0 and Path("kept/wanda_0.5/config.json").is_file()


@pytest.mark.parametrize("file", ["perplexity_", "layers_", "run_"])
def test_disk_full_while_the_figures_are_written(file, place, capsys, monkeypatch):
    write = os.fsync

    def until_full(descriptor: int) -> None:
        if file in os.readlink(f"/proc/self/fd/{descriptor}"):
            full()
        write(descriptor)

    monkeypatch.setattr(os, "fsync", until_full)
    check_one_line(capsys, status_of(arguments(WANDA)), "No space left")
    # What was known before the evaluation is there or not, but no file is cut off.
    before = {"perplexity_": {"layers", "run"}, "layers_": set(), "run_": {"layers"}}[file]
    assert {name.partition("_")[0] for name in os.listdir("save")} == before


def test_out_of_memory_is_one_line(place, capsys, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore.")

    monkeypatch.setattr("lib.pruning.walk.walk", fail)
    check_one_line(capsys, status_of(arguments(WANDA)), "lower --nsamples")


def test_a_checkpoint_without_medians_is_refused_by_dlp(place, capsys):
    assert status_of(arguments("--prune_method magnitude --sparsity_ratio 0.7 --save_model kept")) == 0
    capsys.readouterr()
    again = "--prune_method wanda_dlp --sparsity_ratio 0.8 --model kept/magnitude_0.7"
    check_one_line(capsys, status_of(arguments(again)), "pruned by half already")


@pytest.mark.parametrize("method", ["wanda_dlp", "wanda_owl", "magnitude_lamp", "magnitude_global", "magnitude_ww"])
def test_a_weight_that_is_not_finite_is_named(method, place, capsys):
    damaged("model.layers.1.mlp.up_proj", lambda weight: weight[0].fill_(float("nan")))
    line = check_one_line(capsys, status_of(arguments(f"--prune_method {method} --sparsity_ratio 0.5")), "up_proj")
    assert "model.layers.1.mlp.up_proj" in line


def test_disk_full_while_the_metric_is_written(place, capsys, monkeypatch):
    monkeypatch.setattr(np, "save", full)
    check_one_line(capsys, status_of(arguments(WW)), "No space left")
    assert not list(Path("data/tiny-llama").glob("alpha_peak.npy")) and not Path("save").exists()


# ---------------------------------------------------------------------------------------------------- while running


def damaged(name, change):
    """Write the tiny model anew with one weight changed."""
    model = transformers.AutoModelForCausalLM.from_pretrained("tiny-llama")
    change(model.get_submodule(name).weight.data)
    model.save_pretrained("tiny-llama")


@pytest.mark.parametrize(
    "typed",
    ["--prune_method magnitude --sparsity_ratio 0.5", WANDA, WW, "--prune_method sparsegpt --sparsity_ratio 0.5"],
)
def test_weights_that_are_not_finite_name_the_layer(typed, place, capsys):
    damaged("model.layers.2.mlp.down_proj", lambda w: w[0].fill_(float("nan")))
    check_one_line(capsys, status_of(arguments(typed)), "model.layers.2.mlp.down_proj")
    assert not Path("save").exists()


def test_zero_matrix_names_the_layer(place, capsys):
    damaged("model.layers.1.self_attn.v_proj", lambda w: w.zero_())
    check_one_line(capsys, status_of(arguments(WW)), "model.layers.1.self_attn.v_proj")
    assert not Path("save").exists() and not list(Path("data").rglob("*.npy"))  # the other values are kept: resumable


@pytest.mark.slow
def test_program_itself_ends_with_one_line_and_status_two(place):
    # Once as it is run: a process of its own, whatever Python and the libraries write on stderr included.
    command = [sys.executable, str(ROOT / "main.py"), *arguments(f"{WANDA} --eval_data short.txt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2 and done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if not line.startswith(("INFO: ", "WARNING: "))]
    assert len(lines) == 1 and lines[0].startswith("main.py: error: --eval_data short.txt: too short"), done.stderr
    assert not Path("save").exists()
