"""Perplexity against a computation in float64, position by position."""

import copy
import math

import pytest
import torch
from torch import nn

from lib.evaluation.perplexity import perplexity


@torch.no_grad()
def oracle(model, windows) -> float:
    model = copy.deepcopy(model).double()
    losses = []
    for window in windows.tolist():
        logits = model(torch.tensor([window])).logits[0]
        nats = []
        for position, token in enumerate(window[1:]):
            row = logits[position]
            nats.append((row.logsumexp(0) - row[token]).item())
        losses.append(sum(nats) / len(nats))
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("count", [1, 2, 7])
def test_perplexity_is_that_of_the_definition(tiny_model, tiny_windows, count):
    assert perplexity(tiny_model, tiny_windows[:count]) == pytest.approx(
        oracle(tiny_model, tiny_windows[:count]), rel=1e-5
    )


def test_windows_longer_than_a_chunk_of_the_loss(tiny_model):
    windows = torch.randint(3, 300, (1, 1100), generator=torch.Generator().manual_seed(0))
    assert perplexity(tiny_model, windows) == pytest.approx(oracle(tiny_model, windows), rel=1e-5)


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity(tiny_model, tiny_windows):
    tiny_model.lm_head = nn.Linear(32, 300, bias=False)
    nn.init.zeros_(tiny_model.lm_head.weight)
    assert perplexity(tiny_model, tiny_windows) == pytest.approx(300, rel=1e-5)


def test_loss_is_float32_for_half_precision(tiny_model, tiny_windows):
    # The logits are rounded to 8 bits, the loss over 300 of them is not: within 1 % of the float32 model's.
    exact = perplexity(tiny_model, tiny_windows)
    half = tiny_model.bfloat16()
    assert perplexity(half, tiny_windows) == pytest.approx(exact, rel=2e-2)
    with torch.no_grad():
        nats = [nn.functional.cross_entropy(half(w[None]).logits[0, :-1].double(), w[1:]).item() for w in tiny_windows]
    assert perplexity(half, tiny_windows) == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-5)


def test_order_of_windows_does_not_matter_and_no_cache_lives_on(tiny_model, tiny_windows):
    tiny_model.config.use_cache = True
    assert perplexity(tiny_model, tiny_windows.flip(0)) == pytest.approx(perplexity(tiny_model, tiny_windows), rel=1e-6)
    assert tiny_model.config.use_cache is True


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_broken_model_has_a_perplexity_that_is_not_finite_and_a_warning(tiny_model, tiny_windows, dtype, caplog):
    tiny_model.model.norm.weight.data[0] = math.nan
    assert not math.isfinite(perplexity(tiny_model.to(dtype), tiny_windows))
    (warning,) = caplog.records
    assert "not finite" in warning.getMessage()
    assert ("--dtype bfloat16" in warning.getMessage()) == (dtype == torch.float16)


@pytest.mark.gpu
def test_perplexity_on_cuda_is_that_on_the_cpu(tiny_model, tiny_windows):
    here = perplexity(tiny_model, tiny_windows)
    assert perplexity(tiny_model.cuda(), tiny_windows) == pytest.approx(here, rel=1e-3)
