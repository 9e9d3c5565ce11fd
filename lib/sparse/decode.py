"""Decoding: one new token per sequence through a whole LLaMA in one call of compiled code."""

import ctypes
import functools
import inspect
import math
from collections.abc import Callable
from operator import is_

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import CausalLMOutputWithPast

from lib.sparse.kernel import MAX_TOKENS, BlockStruct, DecoderStruct, Kernel, MatrixStruct
from lib.sparse.layers import DenseLinear, SparseLinear

GROUPED_SDPA = "grouped_sdpa"
# Linear layers of a LLaMA's block, in the order in which the kernel takes them, and the other modules in it.
LINEARS = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
NORMS = ("input_layernorm", "post_attention_layernorm")
OTHER_MODULES = ("self_attn", "mlp", "mlp.act_fn", *NORMS)
# Arguments of a forward pass that a compiled token takes, and of others the values that ask for nothing more.
TAKEN = ("attention_mask", "position_ids", "cache", "past_key_values")  # the last in older versions of transformers
OPTIONS = {"use_cache": True, "return_dict": True, "output_attentions": False, "output_hidden_states": False}
# When keys and values are copied, room is made for at least so many further tokens.
SPARE_TOKENS = 64
# A block is tried on three tokens, each of which reads the keys and values of those before.
TRIAL_TOKENS = 3


