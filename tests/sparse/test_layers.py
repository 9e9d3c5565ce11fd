"""Packed models on the CPU: products against float64, the format bit for bit, whole models, guards and bad input."""

import json
import logging
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import machines
import pytest
import torch
from conftest import ROOT, tiny_llama
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_load_models import build
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from lib import sparse
from lib.core import cpu
from lib.core.errors import UserError
from lib.evaluation.perplexity import perplexity
from lib.models.layers import find_blocks, linear_modules, prunable_layers
from lib.pruning.pruners import magnitude
from lib.sparse import DenseLinear, SparseLinear, kernel, packed
from lib.sparse.decode import grouped_attention
from scripts import generate

SHAPES = [(7, 31), (33, 1000), (1, 64), (5, 8), (40, 2100), (600, 96), (3, 33)]  # [rows, columns]
# Float32 sums of 2,100 products at most: each of the additions is off by 2^-24 of the running sum.
CLOSE = 3e-6
HALF_ULP = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # of the one rounding at the end

needs_kernel = pytest.mark.skipif(not kernel.levels(), reason="this CPU has no kernel")


def matrix(rows: int, columns: int, zeros: float, kind: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Return a weight with a fraction of zeros, half of them -0.0, and a first row without anything else."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=draw)
    weight = weight * (torch.rand(rows, columns, generator=draw) >= zeros)  # leaves -0.0 where weights are negative
    if zeros and rows > 1:
        weight[0] *= 0
    return weight.to(kind)


def linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None).requires_grad_(False)
    made.weight.data = weight
    if bias is not None:
        made.bias.data = bias
    return made


# -------------------------------------------------------------------------------------------------------- products


@pytest.mark.parametrize("multiplies", [False, True])  # whether the CPU has instructions for many tokens of this kind
@pytest.mark.parametrize("kind", kernel.KERNEL_DTYPES)
def test_products_are_those_of_float64(level, kind, multiplies, threads, monkeypatch):
    monkeypatch.setattr(cpu, "multiplies", lambda _: multiplies)
    library = kernel.load_kernel(level)
    for index, (rows, columns) in enumerate(SHAPES):
        for zeros in (0.0, 0.5, 0.9, 1.0):
            weight = matrix(rows, columns, zeros, kind, index)
            bias = torch.randn(rows, generator=torch.Generator().manual_seed(9)).to(kind)
            plain, biased = linear(weight), linear(weight, bias)
            for tokens in (*(() if multiplies else range(1, 9)), 9, 16):  # every one that the kernel has, and more
                x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens)).to(kind)
                expected = x.double() @ weight.double().T
                size = x.double().abs() @ weight.double().abs().T
                torchs = tokens > kernel.MAX_TOKENS and multiplies and platform.machine() in cpu.ARM
                close = HALF_ULP[kind] if torchs else CLOSE  # torch's bfloat16 product rounds parts of a sum there
                bound = close * size + HALF_ULP[kind] * expected.abs() + 1e-7
                # torch's own product, which is used for many tokens, may round before the bias is added
                biased_bound = CLOSE * size + 2 * HALF_ULP[kind] * (size + bias.double().abs()) + 1e-7
                for make in (SparseLinear.from_dense, DenseLinear):
                    layer = make(plain, library)
                    if tokens <= kernel.MAX_TOKENS:
                        sums = library.multiply(layer.matrix(kind), x, torch.float32)
                        assert ((sums - expected).abs() <= CLOSE * size).all()
                    assert ((layer(x) - expected).abs() <= bound).all()
                    assert ((make(biased, library)(x) - expected - bias.double()).abs() <= biased_bound).all()


