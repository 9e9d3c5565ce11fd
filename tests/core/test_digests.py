"""Digests: fingerprints tell a fine-tuned copy of a matrix apart, but not one in half precision."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import fast

from lib.core.digests import fingerprint, first_difference, same_weights
from lib.core.errors import UserError
from lib.models.weights import weights_of
from lib.run.journal import _difference
from lib.spectra.cache import LayerMetrics, Measurement, MetricCache
from lora_ft.common import BASE, check_base


def low_rank_update(weight: torch.Tensor, rank: int, share: float, seed: int) -> torch.Tensor:
    """Return ``weight`` with a random update of a rank whose norm is a share of its own."""
    draw = torch.Generator().manual_seed(seed)
    update = torch.randn(weight.shape[0], rank, generator=draw) @ torch.randn(rank, weight.shape[1], generator=draw)
    return weight + update * (share * weight.norm() / update.norm())


@pytest.mark.parametrize("every", fast([9, 1], 1))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_small_update_of_any_matrix_is_seen(dtype, every, smollm2_weights):
    for index, layer in enumerate(smollm2_weights.layers[::every]):
        weight = smollm2_weights.model.get_submodule(layer.name).weight.detach()
        before, changed = {layer.name: fingerprint(weight)}, low_rank_update(weight, 8, 0.02, index)
        assert first_difference(before, {layer.name: fingerprint(weight.to(dtype))}) is None
        assert first_difference(before, {layer.name: fingerprint(changed.to(dtype))}) == layer.name
        assert first_difference({}, before) == layer.name


@pytest.mark.parametrize("every", fast([9, 1], 1))
@pytest.mark.parametrize("share", [0.001, 0.002])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_checkpoint_that_was_trained_a_little_further_is_another(dtype, share, every, smollm2_weights):
    draw = torch.Generator().manual_seed(0)
    for layer in smollm2_weights.layers[::every]:
        weight = smollm2_weights.model.get_submodule(layer.name).weight.detach().to(dtype)
        noise = share * weight.float().std() * torch.randn(weight.shape, generator=draw)
        assert not same_weights(fingerprint(weight), fingerprint((weight.float() + noise).to(dtype))), layer.name


def test_a_bfloat16_checkpoint_is_the_same_wherever_it_is_loaded():
    # Of bfloat16's numbers float16 rounds those below 2^-14 and loses those below 2^-25.
    weight = (torch.randn(30, 40, generator=torch.Generator().manual_seed(0)) * 2.0 ** torch.arange(-30, 10)).bfloat16()
    for dtype in (torch.float32, torch.float16):
        assert same_weights(fingerprint(weight), fingerprint(weight.to(dtype)))
    assert not same_weights(fingerprint(weight), fingerprint(weight * 1.01))


def test_a_resumed_run_a_cache_and_an_adapter_refuse_such_a_checkpoint(tiny_model, tmp_path):
    before = weights_of(tiny_model.bfloat16()).fingerprints()
    for parameter in tiny_model.parameters():
        parameter.data += (0.001 * parameter.float().std() * torch.randn(parameter.shape)).bfloat16()
    weights, name = weights_of(tiny_model), next(iter(before))

    identity = {"flags": {}, "versions": {}, "calibration": "", "plan": "", "fingerprints": before}
    assert _difference(identity, identity | {"fingerprints": weights.fingerprints()})
    with pytest.raises(UserError, match="was measured on other weights"):
        MetricCache(Measurement("alpha_peak", tmp_path), "m", weights.layers).check_weights(
            LayerMetrics({name: 1.0}, before), weights
        )
    (tmp_path / BASE).write_text(json.dumps({"model": "m", "fingerprints": before, "training": {}}))
    base = SimpleNamespace(source=SimpleNamespace(given="m"))
    with pytest.raises(UserError, match="was trained on other weights"):
        check_base("lora_weights", tmp_path, base, weights)


def test_fingerprint_knows_scale_sign_and_place():
    weight = torch.randn(30, 40, generator=torch.Generator().manual_seed(0))
    for same in (weight, torch.zeros(4, 4)):
        assert same_weights(fingerprint(same), fingerprint(same))
    for changed in (weight * 1.001, -weight, weight.flip(0), weight.flip(1), torch.zeros(30, 40), weight * 1e-6):
        assert not same_weights(fingerprint(weight), fingerprint(changed))
