"""Streaming: the same bits as in memory, from any safetensors checkpoint, with one block in memory at a time."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, fast, saved_tensors, settings, tiny_llama
from safetensors.torch import load_file, save_file
from test_load_models import KINDS, build
from transformers import LlamaForCausalLM

import main
from lib import sparse
from lib.cli.settings import METHODS
from lib.core import digests
from lib.core.errors import UserError
from lib.evaluation.perplexity import perplexity, perplexity_by_blocks
from lib.models import load, memory, safetensors_io
from lib.models.load import Dtypes
from lib.models.locate import locate
from lib.models.streamed import Streamed
from lib.models.weights import weights_of
from lib.pruning.walk import checkpoint_sparsity
from lib.run.language import LanguageModel

CPU = torch.device("cpu")


def some_tensors(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (3, 5), "b": (7,), "empty": (0, 4), "number": (), "z": (1, 1, 2, 3)}
    return {name: torch.randn(shape, generator=draw).mul(9).to(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64], ids=str)
def test_shards_are_what_the_library_reads_and_writes(dtype, tmp_path, monkeypatch):
    tensors = some_tensors(dtype)
    digest = safetensors_io.write_shard(tmp_path / "ours.safetensors", tensors)
    assert digest == hashlib.sha256((tmp_path / "ours.safetensors").read_bytes()).hexdigest()
    assert digest == digests.checksum(tmp_path / "ours.safetensors")
    save_file(tensors, tmp_path / "theirs.safetensors")
    for name in ("ours", "theirs"):
        path = tmp_path / f"{name}.safetensors"
        found = {key: safetensors_io.read_tensor(entry) for key, entry in safetensors_io.read_header(path).items()}
        for read in (found, load_file(path)):
            assert read.keys() == tensors.keys()
            assert all(read[k].dtype == dtype and torch.equal(read[k], tensors[k]) for k in tensors)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours.safetensors", "theirs.safetensors"]

    for piece in (1, 4, 1000):  # entries that are converted at once, as they are read
        monkeypatch.setattr(safetensors_io, "_PIECE", piece)
        for key, entry in safetensors_io.read_header(path).items():
            wanted = tensors[key].float() if dtype.is_floating_point else tensors[key]
            read = safetensors_io.read_tensor(entry, CPU, torch.float32)
            assert read.dtype == wanted.dtype and read.shape == wanted.shape and torch.equal(read, wanted)


@pytest.mark.parametrize("content", [b"", b"12345678", b"\xff" * 16, None])
def test_a_damaged_file_is_one_line(content, tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors_io.write_shard(path, some_tensors(torch.float32))
    path.write_bytes(path.read_bytes()[:-1] if content is None else content)
    with pytest.raises(UserError, match=r"^[^\n]*x\.safetensors: cannot be read[^\n]*$"):
        safetensors_io.read_header(path)


HEADERS = [
    "12", "true", '"abc"', "[1]", "null", "[" * 100_000, '{"a": 5}', '{"a": {}}', '{"a": {"data_offsets": 7}}',
    *(
        json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": at}})
        for dtype, shape, at in [
            ("F32", [2], [0, 4]), ("F32", [-1, -2], [0, 8]), ("F32", [2.0], [0, 8]), ("F32", "2", [0, 8]),
            ("F32", [2], [-8, 0]), ("F32", [2], [8, 0]), ("F32", [2], [0.0, 8.0]), ("F32", [10**30], [0, 8]),
            ("F32", [2], [4, 12]), ("F4", [2], [0, 8]), ([], [2], [0, 8]),
        ]
    ),
]  # fmt: skip


@pytest.mark.parametrize("header", HEADERS, ids=lambda header: header[:60])
def test_a_header_that_says_something_else_is_one_line(header, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(8))
    with pytest.raises(UserError, match=r"model\.safetensors: cannot be read as safetensors \(") as caught:
        safetensors_io.checkpoint_entries(tmp_path)
    assert "\n" not in str(caught.value)


INDEXES = [
    "12", "[]", "{", "[" * 100_000, "\0", '{"weight_map": 5}', '{"weight_map": ["a"]}', '{"weight_map": {"a": 5}}',
    '{"weight_map": {"a": null, "b": "model.safetensors"}}', '{"weight_map": {"a": "../m/x.safetensors"}}',
    '{"weight_map": {"a": "/x.safetensors"}}', '{"weight_map": {"a": ""}}', '{"weight_map": {"a": ".."}}',
]  # fmt: skip


@pytest.mark.parametrize("index", INDEXES, ids=lambda index: index[:60])
def test_an_index_that_says_something_else_is_one_line(index, tmp_path):
    (tmp_path / "m").mkdir()
    save_file(some_tensors(torch.float32), tmp_path / "m" / "x.safetensors")
    (tmp_path / "m" / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=r"index\.json: is damaged \(") as caught:
        safetensors_io.checkpoint_entries(tmp_path / "m")
    assert "\n" not in str(caught.value)


def test_pickled_weights_are_refused_with_the_line_that_converts_them(tmp_path, tiny_folder, tiny_text, capsys):
    folder = shutil.copytree(tiny_folder, tmp_path / "pickled", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_file(tiny_folder / "model.safetensors"), folder / "pytorch_model.bin")
    flags = f"--model {folder} --eval_data {tiny_text} --seqlen 32 --stream always --save {tmp_path / 'save'}"
    assert main.main(flags.split()) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert f"AutoModelForCausalLM.from_pretrained('{folder}').save_pretrained('DIR')" in err
    assert not (tmp_path / "save").exists()


def with_a_backup(folder: Path, of: Path | None = None) -> None:
    scaled(load_file(of or folder / "model.safetensors"), folder / "model_old.safetensors")


def with_shards(folder: Path) -> None:
    shards = tiny_llama()
    shards.model.layers[0].mlp.up_proj.weight.data[:] = 0.5
    shards.save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink()
    with_a_backup(folder, next(folder.glob("model-00001-*")))


def with_shards_and_a_whole_file(folder: Path) -> None:
    with_shards(folder)
    scaled(tiny_llama().state_dict(), folder / "model.safetensors")


def with_a_named_file(folder: Path) -> None:
    scaled(tiny_llama().state_dict(), folder / "chosen.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": "chosen.safetensors"}))


def scaled(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file({name: (2 * tensor).contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})


@pytest.mark.parametrize("add", [with_a_backup, with_shards, with_shards_and_a_whole_file, with_a_named_file])
def test_the_weights_are_those_that_transformers_loads(add, tmp_path, tiny_folder):
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    add(folder)
    loaded = weights_of(LlamaForCausalLM.from_pretrained(folder))
    assert streamed(folder).fingerprints() == loaded.fingerprints()
    assert checkpoint_sparsity(folder, loaded.pruned_tensors()) == loaded.sparsity()
    for name in ("packed", "back"):
        (tmp_path / name).mkdir()
    sparse.pack_files(folder, tmp_path / "packed")
    sparse.unpack_files(tmp_path / "packed", tmp_path / "back")
    back, state = saved_tensors(tmp_path / "back"), loaded.model.state_dict()
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)


def test_a_tensor_that_two_files_hold_is_refused(tmp_path, tiny_folder):
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for number in (1, 2):
        save_file(tensors, folder / f"{number}.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "1.safetensors", "model.norm.weight": "2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"is both in 1\.safetensors and in 2\.safetensors"):
        streamed(folder)


# --------------------------------------------------------------------------------------------------- the home


def streamed(folder: Path, dtype: torch.dtype = torch.float32) -> Streamed:
    return Streamed(folder, Dtypes(dtype, dtype), CPU)


@pytest.mark.parametrize("kind", KINDS)
def test_a_streamed_model_computes_the_same_bits(kind, tmp_path, tiny_windows):
    model = build(kind)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    away, here = streamed(tmp_path), weights_of(model)
    assert away.layers == here.layers and away.zeros() == here.zeros()
    assert perplexity_by_blocks(away, tiny_windows) == perplexity(model, tiny_windows)
    assert all(parameter.is_meta for parameter in away.model.parameters())


@pytest.mark.parametrize("change", [lambda name: f"other.{name}", lambda name: name.removeprefix("model.")])
def test_names_without_the_prefix_are_found_and_others_refused(change, tmp_path, tiny_windows):
    build("llama").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({change(name): tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    if change("a") == "a":
        assert perplexity_by_blocks(streamed(tmp_path), tiny_windows) == perplexity(build("llama"), tiny_windows)
        return
    with pytest.raises(UserError, match="not named as the model's.*--stream never"):
        streamed(tmp_path)


def test_one_block_at_a_time_is_in_memory(tiny_folder):
    weights = streamed(tiny_folder)
    for block in weights.visit():
        real = [name for name, p in weights.model.named_parameters() if not p.is_meta]
        assert real and all(f".layers.{block.index}." in name for name in real)
    with weights.outer_parameters():
        real = [name for name, p in weights.model.named_parameters() if not p.is_meta]
        assert real == ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    assert all(p.is_meta for p in weights.model.parameters())


def test_what_is_changed_is_read_from_then_on_and_can_be_forgotten(tiny_folder):
    weights = streamed(tiny_folder)
    dense, snapshot = weights.zeros(), weights.snapshot()
    for block in weights.visit(write=True):
        for linear in block.linears.values():
            linear.weight.data[0] = 0
    assert weights.zeros() == {layer.name: dense[layer.name] + layer.shape[1] for layer in weights.layers}
    weights.restore(snapshot)
    assert weights.zeros() == dense


def test_a_block_that_fails_is_given_back(tiny_folder):
    weights = streamed(tiny_folder)
    with pytest.raises(ZeroDivisionError):
        for _ in weights.visit(write=True):
            raise ZeroDivisionError
    assert all(p.is_meta for p in weights.model.parameters()) and not weights.changed


def hashes(folder: Path) -> dict[str, str]:
    return {
        name: hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in saved_tensors(folder).items()
    }


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, tiny_tokenizer) -> dict[torch.dtype, Path]:
    """Return folders of a tiny LLaMA in several files, one for each dtype; the bfloat16 one ties its embeddings."""
    folders = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        folder = tmp_path_factory.mktemp("sharded") / "tiny"
        model = tiny_llama().to(dtype)
        if dtype == torch.bfloat16:
            model.config.tie_word_embeddings = True
            model.lm_head.weight = model.model.embed_tokens.weight
        model.save_pretrained(folder, max_shard_size="20KB")
        tiny_tokenizer.save_pretrained(folder)
        assert len(list(folder.glob("*.safetensors"))) > 3
        folders[dtype] = folder
    return folders


@pytest.fixture
def place(tmp_path, monkeypatch, tiny_folder, tiny_text, other_text) -> str:
    """Return the flags of a dense run in a folder of its own, to which the test goes."""
    monkeypatch.chdir(tmp_path)
    return f"--model {tiny_folder} --calib_data {tiny_text} --eval_data {other_text} --seqlen 32 --eval_windows 8"


def run_both(place: str, flags: str) -> tuple[dict, Path]:
    """Run main.py in memory and streamed, and compare; return the streamed run's record and its saved folder."""
    records = []
    for how in ("never", "always"):
        words = f"{place} --nsamples 5 {flags} --save {how} --save_model kept-{how} --stream {how}"
        words += f" --ww_metric_cache cache-{how}" * ("_ww" in flags)
        assert main.main(words.split()) == 0
        (path,) = Path(how).glob("run_*.json")
        records.append(json.loads(path.read_text()))
    folders = [Path(record["saved_model"]) for record in records]
    assert hashes(folders[0]) == hashes(folders[1])
    for key in ("sparsity", "dense_zeros", "perplexity", "epsilon", "epsilon_search"):
        assert records[0][key] == records[1][key], key
    tables = [next(Path(how).glob("layers_*.tsv")).read_text() for how in ("never", "always")]
    assert tables[0] == tables[1]
    return records[1], folders[1]


