"""Bad input: one line that says what was given and what to type, exit status 2, and nothing written."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import transformers
from conftest import ROOT, everything, fast

import main
from lib.cli.command import parse
from lib.cli.settings import Experiment
from lib.core import files
from lib.core.errors import UserError
from lib.models import load, locate
from lib.models.layers import prunable_layers
from lib.run.journal import MANIFEST


def write_inputs(tiny_folder: Path, tiny_text: Path) -> None:
    """Write a model, texts and a few wrong things to the working folder."""
    for folder in ("tiny-llama", "earlier/wanda_0.5", "mismatched"):
        shutil.copytree(tiny_folder, folder)
    for path in ("long.txt", "earlier/wanda_0.5/text.txt"):
        shutil.copy(tiny_text, path)
    for path, content in {
        "short.txt": "Only a few words.",
        "empty.txt": "",
        "words.json": '[{"words": "a"}]',
        "file": "a file",
        "bad.gguf": "no GGUF",
        f"earlier/wanda_0.5/{MANIFEST}": "",
        f"old/wanda_0.5/{MANIFEST}": "",
        "old/wanda_0.5/deployment/decode.onnx": "an export of the weights",
        "strange/wanda_0.5/notes.txt": "nobody's",
        "plain/wanda_0.5": "a file",
        "other/notes.md": "no model",
        "noweights/config.json": (tiny_folder / "config.json").read_text(),
        "adapter/adapter_config.json": "{}",
        "broken/config.json": "{",
        "broken/model.safetensors": "",
        "gpt2/config.json": '{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}',
        "gpt2/model.safetensors": "",
        "nothing/in/it": "",
    }.items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(content)
    shutil.rmtree("nothing/in")
    Path("linked").mkdir()
    Path("linked/wanda_0.5").symlink_to("../old/wanda_0.5")
    for name, count in {"foreign": 21, "longer": 28}.items():
        Path(name).mkdir()
        np.save(f"{name}/alpha_peak.npy", np.full(count, 2.0))
    measured = {"model": "other-model", "metric": "alpha_peak", "settings": {}, "layers": [], "fingerprints": {}}
    Path("foreign/alpha_peak.json").write_text(json.dumps(measured))
    config = json.loads(Path("mismatched/config.json").read_text())  # half the embeddings that there are tokens
    Path("mismatched/config.json").write_text(json.dumps(config | {"vocab_size": 100}))

    Path("plans").mkdir()
    layers = prunable_layers(load.load_skeleton(locate.locate("tiny-llama", "unused")))
    rows = {layer.name: {"ratio": 0.5, "shape": list(layer.shape)} for layer in layers}
    good = {"model": "tiny-llama", "target": 0.5, "layers": rows}
    name = "model.layers.1.mlp.down_proj"
    for kind, change in {
        "good": {},
        "other": {"model": "other-model"},
        "short": {"layers": {key: row for key, row in rows.items() if key != name}},
        "extra": {"layers": rows | {"model.layers.9.mlp.down_proj": rows[name]}},
        "wide": {"layers": rows | {name: rows[name] | {"ratio": 1.5}}},
        "budget": {"target": 0.6},
        "groups": {"layers": {key: row | {"nm": [4, 7], "ratio": 3 / 7} for key, row in rows.items()}, "target": 3 / 7},
    }.items():
        Path(f"plans/{kind}.json").write_text(json.dumps(good | change))


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_folder, tiny_text) -> Path:
    """Return a folder with what runs read, in which nothing may be written."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        write_inputs(tiny_folder, tiny_text)
    return folder


