"""int8 values: products against float64 and by pencil, files, and whole models against what the values stand for."""

import copy
import ctypes
from pathlib import Path

import pytest
import torch
from conftest import error_line, tiny_llama
from safetensors.torch import load_file
from test_decode import compiled, decode, some_ids
from test_layers import CLOSE, HALF_ULP, SHAPES, dense, linear, matrix, needs_kernel, rewrite, with_zeros
from test_load_models import build

from lib import sparse
from lib.core import cpu
from lib.core.errors import UserError
from lib.evaluation.perplexity import perplexity
from lib.sparse import DenseLinear, SparseEmbedding, SparseLinear, kernel, packed
from scripts.speedup import engines, pack


def stood_for(weight: torch.Tensor) -> torch.Tensor:
    """Return the numbers that the rounded values stand for, in float64 and not rounded to the weight's dtype."""
    content = packed.pack_int8(weight)
    return packed.unpack(content._replace(scales=content.scales.float()), list(weight.shape)).double()


def layer_of(weight: torch.Tensor, level: str, bias: torch.Tensor | None = None) -> SparseLinear:
    return SparseLinear.from_dense(linear(weight, bias), kernel.load_kernel(level), packed.pack_int8)


# --------------------------------------------------------------------------------------------------- rounded weights


def test_rounding_by_pencil():
    weight = torch.zeros(3, 66, dtype=torch.bfloat16)
    weight[0, :4] = torch.tensor([127, -1, 0, 0.4])  # scales: 1 and 0
    weight[2, :3] = torch.tensor([254.0, 1, 3])  # 2, with a half that goes to the even 0 and 2, ...
    weight[2, 64] = -0.5  # ... and the next number above 1 / 254, of which that is 126
    mask, values, negative, scales = packed.pack_int8(weight)
    assert mask.tolist() == [[0b11, 0, 0, 0], [0] * 4, [0b101, 0, 1, 0]] and negative is None
    assert values.tolist() == [127, -1, 127, 2, -126] + [0] * packed.PADDING
    assert scales.tolist()[:5] == [1, 0, 0, 0, 2] and scales[5] == 2**-8 * (1 + 2 / 128)
    assert len(scales) == 6 + packed.PADDING and scales.dtype == torch.bfloat16
    back = packed.unpack(packed.PackedTensor(mask, values, None, scales), [3, 66])
    assert back[0, :4].tolist() == [127, -1, 0, 0] and back[2, :3].tolist() == [254, 0, 4] and not back[1].any()
    assert back[2, 64].item() == pytest.approx(-0.5, rel=2**-8) and back.shape == (3, 66)


@pytest.mark.parametrize("kind", [*kernel.KERNEL_DTYPES, torch.float32])
@pytest.mark.parametrize("zeros", [0, 0.7])
def test_rounding_is_by_half_a_step_at_most(kind, zeros):
    weight = matrix(40, 248, zeros, kind) * 10.0 ** torch.arange(-4, 4).repeat(5)[:, None].to(kind)  # rows of all sizes
    content = packed.pack_int8(weight)
    assert (content.mask is None) == (zeros == 0)
    step = content.scales[: -packed.PADDING].view(40, 4).double().repeat_interleave(64, 1)[:, :248]
    assert ((stood_for(weight) - weight.double()).abs() <= 0.5001 * step).all()
    assert (content.values != -128).all()
    # The step is a 127th of the largest, a rounding more; below float16's normal numbers 2^-24 more.
    largest = torch.nn.functional.pad(weight.double(), (0, 8)).view(40, 4, 64).abs().amax(-1)
    unit = 2**-10 if kind == torch.float16 else 2**-7
    assert (step[:, ::64] <= largest[:, :4] / 127 * (1 + unit) + 2**-24).all()


def test_only_finite_matrices_are_rounded():
    for weight in (torch.ones(3), torch.ones(2, 3, 4), torch.ones(2, 3, dtype=torch.int64), torch.ones(0, 4)):
        assert not packed.can_round(weight)
    for value in (torch.nan, torch.inf):
        assert not packed.can_round(torch.tensor([[1.0, value]])) and packed.can_round(torch.tensor([[1.0, 0]]))


# ---------------------------------------------------------------------------------------------------------- products


