"""Digests: fingerprints tell a fine-tuned copy of a matrix apart, but not one in half precision."""

import pytest
import torch
from conftest import fast

from lib.core.digests import fingerprint, first_difference, same_weights


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


def test_fingerprint_knows_scale_sign_and_place():
    weight = torch.randn(30, 40, generator=torch.Generator().manual_seed(0))
    for same in (weight, torch.zeros(4, 4)):
        assert same_weights(fingerprint(same), fingerprint(same))
    for changed in (weight * 1.001, -weight, weight.flip(0), weight.flip(1), torch.zeros(30, 40), weight * 1e-6):
        assert not same_weights(fingerprint(weight), fingerprint(changed))