@pytest.mark.parametrize("biased", [False, True])
def test_products_on_tiles_are_those_of_float64(biased, threads, monkeypatch):
    monkeypatch.setattr(cpu, "processor", machines.REAL_PROCESSOR)
    if "amx" not in kernel.levels() or not kernel.load_kernel("amx").has_tiles:
        pytest.skip("this CPU has no AMX, or the system does not allow it")
    for index, (rows, columns) in enumerate(SHAPES):
        weight = matrix(rows, columns, 0.6, torch.bfloat16, index)
        bias = torch.randn(rows, generator=torch.Generator().manual_seed(9)).bfloat16() if biased else None
        layer, b = (
            SparseLinear.from_dense(linear(weight, bias), kernel.load_kernel("amx")),
            0 if bias is None else bias,
        )
        for tokens in (9, 31, 33, 130, 300):  # parts of tiles, and more than are taken at a time
            x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens)).bfloat16()
            x[7] = torch.nan  # which belongs to no other token
            y, finite = layer(x), torch.arange(tokens) != 7
            assert y[7].isnan().all()
            expected = (x.double() @ weight.double().T + b)[finite]
            size = (x.double().abs() @ weight.double().abs().T + torch.as_tensor(b).abs())[finite]
            bound = CLOSE * size + HALF_ULP[torch.bfloat16] * expected.abs() + 1e-7
            assert ((y[finite] - expected).abs() <= bound).all()


@needs_kernel
def test_tiles_take_many_tokens_in_bfloat16_where_the_system_allows_them(monkeypatch):
    library, calls = kernel.load_kernel(), []
    monkeypatch.setattr(library, "multiply_tiles", lambda _, x: calls.append(len(x)) or x.new_zeros(len(x), 6))
    for allowed in (False, True):
        monkeypatch.setattr(library, "has_tiles", allowed)
        for kind in kernel.KERNEL_DTYPES:
            layer = SparseLinear.from_dense(linear(matrix(6, 32, 0.5, kind)), library)
            for tokens in (8, 9):
                assert layer(torch.ones(tokens, 32, dtype=kind)).shape == (tokens, 6)
    assert calls == [9]


def test_product_by_pencil(level):
    weight = torch.tensor([[0.0, 2, 0, -3], [0, 0, 0, 0], [1, 0, 0.5, -0.0]], dtype=torch.bfloat16)
    layer = SparseLinear.from_dense(linear(weight, torch.tensor([0.0, 7, 0]).bfloat16()), kernel.load_kernel(level))
    x = torch.tensor([[1.0, 10, 100, 1000]], dtype=torch.bfloat16)
    assert layer(x).tolist() == [[20 - 3000 + 4, 7, 51]]  # 2,980 is 2,976 in 8 bits: ties to even
    assert layer.sparsity == pytest.approx(8 / 12)


def test_what_is_beyond_the_last_column_is_not_read(level):
    # The next row's weights, in the place of columns that are not there, would turn the zeros of x into nan.
    weight = torch.ones(2, 40, dtype=torch.bfloat16)
    weight[1] = torch.nan
    x = torch.ones(1, 40, dtype=torch.bfloat16)
    for make in (SparseLinear.from_dense, DenseLinear):
        y = make(linear(weight), kernel.load_kernel(level))(x)
        assert y[0, 0] == 40 and y[0, 1].isnan()


@pytest.mark.machine
@needs_kernel
def test_shapes_kinds_and_empty_input():
    layer = SparseLinear.from_dense(linear(matrix(6, 32, 0.5, torch.float16)))
    assert layer(torch.ones(2, 3, 32).half()).shape == (2, 3, 6) and layer(torch.ones(32).half()).shape == (6,)
    assert layer(torch.ones(0, 32).half()).shape == (0, 6)
    strided = torch.randn(32, 3).half().T
    assert torch.equal(layer(strided), layer(strided.contiguous()))
    for wrong in (layer, DenseLinear(linear(matrix(6, 32, 0.5, torch.float16)))):
        with pytest.raises(RuntimeError):  # twice as wide, not twice as many
            wrong(torch.ones(1, 64).half())


