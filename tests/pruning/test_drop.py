"""Dropping of experts: every family against the whole model whose router is kept from the dropped ones."""

from functools import partial

import pytest
import torch
import transformers as tf
from conftest import fast, saved_tensors
from mixtures import FAMILIES, tiny_mixture
from test_experts import experts_of, with_separate_experts

from lib.calibration.hidden import enter_blocks
from lib.core.errors import UserError
from lib.models import load
from lib.models.experts import router_types
from lib.models.load import Dtypes
from lib.models.safetensors_io import write_shard
from lib.models.streamed import Streamed
from lib.models.weights import weights_of
from lib.pruning import drop

COUNT, LEFT = 6, 4


def some_kept(model) -> dict[str, list[int]]:
    draw = torch.Generator().manual_seed(3)
    return {name: sorted(torch.randperm(COUNT, generator=draw)[:LEFT].tolist()) for name in experts_of(model)}


def keep_router_from(model, keep: dict[str, list[int]]) -> None:
    """Make the router's logits of the dropped experts minus infinity, by the product that they come from."""
    routers = {name: m for name, m in model.named_modules() if isinstance(m, router_types(model))}
    for owner, kept in keep.items():
        (name,) = [name for name in routers if name.startswith(owner.rpartition(".")[0] + ".")]
        gone = [e for e in range(COUNT) if e not in kept]

        def without(forward, *args, gone, **kwargs):
            product = torch.nn.functional.linear

            def linear(x, weight, bias=None):
                y = product(x, weight, bias)
                if y.shape[-1] == COUNT:
                    y[..., gone] = -torch.inf
                return y

            torch.nn.functional.linear = linear
            try:
                return forward(*args, **kwargs)
            finally:
                torch.nn.functional.linear = product

        routers[name].forward = partial(without, routers[name].forward, gone=gone)


@pytest.mark.parametrize("family", fast(FAMILIES, 4))
@torch.no_grad()
def test_the_smaller_model_is_the_whole_one_with_a_router_kept_from_dropped_experts(family, tmp_path, tiny_windows):
    model = tiny_mixture(family, COUNT)
    if family == "ernie4.5-moe":  # its correction is added after the softmax, so that the dropped could still be chosen
        for name, buffer in [*model.named_buffers(), *model.named_parameters()]:
            if "correction" in name:
                buffer.data.zero_()
    model.save_pretrained(tmp_path / "whole")
    keep = some_kept(model)
    homes = [weights_of(model), Streamed(tmp_path / "whole", Dtypes(torch.float32, torch.float32), torch.device("cpu"))]
    homes = [home.keeping(keep) for home in homes]
    whole = tiny_mixture(family, COUNT)
    if family == "ernie4.5-moe":
        for name, buffer in [*whole.named_buffers(), *whole.named_parameters()]:
            if "correction" in name:
                buffer.data.zero_()
    keep_router_from(whole, keep)
    wanted = whole(tiny_windows[:2], use_cache=False).logits
    small = homes[0].model
    torch.testing.assert_close(small(tiny_windows[:2], use_cache=False).logits, wanted, rtol=1e-4, atol=1e-5)

    # Streamed, they are the same bits; what is written is read by plain transformers.
    assert homes[0].layers == homes[1].layers
    fingerprints = [home.fingerprints() for home in homes]
    assert fingerprints[0] == fingerprints[1]
    for name, home in zip(("memory", "streamed"), homes, strict=True):
        (tmp_path / name).mkdir()
        for block in home.visit():
            path = tmp_path / name / f"model-{block.index}.safetensors"
            write_shard(path, home.tensors(block.index), home.save_dtypes(block.index))

        class Tokenizer:
            save_pretrained = staticmethod(lambda folder: None)

        load.complete_folder(tmp_path / name, home, Tokenizer)
        again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
        own = small(tiny_windows[:1], use_cache=False).logits
        assert torch.equal(again(tiny_windows[:1], use_cache=False).logits, own)
    tensors = [saved_tensors(tmp_path / name) for name in ("memory", "streamed")]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


@torch.no_grad()
def test_reap_scores_are_those_of_separate_experts(tiny_windows):
    model = tiny_mixture("mixtral")
    weights = weights_of(model)
    scores = drop.reap_scores(weights, enter_blocks(weights, tiny_windows))
    separate, _ = with_separate_experts(model, tiny_windows)
    for name, one in separate.items():
        for e in range(4):
            parts = []
            for x, share in one.seen[f"{e}.down_proj"]:
                out = one.linears[f"{e}-down_proj"].double()(x)
                parts.append(share * out.norm(dim=1))  # Mixtral's router's weights add up to 1 already
            assert scores[f"{name}.{e}"] == pytest.approx(float(torch.cat(parts).mean()), rel=1e-4)


def test_weights_of_the_router_are_made_to_add_up_to_one(tiny_windows):
    # Qwen2's do not: twice the weights are the same scores.
    model = tiny_mixture("qwen2-moe")
    assert not model.config.norm_topk_prob
    weights = weights_of(model)
    found = drop.reap_scores(weights, enter_blocks(weights, tiny_windows))
    model.config.norm_topk_prob = True
    for block in model.model.layers:
        block.mlp.gate.norm_topk_prob = True
    first = {name: score for name, score in found.items() if ".0.mlp." in name}  # later blocks see other inputs
    normalised = drop.reap_scores(weights, enter_blocks(weights, tiny_windows))
    assert first == pytest.approx({name: normalised[name] for name in first}, rel=1e-5)


def test_the_highest_stay_and_each_group_keeps_as_many():
    scores = {f"a.experts.{e}": score for e, score in enumerate([5.0, 1.0, 4.0, 0.0, 3.0, 3.0, 9.0, 8.0])}
    assert drop.kept_experts(scores, 5, 1) == {"a.experts": [0, 2, 4, 6, 7]}
    assert drop.kept_experts(scores, 4, 2) == {"a.experts": [0, 2, 6, 7]}
    assert drop.kept_experts(scores, 4, 4) == {"a.experts": [0, 2, 4, 6]}


@pytest.mark.parametrize(
    ("share", "why"), [(0.1, "drops none of 4 experts"), (0.75, "leaves 1 of 4 experts, where a token needs 2")]
)
def test_too_few_or_none_are_refused(share, why):
    with pytest.raises(UserError, match=why):
        drop.remaining_experts(tiny_mixture("mixtral"), share)
    with pytest.raises(UserError, match="needs a mixture"):
        drop.remaining_experts(tf.LlamaForCausalLM(tf.LlamaConfig(hidden_size=32, num_hidden_layers=1)), 0.5)
