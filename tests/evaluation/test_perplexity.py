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


# One window, several, and one longer than a chunk of the loss.
@pytest.mark.parametrize("shape", [(1, 24), (7, 24), (1, 1100)], ids=str)
def test_perplexity_is_that_of_the_definition(tiny_model, shape):
    windows = torch.randint(3, 300, shape, generator=torch.Generator().manual_seed(0))
    assert perplexity(tiny_model, windows) == pytest.approx(oracle(tiny_model, windows), rel=1e-5)


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity(tiny_model, tiny_windows):
    nn.init.zeros_(tiny_model.lm_head.weight)
    assert perplexity(tiny_model, tiny_windows) == pytest.approx(300, rel=1e-5)


def test_loss_is_float32_for_half_precision(tiny_model, tiny_windows):
    half = tiny_model.bfloat16()
    with torch.no_grad():
        nats = [nn.functional.cross_entropy(half(w[None]).logits[0, :-1].double(), w[1:]).item() for w in tiny_windows]
    assert perplexity(half, tiny_windows) == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-5)


def test_broken_model_has_a_perplexity_that_is_not_finite_and_a_warning(tiny_model, tiny_windows, caplog):
    tiny_model.model.norm.weight.data[0] = math.nan
    assert not math.isfinite(perplexity(tiny_model, tiny_windows))
    (warning,) = caplog.records
    assert "not finite" in warning.getMessage()


@pytest.mark.gpu
def test_perplexity_on_cuda_is_that_on_the_cpu(tiny_model, tiny_windows):
    here = perplexity(tiny_model, tiny_windows)
    assert perplexity(tiny_model.cuda(), tiny_windows) == pytest.approx(here, rel=1e-3)