@pytest.fixture
def place(made, tmp_path, monkeypatch) -> Path:
    """Return the working folder of a run, a copy of what was ``made``."""
    shutil.copytree(made, tmp_path, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def arguments(typed: str) -> list[str]:
    """Return a good command line of the tiny model with the flags ``typed`` after it, of which the last one counts."""
    good = "--model tiny-llama --calib_data long.txt --eval_data long.txt --seqlen 32 --nsamples 3 --eval_windows 8"
    good += " --save save"
    return [*good.split(), *typed.split()]


HALF = "--sparsity_ratio 0.5"
MAGNITUDE, WANDA = f"--prune_method magnitude {HALF}", f"--prune_method wanda {HALF}"
WW, OWL = f"--prune_method magnitude_ww {HALF}", f"--prune_method wanda_owl {HALF}"
ZERO_SHOT, PLANNED = f"{WANDA} --eval_zero_shot", "--prune_method wanda --plan plans"
TASKS = ROOT / "data" / "tasks"

# What is typed -> what the line must say, known from the command line alone. How ranges, choices and flags that do
# nothing are refused is in tests/cli; here is what main.py declares of them.
BY_THE_COMMAND_LINE = {
    # names
    f"--prune_method Wanda {HALF}": "Did you mean 'wanda'",
    f"--prune_method wanda_owll {HALF}": "Did you mean 'wanda_owl'",
    f"{WW} --ww_metric alphamid": "Did you mean 'alpha_mid'",
    f"{WANDA} --dtype float61": "Did you mean 'float16'",
    f"{WANDA} --calib_data wikitext": "Did you mean 'wikitext2'",
    f"{WANDA} --eval_data tiny-llama/model.safetensors": ".txt",
    f"{WANDA} --calib_data nothing": "nothing",
    f"{WANDA} --sparsity_type unstructerd": "must be unstructured, or N:M",
    f"{WANDA} --sparsity 0.5": "--sparsity",  # no abbreviations
    # numbers
    "--prune_method wanda --sparsity_ratio 1": "--sparsity_ratio 1",
    "--prune_method wanda --sparsity_ratio nan": "--sparsity_ratio nan",
    "--prune_method wanda": "--sparsity_ratio",
    f"{WANDA} --nsamples 0": "--nsamples 0",
    f"{WANDA} --seqlen 1": "--seqlen 1",
    f"{WW} --epsilon 1.1": "--epsilon 1.1",
    f"{WW} --epsilon automatic": "auto",
    f"{OWL} --owl_lambda 1.5": "--owl_lambda 1.5",
    f"--prune_method wanda_dlp {HALF} --dlp_alpha=-0.1": "--dlp_alpha -0.1",
    f"{WW} --farms --farms_rows 1": "--farms_rows 1",
    f"--prune_method alps {HALF} --damping 1e300": "must be above 0 and at most 1000",
    f"{ZERO_SHOT} --num_fewshot=-1": "--num_fewshot -1",
    f"{ZERO_SHOT} --eval_batch_size all": "--eval_batch_size: invalid",
    f"{ZERO_SHOT} --tasks=": "--tasks '': is empty",
    # N:M
    "--prune_method wanda --sparsity_type 4:2": "4:2",
    "--prune_method wanda --sparsity_type 0:4": "0:4",
    "--prune_method wanda --sparsity_type 2:4:8": "2:4:8",
    "--prune_method wanda --sparsity_type 2:4 --sparsity_ratio 0.6": "0.5",
    "--prune_method wanda --sparsity_type 2:4 --use_variant": "--use_variant",
    "--prune_method wanda_ww --sparsity_type 1:4": "use 2:8",
    # flags that do nothing
    HALF: "--prune_method",
    "--sparsity_type 2:4": "--prune_method",
    "--save_model kept": "--prune_method",
    "--hidden_states cpu": "--hidden_states does nothing without --prune_method",
    "--calib_dtype bfloat16": "--calib_dtype does nothing without --prune_method",
    "--farms": "_ww",
    f"{MAGNITUDE} --use_variant": "--use_variant",
    f"{MAGNITUDE} --calib_dtype bfloat16": "does nothing with magnitude",
    f"{MAGNITUDE} --export_llmcompressor r.yaml": "wanda or sparsegpt",
    f"--prune_method magnitude_owl {HALF} --calib_dtype bfloat16": "does nothing with magnitude",
    f"--prune_method sparsegpt_ww {HALF} --use_variant": "--use_variant",
    f"{WANDA} --epsilon auto": "_ww",
    f"{WANDA} --owl_m 4": "_owl",
    f"{WW} --owl_lambda 0.1": "_owl",
    f"{WW} --farms_rows 16": "--farms",
    f"{OWL} --atp_beta 0.1": "_atp",
    f"{WANDA} --tasks boolq": "--eval_zero_shot",
    f"{WW} --farms --ww_metric mp_softrank": "weightwatcher",
    f"{WW} --esd_driver fast --ww_metric random_distance": "weightwatcher",
    f"{WW} --metrics_only": "--metrics_only",
    "--metrics_only --hidden_states cpu": "--hidden_states does nothing with --metrics_only, which prunes and",
    "--metrics_only --eval_wikitext true": "--eval_wikitext does nothing with --metrics_only",
    # plans
    f"{PLANNED}/missing.json": "missing.json",
    f"{PLANNED}/words.json": "words.json",
    "--prune_method wanda_ww --plan plans/good.json": "use --prune_method wanda alone",
    f"{PLANNED}/good.json --sparsity_type 2:4": "--sparsity_type",
    f"{PLANNED}/good.json --epsilon 0.1": "--epsilon",
}

# ... and from files and folders, before the weights are loaded.
BEFORE_LOADING = {
    # contradictions
    f"{WANDA} --dtype float16 --calib_dtype bfloat16": "--calib_dtype bfloat16: the model is computed in float16",
    "--prune_method wanda --sparsity_type 2:5": "2:5",  # 32 columns
    f"{WW} --epsilon auto": "--eval_data's file, too",
    f"{WW} --farms --farms_rows 30 --farms_ratio 1.5": "do not fit",
    f"{WANDA} --hidden_states gpu": "--hidden_states gpu: there is no GPU",
    f"{PLANNED}/other.json": "other-model",
    f"{PLANNED}/short.json": "model.layers.1.mlp.down_proj has shape None there",
    f"{PLANNED}/extra.json": "model.layers.9.mlp.down_proj",
    f"{PLANNED}/wide.json": "outside [0, 1]",
    f"{PLANNED}/budget.json": "add up to",
    f"{PLANNED}/groups.json": "4:7 does not fit",
    f"{PLANNED}/groups.json --use_variant": "the variant is unstructured only",
    f"{PLANNED}/good.json --sparsity_ratio 0.6": "0.5",
    # zero-shot tasks: their data are fetched before the model is loaded, and no test reaches the hub
    ZERO_SHOT: "--tasks boolq: cannot be loaded",
    f"{ZERO_SHOT} --tasks winogrand": "Did you mean 'winogrande'",
    f"{ZERO_SHOT} --tasks winogrande,capital_cities": "--include_path DIR",
    f"{ZERO_SHOT} --include_path missing": "--include_path missing",
    f"{ZERO_SHOT} --include_path nothing": "no lm-eval task files",
    f"{ZERO_SHOT} --tasks capital_cities --include_path {TASKS} --num_fewshot 1000": "114 to draw from",
    # places that cannot be written
    f"{WANDA} --save file": "--save file",
    f"{WANDA} --save /proc/nowhere": "--save /proc/nowhere",
    f"{WANDA} --save_model file": "--save_model file",
    f"{WANDA} --save_plan nothing": "is a folder",
    f"{WW} --ww_metric_cache file": "file",
    # what would be replaced
    f"{WANDA} --save_model plain": "plain/wanda_0.5: is not a folder, and would be replaced",
    f"{WANDA} --save_model linked": "linked/wanda_0.5: is a link, and would be replaced",
    f"{WANDA} --save_model strange": "and no pruning wrote notes.txt in it; move it away",
    f"{WANDA} --save_model old": "no pruning wrote deployment in it; move it away",
    f"{WANDA} --model earlier/wanda_0.5/ --save_model ./other/../earlier": "--model earlier/wanda_0.5 lies in",
    f"{WANDA} --calib_data earlier/wanda_0.5/text.txt --save_model earlier": "lies in earlier/wanda_0.5",
    f"{WANDA} --save earlier/wanda_0.5/figures --save_model earlier": "--save earlier/wanda_0.5/figures lies in",
    f"{PLANNED}/good.json --export_llmcompressor plans/good.json": "plans/good.json: would be written over --plan",
    f"{WANDA} --save_plan long.txt": "long.txt: would be written over",
    f"{WANDA} --save_plan tiny-llama/config.json": "would be written over --model",
    # models
    f"{WANDA} --model ./missing": "--model ./missing",
    f"{WANDA} --model smollm": "Did you mean 'smollm2-135m'",
    f"{WANDA} --model missing.gguf": "--model missing.gguf",
    f"{WANDA} --model nothing": "it holds nothing",
    f"{WANDA} --model other": "config.json",
    f"{WANDA} --model noweights": "no weights",
    f"{WANDA} --model gpt2": "GPT2LMHeadModel",
    f"{WANDA} --model adapter": "adapter",
    f"{WANDA} --model broken": "--model broken",
    f"{WANDA} --model long.txt": "--model long.txt",
    f"{WANDA} --model bad.gguf": "bad.gguf",
    f"{WANDA} --model mismatched": "do not belong together",
    "--prune_method magnitude --sparsity_ratio 0.5 --recover 256 --eval_wikitext false --model mismatched": "together",
    # texts
    f"{WANDA} --calib_data missing.txt": "missing.txt",
    f"{WANDA} --calib_data empty.txt": "too short",
    f"{WANDA} --calib_data short.txt": "tokens",
    f"{WANDA} --eval_windows 100000": "tokens",
    f"{WANDA} --calib_data words.json": "`text`",
    # caches
    f"{WW} --ww_metric_cache foreign": "other-model",
    f"{WW} --ww_metric_cache longer": "28",
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
def test_refused_before_the_model_is_loaded(typed, say, made, capsys, monkeypatch, request):
    if "--eval_zero_shot" in typed:
        request.getfixturevalue("few_tasks")
    monkeypatch.chdir(made)
    monkeypatch.setattr(load, "load_llm", lambda *_, **__: pytest.fail("the model was loaded"))
    before = everything(made)
    check_one_line(capsys, main.main(arguments(typed)), say)
    assert everything(made) == before


@pytest.mark.parametrize("cache", ["/proc/nowhere", "taken"])
def test_a_cache_that_cannot_be_written_is_known_before_the_conversion(cache, place, capsys, monkeypatch):
    Path("taken").mkdir()
    Path("taken/smollm2-135m").write_text("a file")
    monkeypatch.setattr(locate, "smollm2_gguf", lambda: Path("bad.gguf"))
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda **_: pytest.fail("it is converted"))
    before = everything(place)
    line = check_one_line(capsys, main.main(arguments(f"--model smollm2-135m --cache_dir {cache}")), "--cache_dir")
    assert cache in line and everything(place) == before


# Good command lines, without which the refusals above might have another reason, and what is warned about.
@pytest.mark.parametrize(
    ("typed", "twice", "unused"),
    [
        ("", False, "--calib_data, --nsamples"),
        (f"{WW} --calib_data c4", False, "--calib_data, --nsamples"),  # no test reaches the network
        (WANDA, True, None),
        (f"{WANDA} --calib_data other.txt", False, None),
        (f"{WANDA} --eval_wikitext false --eval_data c4 --eval_windows 2", False, "--eval_data, --eval_windows"),
        ("--metrics_only --eval_windows 2", False,
         "--calib_data, --nsamples, --seqlen, --eval_data, --eval_windows"),
    ],
)  # fmt: skip
def test_texts_that_are_read_twice_or_not_at_all_are_a_warning(typed, twice, unused, place, caplog):
    shutil.copy("long.txt", "other.txt")
    assert main.main(arguments(typed)) == 0
    assert Path("save").is_dir() == ("--metrics_only" not in typed)
    assert caplog.text.count("long.txt is both calibrated and evaluated on; give another text") == twice
    lines = [line for line in caplog.messages if "no effect in this run" in line]
    assert lines == ([f"no effect in this run, which reads no such text: {unused}"] if unused else [])


# --------------------------------------------------------------------------------------------------- the disk is full


def full(*_, **__):
    raise OSError(28, "No space left on device")


@pytest.fixture
def full_at(monkeypatch):
    """Return a function: the disk is full from now on for files with a name like this."""
    real = os.fsync

    def fill(name: str) -> None:
        def fsync(descriptor: int) -> None:
            if name in os.readlink(f"/proc/self/fd/{descriptor}"):
                full()
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)

    return fill


