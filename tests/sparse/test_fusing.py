"""Fused calls: layers of one input against each by itself, norms against transformers', and the number of calls."""

import copy
import threading

import pytest
import torch
from conftest import tiny_llama
from test_layers import linear, matrix, needs_kernel
from test_load_models import build
from torch import nn

from lib import sparse
from lib.models.layers import prunable_modules
from lib.pruning.pruners import magnitude
from lib.sparse import DenseLinear, SparseLinear, fusing, kernel
from lib.sparse.layers import FusedProjections

pytestmark = needs_kernel
ROWS = (24, 8, 40)
KERNEL_DTYPES = {  # of the three layers
    "packed": (SparseLinear.from_linear,) * 3,
    "dense": (DenseLinear,) * 3,
    "both": (SparseLinear.from_linear, DenseLinear, SparseLinear.from_linear),
}


def layers_of(kinds: str, dtype: torch.dtype = torch.bfloat16, bias: bool = True) -> list[nn.Module]:
    """Return three layers of 40 columns, which no step of 32 divides."""
    biases = [torch.randn(rows).to(dtype) if bias else None for rows in ROWS]
    weights = [matrix(rows, 40, 0.5, dtype, rows) for rows in ROWS]
    return [make(linear(w, b)) for make, w, b in zip(KERNEL_DTYPES[kinds], weights, biases, strict=True)]


def tokens_of(count: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(count, 40, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.machine
@pytest.mark.parametrize("dtype", kernel.KERNEL_DTYPES)
@pytest.mark.parametrize("kinds", KERNEL_DTYPES)
@torch.no_grad()
def test_layers_of_one_input_give_what_each_gives_by_itself(kinds, dtype):
    layers = layers_of(kinds, dtype)
    for count in range(1, 11):  # 9 and 10 are not the kernel's
        x = tokens_of(count, count, dtype)
        alone = [layer(x) for layer in layers]
        FusedProjections(layers)
        for order in ((0, 1, 2), (2, 0, 1), (1, 1, 0, 0, 2)):
            for place in order:
                y = layers[place](x)
                assert torch.equal(y, alone[place]) and y.is_contiguous()
        assert torch.equal(layers[1](x.view(1, count, 40)), alone[1].view(1, count, 8))
        for layer in layers:
            layer.shared = None


@torch.no_grad()
def test_what_is_held_is_of_that_very_tensor():
    layers = layers_of("both")
    one, other = tokens_of(1, 1), tokens_of(1, 2)
    alone = [[layer(x) for layer in layers] for x in (one, other)]
    FusedProjections(layers)
    assert torch.equal(layers[0](one), alone[0][0])
    assert torch.equal(layers[1](other), alone[1][1])  # and what was held of `one` is gone
    assert torch.equal(layers[1](one), alone[0][1])
    assert torch.equal(layers[2](other), alone[1][2]) and torch.equal(layers[0](other), alone[1][0])
    layers[0](one)
    one += 1  # taken once: the same tensor with other values, given again to the same layer, is multiplied again
    assert not torch.equal(layers[0](one), alone[0][0])


@torch.no_grad()
def test_threads_do_not_take_each_others_products():
    layers = layers_of("packed")
    inputs = [tokens_of(1, seed) for seed in range(4)]
    expected = [[layer(x) for layer in layers] for x in inputs]
    FusedProjections(layers)
    wrong = []

    def work(index: int) -> None:
        for _ in range(300):
            found = [layer(inputs[index]) for layer in layers]
            if not all(torch.equal(a, b) for a, b in zip(found, expected[index], strict=True)):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_gradients_other_weights_and_copies():
    layers = layers_of("dense", bias=False)
    FusedProjections(layers)
    x = tokens_of(2)
    layers[1].weight.requires_grad_(True)
    layers[0](x)
    layers[1](x).sum().backward()  # one that wants gradients has them, although its siblings do not
    assert torch.equal(layers[1].weight.grad[0], x.sum(0))
    with torch.no_grad():
        layers[2].weight.data = matrix(40, 40, 0.0, torch.bfloat16, 7)  # lies elsewhere
        layers[0](x)
        assert torch.equal(layers[2](x), DenseLinear(linear(layers[2].weight.data))(x))
        twin = copy.deepcopy(nn.ModuleList(layers))
        twin[0].weight.data.zero_()
        expected = layers[0](x)
        assert not twin[0](x).any() and twin[1].shared is twin[0].shared is not layers[0].shared
        assert torch.equal(layers[0](x), expected)
        half = nn.ModuleList(layers).half()
        off = half[0](x.half()) - expected.half()
        assert off.abs().max() <= 2**-8 * expected.abs().max()  # bfloat16's rounding; the rest is exact in float16


def pruned_llama(zeros: float = 0.6) -> nn.Module:
    model = tiny_llama().bfloat16().requires_grad_(False)
    for module in prunable_modules(model).values():
        module.weight.data = magnitude(module.weight.data, None, zeros, None)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):  # 1 in a model that was not trained: nothing to round
            parameter.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(2))
    return model


@torch.no_grad()
def test_a_token_takes_four_calls_a_block_and_one_for_the_head(monkeypatch, tiny_windows):
    model = pruned_llama()
    assert sparse.sparsify(model) == 21
    calls = []
    real = kernel.Kernel.multiply_each
    monkeypatch.setattr(
        kernel.Kernel, "multiply_each", lambda self, w, x, ys, n: calls.append(len(ys)) or real(self, w, x, ys, n)
    )
    model(tiny_windows[:1, :1], use_cache=False)
    assert calls == [3, 1, 2, 1] * 3 + [1]
    calls.clear()
    model(tiny_windows[:1, :1], use_cache=True)  # compiled steps multiply in the kernel's own code
    assert calls == [1]


@torch.no_grad()
def test_fused_model_says_what_the_unfused_says(monkeypatch, tiny_windows):
    fused, plain = pruned_llama(), pruned_llama()
    exact = plain.float()(tiny_windows[:2, :3]).logits
    plain.bfloat16()
    monkeypatch.setattr(fusing, "fuse", lambda *_: None)
    sparse.sparsify(plain)
    monkeypatch.undo()
    sparse.sparsify(fused)
    ours, theirs = (model(tiny_windows[:2, :3]).logits.float() for model in (fused, plain))
    # Norms round once less; 1.5 for the luck of one draw.
    assert not torch.equal(ours, theirs) and (ours - exact).norm() <= 1.5 * (theirs - exact).norm()


@torch.no_grad()
@pytest.mark.parametrize(("kind", "replaced"), [("llama", 7), ("qwen2", None), ("gemma3", 0), ("opt projected", 0)])
def test_only_norms_that_compute_the_same_become_torchs(kind, replaced):
    model = (tiny_llama() if kind == "llama" else build(kind)).bfloat16()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and "norm" in name:
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    norms = {name: m for name, m in model.named_modules() if "norm" in name.lower() and not list(m.children())}
    assert norms
    x = {name: torch.randn(3, 5, len(m.weight)).bfloat16() * 20 for name, m in norms.items()}
    before = {name: module(x[name]).float() for name, module in norms.items()}
    sparse.sparsify(model)
    after = {name: model.get_submodule(name) for name in norms}
    count = sum(type(module) is nn.RMSNorm for module in after.values())
    assert count == (len(norms) if replaced is None else replaced)
    for name, module in after.items():
        # Two roundings to 8 bits, or one.
        assert ((module(x[name]).float() - before[name]).abs() <= 2**-7 * before[name].abs() + 1e-6).all()