def test_product_by_pencil(level):
    weight = torch.tensor([[0.0, 254, 0, -2], [0, 0, 0, 0], [127, 0, 64, 1]], dtype=torch.bfloat16)  # steps: 2, 0, 1
    layer = layer_of(weight, level, torch.tensor([0.0, 7, 0]).bfloat16())
    # The step of x is 0.5: 0.2 becomes 0, 1.3 becomes 1.5.
    y = layer.kernel.multiply(
        layer.matrix(torch.bfloat16), torch.tensor([[63.5, 0.2, 1.3, 4]]).bfloat16(), torch.float32
    )
    assert y.tolist() == [[-8, 7, 127 * 63.5 + 64 * 1.5 + 4]]


@pytest.mark.parametrize("kind", kernel.KERNEL_DTYPES)
def test_products_of_few_tokens(level, kind, threads):
    for index, (rows, columns) in enumerate(SHAPES):
        for zeros in (0.0, 0.5, 0.95, 1.0):
            weight = matrix(rows, columns, zeros, kind, index)
            bias = torch.randn(rows, generator=torch.Generator().manual_seed(9)).to(kind)
            layer, exact = layer_of(weight, level, bias), stood_for(weight).T
            for tokens in range(1, 9):
                draw = torch.Generator().manual_seed(tokens)
                x = torch.randn(tokens, columns, generator=draw)
                x = (x * 10 ** torch.randint(-3, 3, (tokens, 1), generator=draw)).to(kind)
                whole = torch.randint(-127, 128, (tokens, columns), generator=draw)  # what int8 holds exactly
                whole[:, ::64] = 127
                for numbers, rounds in ((x, True), ((whole / 32).to(kind), False)):
                    y = layer.kernel.multiply(layer.matrix(kind), numbers, torch.float32)
                    groups = torch.nn.functional.pad(numbers.double(), (0, -columns % 64)).unflatten(1, (-1, 64))
                    # Half a step of 64 numbers, but for float32's rounding of a half to either side.
                    half = rounds * groups.abs().amax(-1).repeat_interleave(64, 1)[:, :columns] / 254 * 1.0001
                    size = numbers.double().abs() @ exact.abs() + bias.double().abs()
                    off = (y - numbers.double() @ exact - bias.double()).abs()
                    assert (off <= half @ exact.abs() + CLOSE * size).all()
                twice = layer.kernel.multiply(layer.matrix(kind), 2 * x, torch.float32) - bias.float()
                once = layer.kernel.multiply(layer.matrix(kind), x, torch.float32) - bias.float()
                assert ((twice - 2 * once).abs() <= CLOSE * (twice.abs() + 3 * bias.float().abs())).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_number_that_is_not_finite_spoils_its_token_alone(level, value):
    for zeros in (0, 0.6):
        layer = layer_of(matrix(20, 200, zeros, torch.bfloat16), level)
        x = torch.randn(3, 200, generator=torch.Generator().manual_seed(1)).bfloat16()
        expected = layer(x)
        x[1, 70] = value
        y = layer(x)
        assert y[1].isnan().all() and torch.equal(y[::2], expected[::2])


@pytest.mark.parametrize("multiplies", [False, True])
@pytest.mark.parametrize("kind", kernel.KERNEL_DTYPES)
def test_products_of_many_tokens_round_the_weights_alone(level, kind, multiplies, threads, monkeypatch):
    monkeypatch.setattr(cpu, "multiplies", lambda _: multiplies)
    for index, (rows, columns) in enumerate(SHAPES):
        for zeros in (0.0, 0.6):
            weight = matrix(rows, columns, zeros, kind, index)
            layer, content = layer_of(weight, level), packed.pack_int8(weight)
            tile = torch.empty(rows, layer._matrix.words * 32, dtype=kind)
            layer.kernel.unpack(layer._matrix, torch.arange(rows), tile)
            assert torch.equal(tile[:, :columns], packed.unpack(content, [rows, columns]))
            x = torch.randn(20, columns, generator=torch.Generator().manual_seed(2)).to(kind)
            exact = x.double() @ stood_for(weight).T
            size = x.double().abs() @ stood_for(weight).abs().T
            # The weights' rounding to 16 bits, one of the sum, and on ARM torch's of parts of it.
            assert ((layer(x) - exact).abs() <= 3 * HALF_ULP[kind] * size + 1e-6).all()


