"""Decoding steps: one new token per sequence through a LLaMA's block in compiled code."""

import ctypes
import inspect

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lib.sparse.kernel import MAX_TOKENS, BlockStruct, Kernel, MatrixStruct
from lib.sparse.layers import DenseLinear, SparseLinear

GROUPED_SDPA = "grouped_sdpa"
# Linear layers of a LLaMA's block, in the order in which the kernel takes them, and the other modules in it.
LINEARS = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
OTHER_MODULES = ("self_attn", "mlp", "mlp.act_fn", "input_layernorm", "post_attention_layernorm")
# When keys and values are copied, room is made for at least so many further tokens.
SPARE_TOKENS = 64
# A block is tried on three tokens: the first key and value, a copy with room for more, and a place in it.
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


def compile_steps(model: PreTrainedModel, kernel: Kernel) -> None:
    """Replace ``sdpa`` by ``grouped_attention``, and let blocks that are built like a LLaMA's take compiled steps.

    A trial on random tokens shows for each block whether the step computes what its own forward pass does: blocks of
    one class may differ, for example in whether they rotate.
    """
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(GROUPED_SDPA)
    for layer in model.modules() if model.config._attn_implementation == GROUPED_SDPA else ():
        try:
            step = CompiledBlock(layer, kernel) if _is_llama(layer) else None
            if step and _agrees(step):
                layer.forward = step
        except Exception:  # any failure means that this is not a plain LLaMA block
            continue


