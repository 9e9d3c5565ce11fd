"""Fused calls: norms against transformers', and a fused model against the same without."""

import pytest
import torch
from conftest import tiny_llama
from test_layers import needs_kernel
from test_load_models import build
from torch import nn

from lib import sparse

pytestmark = needs_kernel


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