@pytest.mark.parametrize("kind", kernel.KERNEL_DTYPES)
@pytest.mark.parametrize("zeros", [0, 0.6])
def test_rows_of_an_embedding(level, kind, zeros, threads):
    weight, library = matrix(40, 200, zeros, kind), kernel.load_kernel(level)
    content = packed.pack_int8(weight)
    table, expected = SparseEmbedding(content, 200, kernel=library), packed.unpack(content, [40, 200])
    ids = torch.randint(40, (8, 5), generator=torch.Generator().manual_seed(1))
    for some in (ids, ids[:, 1:2], ids.int(), ids[0, 0], ids[:0]):  # a column's numbers are apart
        assert torch.equal(table(some), expected[some])
    place = ctypes.addressof(table.matrix(kind))
    front = kernel.DecoderStruct(None, place, None, None, 0, 0, 200, kind == torch.float16)
    out, places = torch.empty(8, 200, dtype=kind), (ctypes.c_int64 * 24)(*ids[:, 2], *[0] * 16)
    library.decode(ctypes.addressof(front), places, 8, None, None, 1, 1, out.data_ptr(), threads)
    assert torch.equal(out, expected[ids[:, 2]])
    for wrong in (-1, 40):
        with pytest.raises(IndexError, match="token ids must be 0 to 39"):
            table(torch.tensor([3, wrong]))