class CompiledBlock:
    """Forward pass of one block: compiled for a single token per sequence, the model's own for everything else.

    The model's own also runs where the kernel would miss something: gradients, hooks, replaced modules or forward
    methods inside of the block, another cache than DynamicCache, another attention than ``grouped_attention``.
    """

    def __init__(self, layer: nn.Module, kernel: Kernel) -> None:
        self.layer, self.kernel, self.attention = layer, kernel, layer.self_attn
        self._linears = [layer.get_submodule(name) for name in LINEARS]
        self._norms = layer.input_layernorm, layer.post_attention_layernorm
        self._children = [(parent._modules, *child) for parent in layer.modules() for child in parent._modules.items()]
        self._key = self._struct = None

    def __call__(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        batch, tokens, _ = hidden_states.shape
        cache = kwargs.get("cache", kwargs.get("past_key_values"))  # the latter in older versions of transformers
        plain = not args and type(cache) is DynamicCache and not torch.is_grad_enabled()
        block = self._block(hidden_states) if plain and tokens == 1 and 1 <= batch <= MAX_TOKENS else None
        if block is not None:
            angles = kwargs.get("position_embeddings")  # cosines and sines, [1 or batch, 1, size] each
            if angles and all(a.shape[1:] == (1, block.size) and len(a) in (1, batch) for a in angles):
                return self._step(block, hidden_states.contiguous(), cache, kwargs)
        return self.plain_forward(hidden_states, *args, **kwargs)

    def plain_forward(self, *args, **kwargs) -> torch.Tensor:
        return type(self.layer).forward(self.layer, *args, **kwargs)

    def _block(self, x: torch.Tensor) -> BlockStruct | None:
        """Return the block for the kernel, None if it is not as the kernel takes it, was altered, or is watched."""
        if x.device.type != "cpu" or self.attention.config._attn_implementation != GROUPED_SDPA:
            return None
        for siblings, name, module in self._children:
            watched = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
            if watched or siblings.get(name) is not module:
                return None
        weights = [norm.weight for norm in self._norms]
        matrices = [linear.matrix(x.dtype) for linear in self._linears]
        key = [x.dtype, *(weight.data_ptr() for weight in weights), *matrices]
        if self._key != key:
            fits = None not in matrices and all(weight.dtype == x.dtype for weight in weights)
            self._key, self._struct = key, self._described(matrices, x.dtype) if fits else None
        return self._struct

    def _described(self, matrices: list[MatrixStruct], dtype: torch.dtype) -> BlockStruct:
        q, k, _, _, gate, _, _ = matrices
        array, size = (MatrixStruct * len(matrices))(*matrices), self.attention.head_dim
        block = BlockStruct(
            *(ctypes.addressof(array) + first * ctypes.sizeof(MatrixStruct) for first in (0, 3, 4, 6)),
            *(norm.weight.data_ptr() for norm in self._norms),
            *(norm.eps for norm in self._norms),
            *(q.columns, q.rows // size, k.rows // size, size, gate.rows),
            dtype == torch.float16,
        )
        block.array = array  # stays alive: the block holds addresses in it
        return block

    def _step(self, block: BlockStruct, x: torch.Tensor, cache: DynamicCache, kwargs: dict) -> torch.Tensor:
        index, batch, threads = self.attention.layer_idx, len(x), torch.get_num_threads()
        cos, sin = (angles.to(x.dtype).contiguous() for angles in kwargs["position_embeddings"])
        stride = block.size if len(cos) > 1 else 0  # 0: all sequences share one position
        layer = cache.layers[index] if index < len(cache.layers) and not cache.offloading else None
        held = with_room(layer, x, block)
        k, v = x.new_empty(2, batch, block.keys, 1, block.size).unbind() if held is None else held
        q, y, at = x.new_empty(batch, block.heads, 1, block.size), torch.empty_like(x), ctypes.addressof(block)
        last = (k.shape[2] - 1) * block.size * x.element_size()
        places = q.data_ptr(), k.data_ptr() + last, v.data_ptr() + last, k.stride(1)
        self.kernel.enter_block(at, x.data_ptr(), cos.data_ptr(), sin.data_ptr(), stride, batch, *places, threads)
        if held is None:
            k, v = cache.update(k, v, index)
        else:
            layer.keys, layer.values = held
        mask, apart = kwargs.get("attention_mask"), k.stride(1)
        strides = block.keys * apart, apart, block.size, 1
        if mask is None and all(each.dtype == q.dtype and each.stride() == strides for each in (k, v)):
            places = q.data_ptr(), k.data_ptr(), v.data_ptr(), k.shape[2], apart
            self.kernel.attend_block(at, *places, self.attention.scaling, batch, q.data_ptr(), threads)
        else:
            more = {key: kwargs[key] for key in kwargs.keys() - {"attention_mask", "cache", "past_key_values"}}
            q, _ = grouped_attention(self.attention, q, k, v, mask, scaling=self.attention.scaling, **more)
            q = q.contiguous()
        self.kernel.leave_block(at, x.data_ptr(), q.data_ptr(), batch, y.data_ptr(), threads)
        return y


def with_room(layer: DynamicLayer | None, x: torch.Tensor, block: BlockStruct) -> tuple[torch.Tensor, ...] | None:
    """Return keys and values of a cache's ``layer`` and a place for one more, [batch, keys, length + 1, size] each.

    The layer is to hold them once the place is filled. Its own update copies all of them for each token; here they are
    views of the part in use of a tensor with room for more, which the layer keeps as ``room``. Only views that this
    function made, and that nobody replaced since (a crop, another order of beams), are continued in place.

    None if the layer is empty, or does more than to append.
    """
    if type(layer) is not DynamicLayer or not layer.is_initialized:
        return None
    k, v, length = layer.keys, layer.values, layer.get_seq_length()
    shape = len(x), block.keys, length, block.size
    if any(each.shape != shape or each.dtype != x.dtype or each.device != x.device for each in (k, v)):
        return None
    *views, both = getattr(layer, "room", (None, None, None))
    if views[0] is not k or views[1] is not v or length == both.shape[3]:
        both = x.new_empty(2, len(x), block.keys, length + max(SPARE_TOKENS, length // 4), block.size)
        both[0, :, :, :length], both[1, :, :, :length] = k, v
    k, v = both[:, :, :, : length + 1].unbind()
    layer.room = k, v, both
    return k, v


def _is_llama(layer: nn.Module) -> bool:
    """Return whether ``layer`` has a LLaMA's modules, and matrices of the shapes that step.cpp takes for granted."""
    if {name for name, _ in layer.named_modules()} - {""} != {*LINEARS, *OTHER_MODULES}:
        return False
    linears = [layer.get_submodule(name) for name in LINEARS]
    packable = all(isinstance(linear, SparseLinear | DenseLinear) for linear in linears)
    # As ``fuse`` leaves those that compute the same.
    norms = type(layer.input_layernorm) is type(layer.post_attention_layernorm) is nn.RMSNorm
    if not (packable and norms and isinstance(layer.mlp.act_fn, nn.SiLU | type(ACT2FN["silu"]))):
        return False
    q, k, v, o, gate, up, down = ((linear.out_features, linear.in_features) for linear in linears)
    size, width, inner = layer.self_attn.head_dim, q[1], gate[0]
    heads = size > 0 and size % 2 == 0 and k[0] % size == 0 and k[0] > 0 and q[0] % k[0] == 0
    attention = k == v == (k[0], width) and o == (width, q[0])
    return heads and attention and gate == up == (inner, width) and down == (width, inner)


@torch.no_grad()
def _agrees(step: CompiledBlock) -> bool:
    """Return whether ``step`` computes what the layer's own forward pass does, up to rounding, for two sequences."""
    attention, dtype = step.attention, step.layer.input_layernorm.weight.dtype
    names = inspect.signature(type(step.layer).forward).parameters
    cache_name = "cache" if "cache" in names else "past_key_values"  # in older versions of transformers
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randn(TRIAL_TOKENS, 2, 1, attention.q_proj.in_features, generator=draw).to(dtype)
    angles = torch.rand(TRIAL_TOKENS, 2, 1, attention.head_dim // 2, generator=draw).mul(6).repeat(1, 1, 1, 2)
    results = []
    for forward in (step.plain_forward, step):
        more, outs = {cache_name: DynamicCache(), "attention_mask": None}, []
        for x, angle in zip(tokens, angles, strict=True):
            outs.append(forward(x, position_embeddings=(angle.cos().to(dtype), angle.sin().to(dtype)), **more).float())
        held = more[cache_name].layers[attention.layer_idx]
        results.append((torch.stack(outs) - tokens.float(), held.keys.float(), held.values.float()))
    expected, computed = results
    eps = torch.finfo(dtype).eps
    # Some ten roundings of what the block adds, and one of the sum, about as large as the tokens. Keys and values are
    # rounded less often: there another rotation, or none, shows.
    bounds = [10 * eps * expected[0].abs().max() + 2 * eps * tokens.float().abs().max()]
    bounds += [3 * eps * values.abs().max() for values in expected[1:]]
    triples = zip(expected, computed, bounds, strict=True)
    return all(a.shape == b.shape and bool((a - b).abs().max() <= bound) for a, b, bound in triples)