@needs_kernel
def test_gradients_moves_and_saving_are_refused_in_one_line():
    model = nn.Sequential(SparseLinear.from_dense(linear(matrix(6, 32, 0.5, torch.bfloat16))))
    x = torch.ones(1, 32, dtype=torch.bfloat16)
    refused = {
        lambda: model(x.clone().requires_grad_()): "has no gradients",
        lambda: model.to("meta")(
            x.to("meta")
        ): r"on the CPU, not \[1, 32\] torch.bfloat16 on meta; for a GPU or another",
        lambda: model.float()(x.float()): r"torch.bfloat16 on the CPU, not \[1, 32\] torch.float32",
        lambda: model.state_dict(): "is not saved again",
    }
    expected = model(x)
    for act, says in refused.items():
        with pytest.raises(RuntimeError, match=says) as caught:
            act()
        assert "\n" not in str(caught.value)
    assert torch.equal(model.to("cpu", torch.bfloat16)(x), expected)


@pytest.mark.parametrize("mask", [None, "padded"])
def test_grouped_attention_is_transformers_attention(mask):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    draw = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, 1, 16, generator=draw)
    key, value = torch.randn(2, 2, 2, 11, 16, generator=draw)
    mask = None if mask is None else (torch.arange(11) >= torch.tensor([[0], [4]]))[:, None, None]  # [2, 1, 1, 11]
    module = nn.Module()
    module.num_key_value_groups = 3
    grouped, _ = grouped_attention(module, query, key, value, mask, scaling=0.3, dropout=0.0)
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3, dropout=0.0, is_causal=False)
    torch.testing.assert_close(grouped, expected, rtol=0, atol=1e-6)  # float32 sums of 11 terms in another order


# ---------------------------------------------------------------------------------------------------------- format


def test_pack_by_pencil():
    tensor = torch.tensor([[0, 1.5, 0, -2], [0, -0.0, 0, 0], [3, 0, -0.0, 0]])
    mask, values, negative, _ = packed.pack(tensor)
    assert mask.tolist() == [[0b1010], [0], [0b0001]]
    assert values.tolist() == [1.5, -2, 3] + [0] * packed.PADDING
    assert negative.tolist() == [0b10001000, 0]  # the zeros in order: two of row 0, four of row 1, three of row 2
    assert packed.row_starts(mask).tolist() == [0, 2, 2, 3]
    back = packed.unpack(packed.PackedTensor(mask, values, negative), [3, 4])
    assert torch.equal(back, tensor) and torch.equal(back.signbit(), tensor.signbit())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8])
@pytest.mark.parametrize("shape", [(37, 29), (3, 5, 64), (70,)])
def test_pack_keeps_every_bit(dtype, shape):
    draw = torch.Generator().manual_seed(3)
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    bits = torch.iinfo(integer)
    # Every pattern, NaNs with payload, infinities and -0.0 among them, whatever the kind of number.
    raw = torch.randint(bits.min, bits.max, shape, generator=draw, dtype=torch.int64).to(integer)
    raw[torch.rand(raw.shape, generator=draw) < 0.7] = 0
    raw[torch.rand(raw.shape, generator=draw) < 0.2] = bits.min  # -0.0 as a float
    tensor = raw.view(dtype)
    back = packed.unpack(packed.pack(tensor), list(shape))
    assert back.dtype == dtype and torch.equal(back.view(integer), raw)


def with_zeros(model, ratio: float = 0.6, kind: torch.dtype = torch.bfloat16, every: int = 1):
    """Return ``model`` in ``kind`` with ``ratio`` of each (or second) matrix zero, half of it -0.0."""
    for linear in list(linear_modules(find_blocks(model)[1]).values())[::every]:
        linear.weight.data *= magnitude(linear.weight.data, None, ratio, None) != 0
    return model.to(kind)


def packed_in(folder: Path, model: nn.Module | None = None) -> Path:
    """Return ``folder``/packed with what is in ``folder``/model, where ``model`` is saved first."""
    if model is not None:
        model.save_pretrained(folder / "model")
    (folder / "packed").mkdir()
    sparse.pack_files(folder / "model", folder / "packed")
    return folder / "packed"


