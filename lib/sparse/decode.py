"""Decoding: one new token per sequence through a whole LLaMA in one call of compiled code."""

import ctypes
import functools
import inspect
import math
from collections.abc import Callable
from operator import is_
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import CausalLMOutputWithPast

from lib.sparse.kernel import MAX_TOKENS, BlockStruct, DecoderStruct, Kernel, MatrixStruct
from lib.sparse.layers import DenseLinear, SparseEmbedding, SparseLinear, dense_matrix

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
        self._rooms: WeakKeyDictionary[DynamicCache, Room | None] = WeakKeyDictionary()

    def __call__(self, input_ids: torch.Tensor | None = None, *args, **kwargs) -> CausalLMOutputWithPast:
        cache, positions = kwargs.get("cache", kwargs.get("past_key_values")), kwargs.get("position_ids")
        fits = not args and input_ids is not None and type(cache) is DynamicCache and not torch.is_grad_enabled()
        batch, tokens = input_ids.shape if fits else (0, 0)
        fits = tokens == 1 and batch <= MAX_TOKENS and (positions is None or positions.shape in ((1, 1), (batch, 1)))
        room = self._room(cache, batch) if fits and self._plain(kwargs) else None
        places = room.places(input_ids, positions, kwargs.get("attention_mask")) if room else None
        if places is None:
            return self.__wrapped__(input_ids, *args, **kwargs)
        logits = self._decode(room.struct, places, room.angles, room.both, room.length)
        room.lend(cache)
        return CausalLMOutputWithPast(logits=logits, **{self._cache_name: cache})

    def _plain(self, kwargs: dict) -> bool:
        """Return whether arguments and configuration ask for the next token's logits alone."""
        options = OPTIONS | {name: value for name, value in kwargs.items() if name not in TAKEN and value is not None}
        config, one = self.model.config, isinstance(options.pop("logits_to_keep", 0), int)
        return one and options == OPTIONS and config.return_dict and not config.output_hidden_states

    def _room(self, cache: DynamicCache, batch: int) -> "Room | None":
        """Return the room of ``cache``; None if the cache or the model is not as the kernel takes it.

        The model is looked at after a prompt and after new hooks anywhere, not for each of the tokens that follow.
        """
        room = self._rooms.get(cache)
        if room is None or not room.continues(cache, batch):
            struct = self._described()
            held = struct and _held(cache, batch, struct)
            room = self._rooms[cache] = Room(held, struct, self.decoder.rotary_emb) if held else None
        return room if room and room.length + 1 < self._window else None

    def _described(self) -> DecoderStruct | None:
        """Return the model for the kernel, None if it is not as the kernel takes it, was altered, or is watched."""
        if self.model.config._attn_implementation != GROUPED_SDPA:
            return None
        for siblings, name, module in self._children:
            watched = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
            if watched or siblings.get(name) is not module:
                return None
        weights, embedding = [norm.weight for norm in self._norms], self.decoder.embed_tokens
        dtype = weights[-1].dtype
        table = embedding.matrix(dtype) if isinstance(embedding, SparseEmbedding) else dense_matrix(embedding.weight)
        matrices = [*(linear.matrix(dtype) for linear in self._linears), table]
        fits = all(weight.dtype == dtype and weight.device.type == "cpu" for weight in weights) and None not in matrices
        if not fits or (table.columns, table.half) != (matrices[0].columns, dtype == torch.float16):
            return None
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
        sizes = len(blocks), table.columns, dtype == torch.float16
        struct = DecoderStruct(ctypes.addressof(blocks), places[-1], last, places[-2], last_eps, *sizes)
        struct.array, struct.all_blocks = array, blocks  # stay alive, as do the data that parameters have now
        struct.parameters = [parameter.detach() for parameter in self.model.parameters()]
        return struct

    def _decode(self, struct: DecoderStruct, places: list[int], *held: torch.Tensor | int) -> torch.Tensor:
        """Return logits, or hidden states where ``struct`` has no head, of one token per sequence, [batch, 1, numbers].

        ``places``: as ``Room.places`` returns them; ``held``: cosines and sines, [2, most, size], keys of each block
        and then values of each, [2 blocks, batch, keys, most, size], and how many of ``most`` places are filled.
        """
        tokens, (angles, both, filled) = len(places) // 3, held
        out = both.new_empty(tokens, 1, self._linears[-1].out_features if struct.head else struct.width)
        rows = (ctypes.c_int64 * len(places))(*places)
        given = rows, tokens, angles.data_ptr(), both.data_ptr(), both.shape[3], filled + 1, out.data_ptr()
        self.kernel.decode(ctypes.addressof(struct), *given, torch.get_num_threads())
        return out

    @torch.no_grad()
    def agrees(self) -> bool:
        """Return whether compiled code computes what the model's own does, up to rounding, for two sequences.

        Each block is tried on random numbers, among which no few large ones hide differences. Then a token's way shows
        that blocks take what the one before gave, and what is in front of them and behind.
        """
        struct = self._described()
        if struct is None or not all(self._block_agrees(struct, index) for index in range(struct.count)):
            return False
        calls, cache, draw = [], DynamicCache(), torch.Generator().manual_seed(0)
        ids = torch.randint(struct.array[-1].rows, (2, TRIAL_TOKENS), generator=draw)
        self.__wrapped__(ids[:, :-1], use_cache=True, **{self._cache_name: cache})
        room = Room(_held(cache, 2, struct), struct, self.decoder.rotary_emb)
        places = room.places(ids[:, -1:], None, None)
        modules = (*self.layers, self.decoder.norm)
        handles = [each.register_forward_hook(lambda *call: calls.append(call), with_kwargs=True) for each in modules]
        try:
            expected = self.__wrapped__(ids[:, -1:], use_cache=True, **{self._cache_name: cache}).logits
        finally:
            for handle in handles:
                handle.remove()
        front = DecoderStruct(None, struct.embedding, None, None, 0, 0, struct.width, struct.half)
        x = self._decode(front, places, room.angles, room.both, 0)
        angles = [each for _, _, kwargs, _ in calls[:-1] for each in kwargs["position_embeddings"]]
        entered, left = [args[0] for _, args, _, _ in calls], [result for *_, result in calls]
        chained = len(calls) == len(modules) and all(map(torch.equal, entered, (x, *left)))
        turned = room.angles.shape[2] == self.layers[0].self_attn.head_dim
        turned = turned and all(map(torch.equal, angles, [*room.angles[:, None, [room.length]]] * struct.count))
        table = dense_matrix(entered[-1][:, 0].contiguous())
        ends = struct.norm, struct.head, struct.eps, 0, struct.width, struct.half
        behind = DecoderStruct(None, ctypes.addressof(table), *ends)
        logits = self._decode(behind, [0, 1, 0, 0, 0, 0], room.angles, room.both, 0)
        # Roundings of the normed numbers and of the products.
        return chained and turned and _close(logits, expected, 4 * torch.finfo(x.dtype).eps * expected.abs().max())

    def _block_agrees(self, struct: DecoderStruct, index: int) -> bool:
        layer, cache, outs = self.layers[index], DynamicCache(), []
        attention, dtype = layer.self_attn, layer.input_layernorm.weight.dtype
        draw, count = torch.Generator().manual_seed(0), 2 * TRIAL_TOKENS
        tokens = torch.randn(TRIAL_TOKENS, 2, 1, struct.width, generator=draw).to(dtype)
        turns = torch.rand(count, attention.head_dim // 2, generator=draw).mul(6).repeat(1, 2)
        angles = torch.stack([turns.cos(), turns.sin()]).to(dtype)
        own = functools.partial(layer, attention_mask=None, **{self._cache_name: cache})
        pairs = angles.unflatten(1, tokens.shape[:3]).unbind(1)
        expected = torch.stack([own(x, position_embeddings=(*turn,)) for x, turn in zip(tokens, pairs, strict=True)])
        held = cache.layers[attention.layer_idx]
        both = torch.zeros(2, 2, *held.keys.shape[1:2], count, attention.head_dim, dtype=dtype)
        table, address = dense_matrix(tokens.view(count, -1)), ctypes.addressof(struct.all_blocks[index])
        alone = DecoderStruct(address, ctypes.addressof(table), None, None, 0, 1, struct.width, struct.half)
        for place in range(TRIAL_TOKENS):
            outs.append(self._decode(alone, [2 * place, 2 * place + 1] * 2 + [0, 0], angles, both, place))
        eps, size, added = torch.finfo(dtype).eps, _largest, expected.float() - tokens.float()
        first = index * len(LINEARS)
        if any(matrix.scales for matrix in struct.array[first : first + len(LINEARS)]):
            # Numbers that differ by eps are rounded to other steps of int8, a 127th, with a probability of eps * 127:
            # few differ by much, and the root of their mean square is the geometric mean of eps and a step.
            eps, size = (eps / 127) ** 0.5, _root_mean_square
        # Some ten roundings of what the block adds, and one of the sum, about as large as the tokens. Keys and values
        # are rounded less often: there another rotation, or none, shows.
        bound = 10 * eps * size(added) + 2 * eps * size(tokens)
        pairs = zip(both[:, :, :, :TRIAL_TOKENS], (held.keys, held.values), strict=True)
        kept = all(_close(ours, theirs, 3 * eps * size(theirs), size) for ours, theirs in pairs)
        return kept and attention.layer_idx == index and _close(torch.stack(outs), expected, bound, size)


class Room:
    """What the tokens after a prompt share: keys and values in one tensor with room for more, and the model as it is.

    The layers of the cache hold views of the tensor: their own update copies all of it for each token. Only views that
    this class made, and that nobody replaced since (a crop, another order of beams), are continued in place.
    """

    def __init__(self, held: list[torch.Tensor], struct: DecoderStruct, rotary: nn.Module) -> None:
        batch, keys, self.length, size = held[0].shape
        most = self.length + max(SPARE_TOKENS, self.length // 4)
        self.both, self.views = held[0].new_empty(len(held), batch, keys, most, size), ()
        for place, each in zip(self.both, held, strict=True):
            place[:, :, : self.length] = each
        self.angles = torch.cat(rotary(self.both, torch.arange(most)[None])).to(self.both.dtype)  # [2, most, size]
        self.struct, self.rows, self.hooks = struct, struct.array[-1].rows, RemovableHandle.next_id

    def continues(self, cache: DynamicCache, batch: int) -> bool:
        """Return whether ``cache`` is as ``lend`` left it, there is room for a token, and nobody registered a hook."""
        held = [*(layer.keys for layer in cache.layers), *(layer.values for layer in cache.layers)]
        same = len(held) == len(self.views) and all(map(is_, held, self.views)) and batch == self.both.shape[1]
        return same and self.length < self.both.shape[3] and self.hooks == RemovableHandle.next_id

    def places(self, ids: torch.Tensor, positions: torch.Tensor | None, mask: torch.Tensor | None) -> list[int] | None:
        """Return each sequence's token, then each one's place in ``angles``, then where the keys of each begin.

        None if there is no such token or place, or if ``mask`` hides others than the first keys.
        """
        tokens, turns = ids.flatten().tolist(), [self.length] if positions is None else positions.flatten().tolist()
        turns, begins = turns * (len(tokens) // len(turns)), _begins(mask, len(tokens), self.length + 1)
        inside = min(*tokens, *turns) >= 0 and max(tokens) < self.rows and max(turns) < self.both.shape[3]
        return [*tokens, *turns, *begins] if inside and begins else None

    def lend(self, cache: DynamicCache) -> None:
        """Let the layers of ``cache`` hold one token more, which is now in its place."""
        self.length += 1
        self.views = self.both[:, :, :, : self.length].unbind()
        for layer, keys, values in zip(cache.layers, self.views, self.views[len(cache.layers) :], strict=False):
            layer.keys, layer.values = keys, values
            if layer.is_sliding:
                layer.cumulative_length += 1


def _held(cache: DynamicCache, batch: int, struct: DecoderStruct) -> list[torch.Tensor] | None:
    """Return the keys of all layers and then their values; None if there are none, or a layer does more than append."""
    plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
    if not plain or len(cache.layers) != struct.count or cache.offloading or not cache.layers[0].get_seq_length():
        return None
    held = [*(layer.keys for layer in cache.layers), *(layer.values for layer in cache.layers)]
    block, dtype = struct.all_blocks[0], (torch.bfloat16, torch.float16)[struct.half]
    shape = batch, block.keys, cache.layers[0].get_seq_length(), block.size
    fits = all(each is not None and each.shape == shape and each.dtype == dtype for each in held)
    return held if fits and all(each.device.type == "cpu" for each in held) else None


def _begins(mask: torch.Tensor | None, batch: int, length: int) -> list[int] | None:
    """Return where the keys of each sequence begin; None if ``mask`` hides others than the first."""
    if mask is None or (mask.shape == (batch, length) and mask.all()):
        return [0] * batch
    if mask.shape != (batch, length):
        return None
    begins = (mask == 0).sum(1)
    padded = mask[:, -1].all() and torch.equal(mask != 0, torch.arange(length) >= begins[:, None])
    return begins.tolist() if padded else None


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
    plain = modules == {*parts} and type(decoder.norm) is nn.RMSNorm and isinstance(head, SparseLinear | DenseLinear)
    plain = plain and type(decoder.embed_tokens) in (nn.Embedding, SparseEmbedding)
    # Frequencies that depend on a text's length are not those of all its places.
    if not plain or any(kind in str(decoder.rotary_emb.rope_type) for kind in ("dynamic", "longrope")):
        return False
    blocks = [_is_block(layer, head.in_features) for layer in decoder.layers]
    sizes = {(layer.self_attn.head_dim, layer.self_attn.k_proj.out_features) for layer in decoder.layers}
    return all(blocks) and len(sizes) == 1


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
