"""Adam on packed survivors against torch's AdamW with a masked gradient, and the bytes that its states take."""

import pytest
import torch

from lib.models import memory
from lib.models.layers import Layer
from lib.recovery.adam import BETAS, EPSILON, STATES, TRAINED, Trained
from lib.recovery.distill import RecoveryOptions


def pruned_matrix(rows: int = 20, columns: int = 30, seed: int = 0) -> torch.Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return weight * (weight.abs() > 0.6)


def taken_up(weight: torch.Tensor, *how) -> Trained:
    """Return what is trained of a weight, which changes in place."""
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(weight, requires_grad=False)
    return Trained((module, "weight"), None, *how)


def gradients(like: torch.Tensor, count: int = 6) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(like.shape, generator=draw) * 10 ** float(i % 3 - 3) for i in range(count)]


def test_packed_adam_is_torchs_adamw_with_a_masked_gradient():
    weight = pruned_matrix()
    mask, plain = weight != 0, torch.nn.Parameter(weight.clone())
    oracle = torch.optim.AdamW([plain], lr=0.01, betas=BETAS, eps=EPSILON, weight_decay=0.0)
    trained = taken_up(weight, "float32")
    for count, gradient in enumerate(gradients(weight), 1):
        plain.grad = gradient * mask
        oracle.step()
        trained.step(gradient * 8, torch.tensor(8.0), 0.01, count)
    assert torch.equal(weight != 0, mask) and len(trained.values[0]) == mask.sum()
    torch.testing.assert_close(weight, plain.detach(), rtol=1e-6, atol=1e-7)  # a few roundings of float32


def test_eight_bits_follow_float32_and_never_step_further():
    weights = [pruned_matrix(40, 40) for _ in range(2)]
    start, last = weights[0].clone(), gradients(weights[0])
    for weight, states in zip(weights, STATES, strict=True):
        trained = taken_up(weight, states)
        for count, gradient in enumerate(last, 1):
            before = trained.values[0].clone()
            trained.step(gradient, torch.tensor(1.0), 0.01, count)
            # |m| <= sqrt(v) up to the betas' ratio, whatever the rounding: no entry leaps.
            assert (trained.values[0] - before).abs().max() < 0.05, states
    moved = [weight - start for weight in weights]
    assert torch.nn.functional.cosine_similarity(*(x.flatten() for x in moved), dim=0) > 0.97


def test_a_moment_of_eight_bits_is_rounded_up_by_pencil():
    trained = taken_up(torch.zeros(3), "8bit")
    trained.step(torch.tensor([127.0, 1.2, 0.0]), torch.tensor(1.0), 0.0, 1)
    # first = .1 g, the largest 127 units; second's root = sqrt(.05) g.
    (first, _), (second, _) = trained.moments[0]
    assert first.view(-1)[:3].tolist() == [127, 1, 0] and second.view(-1)[:3].tolist() == [127, 2, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_survivor_never_becomes_zero(dtype):
    weight = torch.tensor([[1.0, 0.0, -2.0], [0.0, 3.0, 4.0]]).to(dtype)
    trained = taken_up(weight, "float32")
    small = 0.0 if dtype == torch.float32 else 1e-42  # rounds to zero
    trained.values[0].copy_(torch.tensor([small, -small, 0.0, 5.0]))
    trained.write()
    tiny = torch.finfo(dtype).tiny
    assert weight.tolist() == [[tiny, 0, tiny], [0, tiny, 5]]
    vector = torch.tensor([1.0, 0.0]).to(dtype)
    taken_up(vector, "float32").write()
    assert vector.tolist() == [1, 0], "a bias may be zero"


@pytest.mark.parametrize("states", STATES)
@pytest.mark.parametrize("train", TRAINED)
def test_bytes_are_those_of_the_live_tensors(train, states):
    weight = pruned_matrix(256, 512)
    left = int((weight != 0).sum())
    rank = {"surviving": None, "low_rank": 8}
    tensors = taken_up(weight, states, rank[train]).tensors if train in rank else []
    live = sum(x.numel() * x.element_size() for x in tensors)
    options = RecoveryOptions(0, train, 8, states=states)
    counted = memory.trained_bytes([Layer("x", 0, (256, 512))], left / weight.numel(), options)
    assert live <= counted <= live * 1.01 + 2000  # 256 numbers share a scale, the last group of them fewer
    assert counted <= 14 * left


def test_low_rank_steps_by_the_chain_rule_under_the_mask():
    weight = pruned_matrix()
    mask, base = weight != 0, weight.clone()
    trained = taken_up(weight, "float32", 4, 3)
    left, right = (torch.nn.Parameter(factor.clone()) for factor in trained.values)
    oracle = torch.optim.AdamW([left, right], lr=0.01, betas=BETAS, eps=EPSILON, weight_decay=0.0)
    for count, gradient in enumerate(gradients(weight), 1):
        oracle.zero_grad()
        (((left @ right) * mask) * gradient).sum().backward()
        oracle.step()
        trained.step(gradient, torch.tensor(1.0), 0.01, count)
    torch.testing.assert_close(weight, (base + left @ right * mask).detach(), rtol=1e-5, atol=1e-5)
    assert torch.equal(weight != 0, mask)