@pytest.fixture(scope="module")
def pruned(tmp_path_factory, tiny_folder) -> Path:
    """Return the folder of a tiny LLaMA with 70 % zeros in bfloat16, half of them -0.0; to be read only."""
    folder = Path(shutil.copytree(tiny_folder, tmp_path_factory.mktemp("sparse") / "model"))
    with_zeros(tiny_llama(), 0.7).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def packed_folder(pruned) -> Path:
    """Return ``pruned``, packed; to be read only."""
    return packed_in(pruned.parent)


# ---------------------------------------------------------------------------------------------------- whole models


@pytest.fixture
def model(packed_folder):
    return sparse.load_packed(packed_folder)


def dense(folder: Path, kind: torch.dtype):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=kind).eval()


@needs_kernel
def test_layers_stay_packed_and_say_what_they_are(model):
    layers = [module for module in model.modules() if isinstance(module, SparseLinear)]
    assert len(layers) == 21 and isinstance(model.lm_head, DenseLinear)
    assert all(layer.sparsity == pytest.approx(0.7, abs=0.01) for layer in layers)
    assert not any(parameter.is_meta for parameter in model.parameters()) and not model.training
    assert model.dtype == torch.bfloat16


@pytest.mark.machine
@torch.no_grad()
@pytest.mark.parametrize("length", [1, 5, 24])
def test_logits_are_as_close_to_float32_as_dense_bfloat16s(pruned, model, tiny_windows, length):
    ids = tiny_windows[:1, :length]
    exact = dense(pruned, torch.float32)(ids).logits
    ours, theirs = (m(ids).logits.float() for m in (model, dense(pruned, torch.bfloat16)))
    # Both round every activation to 8 bits, at other places: 1.5 for the luck of one draw.
    assert (ours - exact).norm() <= 1.5 * (theirs - exact).norm()


@pytest.mark.machine
def test_generate_pipeline_and_perplexity_run(pruned, packed_folder, model, tiny_windows):
    tokenizer = AutoTokenizer.from_pretrained(packed_folder)
    ids = tiny_windows[:2, :6]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    assert out.shape[0] == 2 and torch.equal(out[:, :6], ids)
    texts = pipeline("text-generation", model=model, tokenizer=tokenizer)("Ab", max_new_tokens=3)
    assert texts[0]["generated_text"].startswith("Ab")
    reference = perplexity(dense(pruned, torch.bfloat16), tiny_windows)
    assert perplexity(model, tiny_windows) == pytest.approx(reference, rel=0.01)  # 8 bits of every activation


@pytest.mark.machine
def test_lm_eval_runs(packed_folder, model, tiny_windows):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(packed_folder), batch_size=2)
    asked = [Instance("loglikelihood", {}, ("ab de", " " + word), index) for index, word in enumerate(["kil", "mor"])]
    assert all(value < 0 for value, _ in wrapped.loglikelihood(asked, disable_tqdm=True))


@torch.no_grad()
def test_sparsify_packs_what_is_sparse_and_leaves_the_rest(tiny_windows):
    model = tiny_llama().bfloat16()
    layers = prunable_layers(model)
    for index, linear in enumerate(linear_modules(find_blocks(model)[1]).values()):
        linear.weight.data = magnitude(linear.weight.data, None, 0.6 if index % 3 else 0.2, None)
    before = model(tiny_windows[:1, :4]).logits
    count = sparse.sparsify(model)
    assert count == (14 if kernel.levels() else 0)
    if count:
        assert isinstance(model.get_submodule(layers[0].name), DenseLinear)
        assert isinstance(model.get_submodule(layers[1].name), SparseLinear)
    assert (model(tiny_windows[:1, :4]).logits - before).abs().max() <= 0.05 * before.abs().max()  # 8 bits
    with pytest.raises(UserError, match="is torch.float32 on cpu; load the model on the CPU in bfloat16"):
        sparse.sparsify(tiny_llama())


