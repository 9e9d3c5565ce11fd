"""Compiled decoding steps: attention against float64, whole models against float32, and when a block keeps its own."""

import copy
import ctypes
import math

import pytest
import torch
from conftest import tiny_llama
from test_layers import HALF_ULP, needs_kernel, packed_in, with_zeros
from test_load_models import KINDS, build
from transformers import DynamicCache, StaticCache
from transformers.activations import ACT2FN
from transformers.models.llama import modeling_llama

from lib import sparse
from lib.sparse import decode as steps
from lib.sparse import kernel
from lib.sparse.decode import CompiledBlock

pytestmark = needs_kernel


def compiled(model) -> list[bool]:
    """Return for each block whether it takes compiled steps."""
    return [isinstance(vars(layer).get("forward"), CompiledBlock) for layer in model.get_decoder().layers]


@torch.no_grad()
def filled(model, ids: torch.Tensor, **more) -> DynamicCache:
    """Return the cache after a prompt of ``ids`` [batch, tokens]."""
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache, use_cache=True, **more)
    return cache


@torch.no_grad()
def continued(model, cache: DynamicCache, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits of ``ids`` [batch, tokens], decoded one by one after what the cache holds."""
    steps = ids.split(1, dim=1)
    return torch.cat([model(token, past_key_values=cache, use_cache=True).logits for token in steps], 1)


def decode(model, ids: torch.Tensor, prompt: int = 5, **more) -> torch.Tensor:
    """Return the logits of the tokens after the prompt, decoded one by one, [batch, tokens, vocabulary] float32."""
    return continued(model, filled(model, ids[:, :prompt], **more), ids[:, prompt:]).float()


def some_ids(batch: int, tokens: int = 13) -> torch.Tensor:
    return torch.randint(3, 100, (batch, tokens), generator=torch.Generator().manual_seed(batch))


@pytest.fixture
def made():
    """Return a model all of whose blocks take compiled steps."""
    model = with_zeros(tiny_llama())
    sparse.sparsify(model)
    assert all(compiled(model))
    return model


@pytest.fixture
def stepped(monkeypatch):
    """Return a list that grows by a number for each compiled step."""
    count, real = [], CompiledBlock._step
    monkeypatch.setattr(CompiledBlock, "_step", lambda self, *rest: count.append(1) or real(self, *rest))
    return count


# ------------------------------------------------------------------------------------------------------- the cache


@pytest.mark.machine
def test_keys_and_values_are_copied_only_when_there_is_no_more_room(made, monkeypatch):
    monkeypatch.setattr(steps, "SPARE_TOKENS", 3)
    ids, places = some_ids(2, 11), []
    cache = filled(made, ids[:, :4])
    for at in range(4, 11):
        continued(made, cache, ids[:, [at]])
        places.append(cache.layers[1].keys.data_ptr())
        whole = filled(made, ids[:, : at + 1])
        for layer, expected in zip(cache.layers, whole.layers, strict=True):
            for kept, exact in ((layer.keys, expected.keys), (layer.values, expected.values)):
                torch.testing.assert_close(kept, exact, rtol=2**-6, atol=2**-6 * exact.abs().max().item())
    assert [places.count(place) for place in dict.fromkeys(places)] == [3, 3, 1]


def test_continuations_of_one_prefix_do_not_meet(made):
    def prefix() -> DynamicCache:  # the last token leaves room for more
        cache = filled(made, some_ids(1)[:, :5])
        continued(made, cache, some_ids(1)[:, 5:6])
        return cache

    first, second = some_ids(3, 5)[:1], some_ids(5, 5)[:1]
    alone = [continued(made, prefix(), ids) for ids in (first, second)]
    cache, sharing = prefix(), DynamicCache(config=made.config)
    for here, there in zip(cache.layers, sharing.layers, strict=True):
        there.lazy_initialization(here.keys, here.values)
        there.keys, there.values = here.keys, here.values
    caches, texts, logits = [cache, sharing, copy.deepcopy(cache)], (first, second, second), [[], [], []]
    for at in range(5):
        for steps_logits, each, ids in zip(logits, caches, texts, strict=True):
            steps_logits.append(continued(made, each, ids[:, [at]]))
    for steps_logits, expected in zip(logits, (alone[0], alone[1], alone[1]), strict=True):
        assert torch.equal(torch.cat(steps_logits, 1), expected)


def test_a_cropped_cache_leaves_what_others_hold(made):
    ids, tail = some_ids(1, 6), some_ids(3, 4)[:1]
    cache = filled(made, ids)
    continued(made, cache, tail)
    held, before = [layer.keys for layer in cache.layers], [layer.keys.clone() for layer in cache.layers]
    cache.crop(-3)
    logits = continued(made, cache, some_ids(5, 3)[:1])
    assert all(map(torch.equal, held, before))
    again = filled(made, ids)
    continued(made, again, tail[:, :1])
    assert torch.equal(logits, continued(made, again, some_ids(5, 3)[:1]))


# -------------------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("kind", kernel.KERNEL_DTYPES)
@pytest.mark.parametrize("length", [1, 7, 300])
@pytest.mark.parametrize("size", [8, 20, 64])
def test_attention_is_that_of_float64(level, kind, length, size, threads):
    draw = torch.Generator().manual_seed(length)
    batch, heads, keys = 3, 6, 2
    q = (3 * torch.randn(batch, heads, 1, size, generator=draw)).to(kind)
    # In a tensor with room for more.
    k, v = torch.randn(2, batch, keys, length + 5, size, generator=draw).to(kind)[:, :, :, :length].unbind()
    k[0] *= 40  # scores of some hundred: all but the largest are nothing
    block = kernel.BlockStruct(heads=heads, keys=keys, size=size, half=kind == torch.float16)
    out = torch.full_like(q, math.nan)
    places = ctypes.addressof(block), q.data_ptr(), k.data_ptr(), v.data_ptr()
    attend = kernel.load_kernel(level).attend_block
    attend(*places, length, k.stride(1), size**-0.5, batch, out.data_ptr(), threads)
    wide = (q.double(), *(x.double().repeat_interleave(heads // keys, 1) for x in (k, v)))
    weights = torch.softmax(wide[0] @ wide[1].mT * size**-0.5, -1)
    exact = weights @ wide[2]
    # A score is off by float32's 6e-8 of the sum of its products' sizes, and so is its weight, relatively.
    scores = (wide[0].abs() @ wide[1].abs().mT * size**-0.5).amax()
    bound = 4e-7 * (2 + scores) * wide[2].abs().max() + HALF_ULP[kind] * exact.abs() + 1e-7
    assert ((out.double() - exact).abs() <= bound).all()


@pytest.mark.machine
@pytest.mark.parametrize("kind", kernel.KERNEL_DTYPES)
@pytest.mark.parametrize(("batch", "every"), [(1, 1), (3, 1), (8, 1), (2, 2)])
def test_decoding_is_as_close_to_float32_as_dense(level, kind, batch, every, threads):
    ids = some_ids(batch)
    made = with_zeros(tiny_llama(), kind=kind, every=every)  # or dense and packed layers in one block
    exact, theirs = decode(copy.deepcopy(made).float(), ids), decode(copy.deepcopy(made), ids)
    assert sparse.sparsify(made, kernel=kernel.load_kernel(level)) == -(-21 // every) and compiled(made) == [True] * 3
    # Both round the activations, at other places and ours at fewer: 1.5 for the luck of one draw.
    assert (decode(made, ids) - exact).norm() <= 1.5 * (theirs - exact).norm()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_so(value, made):
    made.get_input_embeddings().weight.data[7] = value
    ids = some_ids(1)
    ids[0, -1] = 7
    logits = decode(made, ids)
    assert logits[:, :-1].isfinite().all() and logits[:, -1].isnan().all()


@pytest.mark.machine
def test_sequences_of_unequal_length_are_padded_on_the_left(made):
    ids, mask = some_ids(2), torch.ones(2, 9, dtype=torch.long)
    made.generation_config.pad_token_id = 2
    mask[0, :4] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    both = made.generate(ids[:, :9], attention_mask=mask, **options)
    alone = made.generate(ids[:1, 4:9], attention_mask=mask[:1, 4:], **options)
    for ours, theirs in zip(both.logits, alone.logits, strict=True):
        assert (ours[0].float() - theirs[0].float()).abs().max() <= 0.05 * theirs.float().abs().max()  # 8 bits
        if ours[0].argmax() != theirs[0].argmax():
            break  # a tie, after which the texts differ


# ---------------------------------------------------------------------------------------------------- who takes part

PLAIN = ("llama", "llama grouped-query", "llama3 tied", "mistral", "qwen2")


@pytest.mark.machine
@pytest.mark.parametrize("kind", KINDS)
def test_only_blocks_that_agree_are_compiled_and_all_models_decode(kind):
    made = with_zeros(build(kind))
    ids = some_ids(2) % made.config.get_text_config().vocab_size
    expected = decode(copy.deepcopy(made), ids)
    sparse.sparsify(made)
    if kind in PLAIN:
        assert all(compiled(made))
    if kind in ("gemma", "gemma2", "qwen3", "phi3"):  # other norms, norms of queries, fused projections
        assert not any(compiled(made))
    # Two results of 8 bits, a few blocks deep.
    assert (decode(made, ids) - expected).abs().max() <= 0.08 * expected.abs().max()


def test_blocks_of_one_class_may_differ():
    unrotated, scaled = with_zeros(build("smollm3")), with_zeros(build("granite"))
    for index, layer in enumerate(unrotated.get_decoder().layers):
        layer.self_attn.use_rope = index
    scaled.get_decoder().layers[1].residual_multiplier = 0.8
    for made, expected in ((unrotated, [False, True]), (scaled, [True, False])):
        sparse.sparsify(made)
        assert compiled(made)[:2] == expected


@pytest.mark.machine
def test_one_token_is_a_step_and_several_are_not(made, stepped):
    decode(made, some_ids(8), prompt=11)
    assert len(stepped) == 2 * 3  # tokens, blocks
    decode(made, some_ids(9), prompt=11)  # sequences: one more than the kernel takes
    assert len(stepped) == 2 * 3


@pytest.mark.machine
@pytest.mark.parametrize("place", ["self_attn.q_proj", "mlp", "input_layernorm"])
def test_hooks_inside_are_called(place, made, stepped):
    seen = []
    handle = made.model.layers[1].get_submodule(place).register_forward_hook(lambda *_: seen.append(1))
    decode(made, some_ids(1), prompt=11)
    assert len(seen) == 3 and len(stepped) == 2 * 2
    handle.remove()
    decode(made, some_ids(1), prompt=12)
    assert len(seen) == 3 and len(stepped) == 2 * 2 + 3


@pytest.mark.machine
def test_another_module_or_forward_method_in_a_block_is_used(made, stepped):
    before = decode(made, some_ids(1), prompt=12)
    made.model.layers[2].mlp.down_proj = torch.nn.Sequential(made.model.layers[2].mlp.down_proj, torch.nn.Tanh())
    other_module = decode(made, some_ids(1), prompt=12)
    assert len(stepped) == 3 + 2 and not torch.allclose(before, other_module)
    made.model.layers[0].mlp.forward = lambda x: 0 * x
    other_method = decode(made, some_ids(1), prompt=12)
    assert len(stepped) == 3 + 2 + 1 and not torch.allclose(other_module, other_method)


def test_gradients_other_caches_and_other_attentions_take_the_models_own(made, stepped):
    ids = some_ids(1)
    made.requires_grad_(False)
    cache = made(ids[:, :5], use_cache=True).past_key_values
    made(ids[:, 5:6], past_key_values=cache, use_cache=True)  # gradients are enabled
    with torch.no_grad():
        static = StaticCache(config=made.config, max_cache_len=16)
        made(ids[:, :5], past_key_values=static, use_cache=True)
        made(ids[:, 5:6], past_key_values=static, use_cache=True)
        made(ids[:, :1], use_cache=False)
    assert not stepped
    made.set_attn_implementation("eager")
    decode(made, ids)
    assert not stepped


def test_norms_that_move_are_found(made):
    ids = some_ids(1)
    expected = decode(made, ids)
    for layer in made.model.layers:
        layer.input_layernorm.weight.data = 2 * layer.input_layernorm.weight.data
    changed = decode(made, ids)
    assert not torch.allclose(changed, expected)
    for layer in made.model.layers:
        del layer.forward
    exact = decode(made, ids)
    assert (changed - exact).abs().max() <= 0.05 * exact.abs().max()  # 8 bits


# ------------------------------------------------------------------------------------------- what is not compiled


@pytest.mark.parametrize("act", ["gelu", "gelu_pytorch_tanh", "relu"])
@pytest.mark.parametrize("scale", [0.05, 0.3, 1.0])
def test_other_activations_keep_their_own(act, scale):
    made = tiny_llama()
    for layer in made.model.layers:
        layer.mlp.act_fn = ACT2FN[act]
        layer.mlp.down_proj.weight.data *= scale
    made = with_zeros(made)
    sparse.sparsify(made)
    assert not any(compiled(made))


OTHER_ROTATIONS = {
    "none": lambda x, cos, sin: x,
    "interleaved": lambda x, cos, sin: x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * sin,
    "backwards": lambda x, cos, sin: x * cos - modeling_llama.rotate_half(x) * sin,
}


@pytest.mark.parametrize("kind", OTHER_ROTATIONS)
def test_other_rotations_keep_their_own(kind, monkeypatch):
    def rotate(q, k, cos, sin, *_):
        return tuple(OTHER_ROTATIONS[kind](x, cos[:, None], sin[:, None]) for x in (q, k))

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rotate)
    made = with_zeros(tiny_llama())
    sparse.sparsify(made)
    assert not any(compiled(made))


def test_angles_of_another_width_take_the_models_own(made, stepped):
    layer, x = made.model.layers[0], torch.zeros(2, 1, 32, dtype=torch.bfloat16)
    for width, batch in ((4, 1), (8, 3)):  # of 8; of 2 sequences
        angles = torch.ones(batch, 1, width, dtype=torch.bfloat16)
        with torch.no_grad(), pytest.raises(RuntimeError):  # LLaMA's own does not take them
            layer(x, position_embeddings=(angles, angles), past_key_values=DynamicCache())
    assert not stepped


@pytest.mark.parametrize("broken", ["self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"])
def test_shapes_that_do_not_fit_are_not_compiled(broken):
    made = with_zeros(tiny_llama())
    layer = made.model.layers[1]
    old = layer.get_submodule(broken)
    wider = torch.nn.Linear(old.in_features, old.out_features + 8, bias=False, dtype=torch.bfloat16)
    layer.set_submodule(broken, wider)
    sparse.sparsify(made)
    assert compiled(made) == [True, False, True]


def test_a_cache_of_another_dtype_is_not_misread(made):
    ids, cache = some_ids(1), DynamicCache(config=made.config)
    with torch.no_grad():
        made(ids[:, :5], past_key_values=cache, use_cache=True)
        for held in cache.layers:
            held.keys, held.values = held.keys.float(), held.values.float()
        with pytest.raises(RuntimeError):  # torch's: the query is bfloat16
            made(ids[:, 5:6], past_key_values=cache, use_cache=True)


def test_a_model_with_dropout_is_tried_without(tmp_path):
    made = with_zeros(tiny_llama())
    made.config.attention_dropout = 0.5
    assert compiled(sparse.load_packed(packed_in(tmp_path, made))) == [True] * 3