SIX = ["magnitude", "wanda", "sparsegpt", "magnitude_ww", "wanda_ww", "sparsegpt_ww"]
ALLOCATIONS = [m for m in METHODS if m.startswith("wanda_") and m not in ("wanda_ww", "wanda_price")]
# Each pruner and each way to read the dense weights once; what differs by a formula or a dtype alone, with --slow.
FAST = ["magnitude", "sparsegpt_ww", "wanda_owl", "wanda_lamp"]
RUNS = [(f"{method} --sparsity_ratio 0.5", torch.float32) for method in FAST]
RUNS += [("wanda --sparsity_ratio 0.5", torch.bfloat16), ("sparsegpt --sparsity_type 2:4", torch.float16)]
RUNS += [("sparsegpt_ww --sparsity_ratio 0.6 --save_plan plan.json --hidden_states disk", torch.float32)]
RUNS += [("magnitude_ww --sparsity_ratio 0.6 --esd_driver fast", torch.float32)]
MORE = [(f"{method} --sparsity_ratio 0.5", torch.float32) for method in SIX + ALLOCATIONS if method not in FAST]
MORE += [(f"{method} --sparsity_ratio 0.5", dtype) for method in SIX for dtype in (torch.float16, torch.bfloat16)]
MORE += [(f"{pruner} --sparsity_type 2:4", torch.float16) for pruner in ("magnitude", "wanda")]
MORE += [("sparsegpt_ww --sparsity_ratio 0.6 --epsilon auto", torch.float32)]
MORE += [("sparsegpt_ww --sparsity_ratio 0.6 --ww_metric random_distance", torch.float32)]