@pytest.mark.parametrize("kind", [torch.float16, torch.float32])
@torch.no_grad()
def test_other_kinds_of_checkpoints(kind, tmp_path, tiny_windows, caplog):
    folder = packed_in(tmp_path, with_zeros(tiny_llama(), 0.7, kind))
    with caplog.at_level(logging.INFO):
        model = sparse.load_packed(folder)
    runs_in = torch.bfloat16 if kind == torch.float32 else kind
    assert model.dtype == runs_in and ("float32 weights are rounded to bfloat16" in caplog.text) == (kind != runs_in)
    expected = dense(tmp_path / "model", runs_in)(tiny_windows[:1, :4]).logits
    assert (model(tiny_windows[:1, :4]).logits - expected).abs().max() <= 0.05 * expected.abs().max()


@pytest.mark.parametrize("kind", ["gemma3", "opt projected", "gpt-neox", "phi3", "qwen2"])
@torch.no_grad()
def test_other_kinds_of_models(kind, tmp_path, tiny_windows):
    model = sparse.load_packed(packed_in(tmp_path, with_zeros(build(kind))))
    expected = dense(tmp_path / "model", torch.bfloat16)
    ids = tiny_windows[:1, :5] % expected.config.get_text_config().vocab_size
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head.weight is embedding.weight) == expected.config.tie_word_embeddings
    off = (model(ids).logits - expected(ids).logits).abs().max()
    assert off <= 0.05 * expected(ids).logits.abs().max()  # 8 bits of every activation, a few blocks deep


# ------------------------------------------------------------------------------------------------ damage, bad input


def flip(at: int, path: Path) -> None:
    """Change one bit of the byte ``at`` of the tensors."""
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[(start if at >= 0 else len(content)) + at] ^= 1
    path.write_bytes(content)


def rewrite(change: Callable, path: Path) -> None:
    """Write the packed file again with its header (a dict) and tensors changed."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors, header = load_file(path), json.loads(metadata["packed"])
    change(header, tensors)
    save_file(tensors, path, metadata | {"packed": json.dumps(header)})


def forged(part: str, forge) -> Callable:
    """Return a change of one part of a packed matrix whose SHA-256 is that of the change: anybody can write it."""

    def change(header, tensors):
        name = "model.layers.0.mlp.down_proj.weight"
        tensors[f"{name}.{part}"] = forge(tensors[f"{name}.{part}"].clone())
        parts = {each: tensors[key] for each in packed.PackedTensor._fields if (key := f"{name}.{each}") in tensors}
        entry = header["tensors"][name]
        entry["sha256"] = packed._digest(packed.PackedTensor(**parts), entry["shape"])

    return change


def stray(bit: int) -> Callable:
    """Return a forgery that sets a bit of the mask beyond its 48 columns."""

    def forge(mask):
        mask.view(torch.uint8)[3, bit // 8] |= 1 << bit % 8
        return mask

    return forged("mask", forge)


ALTERED, UNREADABLE = "is not what was packed", "cannot be read as a packed model"
# What is done to the packed file, and what is said.
DAMAGED = {
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:-100]), UNREADABLE),
    "altered mask": (partial(flip, 5), ALTERED),
    "altered values": (partial(flip, -3), ALTERED),
    "another version": (
        partial(rewrite, lambda header, _: header.update(version=3)),
        "is in version 3 of the packed format and this reads 4",
    ),
    "shape": (partial(rewrite, lambda header, _: header["tensors"]["lm_head.weight"].update(shape=[64, 16])), ALTERED),
    "no header": (partial(rewrite, lambda header, _: header.clear()), UNREADABLE),
    "fewer values": (partial(rewrite, forged("values", lambda values: values[:-1])), ALTERED),
    "two dimensions": (partial(rewrite, forged("values", lambda values: values[:, None])), ALTERED),
    "other mask": (partial(rewrite, forged("mask", lambda mask: mask[:, :1].clone())), ALTERED),
    **{f"stray bit {bit}": (partial(rewrite, stray(bit)), ALTERED) for bit in (48, 55, 63)},
}


@pytest.fixture
def copied(packed_folder, tmp_path) -> Path:
    return Path(shutil.copytree(packed_folder, tmp_path / "copied"))


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_file_is_refused_in_one_line(case, copied, tmp_path):
    spoil, says = DAMAGED[case]
    spoil(copied / "model.packed.safetensors")
    (tmp_path / "back").mkdir()
    for read in (sparse.load_packed, lambda folder: sparse.unpack_files(folder, tmp_path / "back")):
        with pytest.raises(UserError, match=says) as caught:
            read(copied)
        assert "\n" not in str(caught.value) and "model.packed.safetensors" in str(caught.value)
    assert list((tmp_path / "back").iterdir()) == []


# A kernel that stops at the first access outside of a buffer, given matrices with random bits, also in the mask's last
# word: most are refused, the others are multiplied by few and by many tokens.
FUZZ = """
import sys, torch
from lib.sparse import kernel, layers, packed

