"""Compiled decoding: a block against float64, whole models against float32, and when a model keeps its own."""

import copy
import ctypes
import functools
import math

import pytest
import torch
from conftest import fast, tiny_llama
from test_layers import HALF_ULP, needs_kernel, packed_in, with_zeros
from test_load_models import KINDS, build
from transformers import DynamicCache, StaticCache
from transformers.activations import ACT2FN
from transformers.models.llama import modeling_llama

from lib import sparse
from lib.sparse import decode as decoding
from lib.sparse import kernel
from lib.sparse.decode import CompiledTokens

pytestmark = needs_kernel


def compiled(model) -> bool:
    """Return whether the model decodes in compiled code."""
    return isinstance(vars(model).get("forward"), CompiledTokens)


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
    """Return a model that decodes in compiled code."""
    model = with_zeros(tiny_llama())
    sparse.sparsify(model)
    assert compiled(model)
    return model


@pytest.fixture
def stepped(monkeypatch):
    """Return a list that grows by a number for each compiled token."""
    count, real = [], CompiledTokens._decode
    monkeypatch.setattr(CompiledTokens, "_decode", lambda self, *rest: count.append(1) or real(self, *rest))
    return count


# ------------------------------------------------------------------------------------------------------- the cache


@pytest.mark.machine
def test_keys_and_values_are_copied_only_when_there_is_no_more_room(made, monkeypatch):
    monkeypatch.setattr(decoding, "SPARE_TOKENS", 3)
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


