"""SparseGPT's memory, counted in matrices of the Hessian's size, and its factor against the plain formulation."""

import math

import pytest
import torch
from mixtures import tiny_mixture
from pretend_cuda import pretend_cuda
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from lib.calibration import statistics as calibration
from lib.calibration.statistics import as_float32, hessian, squared_norms
from lib.models import memory
from lib.models.experts import active_share
from lib.models.layers import prunable_layers
from lib.models.weights import weights_of
from lib.pruning.pruners import PRUNERS, refitted
from lib.pruning.sparsegpt import BLOCK, inverse_factor, repair, repair_group

SIZE = 2048
MATRIX = 4 * SIZE * SIZE  # bytes, float32
STRIP = 4 * SIZE * BLOCK
SCALARS = 4096  # numbers, vectors of numbers


def peak_bytes(work) -> int:
    """Return the most bytes that ``work()`` held at once, torch's own temporaries included, as the allocator saw it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    steps, events = [], list(seen.profiler.kineto_results.experimental_event_tree())
    while events:
        event = events.pop()
        events += event.children
        if event.tag.name == "Allocation":  # negative when freed
            steps.append((event.start_time_ns, event.extra_fields.alloc_size))
    held = most = 0
    for _, size in sorted(steps, key=lambda step: step[0]):
        held += size
        most = max(most, held)
    return most


def inputs(size: int, seed: int = 0, tokens: int = 300) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, size, generator=draw) + 0.5 * torch.randn(tokens, 1, generator=draw)


def test_bytes_are_counted():
    def two_at_once():
        a = torch.ones(SIZE)
        b = a + 1
        del a
        return b * 2

    assert 8 * SIZE <= peak_bytes(two_at_once) < 8.1 * SIZE
    assert peak_bytes(lambda: torch.ones(SIZE, 10).isfinite()) > 80 * SIZE  # its temporary too


@pytest.mark.parametrize("nm", [None, pytest.param((2, 4), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_statistics_factor_and_solve_hold_three_matrices_at_most(nm, dtype):
    weight = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(1)).to(dtype)
    first, second = inputs(SIZE), inputs(SIZE, seed=1)
    held = []
    # On the CPU the sum is float64, two matrices, beside a strip in float32 and float64; then a float32 copy beside it.
    product = 4 * SIZE * calibration.STRIP
    assert peak_bytes(lambda: held.append(hessian(second, hessian(first, None)))) <= 2 * MATRIX + 3 * product + SCALARS
    assert held[0].dtype == torch.float64
    squares = 4 * 4 * calibration.STRIP**2
    assert peak_bytes(lambda: held.append(as_float32(held.pop()))) <= MATRIX + squares + SCALARS
    # Beside the Hessian: the triangle, and two strips of 128 columns while it is reversed.
    vectors = 16 * 4 * SIZE
    assert peak_bytes(lambda: held.append(inverse_factor(held[0]))) <= MATRIX + 2 * STRIP + vectors
    assert held[1].upper.untyped_storage().data_ptr() == held[0].untyped_storage().data_ptr()
    # Beside the factor: the float32 copy that is worked on and the result; of a block errors, mask and a square.
    assert peak_bytes(lambda: repair(weight, held[1], 0.5, nm)) <= 2 * MATRIX + 3 * STRIP
    weights, nms = {"up": weight[: SIZE // 4], "gate": weight[SIZE // 4 :]}, {"up": nm, "gate": nm}
    ratios = {"up": 0.5, "gate": 0.4}
    assert peak_bytes(lambda: repair_group(weights, held[1], ratios, nms)) <= 2 * MATRIX + 3 * STRIP


@pytest.mark.parametrize("size", [1, 2, 37, 128, 300])
@pytest.mark.parametrize("seed", range(3))
def test_factor_is_as_near_as_the_plain_formulation(size, seed):
    x = inputs(size, seed)
    x[:, size // 2] = 0
    statistic = as_float32(hessian(x, None))
    assert statistic.dtype == torch.float32 and torch.equal(statistic, statistic.T)
    damped = statistic.double()
    damped[size // 2, size // 2] = 1
    damped += torch.diag(0.01 * damped.diagonal().mean().expand(size))
    exact = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    lower = torch.linalg.cholesky(damped.float().flip(0, 1))
    plain = torch.linalg.solve_triangular(lower.flip(0, 1), torch.eye(size), upper=True)
    found = inverse_factor(statistic)
    assert found.dead.nonzero().tolist() == [[size // 2]] and torch.equal(found.upper, found.upper.triu())
    largest = exact.abs().max()
    errors = [((upper.double() - exact).abs().max() / largest).item() for upper in (found.upper, plain)]
    assert errors[0] <= 4 * errors[1] + 1e-6  # a few roundings, where the plain one happens to be exact


@pytest.mark.parametrize("size", [255, 256, 257, 700])
def test_factor_of_a_size_that_is_reversed_in_several_chunks(size):
    scale = torch.linspace(0.5, 2, size)
    found = inverse_factor(torch.diag(scale)).upper
    damp = 0.01 * scale.mean()
    torch.testing.assert_close(found, torch.diag((scale + damp).rsqrt()), rtol=4e-7, atol=0)  # a root, a division


def error_of(count: int, exact: torch.Tensor) -> float:
    """Return what a float32 sum of ``count`` products may miss: 6e-8 each, of what the diagonal bounds."""
    return count * 6e-8 * exact.max().item()


@pytest.mark.parametrize("size", [1, 16, 50])
def test_hessian_in_strips_is_the_product(size, monkeypatch):
    monkeypatch.setattr(calibration, "STRIP", 16)  # of 50: 3 strips and a rest
    first, second = inputs(size), inputs(size, seed=1)
    exact = sum(2 * x.double().T @ x.double() for x in (first, second))
    found = as_float32(hessian(second, hessian(first, None)))
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=error_of(600, exact))
    assert torch.equal(found, found.T)


def test_the_other_triangle_is_not_read(monkeypatch):
    monkeypatch.setattr(calibration, "STRIP", 3)
    upper = torch.arange(49.0).view(7, 7).triu()
    spoiled = upper.clone()
    spoiled[tuple(torch.tril_indices(7, 7, -1))] = math.nan
    assert torch.equal(as_float32(spoiled), upper + upper.triu(1).T)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real CUDA device here")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_hessian_of_halves_on_tensor_cores(dtype, monkeypatch):
    first, second = inputs(50).to(dtype), inputs(50, seed=1).to(dtype)
    product, kinds = torch.mm, set()
    monkeypatch.setattr(calibration, "GPU_STRIP", 16)
    monkeypatch.setattr(torch, "mm", lambda a, b, **more: kinds.add((a.dtype, b.dtype)) or product(a, b, **more))
    with pretend_cuda():
        total = as_float32(hessian(second.to("cuda"), hessian(first.to("cuda"), None))).cpu()
    exact = sum(2 * x.double().T @ x.double() for x in (first, second))
    torch.testing.assert_close(total.double(), exact, rtol=0, atol=error_of(600, exact))
    if "dtype" in torch.ops.aten.mm.overloads():  # else they are multiplied in float32, before torch 2.8
        assert kinds == {(dtype, dtype)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_elsewhere_are_multiplied_in_float32(dtype):
    x = inputs(50).to(dtype)
    assert torch.equal(hessian(x, None), hessian(x.float(), None))
    assert torch.equal(squared_norms(x, None), squared_norms(x.float(), None))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_hessian_of_halves_on_cuda(dtype):
    x = inputs(5000).to(dtype)
    found = as_float32(hessian(x.cuda(), hessian(x.cuda(), None))).cpu().double()
    exact = 4 * x.double().T @ x.double()
    torch.testing.assert_close(found, exact, rtol=0, atol=600 * 1.2e-7 * exact.max().item())  # tensor cores truncate


@pytest.mark.parametrize("nm", [None, (2, 4)], ids=str)
@pytest.mark.parametrize("name", [*PRUNERS, "wanda, refitted"])
def test_pruners_hold_no_more_matrices_than_they_declare(name, nm):
    pruner = PRUNERS[name.partition(",")[0]]
    if name not in PRUNERS:
        pruner = refitted(pruner, 3)
    size, draw = 512, torch.Generator().manual_seed(1)
    weights = {name: torch.randn(8 * size, size, generator=draw) for name in ("gate", "up")}
    x = inputs(size)
    statistics = {"hessian": as_float32(hessian(x, None)), "squared_norms": squared_norms(x, None).float()}
    prepared, ratios, one = pruner.prepare(statistics.get(pruner.statistic)), {"gate": 0.4, "up": 0.6}, 4 * 8 * size**2

    def work():
        for _, result in pruner.prune_all(weights, prepared, ratios, dict.fromkeys(weights, nm)):
            del result

    square = 4 * size**2 if pruner.statistic == "hessian" else 0
    # Of SparseGPT's blocks of columns: errors, mask and a square; of ALPS some rows.
    assert peak_bytes(work) <= pruner.copies * one + square + 3 * 4 * BLOCK * 16 * size


@pytest.mark.parametrize("name", PRUNERS)
def test_a_7b_is_pruned_beside_its_weights_on_a_card_of_24_gb(name):
    # From shapes; that no more matrices of the Hessian's size are held is measured above, at another size.
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32))
    weights = 2 * sum(p.numel() for p in model.parameters())
    hessians = PRUNERS[name].statistic == "hessian"
    bound = memory.working_set(model, torch.float16, hessians, 128, 2048, PRUNERS[name].copies)
    assert weights + bound <= 24e9  # hidden states of all windows on the card, and whatever else is held at once


def test_experts_as_wide_as_the_model_have_two_hessians_each(monkeypatch):
    # As in gpt-oss; gate and up share one, down has its own.
    config = MixtralConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4)
    config.num_key_value_heads = config.num_local_experts = 4
    (block,) = weights_of(MixtralForCausalLM(config)).visit()
    for experts, groups in ((4, 1), (3, 2), (1, 4)):
        room = 8 * 2 * experts * 32**2 + 5 * 4 * 32**2
        monkeypatch.setattr(memory, "free_ram", lambda room=room: room / memory._FILLED + 1)
        assert len(memory.hessian_groups(block)) == groups


def test_activations_of_a_mixture_are_those_of_the_experts_that_are_active():
    layers = prunable_layers(tiny_mixture("mixtral"))
    assert active_share(tiny_mixture("mixtral")) == 0.5
    block = [layer for layer in layers if layer.block == 0]
    outside = sum(sum(layer.shape) for layer in block if not layer.expert)
    inside = sum(sum(layer.shape) for layer in block if layer.expert)
    copies = sum(layer.size for layer in block)
    assert memory.activation_bytes(block, torch.float16, 10, 0.5) == 2 * (copies + 30 * (outside + inside // 2))
    whole = memory.activation_bytes(layers, torch.float16, 10, 0.5)
    assert whole == 2 * memory.activation_bytes(block, torch.float16, 10, 0.5)