kernel.FLAGS = (*kernel.FLAGS, "-g", "-fsanitize=address")
layers.cpu.multiplies = lambda dtype: False  # prompts are multiplied by the kernel, too
draw, multiplied = torch.Generator().manual_seed(0), 0
for trial in range(60):
    rows, columns = torch.randint(1, 200, (2,), generator=draw).tolist()
    weight = torch.randn(rows, columns, generator=draw) * (torch.rand(rows, columns, generator=draw) < 0.4)
    mask, values, negative, scales = (packed.pack_int8 if trial % 2 else packed.pack)(weight.half())
    if trial % 3 and mask is not None:
        mask[torch.randint(rows, (3,), generator=draw), -1] = torch.randint(-2**31, 2**31, (3,), generator=draw).int()
        values = torch.ones(int(packed.row_starts(mask)[-1]) + packed.PADDING).to(values.dtype)
    content = packed.PackedTensor(mask, values, negative, scales)
    if trial % 5 and not packed._fits(content, [rows, columns]):
        continue  # every fifth is multiplied although it should be refused: the kernel stays inside all the same
    layer = layers.SparseLinear(content, columns)
    layer.sparsity, multiplied = 0.5, multiplied + 1
    for tokens in (1, 3, 8, 100):
        layer(torch.randn(tokens, columns, generator=draw).half())
print("multiplied", multiplied)
"""


@pytest.mark.slow
@needs_kernel
def test_kernel_stays_inside_its_buffers_whatever_a_file_holds(tmp_path):
    library = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(library).is_absolute():
        pytest.skip("needs g++ with AddressSanitizer")
    env = os.environ | {"LD_PRELOAD": library, "ASAN_OPTIONS": "detect_leaks=0", "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", FUZZ], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and int(done.stdout.split()[1]) > 20, done.stderr[-2000:]


def test_packed_files_are_the_same_bytes_in_every_process(pruned, packed_folder, tmp_path):
    code = "import sys, pathlib; from lib import sparse; sparse.pack_files(*map(pathlib.Path, sys.argv[1:]))"
    env = os.environ | {"PYTHONHASHSEED": "1"}
    subprocess.run([sys.executable, "-c", code, pruned, tmp_path], cwd=ROOT, env=env, check=True)
    ours, theirs = ({file.name: file.read_bytes() for file in folder.iterdir()} for folder in (packed_folder, tmp_path))
    assert ours == theirs


def test_another_models_config_is_refused_in_one_line(copied, tmp_path):
    config = json.loads((copied / "config.json").read_text())
    for change, says in (
        ({"hidden_size": 64}, r"is packed with shape \[.*\], the model of its config.json has"),
        ({"num_hidden_layers": 2}, "is packed there, and the model of its config.json has none"),
        ({"num_hidden_layers": 4}, "lacks 9 weights of its config.json's model, first model.layers.3"),
        ({"model_type": "nothing"}, "config.json: cannot be used"),
    ):
        (copied / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=says) as caught:
            sparse.load_packed(copied)
        assert "\n" not in str(caught.value)
    rewrite(lambda header, _: header["tensors"].popitem(), copied / "model.packed.safetensors")
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="lacks 1 weights of its config.json's model"):
        sparse.load_packed(copied)
    with pytest.raises(UserError, match=r"holds no \*.packed.safetensors"):
        sparse.load_packed(tmp_path)


# ------------------------------------------------------------------------------------------------------- the build


@pytest.fixture
def fresh(tmp_path, monkeypatch) -> Path:
    """Return an empty cache folder, in which nothing was compiled yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kernel, "_loaded", kernel._loaded.__wrapped__)
    return tmp_path / "cache" / "alphapruning"


