"""Fused calls: norms against transformers', and a fused model against the same without."""

import pytest
import torch
from conftest import tiny_llama
from test_layers import needs_kernel, with_zeros
from test_load_models import build
from torch import nn

from lib import sparse
from lib.sparse import fusing

pytestmark = needs_kernel


def pruned_llama() -> nn.Module:
    model = with_zeros(tiny_llama())
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):  # 1 in a model that was not trained: nothing to round
            parameter.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(2))
    return model


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
