"""Products of many tokens that skip zeros, bit for bit, the passes that use them, and SparseGPT's compiled solver."""

from functools import cache
from unittest.mock import Mock

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from conftest import tiny_llama
from test_layers import linear, matrix, needs_kernel
from test_sparsegpt_triton import plain_loop, random_block, ties
from torch import nn

from lib.calibration.hidden import advance, enter_blocks
from lib.evaluation.perplexity import perplexity
from lib.models.weights import weights_of
from lib.pruning import sparsegpt
from lib.sparse import SparseLinear, kernel, skipping, zeros_skipped


def in_order(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return x W' as the kernel defines it: in float32, column by column, each product and addition rounded once.

    Float64 holds a product of two float32 exactly; its own rounding of the sum, before the one to float32, would show
    once in half a billion additions.
    """
    y = torch.zeros(len(x), len(weight))
    for column in range(weight.shape[1]):
        y = (y.double() + x[:, column, None].double() * weight[:, column].double()).float()
    return y


@pytest.fixture
def products(monkeypatch):
    """Return a list that grows by the number of tokens for each product that skips zeros."""
    tokens, real = [], kernel.Kernel.multiply_many
    monkeypatch.setattr(kernel.Kernel, "multiply_many", lambda *a: tokens.append(len(a[2])) or real(*a))
    return tokens


@cache  # the same at every level and with any number of threads
def products_in_order(kind: torch.dtype) -> list[tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]]:
    """Return weights of ``kind``, each with inputs of several numbers of tokens and the products."""
    products = []
    for index, (rows, columns) in enumerate([(7, 31), (1, 64), (5, 8), (40, 700), (130, 129)]):
        for zeros in (0.0, 0.5, 0.9, 1.0):
            weight, draw = matrix(rows, columns, zeros, kind, index), torch.Generator().manual_seed(index)
            # One panel, a full one, two with a ragged end, three.
            inputs = [torch.randn(tokens, columns, generator=draw) for tokens in (1, 9, 96, 97, 205)]
            products.append((weight, [(x, in_order(weight.float(), x)) for x in inputs]))
    return products


@pytest.mark.parametrize("kind", [torch.float32, *kernel.KERNEL_DTYPES])
def test_sums_have_the_bits_of_additions_in_order(level, kind, threads):
    library = kernel.load_kernel(level)
    for weight, pairs in products_in_order(kind):
        layer = None if kind == torch.float32 else SparseLinear.from_dense(linear(weight), library)
        skipped = weight if layer is None else layer._matrix
        for x, expected in pairs:
            assert torch.equal(library.multiply_many(skipped, x), expected)


def test_more_tokens_than_a_slab_of_panels(level):
    weight, x = matrix(9, 40, 0.6, torch.float32), torch.randn(900, 40, generator=torch.Generator().manual_seed(1))
    y = kernel.load_kernel(level).multiply_many(weight, x)
    assert torch.equal(y, in_order(weight, x))
    assert torch.equal(y[500:], kernel.load_kernel(level).multiply_many(weight, x[500:].contiguous()))


def test_what_is_not_a_number_stays_where_it_is(level):
    weight = torch.tensor([[0.0, 1, 0], [torch.nan, 0, 0], [0, 0, -0.0]])
    x = torch.tensor([[1.0, torch.inf, 2], [3, 4, 5]])
    y = kernel.load_kernel(level).multiply_many(weight, x)
    assert y[:, 0].tolist() == [torch.inf, 4] and y[:, 1].isnan().all() and y[:, 2].tolist() == [0, 0]


@needs_kernel
@pytest.mark.parametrize("kind", kernel.KERNEL_DTYPES)
@pytest.mark.parametrize(("zeros", "skips"), [(0.7, True), (0.35, False)])
def test_packed_layers_skip_zeros_in_prompts_where_that_pays(kind, zeros, skips, products, monkeypatch):
    monkeypatch.setattr("lib.core.cpu.multiplies", lambda _: False)
    weight = matrix(70, 200, zeros, kind)
    bias = torch.randn(70, generator=torch.Generator().manual_seed(2)).to(kind)
    x = torch.randn(3, 11, 200, generator=torch.Generator().manual_seed(3)).to(kind)
    y = SparseLinear.from_dense(linear(weight, bias))(x)
    assert products == ([33] if skips else []) and y.dtype == kind
    expected = x.double() @ weight.double().T + bias.double()
    size = x.double().abs() @ weight.double().abs().T + bias.double().abs()
    # One rounding to the kind, of up to two (torch may round before the bias is added); float32 sums of 201 terms.
    assert ((y - expected).abs() <= (3e-6 + 2 * torch.finfo(kind).eps / 2) * size).all()


# ---------------------------------------------------------------------------------------------------------- passes


def layers() -> dict[str, nn.Linear]:
    """Return layers as ``zeros_skipped`` may meet them; only ``pruned`` and ``biased`` are suitable."""
    wide = {"rows": 256, "columns": 256, "kind": torch.float32}
    return {
        "pruned": linear(matrix(zeros=0.5, **wide)),
        "biased": linear(matrix(zeros=0.9, **wide), torch.randn(256)),
        "dense": linear(matrix(zeros=0.3, **wide)),
        "small": linear(matrix(16, 16, 0.9, torch.float32)),
        "half": linear(matrix(256, 256, 0.9, torch.bfloat16)),
        "strided": linear(matrix(zeros=0.9, **wide).T),
        "hooked": add_hook_to_module(linear(matrix(zeros=0.9, **wide)), ModelHook()),
        "other": type("Other", (nn.Linear,), {})(256, 256, bias=False).requires_grad_(False),
    }


@needs_kernel
def test_layers_that_skip_their_zeros_and_layers_that_do_not():
    made = layers()
    before = {name: vars(layer).get("forward") for name, layer in made.items()}
    x = torch.randn(2, 64, 256, generator=torch.Generator().manual_seed(0))
    expected = {name: made[name](x) for name in ("pruned", "biased")}
    with pytest.raises(KeyError), zeros_skipped(made.values()) as count:  # as before after an error, too
        assert count == 2
        replaced = {name for name, layer in made.items() if vars(layer).get("forward") is not before[name]}
        assert replaced == {"pruned", "biased"}
        for name in replaced:
            y = made[name](x)
            weight, bias = made[name].weight, made[name].bias
            sums = in_order(weight, x.flatten(0, 1)).view(2, 64, 256)
            assert torch.equal(y, sums if bias is None else sums + bias)
            torch.testing.assert_close(y, expected[name], rtol=1e-5, atol=1e-5)  # torch adds in another order
        raise KeyError
    assert {name: vars(layer).get("forward") for name, layer in made.items()} == before


@needs_kernel
def test_what_the_kernel_does_not_compute_is_left_to_torch():
    layer, x = layers()["biased"], torch.randn(64, 256)
    few, wide = layer(x[:63]), layer.double()(x.double())
    layer.float()
    with zeros_skipped([layer]):
        assert torch.equal(layer(x[:63]), few)
        watched = x.clone().requires_grad_()
        layer(watched).sum().backward()
        assert torch.allclose(watched.grad, layer.weight.sum(0).expand(64, -1), atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        with pytest.raises(RuntimeError):  # twice as wide, not twice as many
            layer(torch.randn(64, 512))
        layer.double()
        assert torch.equal(layer(x.double()), wide)
        with pytest.raises(RuntimeError):
            layer(x)


def test_without_a_kernel_zeros_are_multiplied(monkeypatch):
    monkeypatch.setattr(skipping, "load_kernel", Mock(side_effect=kernel.Unavailable("no compiler")))
    layer = layers()["pruned"]
    with zeros_skipped([layer]) as count:
        assert count == 0 and "forward" not in vars(layer)


@needs_kernel
def test_pruned_passes_and_perplexity_skip_zeros(products, monkeypatch):
    monkeypatch.setattr(skipping, "MIN_WEIGHTS", 1)
    monkeypatch.setattr(skipping, "MIN_TOKENS", 1)
    model = tiny_llama()
    windows = torch.randint(3, 300, (3, 24), generator=torch.Generator().manual_seed(0))
    weights = weights_of(model)
    layers = len(weights.layers)
    perplexity(model, windows)
    assert not products
    for block in weights.visit(write=True):
        for layer in block.linears.values():
            layer.weight.data *= torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    with monkeypatch.context() as patch:
        patch.setattr(skipping, "SKIP_FROM", 2.0)  # never
        plain = perplexity(model, windows), enter_blocks(weights, windows)
        for block in weights.visit():
            advance(block, plain[1])
    assert not products
    assert perplexity(model, windows) == pytest.approx(plain[0], rel=1e-5)  # the order of float32 additions
    assert len(products) == layers * len(windows)
    inputs = enter_blocks(weights, windows)
    hook = Mock(return_value=None)
    for block in weights.visit():
        handles = [layer.register_forward_hook(hook) for layer in block.linears.values()]
        advance(block, inputs)
        for handle in handles:
            handle.remove()
    assert len(products) == 2 * layers * len(windows) and hook.call_count == layers * len(windows)
    torch.testing.assert_close(inputs.hidden, plain[1].hidden, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------- SparseGPT's solver


def rounded_once(column: torch.Tensor, factor: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
    return (column.double() - factor.double() * error.double()).float()  # as in ``in_order``


@pytest.mark.parametrize("group", [None, 2, 4, 8, 5])
def test_solver_has_the_bits_of_a_plain_loop(level, group, threads):
    for columns, outputs in ((128, 40), (127, 3), (20, 70), (1, 1), (40, 96)):
        columns -= columns % (group or 1)
        if columns == 0:
            continue
        block, *rest = random_block(columns, outputs, group)
        expected = block.clone()
        expected_errors = plain_loop(expected, *rest, rounded_once)
        errors = kernel.load_kernel(level).solve_block(block, *rest)
        assert torch.equal(block, expected) and torch.equal(errors, expected_errors)


def test_solver_gives_ties_to_the_upper_column(level):
    block, *rest = ties()
    kernel.load_kernel(level).solve_block(block, *rest)
    for output in range(6):
        gone = min(output, 4)
        assert block[:, output].tolist() == ([0.0] * gone + [1.0] * (4 - gone)) * 2


@needs_kernel
@pytest.mark.parametrize("nm", [None, (2, 4)])
def test_sparsegpt_on_the_cpu_uses_the_compiled_solver(nm, monkeypatch):
    draw = torch.Generator().manual_seed(5)
    x, weight = torch.randn(900, 300, generator=draw), torch.randn(32, 300, generator=draw)
    factor = sparsegpt.inverse_factor(2 * (x.T @ x))
    sparsegpt.block_solver.cache_clear()
    assert sparsegpt.block_solver(torch.device("cpu"), nm and nm[1]).__name__ == "solve_block"
    assert sparsegpt.block_solver(torch.device("cpu"), nm and nm[1]) is not sparsegpt.solve_block
    solved = sparsegpt.repair(weight, factor, 0.6, nm)
    monkeypatch.setattr(sparsegpt, "block_solver", lambda *_: sparsegpt.solve_block)
    expected = sparsegpt.repair(weight, factor, 0.6, nm)
    assert torch.equal(solved == 0, expected == 0)
    # torch's loop rounds twice where a row of outputs is not a whole number of its vectors, and anywhere without FMA
    torch.testing.assert_close(solved, expected, rtol=1e-5, atol=2e-5)


def test_without_a_kernel_sparsegpt_is_a_loop(monkeypatch):
    monkeypatch.setattr(kernel, "load_kernel", Mock(side_effect=kernel.Unavailable("no compiler")))
    sparsegpt.block_solver.cache_clear()
    assert sparsegpt.block_solver(torch.device("cpu"), None) is sparsegpt.solve_block
    sparsegpt.block_solver.cache_clear()


def test_a_kernel_is_tried_before_it_is_used(caplog, monkeypatch):
    def alike(*block):
        return sparsegpt.solve_block(*block)

    def wrong(*block):
        return sparsegpt.solve_block(*block) + 1e-3

    def failing(*block):
        raise RuntimeError("no such instruction\nsecond line")

    for solver in (alike, wrong, failing):
        monkeypatch.setattr(kernel, "load_kernel", lambda solver=solver: Mock(solve_block=solver))
        for group in (None, 4, 8):
            sparsegpt.block_solver.cache_clear()
            assert sparsegpt.block_solver(torch.device("cpu"), group) is (
                alike if solver is alike else sparsegpt.solve_block
            )
    sparsegpt.block_solver.cache_clear()
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 6
    assert "(no such instruction)" in caplog.records[-1].getMessage()