def without_home(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", Mock(side_effect=RuntimeError("Could not determine home directory.")))


def read_only(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nothing")


def without_compiler(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")


def unsupported_machine(monkeypatch):
    monkeypatch.setattr(cpu, "processor", dict)
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")


WITHOUT = {
    "no home": (without_home, "no place for the kernel"),
    "read-only": (read_only, "cannot be kept or loaded"),
    "no compiler": (without_compiler, "no C\\+\\+ compiler found"),
    "another machine": (unsupported_machine, r"\(riscv64\) has neither AVX2 nor NEON"),
}


@pytest.mark.parametrize("case", WITHOUT)
@torch.no_grad()
def test_without_a_kernel_the_model_runs_dense_and_one_line_says_why(
    case, fresh, monkeypatch, caplog, pruned, packed_folder, tiny_windows
):
    if case != "another machine" and not kernel.levels():
        pytest.skip("this CPU has no kernel")
    spoil, says = WITHOUT[case]
    spoil(monkeypatch)
    with pytest.raises(kernel.Unavailable, match=says) as caught:
        kernel.load_kernel()
    assert "\n" not in str(caught.value)
    model = sparse.load_packed(packed_folder)
    assert len(caplog.records) == 1 and "the model is unpacked and runs dense" in caplog.text
    assert not any(isinstance(module, SparseLinear | DenseLinear) for module in model.modules())
    expected = dense(pruned, torch.bfloat16)(tiny_windows[:1]).logits
    assert torch.equal(model(tiny_windows[:1]).logits, expected)
    caplog.clear()
    assert sparse.sparsify(dense(pruned, torch.bfloat16)) == 0
    assert len(caplog.records) == 1 and "the model stays dense" in caplog.text
    assert not fresh.exists() or list(fresh.iterdir()) == []


@needs_kernel
def test_library_is_compiled_once_and_again_for_other_flags(fresh, monkeypatch):
    compiled = pretended_compiler(monkeypatch)
    level = kernel.levels()[-1]
    library = kernel._built(level)
    assert kernel._built(level) == library and len(compiled) == 1
    assert [path.name for path in fresh.iterdir()] == [library.name]
    assert fresh.stat().st_mode & 0o777 == library.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(kernel, "FLAGS", (*kernel.FLAGS, "-DOTHER"))
    assert kernel._built(level) != library and len(compiled) == 2
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "9.99"))
    kernel._built(level)
    assert len(compiled) == 3
    compiled = pretended_compiler(monkeypatch, b"g++ 99")
    kernel._built(level)
    assert len(compiled) == 1 and len(list(fresh.iterdir())) == 4


def pretended_compiler(monkeypatch, version: bytes = b"g++ 1") -> list[bytes]:
    """Let a compiler of a ``version`` write other bytes at each call; return what it wrote so far."""
    compiled = []

    def run(command, **_):
        if command[-1] == "--version":
            return subprocess.CompletedProcess(command, 0, version)
        compiled.append(f"library {len(compiled)} of {version}".encode())
        Path(command[-1]).write_bytes(compiled[-1])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(kernel.subprocess, "run", run)
    return compiled


def of_another(path: Path, monkeypatch) -> None:
    lstat, other = Path.lstat, path.lstat()
    owned = SimpleNamespace(st_uid=os.getuid() + 1, st_mode=other.st_mode)
    monkeypatch.setattr(Path, "lstat", lambda self: owned if self == path else lstat(self))


UNSAFE = {
    "a folder of another user": lambda folder, _, patch: of_another(folder, patch),
    "a folder that all write": lambda folder, *_: folder.chmod(0o1777),
    "a folder that the group writes": lambda folder, *_: folder.chmod(0o770),
    "a library of another user": lambda _, library, patch: of_another(library, patch),
    "a library that all write": lambda _, library, __: library.chmod(0o777),
    "an empty library": lambda _, library, __: library.write_bytes(b""),
    "a library that is cut off": lambda _, library, __: library.write_bytes(library.read_bytes()[:-1]),
    "a library that was changed": lambda _, library, __: library.write_bytes(b"L" + library.read_bytes()[1:]),
}


@needs_kernel
@pytest.mark.parametrize("case", UNSAFE)
def test_a_library_that_others_could_have_written_is_not_loaded(case, fresh, monkeypatch, caplog):
    compiled = pretended_compiler(monkeypatch)
    level = kernel.levels()[-1]
    library = kernel._built(level)
    UNSAFE[case](fresh, library, monkeypatch)
    again = kernel._built(level)
    assert len(compiled) == 2 and again.read_bytes() == compiled[-1]
    assert again.is_relative_to(fresh) == ("folder" not in case) and ("is not used" in caplog.text) == (
        "folder" in case
    )


@needs_kernel
def test_a_library_that_cannot_be_loaded_is_compiled_once_more(fresh, monkeypatch):
    level = kernel.levels()[-1]
    compiled = pretended_compiler(monkeypatch)
    library = kernel._built(level)
    monkeypatch.setattr(kernel, "Kernel", Mock(side_effect=[OSError("file too short"), "loaded"]))
    assert kernel.load_kernel(level) == "loaded" and len(compiled) == 2 and library.exists()
    monkeypatch.setattr(kernel, "Kernel", Mock(side_effect=AttributeError("multiply")))
    with pytest.raises(kernel.Unavailable, match="cannot be kept or loaded"):
        kernel.load_kernel(level)


@needs_kernel
def test_a_cache_relative_to_the_current_folder_is_ignored(fresh, tmp_path, monkeypatch):
    pretended_compiler(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert kernel._built(kernel.levels()[-1]).is_relative_to(tmp_path / "home" / ".cache" / "alphapruning")
    assert not Path("here").exists()


# ----------------------------------------------------------------------------------------------------- generate.py


@pytest.mark.machine
@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["nowhere", "x"], "error: nowhere: folder not found"),
        (["{}", "x", "--tokens", "1"], "--tokens 1: must be at least 2"),
        (["{}", "x", "--compare", "nowhere"], "error: nowhere: folder not found"),
        (
            ["{}", "Ab", "--tokens", "127"],
            "--tokens 127: the prompt has 2 tokens and {} a context of 128; give fewer, or a shorter",
        ),
        (["{}", "x", "--threads", "100000"], "--threads 100000: must be at least 0 and at most "),
        (["{}", ""], "error: '': is empty"),
        (["{}", "unstuns", "--compare", "{few}"], "few: its tokenizer gives token"),
    ],
)
def test_generate_bad_input(packed_folder, few, flags, says, capsys, monkeypatch):
    monkeypatch.setattr(generate, "Runner", lambda *_: pytest.fail("the model was loaded"))
    assert generate.main([flag.format(packed_folder, few=few) for flag in flags]) == 2
    err = capsys.readouterr().err
    assert says.format(packed_folder) in err and err.count("\n") == 1


@pytest.fixture
def few(tiny_folder, tmp_path) -> Path:
    """Return the folder of a model with fewer embeddings than its tokenizer has tokens."""
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "few"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 20}))
    return folder