# -------------------------------------------------------------------------------------------------- files and models


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return the folder of a packed model with 70 % zeros and int8 values; beside it "model". To be read only."""
    place = tmp_path_factory.mktemp("int8")
    with_zeros(build("llama3 tied"), 0.7).save_pretrained(place / "model")
    (place / "packed").mkdir()
    sparse.pack_files(place / "model", place / "packed", "int8")
    return place / "packed"


def test_a_folder_says_what_it_holds_and_is_smaller(folder, tmp_path, capsys):
    exact = tmp_path / "exact"
    exact.mkdir()
    sparse.pack_files(folder.parent / "model", exact)
    assert sparse.holds_int8(folder) and not sparse.holds_int8(exact)
    sizes = [sum(path.stat().st_size for path in place.glob("*.safetensors")) for place in (folder, exact)]
    assert sizes[0] < sizes[1]
    assert pack.main([str(folder), "--unpack", "--save", str(tmp_path / "back")]) == 0
    assert "the matrices from int8, as products take them" in capsys.readouterr().out
    assert pack.main([str(exact), "--unpack", "--save", str(tmp_path / "same")]) == 0
    assert "bit for bit" in capsys.readouterr().out
    model, back = (dense(place, torch.bfloat16) for place in (folder.parent / "model", tmp_path / "back"))
    for (name, ours), theirs in zip(model.named_parameters(), back.parameters(), strict=True):
        rounded = packed.unpack(packed.pack_int8(ours.data), list(ours.shape)) if ours.ndim == 2 else ours
        assert torch.equal(rounded, theirs), name


@needs_kernel
def test_megabytes_are_those_of_the_file_and_of_where_rows_begin(folder):
    model = engines.ENGINES["packed"]({"path": str(folder)}, {"cores": 1})
    held = sum(buffer.nbytes for buffer in model.model.buffers())  # of the rotations
    for name, tensor in load_file(next(folder.glob("*.safetensors"))).items():
        owners = 2 if "embed_tokens" in name else 1  # the tied head looks up its rows itself
        held += tensor.nbytes + (8 * owners * (len(tensor) + 1) if name.endswith(".mask") else 0)
    assert round(1e6 * model.megabytes()) == held


def test_values_are_refused_where_they_do_nothing(folder, tmp_path, capsys):
    command = [str(folder), "--unpack", "--save", str(tmp_path / "back"), "--values", "int8"]
    assert "--values does nothing" in error_line(capsys, pack.main(command))
    assert "int4" in error_line(capsys, pack.main([str(folder), "--save", "x", "--values", "int4"]))


@needs_kernel
@pytest.mark.machine
def test_a_model_runs_on_its_rounded_values(folder, tmp_path, tiny_windows):
    model = sparse.load_packed(folder)
    (tmp_path / "back").mkdir()
    sparse.unpack_files(folder, tmp_path / "back")
    rounded = dense(tmp_path / "back", torch.bfloat16)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert isinstance(head, SparseLinear) and isinstance(embedding, SparseEmbedding) and compiled(model)
    assert embedding.values.data_ptr() == head.values.data_ptr()  # tied
    assert torch.equal(embedding(torch.arange(head.out_features)), rounded.get_input_embeddings().weight)
    windows = tiny_windows % model.config.vocab_size
    assert perplexity(model, windows) == pytest.approx(perplexity(rounded, windows), rel=0.01)  # as of 16 bits
    ids = some_ids(2) % model.config.vocab_size
    ours, theirs = decode(model, ids), decode(rounded, ids)
    # 127 steps of the largest number of x, several products deep.
    assert (ours - theirs).norm() <= 0.05 * theirs.norm()


def test_without_the_kernel_the_values_are_unpacked(folder, tmp_path, monkeypatch, caplog, tiny_windows):
    monkeypatch.setattr(kernel, "levels", list)
    (tmp_path / "back").mkdir()
    sparse.unpack_files(folder, tmp_path / "back")
    ids = tiny_windows[:1] % 60
    assert torch.equal(sparse.load_packed(folder)(ids).logits, dense(tmp_path / "back", torch.bfloat16)(ids).logits)
    assert "the model is unpacked and runs dense" in caplog.text


@needs_kernel
@pytest.mark.parametrize("kind", ["gpt-neox", "opt projected", "qwen2", "gemma3"])
@torch.no_grad()
def test_other_kinds_of_models(kind, tmp_path, tiny_windows):
    with_zeros(build(kind)).save_pretrained(tmp_path / "model")
    for name, values in (("packed", "int8"), ("exact", "exact")):
        (tmp_path / name).mkdir()
        sparse.pack_files(tmp_path / "model", tmp_path / name, values)
    model, exact = sparse.load_packed(tmp_path / "packed"), sparse.load_packed(tmp_path / "exact")
    assert not any(isinstance(module, DenseLinear) for module in model.modules())
    for length in (5, 24):
        ids = tiny_windows[:1, :length] % model.config.get_text_config().vocab_size
        ours, theirs = model(ids).logits, exact(ids).logits
        assert (ours - theirs).norm() <= 0.08 * theirs.norm()


@needs_kernel
def test_sparsify_rounds_dense_layers_too():
    config = tiny_llama().config
    config.hidden_size, config.intermediate_size, config.head_dim = 64, 128, 16  # whole steps, which need no mask
    model = with_zeros(type(tiny_llama())(config).eval(), every=2)
    expected = decode(copy.deepcopy(model), some_ids(3))
    assert sparse.sparsify(model, values="int8") == 22 and compiled(model)
    masks = [module.mask is None for module in model.modules() if isinstance(module, SparseLinear)]
    assert masks.count(True) == 12  # the head and the embedding among them
    assert (decode(model, some_ids(3)) - expected).norm() <= 0.08 * expected.norm()


FORGED = {
    "fewer scales": lambda parts: parts | {"scales": parts["scales"][:-1]},
    "scales of another dtype": lambda parts: parts | {"scales": parts["scales"].float()},
    "values of another dtype": lambda parts: parts | {"values": parts["values"].to(torch.uint8)},
    "no values": lambda parts: parts | {"values": None},
    "no mask": lambda parts: parts | {"mask": None},
    "signs of zeros": lambda parts: parts | {"negative": torch.zeros(1, dtype=torch.uint8)},
    "fewer values": lambda parts: parts | {"values": parts["values"][:-1]},
    "a bit beyond the columns": lambda parts: parts | {"mask": parts["mask"] | -(1 << 31)},
}


@pytest.mark.parametrize("case", FORGED)
def test_forged_files_are_refused_in_one_line(case, folder, tmp_path):
    name = "model.layers.0.mlp.down_proj.weight"
    path = tmp_path / f"model{packed.SUFFIX}"
    path.write_bytes(next(folder.glob("*.safetensors")).read_bytes())

    def forge(header, tensors):
        parts = {field: tensors.pop(f"{name}.{field}", None) for field in packed.PackedTensor._fields}
        parts = FORGED[case](parts)
        tensors |= {f"{name}.{field}": part.clone() for field, part in parts.items() if part is not None}
        entry = header["tensors"][name]
        entry["sha256"] = packed._digest(packed.PackedTensor(**parts), entry["shape"])

    rewrite(forge, path)
    with pytest.raises(UserError, match="is not what was packed") as caught:
        list(packed.read_file(path))
    assert "\n" not in str(caught.value)