def matrix(weight: torch.Tensor, bias: torch.Tensor | None = None) -> tuple[kernel.MatrixStruct, list[torch.Tensor]]:
    """Return a dense weight for the kernel, and the tensors to be kept alive."""
    sizes = *weight.shape, -(-weight.shape[1] // 32), weight.dtype == torch.float16
    tensors = [weight, torch.zeros(len(weight), dtype=weight.dtype) if bias is None else bias]
    return kernel.MatrixStruct(None, weight.data_ptr(), None, tensors[1].data_ptr(), *sizes), tensors


class Llama:
    """Random weights of a few blocks and a head, dense, as the kernel takes them and as float64 computes with them."""

    def __init__(self, kind: torch.dtype, blocks: int, size: int = 8, vocabulary: int = 50) -> None:
        draw = torch.Generator().manual_seed(size)
        heads, keys, inner, width = 6, 2, 40, 6 * size
        self.kind, self.size, self.heads, self.keys, self.blocks, structs, matrices = (
            kind,
            size,
            heads,
            keys,
            [],
            [],
            [],
        )
        shapes = [(heads * size, width), *[(keys * size, width)] * 2, (width, width), *[(inner, width)] * 2]
        for _ in range(blocks):
            weights = [torch.randn(shape, generator=draw).mul(0.3).to(kind) for shape in (*shapes, (width, inner))]
            norms = [(1 + 0.3 * torch.randn(width, generator=draw)).to(kind) for _ in range(2)]
            biases = [torch.randn(len(weight), generator=draw).to(kind) for weight in weights]
            self.blocks.append((weights, biases, norms))
            matrices += [matrix(*pair) for pair in zip(weights, biases, strict=True)]
        self.norm = (1 + 0.3 * torch.randn(width, generator=draw)).to(kind)
        self.head, self.table = (torch.randn(vocabulary, width, generator=draw) for _ in range(2))
        self.head, self.table = self.head.mul(0.3).to(kind), self.table.to(kind)
        matrices += [matrix(self.head), matrix(self.table)]
        self.array = (kernel.MatrixStruct * len(matrices))(*(each for each, _ in matrices))
        self.alive = matrices
        places = [ctypes.addressof(self.array) + i * ctypes.sizeof(kernel.MatrixStruct) for i in range(len(matrices))]
        for index, (_, _, norms) in enumerate(self.blocks):
            linears = (places[7 * index + at] for at in (0, 3, 4, 6))
            sizes = width, heads, keys, size, inner
            structs.append(kernel.BlockStruct(*linears, *(n.data_ptr() for n in norms), 1e-5, 1e-6, size**-0.5, *sizes))
        self.structs = (kernel.BlockStruct * blocks)(*structs)
        place = ctypes.addressof(self.structs), places[-1], self.norm.data_ptr(), places[-2]
        self.struct = kernel.DecoderStruct(*place, 1e-4, blocks, width, kind == torch.float16)

    def decode(self, level: str, places: list[int], angles, both, length: int, out, threads: int) -> None:
        """Fill ``out`` [batch, vocabulary] with the kernel's logits; the arguments are those of step.cpp."""
        tokens, rows = len(out), (ctypes.c_int64 * len(places))(*places)
        tensors = angles.data_ptr(), both.data_ptr(), both.shape[3], length, out.data_ptr()
        kernel.load_kernel(level).decode(ctypes.addressof(self.struct), rows, tokens, *tensors, threads)

    def exact(self, x, cos, sin, both, length: int, begins: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits and what the keys and values become, in float64, rounded where the kernel rounds."""

        def rounded(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(self.kind).double()

        def normed(h: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
            return rounded(h * (h.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double())

        def turned(tensor: torch.Tensor) -> torch.Tensor:  # [batch, heads, size]
            half = torch.cat([-tensor[..., self.size // 2 :], tensor[..., : self.size // 2]], -1)
            return rounded(tensor * cos.double() + half * sin.double())

        h, both, batch = x.double()[:, 0], both.double().clone(), len(x)
        for index, (weights, biases, norms) in enumerate(self.blocks):
            q_w, k_w, v_w, o_w, gate_w, up_w, down_w = (
                functools.partial(torch.nn.functional.linear, weight=weight.double(), bias=bias.double())
                for weight, bias in zip(weights, biases, strict=True)
            )
            n = normed(h, norms[0], 1e-5)
            q, k, v = (project(n).view(batch, -1, self.size) for project in (q_w, k_w, v_w))
            both[index, :, :, length - 1] = turned(k)
            both[len(self.blocks) + index, :, :, length - 1] = rounded(v)
            keys, values = (
                each[:, :, :length].repeat_interleave(self.heads // self.keys, 1)
                for each in (both[index], both[len(self.blocks) + index])
            )
            scores = (turned(q)[:, :, None] @ keys.mT).squeeze(2) * self.size**-0.5  # [batch, heads, length]
            scores.masked_fill_((torch.arange(length) < begins[:, None])[:, None], -math.inf)
            attended = (torch.softmax(scores, -1)[:, :, None] @ values).flatten(1)
            h = rounded(h + o_w(rounded(attended)))
            n = normed(h, norms[1], 1e-6)
            h = rounded(h + down_w(rounded(torch.nn.functional.silu(gate_w(n)) * up_w(n))))
        return normed(h, self.norm, 1e-4) @ self.head.double().T, both


@pytest.mark.parametrize("kind", kernel.KERNEL_DTYPES)
@pytest.mark.parametrize(("batch", "length", "size"), [(1, 1, 8), (3, 7, 20), (8, 40, 64)])
def test_a_token_is_that_of_float64(level, kind, batch, length, size, threads):
    made, draw = Llama(kind, 3, size), torch.Generator().manual_seed(length)
    most, ids = length + 5, torch.randperm(50, generator=draw)[:batch]
    angles = torch.rand(most, size // 2, generator=draw).mul(6).repeat(1, 2)
    angles = torch.stack([angles.cos(), angles.sin()]).to(kind)
    both = torch.randn(6, batch, 2, most, size, generator=draw).to(kind)
    turns = torch.arange(batch) * 3 % most
    begins = torch.arange(batch) * (length - 1) // 8  # padded by none and by some
    exact, kept = made.exact(made.table[ids][:, None], *angles[:, turns, None], both, length, begins)
    out, before = torch.full((batch, 50), math.nan, dtype=kind), both.clone()
    made.decode(level, [*ids.tolist(), *turns.tolist(), *begins.tolist()], angles, both, length, out, threads)
    eps = torch.finfo(kind).eps
    # Numbers that are halfway are rounded to either side, once in a while, and later ones feel it: a few units of the
    # largest. Nothing but the new place changes.
    assert (out.double() - exact).abs().max() <= 8 * eps * exact.abs().max()
    assert (both.double() - kept).abs().max() <= 4 * eps * kept.abs().max()
    both[:, :, :, length - 1] = before[:, :, :, length - 1]
    assert torch.equal(both, before)
    half = batch // 2  # other threads' numbers: each sequence is on its own
    if half:
        alone, few = torch.empty(half, 50, dtype=kind), both[:, :half].contiguous()
        places = [number for each in (ids, turns, begins) for number in each[:half].tolist()]
        made.decode(level, places, angles, few, length, alone, threads)
        assert (alone.double() - exact[:half]).abs().max() <= 8 * eps * exact.abs().max()


@pytest.mark.parametrize("kind", kernel.KERNEL_DTYPES)
@pytest.mark.parametrize("length", [1, 7, 300])
@pytest.mark.parametrize("size", [8, 20, 64])
def test_attention_is_that_of_float64(level, kind, length, size, threads):
    # A block that adds its attention alone to zeros: queries are the bias, the other projections nothing and one.
    made, draw = Llama(kind, 1, size), torch.Generator().manual_seed(length)
    weights, biases, _ = made.blocks[0]
    for tensor in (*weights, *biases):
        tensor.zero_()
    weights[3].copy_(torch.eye(6 * size))
    biases[0].copy_(3 * torch.randn(6 * size, generator=draw))
    made.table.zero_()
    made.struct.head, begins = None, torch.tensor([0, 0, length // 2])
    angles = torch.tensor([1.0, 0])[:, None, None].repeat(1, length + 5, size).to(kind)
    both = torch.randn(2, 3, 2, length + 5, size, generator=draw).to(kind)
    both[0, 0] *= 40  # scores of some hundred: all but the largest are nothing
    out = torch.full((3, 6 * size), math.nan, dtype=kind)
    made.decode(level, [0] * 6 + begins.tolist(), angles, both, length, out, threads)
    k, v = both[:, :, :, :length].double().repeat_interleave(3, 2)
    q, hidden = biases[0].double().view(6, 1, size), (torch.arange(length) < begins[:, None])[:, None, None]
    weights = torch.softmax((q @ k.mT * size**-0.5).masked_fill(hidden, -math.inf), -1)
    exact = (weights @ v).view(3, -1)
    # A score is off by float32's 6e-8 of the sum of its products' sizes, and so is its weight, relatively.
    scores = (q.abs() @ k.abs().mT * size**-0.5).amax()
    bound = 4e-7 * (2 + scores) * v.abs().max() + HALF_ULP[kind] * exact.abs() + 1e-7
    assert ((out.double() - exact).abs() <= bound).all()


@pytest.mark.machine
@pytest.mark.parametrize("kind", kernel.KERNEL_DTYPES)
@pytest.mark.parametrize(("batch", "every"), [(1, 1), (3, 1), (8, 1), (2, 2)])
def test_decoding_is_as_close_to_float32_as_dense(level, kind, batch, every, threads):
    ids = some_ids(batch)
    made = with_zeros(tiny_llama(), kind=kind, every=every)  # or dense and packed layers in one block
    exact, theirs = decode(copy.deepcopy(made).float(), ids), decode(copy.deepcopy(made), ids)
    assert sparse.sparsify(made, kernel=kernel.load_kernel(level)) == -(-21 // every) and compiled(made)
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
def test_sequences_of_unequal_length_are_padded_on_the_left(made, stepped):
    ids, mask = some_ids(2), torch.ones(2, 9, dtype=torch.long)
    made.generation_config.pad_token_id = 2
    mask[0, :4] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    both = made.generate(ids[:, :9], attention_mask=mask, **options)
    assert len(stepped) == 5  # the first of six follows from the prompt
    alone = made.generate(ids[:1, 4:9], attention_mask=mask[:1, 4:], **options)
    for ours, theirs in zip(both.logits, alone.logits, strict=True):
        assert (ours[0].float() - theirs[0].float()).abs().max() <= 0.05 * theirs.float().abs().max()  # 8 bits
        if ours[0].argmax() != theirs[0].argmax():
            break  # a tie, after which the texts differ


# ---------------------------------------------------------------------------------------------------- who takes part

PLAIN = ("llama", "llama grouped-query", "llama3 tied", "mistral", "qwen2")


@pytest.mark.machine
@pytest.mark.parametrize("values", fast(sparse.PACKED_VALUES, 1))
@pytest.mark.parametrize("kind", KINDS)
def test_only_models_that_agree_are_compiled_and_all_decode(kind, values):
    made = with_zeros(build(kind))
    ids = some_ids(2) % made.config.get_text_config().vocab_size
    expected = decode(copy.deepcopy(made), ids)
    sparse.sparsify(made, values=values)
    if kind in PLAIN:
        assert compiled(made)
    if kind in ("gemma", "gemma2", "qwen3", "phi3"):  # other norms, norms of queries, fused projections
        assert not compiled(made)
    # Two results of 8 bits, a few blocks deep.
    assert (decode(made, ids) - expected).abs().max() <= 0.08 * expected.abs().max()


@pytest.mark.parametrize("values", sparse.PACKED_VALUES)
@pytest.mark.parametrize("at", [0, 1])
def test_one_block_that_differs_is_noticed(at, values):
    unrotated, scaled = with_zeros(build("smollm3")), with_zeros(build("granite"))
    for index, layer in enumerate(unrotated.get_decoder().layers):
        layer.self_attn.use_rope = index != at
    scaled.get_decoder().layers[at].residual_multiplier = 0.8
    for made in (unrotated, scaled):
        sparse.sparsify(made, values=values)
        assert not compiled(made)


GRANITE = ("embedding_multiplier", "logits_scaling", "residual_multiplier")


@pytest.mark.parametrize("values", sparse.PACKED_VALUES)
@pytest.mark.parametrize("name", [None, *GRANITE])
def test_what_is_around_the_blocks_is_noticed(name, values):
    config = build("granite").config
    for each in GRANITE:
        setattr(config, each, 0.8 if each == name else 1.0)
    made = with_zeros(type(build("granite"))(config).eval())
    sparse.sparsify(made, values=values)
    assert compiled(made) == (name is None)


@pytest.mark.machine
def test_a_window_that_slides_takes_the_models_own(stepped):
    made = with_zeros(build("mistral"))  # with a window of 8
    sparse.sparsify(made)
    stepped.clear()
    decode(made, some_ids(1), prompt=5)
    assert len(stepped) == 2  # 6 and 7 tokens


@pytest.mark.machine
def test_one_token_is_compiled_and_several_are_not(made, stepped):
    decode(made, some_ids(8), prompt=11)
    assert len(stepped) == 2
    decode(made, some_ids(9), prompt=11)  # sequences: one more than the kernel takes
    assert len(stepped) == 2


@pytest.mark.machine
@pytest.mark.parametrize("place", ["self_attn.q_proj", "mlp", "input_layernorm"])
def test_hooks_inside_are_called(place, made, stepped):
    seen = []
    handle = made.model.layers[1].get_submodule(place).register_forward_hook(lambda *_: seen.append(1))
    decode(made, some_ids(1), prompt=11)
    assert len(seen) == 3 and not stepped
    handle.remove()
    decode(made, some_ids(1), prompt=12)
    assert len(seen) == 3 and len(stepped) == 1


@pytest.mark.machine
def test_a_model_is_looked_at_once_for_the_tokens_of_a_text_and_again_for_a_hook(made, monkeypatch):
    looked, real, seen = [], CompiledTokens._described, []
    monkeypatch.setattr(CompiledTokens, "_described", lambda self: looked.append(1) or real(self))
    ids, cache = some_ids(1), filled(made, some_ids(1)[:, :5])
    continued(made, cache, ids[:, 5:9])
    assert len(looked) == 1
    handle = made.model.layers[1].mlp.register_forward_hook(lambda *_: seen.append(1))
    continued(made, cache, ids[:, 9:10])
    assert len(seen) == 1
    handle.remove()
    continued(made, cache, ids[:, 10:11])
    assert len(seen) == 1
    # What another text needs: a weight that was replaced meanwhile is not read where it was.
    before, others = continued(made, filled(made, ids[:, :5]), ids[:, 5:7]), filled(made, ids[:, :5])
    first = continued(made, others, ids[:, 5:6])
    for norm in (made.model.norm, made.model.layers[0].input_layernorm):
        norm.weight.data = torch.full_like(norm.weight, 7)
    assert torch.equal(torch.cat([first, continued(made, others, ids[:, 6:7])], 1), before)
    assert not torch.equal(continued(made, filled(made, ids[:, :5]), ids[:, 5:7]), before)


@pytest.mark.parametrize("rope", ["default", "linear", "dynamic"])
def test_angles_that_depend_on_the_length_are_the_models_own(rope):
    config = tiny_llama().config
    config.rope_parameters = config.rope_parameters | {"rope_type": rope, "factor": 2.0}
    made = with_zeros(type(tiny_llama())(config).eval())
    sparse.sparsify(made)
    assert compiled(made) == (rope != "dynamic")


@torch.no_grad()
def test_tokens_and_positions_that_do_not_exist_are_the_models_own(made, stepped):
    ids, cache = some_ids(1), filled(made, some_ids(1)[:, :5])
    far = torch.tensor([[500]])  # what the room's angles do not reach
    made(ids[:, 5:6], past_key_values=cache, position_ids=far, use_cache=True)
    for wrong in (-1, made.config.vocab_size):
        with pytest.raises(IndexError):
            made(torch.tensor([[wrong]]), past_key_values=cache, use_cache=True)
    assert not stepped


def test_another_module_or_forward_method_is_used(made, stepped):
    before = decode(made, some_ids(1), prompt=12)
    made.model.layers[2].mlp.down_proj = torch.nn.Sequential(made.model.layers[2].mlp.down_proj, torch.nn.Tanh())
    other_module = decode(made, some_ids(1), prompt=12)
    assert len(stepped) == 1 and not torch.allclose(before, other_module)
    made.model.layers[0].mlp.forward = lambda x: 0 * x
    other_method = decode(made, some_ids(1), prompt=12)
    assert len(stepped) == 1 and not torch.allclose(other_module, other_method)


ASKED = {"output_hidden_states": True, "return_dict": False, "use_cache": False, "position_ids": torch.full((2, 1), 5)}


@pytest.mark.parametrize("name", [*ASKED, "labels", "a mask of gaps", "inputs_embeds"])
@torch.no_grad()
def test_what_else_is_asked_for_is_the_models_own(name, made, stepped):
    ids, cache = some_ids(1), filled(made, some_ids(1)[:, :5])
    more = {name: ASKED[name]} if name in ASKED else {}
    if name == "labels":
        more = {"labels": ids[:, :1]}
    if name == "a mask of gaps":
        more = {"attention_mask": torch.tensor([[1, 1, 0, 1, 1, 1]])}
    if name == "inputs_embeds":
        more = {"inputs_embeds": made.get_input_embeddings()(ids[:, :1])}
    try:
        made(*([] if name == "inputs_embeds" else [ids[:, 5:6]]), past_key_values=cache, **more)
    except RuntimeError:  # transformers': there are not two sequences
        assert name == "position_ids"
    assert not stepped


@torch.no_grad()
def test_a_cache_of_other_sequences_or_of_another_model_is_not_misread(made, stepped):
    cache = filled(made, some_ids(1)[:, :5])
    continued(made, cache, some_ids(1)[:, 5:6])
    with pytest.raises(RuntimeError):  # torch's: one sequence and two
        continued(made, cache, some_ids(2)[:, :1])
    other = with_zeros(build("llama"))
    sparse.sparsify(other)
    stepped.clear()
    with pytest.raises(RuntimeError):
        continued(other, cache, some_ids(1)[:, :1])
    assert not stepped


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
    del made.forward
    exact = decode(made, ids)
    assert (changed - exact).abs().max() <= 0.05 * exact.abs().max()  # 8 bits


def test_an_embedding_of_another_dtype_is_not_misread(made, stepped):
    cache = filled(made, some_ids(1)[:, :5])
    made.get_input_embeddings().weight.data = made.get_input_embeddings().weight.data.float()
    with pytest.raises(RuntimeError):  # torch's: the other weights are bfloat16
        continued(made, cache, some_ids(1)[:, 5:6])
    assert not stepped


# ------------------------------------------------------------------------------------------- what is not compiled


@pytest.mark.parametrize("values", sparse.PACKED_VALUES)
@pytest.mark.parametrize("act", ["gelu", "gelu_pytorch_tanh", "relu"])
@pytest.mark.parametrize("scale", [0.05, 0.3, 1.0])
def test_other_activations_keep_their_own(act, scale, values):
    made = tiny_llama()
    for layer in made.model.layers:
        layer.mlp.act_fn = ACT2FN[act]
        layer.mlp.down_proj.weight.data *= scale
    made = with_zeros(made)
    sparse.sparsify(made, values=values)
    assert not compiled(made)


OTHER_ROTATIONS = {
    "none": lambda x, cos, sin: x,
    "interleaved": lambda x, cos, sin: x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * sin,
    "backwards": lambda x, cos, sin: x * cos - modeling_llama.rotate_half(x) * sin,
}


@pytest.mark.parametrize("values", sparse.PACKED_VALUES)
@pytest.mark.parametrize("kind", OTHER_ROTATIONS)
def test_other_rotations_keep_their_own(kind, values, monkeypatch):
    def rotate(q, k, cos, sin, *_):
        return tuple(OTHER_ROTATIONS[kind](x, cos[:, None], sin[:, None]) for x in (q, k))

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rotate)
    made = with_zeros(tiny_llama())
    sparse.sparsify(made, values=values)
    assert not compiled(made)


@pytest.mark.parametrize("broken", ["self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"])
def test_shapes_that_do_not_fit_are_not_compiled(broken):
    made = with_zeros(tiny_llama())
    layer = made.model.layers[1]
    old = layer.get_submodule(broken)
    wider = torch.nn.Linear(old.in_features, old.out_features + 8, bias=False, dtype=torch.bfloat16)
    layer.set_submodule(broken, wider)
    sparse.sparsify(made)
    assert not compiled(made)


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
    assert compiled(sparse.load_packed(packed_in(tmp_path, made)))
