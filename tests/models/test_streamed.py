"""Streaming: the same bits as in memory, from any safetensors checkpoint, with one block in memory at a time."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, fast, saved_tensors, tiny_llama
from safetensors.torch import load_file, save_file
from test_load_models import KINDS, build

import main
from lib.calibration import hidden
from lib.calibration.hidden import HIDDEN_STATES, enter_blocks
from lib.cli.settings import METHODS
from lib.core import digests
from lib.core.errors import UserError
from lib.evaluation.perplexity import perplexity, perplexity_by_blocks
from lib.models import load, memory, safetensors_io
from lib.models.load import Dtypes
from lib.models.locate import locate
from lib.models.streamed import Streamed
from lib.models.weights import weights_of

CPU = torch.device("cpu")

# --------------------------------------------------------------------------------------------------- files


def some_tensors(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (3, 5), "b": (7,), "empty": (0, 4), "number": (), "z": (1, 1, 2, 3)}
    return {name: torch.randn(shape, generator=draw).mul(9).to(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("piece", [1, 4, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64], ids=str)
def test_a_tensor_that_is_converted_as_it_is_read(dtype, piece, tmp_path, monkeypatch):
    tensors = some_tensors(dtype)
    safetensors_io.write_shard(tmp_path / "shard.safetensors", tensors)
    monkeypatch.setattr(safetensors_io, "_PIECE", piece)
    for name, entry in safetensors_io.read_header(tmp_path / "shard.safetensors").items():
        wanted = tensors[name].to(torch.float32) if dtype.is_floating_point else tensors[name]
        found = safetensors_io.read_tensor(entry, CPU, torch.float32)
        assert found.dtype == wanted.dtype and found.shape == wanted.shape and torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64], ids=str)
def test_shards_are_what_the_library_reads_and_writes(dtype, tmp_path):
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


def test_a_shard_is_written_in_another_dtype(tmp_path):
    tensors = some_tensors(torch.float32) | {"count": torch.tensor([3])}
    safetensors_io.write_shard(tmp_path / "x.safetensors", tensors, dict.fromkeys(tensors, torch.bfloat16))
    read = load_file(tmp_path / "x.safetensors")
    assert read["count"].dtype == torch.int64
    assert all(torch.equal(read[name], tensors[name].bfloat16()) for name in tensors if name != "count")


@pytest.mark.parametrize("content", [b"", b"12345678", b"\xff" * 16, b"\x02\0\0\0\0\0\0\0{}x", None])
def test_a_damaged_file_is_one_line(content, tmp_path):
    path = tmp_path / "x.safetensors"
    if content is None:
        safetensors_io.write_shard(path, some_tensors(torch.float32))
        content = path.read_bytes()[:-1]
    path.write_bytes(content)
    if content.startswith(b"\x02"):
        assert safetensors_io.read_header(path) == {}
        return
    with pytest.raises(UserError, match=r"x\.safetensors: cannot be read") as caught:
        safetensors_io.read_header(path)
    assert "\n" not in str(caught.value)


def test_pickled_weights_are_refused_with_the_line_that_converts_them(tmp_path, tiny_folder, tiny_text, capsys):
    folder = shutil.copytree(tiny_folder, tmp_path / "pickled", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_file(tiny_folder / "model.safetensors"), folder / "pytorch_model.bin")
    flags = f"--model {folder} --eval_data {tiny_text} --seqlen 32 --stream always --save {tmp_path / 'save'}"
    assert main.main(flags.split()) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert f"AutoModelForCausalLM.from_pretrained('{folder}').save_pretrained('DIR')" in err
    assert not (tmp_path / "save").exists()


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


def test_one_block_at_a_time_is_in_memory(tmp_path, tiny_windows):
    tiny_llama().save_pretrained(tmp_path)
    weights = streamed(tmp_path)
    for block in weights.visit():
        real = [name for name, p in weights.model.named_parameters() if not p.is_meta]
        assert real and all(f".layers.{block.index}." in name for name in real)
    with weights.outer_parameters():
        real = [name for name, p in weights.model.named_parameters() if not p.is_meta]
        assert real == ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    assert all(p.is_meta for p in weights.model.parameters())


def test_what_is_changed_is_read_from_then_on_and_can_be_forgotten(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    weights = streamed(tmp_path)
    dense = weights.zeros()
    snapshot = weights.snapshot()
    for block in weights.visit(write=True):
        for linear in block.linears.values():
            linear.weight.data[0] = 0
    assert all(count == dense[name] + weights.model.get_submodule(name).weight.shape[1]
               for name, count in weights.zeros().items())  # fmt: skip
    weights.restore(snapshot)
    assert weights.zeros() == dense


def test_a_block_that_fails_is_given_back(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    weights = streamed(tmp_path)
    with pytest.raises(ZeroDivisionError):
        for _ in weights.visit(write=True):
            raise ZeroDivisionError
    assert all(p.is_meta for p in weights.model.parameters()) and not weights.changed


@pytest.mark.parametrize("place", HIDDEN_STATES)
def test_hidden_states_are_the_same_wherever_they_are_kept(place, tiny_weights, tiny_windows, monkeypatch):
    if place == "gpu":
        pytest.skip("needs a CUDA device, and there is none")
    kept = enter_blocks(tiny_weights, tiny_windows, place).hidden
    assert torch.equal(kept, enter_blocks(tiny_weights, tiny_windows).hidden)


def test_a_busy_gpu_sends_hidden_states_to_pinned_memory(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1000, 2000))
    monkeypatch.setattr(torch, "empty", lambda *_, **options: asked.append(options))

    class OnGpu:
        is_cuda, device, dtype = True, "cuda:0", torch.float16

        def element_size(self) -> int:
            return 2

    hidden._allocate_hidden_states((10, 5, 5), OnGpu(), "auto")
    hidden._allocate_hidden_states((5, 5, 5), OnGpu(), "auto")
    assert [options.get("device", "cpu") for options in asked] == ["cpu", "cuda:0"] and asked[0]["pin_memory"] is True


# --------------------------------------------------------------------------------------------------- whole runs


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
def run(tmp_path, monkeypatch, tiny_text):
    """Return a function of a model and flags: runs main.py in memory and streamed; returns both records and folders."""
    monkeypatch.chdir(tmp_path)

    def both(model: Path, flags: str) -> list[tuple[dict, Path]]:
        found = []
        for how in ("never", "always"):
            words = f"--model {model} --calib_data {tiny_text} --eval_data {tiny_text} --seqlen 32 --nsamples 5 "
            words += f"--eval_windows 8 {flags} --save {how} --save_model kept-{how} --stream {how}"
            if "_ww" in flags or "_" not in flags.split()[1]:
                words += f" --ww_metric_cache cache-{how}"
            assert main.main(words.split()) == 0
            (path,) = Path(how).glob("run_*.json")
            record = json.loads(path.read_text())
            found.append((record, Path(record["saved_model"])))
        return found

    return both


def check_same(found: list[tuple[dict, Path]]) -> None:
    (here, one), (away, other) = found
    assert hashes(one) == hashes(other)
    for key in ("sparsity", "dense_zeros", "perplexity", "epsilon", "epsilon_search"):
        assert here[key] == away[key], key
    tables = [next(Path(how).glob("layers_*.tsv")).read_text() for how in ("never", "always")]
    assert tables[0] == tables[1]


SIX = ["magnitude", "wanda", "sparsegpt", "magnitude_ww", "wanda_ww", "sparsegpt_ww"]
ALLOCATIONS = [m for m in METHODS if m.startswith("wanda_") and m not in ("wanda_ww", "wanda_price")]
HALVES = [torch.float16, torch.bfloat16]
RUNS = [(f"{method} --sparsity_ratio 0.5", torch.float32) for method in SIX + ALLOCATIONS]
RUNS += [("sparsegpt_ww --sparsity_ratio 0.5", torch.float16), ("wanda --sparsity_ratio 0.5", torch.bfloat16)]
RUNS += [(f"{pruner} --sparsity_type 2:4", torch.float16) for pruner in ("magnitude", "wanda", "sparsegpt")]
RUNS += [("sparsegpt_ww --sparsity_ratio 0.6 --save_plan plan.json --hidden_states disk", torch.float32)]
RUNS += [("sparsegpt_ww --sparsity_ratio 0.6 --esd_driver fast", torch.float32)]
MORE = [(f"{method} --sparsity_ratio 0.5", dtype) for method in SIX for dtype in HALVES]
MORE += [("sparsegpt_ww --sparsity_ratio 0.6 --epsilon auto --eval_data words.txt", torch.float32)]
MORE += [("sparsegpt_ww --sparsity_ratio 0.6 --ww_metric random_distance", torch.float32)]


@pytest.mark.parametrize(("flags", "dtype"), fast([*RUNS, *(pair for pair in MORE if pair not in RUNS)], len(RUNS)))
def test_the_same_bits_from_a_sharded_checkpoint(flags, dtype, sharded, run, tiny_text):
    Path("words.txt").write_text(tiny_text.read_text()[:3000])
    runs = run(sharded[dtype], f"--prune_method {flags}")
    check_same(runs)
    record, folder = runs[1]
    assert {t.dtype for t in saved_tensors(folder).values()} == {dtype}
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.") and config["architectures"] == ["LlamaForCausalLM"]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(hashes(folder))
    again = load.load_llm(locate(str(folder), "unused"), torch.float32, CPU)  # an ordinary folder: nothing is missing
    assert weights_of(again).sparsity() == record["sparsity"]


@pytest.mark.parametrize("how", ["always", "auto"])
def test_prices_of_a_streamed_model_are_refused(how, tiny_folder, tiny_text, other_text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda _: {"cpu": 0})
    monkeypatch.chdir(tmp_path)
    flags = f"--model {tiny_folder} --calib_data {tiny_text} --eval_data {other_text} --seqlen 32 --save_model kept"
    assert main.main(f"{flags} --prune_method wanda_price --sparsity_ratio 0.5 --stream {how}".split()) == 2
    err = capsys.readouterr().err
    assert "--prune_method wanda_price: " in err and "a streamed model has no prices" in err
    assert len(err.splitlines()) == 1 and not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("method", SIX)
def test_the_same_bits_from_smollm2(method, smollm2_source, run):
    flags = f"--prune_method {method} --sparsity_ratio 0.5 --calib_data wiki_leads --eval_data wiki_leads "
    flags += f"--eval_windows 2 --cache_dir {ROOT / 'llm_weights'}"
    check_same(run(Path(smollm2_source.path).resolve(), flags))


def test_a_streamed_model_needs_a_place_for_its_blocks(tiny_folder, tiny_text, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = f"--model {tiny_folder} --eval_data {tiny_text} --seqlen 32 --eval_windows 8 --stream always"
    assert main.main(f"{flags} --prune_method magnitude --sparsity_ratio 0.5".split()) == 2
    assert "add --save_model DIR" in capsys.readouterr().err and not list(tmp_path.iterdir())
    assert main.main(flags.split()) == 0  # a dense one does not


@pytest.mark.parametrize(("free", "expected"), [(0, True), (2**40, False)])
def test_auto_streams_what_does_not_fit(free, expected, tiny_folder, tiny_text, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(memory, "free_memory", lambda _: {"cpu": free})
    flags = f"--model {tiny_folder} --eval_data {tiny_text} --seqlen 32 --eval_windows 8"
    with caplog.at_level("INFO"):
        assert main.main(flags.split()) == 0
    assert ("block by block" in caplog.text) == expected
    zero_shot = f"{flags} --eval_zero_shot --tasks capital_cities --include_path {ROOT / 'data/tasks'} --limit 2"
    assert main.main(zero_shot.split()) == (2 if expected else 0)


def test_zero_shot_runs_on_the_saved_folder(tiny_folder, tiny_text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = f"--model {tiny_folder} --eval_wikitext false --prune_method magnitude --sparsity_ratio 0.5 --save_model m "
    flags += f"--eval_zero_shot --tasks capital_cities --include_path {ROOT / 'data/tasks'} --limit 9"
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
