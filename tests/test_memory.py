"""SparseGPT's memory, counted in matrices of the Hessian's size, and its factor against the plain formulation."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from lib import calibration
from lib.calibration import hessian, squared_norms
from lib.sparsegpt import BLOCK, inverse_factor, repair, repair_group

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


@pytest.mark.parametrize("nm", [None, (2, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_statistics_factor_and_solve_hold_three_matrices_at_most(nm, dtype):
    weight = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(1)).to(dtype)
    first, second = inputs(SIZE), inputs(SIZE, seed=1)
    held = []
    assert peak_bytes(lambda: held.append(hessian(second, hessian(first, None)))) <= MATRIX + SCALARS
    # Beside the Hessian: the triangle, and two strips of 128 columns while it is reversed.
    vectors = 16 * 4 * SIZE
    assert peak_bytes(lambda: held.append(inverse_factor(held[0]))) <= MATRIX + 2 * STRIP + vectors
    assert held[1].upper.untyped_storage().data_ptr() == held[0].untyped_storage().data_ptr()
    # Beside the factor: the float32 copy that is worked on and the result; of a block errors, mask and a square.
    assert peak_bytes(lambda: repair(weight, held[1], 0.5, nm)) <= 2 * MATRIX + 3 * STRIP
    weights = [weight[: SIZE // 4], weight[SIZE // 4 :]]
    assert peak_bytes(lambda: repair_group(weights, held[1], [0.5, 0.4], [nm, nm])) <= 2 * MATRIX + 3 * STRIP


@pytest.mark.parametrize("size", [1, 2, 37, 128, 300])
@pytest.mark.parametrize("seed", range(3))
def test_factor_has_the_bits_of_the_plain_formulation(size, seed):
    x = inputs(size, seed)
    x[:, size // 2] = 0
    statistic = 2 * (x.T @ x)
    damped = statistic.clone()
    damped[size // 2, size // 2] = 1
    damped += torch.diag(0.01 * damped.diagonal().mean().expand(size))
    lower = torch.linalg.cholesky(damped.flip(0, 1))
    upper = torch.linalg.solve_triangular(lower.flip(0, 1), torch.eye(size), upper=True)
    assert torch.equal(hessian(x, None), statistic)
    found = inverse_factor(statistic)
    assert torch.equal(found.upper, upper) and found.dead.nonzero().tolist() == [[size // 2]]


@pytest.mark.parametrize("size", [255, 256, 257, 700])
def test_factor_of_a_size_that_is_reversed_in_several_chunks(size):
    scale = torch.linspace(0.5, 2, size)
    found = inverse_factor(torch.diag(scale)).upper
    damp = 0.01 * scale.mean()
    torch.testing.assert_close(found, torch.diag((scale + damp).rsqrt()), rtol=4e-7, atol=0)  # a root, a division


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_hessian_of_halves_in_strips(dtype, monkeypatch):
    first, second = inputs(50).to(dtype), inputs(50, seed=1).to(dtype)
    product = torch.mm
    monkeypatch.setattr(calibration, "STRIP", 16)  # 3 strips and a rest
    monkeypatch.setattr(torch, "mm", lambda a, b, out_dtype: product(a.to(out_dtype), b.to(out_dtype)))  # as on CUDA
    found = calibration._hessian_of_halves(second, calibration._hessian_of_halves(first, None))
    assert found.dtype == torch.float32
    exact = sum(2 * x.double().T @ x.double() for x in (first, second))
    # A sum of 600 products in float32: at most 600 roundings of 6e-8 of what the diagonal bounds.
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=600 * 6e-8 * exact.max().item())
    assert torch.equal(hessian(first, None), hessian(first.float(), None))
    assert torch.equal(squared_norms(first, None), squared_norms(first.float(), None))


def test_mm_of_halves_gives_float32_where_torch_has_it():
    if "dtype" not in torch.ops.aten.mm.overloads():
        pytest.skip("torch before 2.8")
    x = torch.empty(5, 7, dtype=torch.float16, device="meta")
    found = calibration._hessian_of_halves(x, None)
    assert found.shape == (7, 7) and found.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_hessian_of_halves_on_cuda(dtype):
    x = inputs(5000).to(dtype)
    found = hessian(x.cuda(), hessian(x.cuda(), None)).cpu().double()
    exact = 4 * x.double().T @ x.double()
    torch.testing.assert_close(found, exact, rtol=0, atol=600 * 1.2e-7 * exact.max().item())  # tensor cores truncate