@pytest.mark.parametrize(("flags", "dtype"), fast([*RUNS, *MORE], len(RUNS)))
def test_the_same_bits_from_a_sharded_checkpoint(flags, dtype, sharded, place):
    record, folder = run_both(place, f"--model {sharded[dtype]} --prune_method {flags}")
    assert {t.dtype for t in saved_tensors(folder).values()} == {dtype}
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.") and config["architectures"] == ["LlamaForCausalLM"]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(hashes(folder))
    again = load.load_llm(locate(str(folder), "unused"), torch.float32, CPU)  # an ordinary folder: nothing is missing
    assert weights_of(again).sparsity() == record["sparsity"]


@pytest.mark.parametrize("how", ["always", "auto"])
def test_prices_of_a_streamed_model_are_refused(how, place, capsys, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda _: {"cpu": 0})
    flags = f"{place} --prune_method wanda_price --sparsity_ratio 0.5 --save_model kept --stream {how}"
    assert main.main(flags.split()) == 2
    err = capsys.readouterr().err
    assert "--prune_method wanda_price: " in err and "a streamed model has no prices" in err
    assert len(err.splitlines()) == 1 and not list(Path().iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("method", SIX)
def test_the_same_bits_from_smollm2(method, smollm2_source, place):
    flags = f"--model {Path(smollm2_source.path).resolve()} --cache_dir {ROOT / 'llm_weights'} --eval_windows 2 "
    run_both(place, f"{flags} --prune_method {method} --sparsity_ratio 0.5 --calib_data wiki_leads")


def test_a_streamed_model_needs_a_place_for_its_blocks(place, capsys):
    flags = f"{place} --stream always"
    assert main.main(f"{flags} --prune_method magnitude --sparsity_ratio 0.5".split()) == 2
    assert "add --save_model DIR" in capsys.readouterr().err and not list(Path().iterdir())
    assert main.main(flags.split()) == 0  # a dense one does not


ZERO_SHOT = f"--eval_zero_shot --tasks capital_cities --include_path {ROOT / 'data/tasks'} --limit 2"


@pytest.mark.usefixtures("few_tasks")
@pytest.mark.parametrize(("free", "expected"), [(0, True), (2**40, False)])
def test_auto_streams_what_does_not_fit(free, expected, place, monkeypatch, caplog):
    monkeypatch.setattr(memory, "free_memory", lambda _: {"cpu": free})
    with caplog.at_level("INFO"):
        assert main.main(place.split()) == 0
    assert ("block by block" in caplog.text) == expected
    if expected:
        assert main.main(f"{place} {ZERO_SHOT}".split()) == 2  # which needs a saved folder


LIMITED = """
import psutil, resource, sys
import torch, transformers.models.llama.modeling_llama
import main

limit = psutil.Process().memory_info().vms + 2**29
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.exit(main.main(sys.argv[1:]))
"""


@pytest.mark.slow  # a program of its own, which can be limited
def test_auto_streams_where_the_address_space_is_limited(tiny_folder, tiny_text, tmp_path):
    # Half a GiB is less than any run in memory is left, whatever the machine has.
    flags = f"--model {tiny_folder} --calib_data {tiny_text} --eval_data {tiny_text} --seqlen 32 --nsamples 4"
    flags += f" --prune_method sparsegpt --sparsity_ratio 0.5 --save {tmp_path} --save_model {tmp_path}"
    done = subprocess.run([sys.executable, "-c", LIMITED, *flags.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "block by block" in done.stderr + done.stdout


def test_a_second_copy_of_the_weights_is_counted(tiny_folder, tiny_text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(memory, "free_ram", lambda: 2**40)
    asked = []
    monkeypatch.setattr(memory, "fits_in_memory", lambda *how: bool(asked.append(how)) or True)
    flags = f"--model {tiny_folder} --calib_data {tiny_text} --eval_wikitext false --seqlen 32 --nsamples 4 "
    flags += "--sparsity_ratio 0.5 --prune_method wanda"
    runs = settings(flags), settings(f"{flags}_ww --epsilon auto"), settings(f"{flags}_ww")
    for first, *planned in [runs[:1], runs[1:2], runs[2:], [runs[0], *runs], [runs[2], runs[1]]]:
        LanguageModel(planned).prepare(first, first.task())
    assert [len(copied) for *_, copied in asked] == [0, 21, 0, 21, 21]
    more = settings(f"{flags} --nsamples 8")
    LanguageModel().prepare(more, more.task())
    disk = settings(f"{flags} --hidden_states disk")
    LanguageModel().prepare(disk, disk.task())
    reserves = [reserve for *_, reserve, _ in asked]
    assert reserves[-2] - reserves[0] == 4 * 32 * 32 * 4 == reserves[0] - reserves[-1]  # four windows' hidden states


@pytest.mark.usefixtures("few_tasks")
def test_zero_shot_runs_on_the_saved_folder(place):
    flags = f"{place} --eval_wikitext false --prune_method magnitude --sparsity_ratio 0.5 --save_model m {ZERO_SHOT}"
    answers = []
    for how in ("never", "always"):
        assert main.main([*flags.split(), "--stream", how, "--save", how]) == 0
        answers.append(json.loads(Path(how, "run_magnitude_sparsity_0.5.json").read_text())["zero_shot"]["means"])
    assert answers[0] == answers[1]


def test_a_checkpoint_that_is_not_tied_as_its_config_says_is_refused(tmp_path, tiny_folder):
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(UserError, match="lm_head.weight and model.embed_tokens.weight differ.*--stream never"):
        streamed(folder)