def test_disk_that_is_too_full_is_known_before_loading(place, capsys, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    monkeypatch.setattr(load, "load_llm", lambda *_, **__: pytest.fail("the model was loaded"))
    before = everything(place)
    check_one_line(capsys, main.main(arguments(f"{WANDA} --save_model kept")), "full")
    assert everything(place) == before


@pytest.mark.parametrize("block", ["block-00001", "edges-00000"])
@pytest.mark.parametrize("stream_it", ["never", "always"])
def test_disk_full_while_the_model_is_saved(block, stream_it, place, capsys, full_at):
    full_at(block)
    flags = f"{WANDA} --save_model kept --stream {stream_it}"
    check_one_line(capsys, main.main(arguments(flags)), "No space left")
    assert not Path("kept/wanda_0.5").exists() and not list(Path("kept").rglob("*.tmp"))
    figures = {path.name.partition("_")[0] for path in Path("save").glob("*")}
    lost = stream_it == "always" and "edges" not in block  # a streamed block has no other place: the run ends there
    assert figures == (set() if lost else {"layers", "perplexity", "run"})
    # and the same command resumes once there is room
    full_at("no such file")
    assert main.main(arguments(flags)) == 0
    assert Path("kept/wanda_0.5/config.json").is_file()


def test_disk_full_while_the_small_files_are_saved(place, capsys, monkeypatch):
    def full_for_rust(*_, **__):
        raise Exception("No space left on device (os error 28)")  # as the library of tokenizers says it

    with monkeypatch.context() as patched:
        patched.setattr(transformers.PreTrainedTokenizerBase, "save_pretrained", full_for_rust)
        line = check_one_line(capsys, main.main(arguments(f"{WANDA} --save_model kept")), "No space left")
    assert ".partial: cannot be written" in line
    assert json.loads(Path("save/run_wanda_sparsity_0.5.json").read_text())["perplexity"] > 1, "it is measured"
    assert main.main(arguments(f"{WANDA} --save_model kept")) == 0 and Path("kept/wanda_0.5/config.json").is_file()


@pytest.mark.parametrize(
    ("file", "left"), [("perplexity_", {"layers", "run"}), ("layers_", set()), ("run_", {"layers"})]
)
def test_disk_full_while_the_figures_are_written(file, left, place, capsys, full_at):
    full_at(file)
    check_one_line(capsys, main.main(arguments(WANDA)), "No space left")
    # What was known before the evaluation is there or not, but no file is cut off.
    assert {name.partition("_")[0] for name in os.listdir("save")} == left


def test_disk_full_while_the_metric_is_written(place, capsys, monkeypatch):
    monkeypatch.setattr(np, "save", full)
    check_one_line(capsys, main.main(arguments(WW)), "No space left")
    assert not list(Path("data/tiny-llama").glob("alpha_peak.npy")) and not Path("save").exists()


# ---------------------------------------------------------------------------------------------------- while running


def test_a_checkpoint_without_medians_is_refused_by_dlp(place, capsys):
    assert main.main(arguments("--prune_method magnitude --sparsity_ratio 0.7 --save_model kept")) == 0
    capsys.readouterr()
    again = "--prune_method wanda_dlp --sparsity_ratio 0.8 --model kept/magnitude_0.7"
    check_one_line(capsys, main.main(arguments(again)), "pruned by half already")


def damage(name: str, value: float) -> None:
    """Write the tiny model anew with one matrix, or its first row if ``value`` is not a number, set to ``value``."""
    model = transformers.AutoModelForCausalLM.from_pretrained("tiny-llama")
    weight = model.get_submodule(name).weight.data
    (weight if value == 0 else weight[0]).fill_(value)
    model.save_pretrained("tiny-llama")


METHODS = "magnitude wanda sparsegpt magnitude_ww wanda_dlp wanda_owl magnitude_lamp magnitude_global"


@pytest.mark.parametrize("method", fast(METHODS.split(), 4))
def test_weights_that_are_not_finite_name_the_layer(method, place, capsys):
    damage("model.layers.1.mlp.down_proj", float("nan"))
    check_one_line(capsys, main.main(arguments(f"--prune_method {method} {HALF}")), "model.layers.1.mlp.down_proj")
    assert not Path("save").exists()


def test_zero_matrix_names_the_layer(place, capsys):
    damage("model.layers.1.self_attn.v_proj", 0)
    check_one_line(capsys, main.main(arguments(WW)), "model.layers.1.self_attn.v_proj")
    assert not Path("save").exists() and not list(Path("data").rglob("*.npy"))  # the other values are kept: resumable