def grouped_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Return the result of transformers' ``sdpa``, [batch, tokens, heads, size], with the same arguments.

    With grouped-query attention torch copies the keys for every head that shares them. For one token per sequence the
    heads of a group can take the place of tokens instead: 4 times faster after 128 tokens of SmolLM2, 16 times
    after 512 with 32 heads on 4. (transformers does this too, but not without a mask.)
    """
    batch, heads, tokens, size = query.shape
    plain = all(kwargs.get(name) is None for name in ("position_bias", "softcap")) and not kwargs.get("dropout")
    one_mask = attention_mask is None or attention_mask.shape[1] == 1  # for all heads
    if tokens != 1 or heads == key.shape[1] or not plain or not one_mask:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    query = query.reshape(batch, key.shape[1], heads // key.shape[1], size)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=kwargs.get("scaling"))
    return out.reshape(batch, 1, heads, value.shape[-1]), None


AttentionInterface.register(GROUPED_SDPA, grouped_attention)
AttentionMaskInterface.register(GROUPED_SDPA, sdpa_mask)


def compile_tokens(model: PreTrainedModel, kernel: Kernel) -> None:
    """Replace ``sdpa`` by ``grouped_attention``, and let a model that is built like a LLaMA decode in compiled code.

    A trial shows for each block, and for what is around them, whether compiled code computes what the model's own does:
    blocks of one class may differ, for example in whether they rotate.
    """
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(GROUPED_SDPA)
    try:
        compiled = CompiledTokens(model, kernel) if _is_llama(model) else None
        if compiled and compiled.agrees():
            model.forward = compiled
    except Exception:  # any failure means that this is not a plain LLaMA
        return


class CompiledTokens:
    """Forward pass of a model: compiled for one new token per sequence, the model's own for everything else.

    The model's own also runs where the kernel would miss something: gradients, hooks, replaced modules or forward
    methods, another cache than DynamicCache or an empty one, a mask of more than padding on the left, another attention
    than ``grouped_attention``.
    """

    def __init__(self, model: PreTrainedModel, kernel: Kernel) -> None:
        functools.update_wrapper(self, model.forward)  # generate() asks for its signature
        self.model, self.kernel, self.decoder = model, kernel, model.get_decoder()
        self.layers, head = self.decoder.layers, model.get_output_embeddings()
        self._linears = [*(layer.get_submodule(name) for layer in self.layers for name in LINEARS), head]
        self._norms = [*(layer.get_submodule(name) for layer in self.layers for name in NORMS), self.decoder.norm]
        self._children = [(parent._modules, *child) for parent in model.modules() for child in parent._modules.items()]
        self._cache_name = "cache" if "cache" in inspect.signature(self).parameters else "past_key_values"
        self._window = getattr(model.config, "sliding_window", None) or math.inf
        self._key = self._struct = None

    def __call__(self, input_ids: torch.Tensor | None = None, *args, **kwargs) -> CausalLMOutputWithPast:
        cache, positions = kwargs.get("cache", kwargs.get("past_key_values")), kwargs.get("position_ids")
        fits = not args and input_ids is not None and type(cache) is DynamicCache and not torch.is_grad_enabled()
        batch, tokens = input_ids.shape if fits else (0, 0)
        fits = tokens == 1 and batch <= MAX_TOKENS and (positions is None or positions.shape in ((1, 1), (batch, 1)))
        struct = self._described() if fits and self._plain(kwargs) else None
        room = Room.of(cache, batch, struct, self._norms[0].weight) if struct else None
        whole = room and room.length + 1 < self._window
        begins = _begins(kwargs.get("attention_mask"), batch, room.length + 1) if whole else None
        if begins is None:
            return self.__wrapped__(input_ids, *args, **kwargs)
        positions = torch.full((1, 1), room.length) if positions is None else positions
        logits = self._decode(struct, *self._entering(input_ids, positions), room.both, room.length, begins)
        room.lend(cache)
        return CausalLMOutputWithPast(logits=logits, **{self._cache_name: cache})

    def _plain(self, kwargs: dict) -> bool:
        """Return whether arguments and configuration ask for the next token's logits alone."""
        options = OPTIONS | {name: value for name, value in kwargs.items() if name not in TAKEN and value is not None}
        config, one = self.model.config, isinstance(options.pop("logits_to_keep", 0), int)
        return one and options == OPTIONS and config.return_dict and not config.output_hidden_states

    def _described(self) -> DecoderStruct | None:
        """Return the model for the kernel, None if it is not as the kernel takes it, was altered, or is watched."""
        if self.model.config._attn_implementation != GROUPED_SDPA:
            return None
        for siblings, name, module in self._children:
            watched = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
            if watched or siblings.get(name) is not module:
                return None
        weights = [module.weight for module in (*self._norms, self.decoder.embed_tokens)]
        dtype = weights[0].dtype
        matrices = [linear.matrix(dtype) for linear in self._linears]
        key = [dtype, *(weight.data_ptr() for weight in weights), *matrices]
        if self._key != key:
            fits = all(each.dtype == dtype and each.device.type == "cpu" for each in weights)
            self._key, self._struct = key, self._structs(matrices, dtype) if fits and None not in matrices else None
        return self._struct

    def _structs(self, matrices: list[MatrixStruct], dtype: torch.dtype) -> DecoderStruct:
        array, blocks = (MatrixStruct * len(matrices))(*matrices), (BlockStruct * len(self.layers))()
        places = [ctypes.addressof(array) + index * ctypes.sizeof(MatrixStruct) for index in range(len(matrices))]
        *norms, (last, last_eps) = ((norm.weight.data_ptr(), norm.eps) for norm in self._norms)
        for index, layer in enumerate(self.layers):
            first, size = index * len(LINEARS), layer.self_attn.head_dim
            q, k, _, _, gate, *_ = matrices[first:]
            (before, before_eps), (after, after_eps) = norms[2 * index : 2 * index + 2]
            blocks[index] = BlockStruct(
                *(places[first + at] for at in (0, 3, 4, 6)),
                *(before, after, before_eps, after_eps, layer.self_attn.scaling),
                *(q.columns, q.rows // size, k.rows // size, size, gate.rows),
            )
        sizes = len(blocks), matrices[0].columns, dtype == torch.float16
        struct = DecoderStruct(ctypes.addressof(blocks), last, places[-1], last_eps, *sizes)
        struct.array, struct.all_blocks = array, blocks  # stay alive: their addresses are in it
        return struct

    def _entering(self, ids: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return what enters the first block, [batch, 1, width], and cosines and sines, [1 or batch, 1, size] each."""
        x = self.decoder.embed_tokens(ids)
        return x.contiguous(), *(each.to(x.dtype).contiguous() for each in self.decoder.rotary_emb(x, positions))

    def _decode(self, struct: DecoderStruct, *tensors: torch.Tensor | int) -> torch.Tensor:
        """Return logits, or hidden states where ``struct`` has no head, of one token per sequence, [batch, 1, numbers].

        ``tensors``: those of ``_entering``; keys of each block and then values of each, [2 blocks, batch, keys, most,
        size]; the place of them that is filled; where each sequence's begin, int64 [batch].
        """
        x, cos, sin, both, place, begins = tensors
        out = x.new_empty(len(x), 1, self._linears[-1].out_features if struct.head else struct.width)
        stride = cos.shape[-1] if len(cos) > 1 else 0  # 0: all sequences share one position
        entering = x.data_ptr(), cos.data_ptr(), sin.data_ptr(), stride, len(x)
        held = both.data_ptr(), both.shape[3], place + 1, begins.data_ptr()
        self.kernel.decode(ctypes.addressof(struct), *entering, *held, out.data_ptr(), torch.get_num_threads())
        return out

    @torch.no_grad()
    def agrees(self) -> bool:
        """Return whether compiled code computes what the model's own does, up to rounding, for two sequences.

        Each block is tried on random numbers, among which no few large ones hide differences. Then a token's way shows
        that blocks take what the one before gave, and what is in front of them and behind.
        """
        struct = self._described()
        if struct is None or not all(map(self._block_agrees, range(struct.count))):
            return False
        vocabulary, calls = self.decoder.embed_tokens.num_embeddings, []
        ids = torch.randint(vocabulary, (2, TRIAL_TOKENS), generator=torch.Generator().manual_seed(0))
        cache = {self._cache_name: DynamicCache()}
        self.__wrapped__(ids[:, :-1], use_cache=True, **cache)
        modules = (*self.layers, self.decoder.norm)
        handles = [each.register_forward_hook(lambda *call: calls.append(call), with_kwargs=True) for each in modules]
        try:
            expected = self.__wrapped__(ids[:, -1:], use_cache=True, **cache).logits
        finally:
            for handle in handles:
                handle.remove()
        x, cos, sin = self._entering(ids[:, -1:], torch.full((1, 1), TRIAL_TOKENS - 1))
        angles = [each for _, _, kwargs, _ in calls[:-1] for each in kwargs["position_embeddings"]]
        entered, left = [args[0] for _, args, _, _ in calls], [result for *_, result in calls]
        chained = len(calls) == len(modules) and all(map(torch.equal, entered, (x, *left)))
        turned = cos.shape == (1, 1, self.layers[0].self_attn.head_dim)
        turned = turned and all(map(torch.equal, angles, (cos, sin) * struct.count))
        behind = DecoderStruct(None, struct.norm, struct.head, struct.eps, 0, struct.width, struct.half)
        begins, nothing = torch.zeros(2, dtype=torch.int64), x.new_empty(1, 1, 1, 1, 1)
        logits = self._decode(behind, entered[-1].contiguous(), cos, sin, nothing, 0, begins)
        # Roundings of the normed numbers and of the products.
        return chained and turned and _close(logits, expected, 4 * torch.finfo(x.dtype).eps * expected.abs().max())

    def _block_agrees(self, index: int) -> bool:
        layer, cache, outs = self.layers[index], DynamicCache(), []
        attention, dtype = layer.self_attn, layer.input_layernorm.weight.dtype
        draw = torch.Generator().manual_seed(0)
        tokens = torch.randn(TRIAL_TOKENS, 2, 1, self._struct.width, generator=draw).to(dtype)
        angles = torch.rand(TRIAL_TOKENS, 2, 1, attention.head_dim // 2, generator=draw).mul(6).repeat(1, 1, 1, 2)
        turns = [(angle.cos().to(dtype), angle.sin().to(dtype)) for angle in angles]
        own = functools.partial(layer, attention_mask=None, **{self._cache_name: cache})
        expected = torch.stack([own(x, position_embeddings=turn) for x, turn in zip(tokens, turns, strict=True)])
        held = cache.layers[attention.layer_idx]
        both, begins = torch.zeros(2, *held.keys.shape, dtype=dtype), torch.zeros(2, dtype=torch.int64)
        address = ctypes.addressof(self._struct.all_blocks[index])
        alone = DecoderStruct(address, None, None, 0, 1, self._struct.width, self._struct.half)
        for place, (x, turn) in enumerate(zip(tokens, turns, strict=True)):
            outs.append(self._decode(alone, x, *turn, both, place, begins))
        eps, size, added = torch.finfo(dtype).eps, _largest, expected.float() - tokens.float()
        first = index * len(LINEARS)
        if any(matrix.scales for matrix in self._struct.array[first : first + len(LINEARS)]):
            # Numbers that differ by eps are rounded to other steps of int8, a 127th, with a probability of eps * 127:
            # few differ by much, and the root of their mean square is the geometric mean of eps and a step.
            eps, size = (eps / 127) ** 0.5, _root_mean_square
        # Some ten roundings of what the block adds, and one of the sum, about as large as the tokens. Keys and values
        # are rounded less often: there another rotation, or none, shows.
        bound = 10 * eps * size(added) + 2 * eps * size(tokens)
        pairs = zip(both, (held.keys, held.values), strict=True)
        kept = all(_close(ours, theirs, 3 * eps * size(theirs), size) for ours, theirs in pairs)
        return kept and attention.layer_idx == index and _close(torch.stack(outs), expected, bound, size)


class Room:
    """Keys and values of all blocks in one tensor with room for more tokens; the layers of a cache hold views of it.

    Their own update copies all of them for each token. Only views that this class made, and that nobody replaced since
    (a crop, another order of beams), are continued in place.
    """

    def __init__(self, held: list[torch.Tensor]) -> None:
        batch, keys, self.length, size = held[0].shape
        most = self.length + max(SPARE_TOKENS, self.length // 4)
        self.both, self.views = held[0].new_empty(len(held), batch, keys, most, size), ()
        for place, each in zip(self.both, held, strict=True):
            place[:, :, : self.length] = each

    @classmethod
    def of(cls, cache: DynamicCache, batch: int, struct: DecoderStruct, weight: torch.Tensor) -> "Room | None":
        """Return the room of ``cache``, made if necessary; None if it is empty or does more than to append."""
        plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
        if not plain or len(cache.layers) != struct.count or cache.offloading or not cache.layers[0].get_seq_length():
            return None
        block, length, room = struct.all_blocks[0], cache.layers[0].get_seq_length(), getattr(cache, "room", None)
        held = [*(layer.keys for layer in cache.layers), *(layer.values for layer in cache.layers)]
        shape, kind = (batch, block.keys, length, block.size), (weight.dtype, weight.device)
        if any(each is None or each.shape != shape or (each.dtype, each.device) != kind for each in held):
            return None
        continued = room and room.length == length < room.both.shape[3] and all(map(is_, held, room.views))
        return room if continued else cls(held)

    def lend(self, cache: DynamicCache) -> None:
        """Let the layers of ``cache`` hold one token more, which is now in its place."""
        self.length += 1
        self.views, cache.room = self.both[:, :, :, : self.length].unbind(), self
        for layer, keys, values in zip(cache.layers, self.views, self.views[len(cache.layers) :], strict=False):
            layer.keys, layer.values = keys, values
            if layer.is_sliding:
                layer.cumulative_length += 1


def _begins(mask: torch.Tensor | None, batch: int, length: int) -> torch.Tensor | None:
    """Return where the keys of each sequence begin, int64 [batch]; None if ``mask`` hides others than the first."""
    if mask is None:
        return torch.zeros(batch, dtype=torch.int64)
    if mask.shape != (batch, length):
        return None
    begins = (mask == 0).sum(1)
    padded = bool(mask[:, -1].all()) and torch.equal(mask != 0, torch.arange(length) >= begins[:, None])
    return begins if padded else None


def _largest(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.float().abs().max()


def _root_mean_square(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.float().square().mean().sqrt()


def _close(ours: torch.Tensor, theirs: torch.Tensor, bound: torch.Tensor | float, size: Callable = _largest) -> bool:
    return ours.shape == theirs.shape and bool(size(ours.float() - theirs.float()) <= bound)


def _is_llama(model: PreTrainedModel) -> bool:
    """Return whether ``model`` has a LLaMA's modules, and matrices of the shapes that step.cpp takes for granted."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    parts = decoder, head, decoder.embed_tokens, decoder.layers, decoder.norm, decoder.rotary_emb
    modules = {*model.children(), *decoder.children()}
    plain = modules == {*parts} and type(decoder.norm) is nn.RMSNorm and type(decoder.embed_tokens) is nn.Embedding
    if not plain or not isinstance(head, SparseLinear | DenseLinear):
        return False
    blocks = [_is_block(layer, head.in_features) for layer in decoder.layers]
    sizes = {(layer.self_attn.head_dim, layer.self_attn.k_proj.out_features) for layer in decoder.layers}
    return all(blocks) and len(sizes) == 1 and decoder.embed_tokens.embedding_dim == head.in_features


def _is_block(layer: nn.Module, width: int) -> bool:
    if {name for name, _ in layer.named_modules()} - {""} != {*LINEARS, *OTHER_MODULES}:
        return False
    linears = [layer.get_submodule(name) for name in LINEARS]
    packable = all(isinstance(linear, SparseLinear | DenseLinear) for linear in linears)
    # As ``fuse`` leaves those that compute the same.
    norms = type(layer.input_layernorm) is type(layer.post_attention_layernorm) is nn.RMSNorm
    if not (packable and norms and isinstance(layer.mlp.act_fn, nn.SiLU | type(ACT2FN["silu"]))):
        return False
    q, k, v, o, gate, up, down = ((linear.out_features, linear.in_features) for linear in linears)
    size, inner = layer.self_attn.head_dim, gate[0]
    heads = size > 0 and size % 2 == 0 and k[0] % size == 0 and k[0] > 0 and q[0] % k[0] == 0
    attention = q[1] == width and k == v == (k[0], width) and o == (width, q[0])
    return heads and attention and gate == up == (inner, width) and down == (width, inner)
