"""Decoding steps: one new token per sequence through a LLaMA's block in one compiled call."""

import ctypes
import inspect
from collections.abc import Sequence
from itertools import chain, repeat
from operator import contains, is_
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as watching
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lib.sparse.kernel import MAX_TOKENS, BlockStruct, Kernel, MatrixStruct, load
from lib.sparse.layers import DenseLinear, SparseLinear

GROUPED_SDPA = "grouped_sdpa"


def grouped_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs
) -> tuple[Tensor, None]:
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


def group_attention(model: PreTrainedModel) -> None:
    """Replace ``sdpa`` by ``grouped_attention`` in ``model``, in place, if it uses it."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(GROUPED_SDPA)


# Linear layers of a LLaMA's block, those of one kernel call together.
PRODUCTS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
OTHER_MODULES = ("self_attn", "mlp", "mlp.act_fn", "input_layernorm", "post_attention_layernorm")
# When keys and values are copied, room is made for at least so many further tokens.
SPARE_TOKENS = 64
# A block is tried on three tokens: the first key and value, a copy with room for more, and a place in it.
TRIAL_TOKENS = 3


class RotaryCache:
    """Cosines and sines of a forward pass for the kernel, prepared once for all blocks."""

    def __init__(self) -> None:
        self._latest = None  # one tuple, so that another thread replaces all of it or nothing

    def angles(self, embeddings: tuple | None, x: Tensor, size: int, config: PreTrainedConfig) -> list | None:
        """Return [address of the cosines, of the sines, stride], None where the kernel does not compute such a pass.

        ``embeddings``: cosines and sines, [1 or batch, 1, size] each. Every block of a pass is given the same tuple;
        another tuple is another pass.
        """
        latest, key = self._latest, (x.dtype, x.shape[0], size)
        if latest is None or latest[0] is not embeddings or latest[1] != key:
            latest = self._latest = (embeddings, key, *_addresses_of_angles(embeddings, x, size, config))
        return latest[3]


class BlockGuard:
    """Guard of a block's modules: whether they still are as they were when the block was compiled."""

    def __init__(self, layer: nn.Module) -> None:
        self.attention, self.linears, self.norms = layer.self_attn, _linears(layer), _norms(layer)
        children = [(parent._modules, *child) for parent in layer.modules() for child in parent._modules.items()]
        self._tables, self._names, self._modules = zip(*children, strict=True)
        self._hooks = [table for m in self._modules for table in (m._forward_hooks, m._forward_pre_hooks)]
        self._states = [vars(module) for module in self._modules]

    def untouched(self) -> bool:
        """Return whether no module was replaced, is watched by hooks, or has another forward method of its own.

        This runs for every block and token: map keeps it out of Python.
        """
        kept = all(map(is_, map(dict.get, self._tables, self._names), self._modules))
        return kept and not any(self._hooks) and not any(map(contains, self._states, repeat("forward")))


class KeyValueStore:
    """Keys and values of one block in tensors with room for more: a cache's own copies all of them for each token.

    What the cache holds are views of the part in use. Only a view that this object put there, and that nobody replaced
    since (a crop, another order of beams, another cache of the same keys), is continued in place.
    """

    def __init__(self) -> None:
        self._held = WeakKeyDictionary()  # by the cache's layer: the views of keys and values, and the whole of both

    def with_room(self, cache: DynamicCache, index: int, x: Tensor, block: BlockStruct) -> tuple[Tensor, Tensor] | None:
        """Return the cache's keys and values and a place for one more, [batch, keys, length + 1, size] each.

        The cache is to hold them once the place is filled. None if the cache is empty, or does more than to append.
        """
        layer = cache.layers[index] if index < len(cache.layers) and not cache.offloading else None
        if type(layer) is not DynamicLayer or not layer.is_initialized:
            return None
        k, v, held = layer.keys, layer.values, self._held.get(layer)
        ours = held is not None and held[0] is k and held[1] is v and k.shape[0] == x.shape[0] and k.dtype == x.dtype
        if not ours and not self._fits(k, v, x, block):
            return None
        length = k.shape[2]
        if ours and length < held[2].shape[3]:
            both = held[2]
        else:
            both = x.new_empty(2, x.shape[0], block.keys, length + max(SPARE_TOKENS, length // 4), block.size)
            both[0, :, :, :length], both[1, :, :, :length] = k, v
        k, v = both[:, :, :, : length + 1].unbind()
        self._held[layer] = k, v, both
        return k, v

    @staticmethod
    def _fits(k: Tensor, v: Tensor, x: Tensor, block: BlockStruct) -> bool:
        if k.numel() == 0:
            return False
        shape = x.shape[0], block.keys, k.shape[2], block.size
        return all(each.shape == shape and each.dtype == x.dtype and each.device == x.device for each in (k, v))


class CompiledBlock:
    """Forward pass of one block: compiled for a single token per sequence, the model's own for everything else.

    The model's own also runs where the kernel would miss something: gradients, hooks, replaced modules or forward
    methods inside of the block, another cache than DynamicCache, another attention than ``grouped_attention``.
    """

    def __init__(self, layer: nn.Module, kernel: Kernel | None = None, shared: RotaryCache | None = None) -> None:
        self.layer, self.kernel, self._pass = layer, kernel or load(), shared or RotaryCache()
        self._store = KeyValueStore()
        self._parts = self._built = None  # made when first needed: a layer that is being copied has no parts yet

    def __call__(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        plain = not args and type(cache) is DynamicCache and not torch.is_grad_enabled()
        batch, tokens, _ = hidden_states.shape
        few = tokens == 1 and 1 <= batch <= MAX_TOKENS
        block = self._block(hidden_states) if plain and few else None
        if block is not None:
            config = self._parts.attention.config
            angles = self._pass.angles(kwargs.get("position_embeddings"), hidden_states, block.size, config)
            if angles is not None:
                return self._step(block, hidden_states.contiguous(), angles, cache, kwargs)
        return self.plain_forward(hidden_states, *args, **kwargs)

    def plain_forward(self, *args, **kwargs) -> Tensor:
        """Return what the model's own forward pass gives."""
        return type(self.layer).forward(self.layer, *args, **kwargs)

    def _step(self, block: BlockStruct, x: Tensor, angles: list, cache: DynamicCache, kwargs: dict) -> Tensor:
        index, batch, threads = self._parts.attention.layer_idx, x.shape[0], torch.get_num_threads()
        held = self._store.with_room(cache, index, x, block)
        at, y = ctypes.addressof(block), torch.empty_like(x)
        if held is not None and kwargs.get("attention_mask") is None:
            k, v = held
            places = k.data_ptr(), v.data_ptr(), k.shape[2], k.stride(1), self._parts.attention.scaling
            self.kernel.take_step(at, x.data_ptr(), *angles, batch, *places, y.data_ptr(), threads)
            layer = cache.layers[index]
            layer.keys, layer.values = held
            return y
        q = x.new_empty(batch, block.heads, 1, block.size)
        k, v = x.new_empty(2, batch, block.keys, 1, block.size).unbind() if held is None else held
        last = (k.shape[2] - 1) * block.size * x.element_size()
        places = (q.data_ptr(), k.data_ptr() + last, v.data_ptr() + last, k.stride(1))
        self.kernel.enter_block(at, x.data_ptr(), *angles, batch, *places, threads)
        if held is None:
            k, v = cache.update(k, v, index)
        else:
            cache.layers[index].keys, cache.layers[index].values = k, v
        attended = self._attend(block, q, k, v, kwargs)
        self.kernel.leave_block(at, x.data_ptr(), attended.data_ptr(), batch, y.data_ptr(), threads)
        return y

    def _attend(self, block: BlockStruct, q: Tensor, k: Tensor, v: Tensor, kwargs: dict) -> Tensor:
        attention, mask = self._parts.attention, kwargs.get("attention_mask")
        apart, expected = k.stride(1), (block.keys * k.stride(1), k.stride(1), block.size, 1)
        if mask is not None or any(x.dtype != q.dtype or x.stride() != expected for x in (k, v)):
            more = {key: kwargs[key] for key in kwargs.keys() - {"attention_mask", "cache", "past_key_values"}}
            return grouped_attention(attention, q, k, v, mask, scaling=attention.scaling, **more)[0].contiguous()
        at, places = ctypes.addressof(block), (q.data_ptr(), k.data_ptr(), v.data_ptr(), k.shape[2], apart)
        self.kernel.attend_block(at, *places, attention.scaling, q.shape[0], q.data_ptr(), torch.get_num_threads())
        return q

    def _block(self, x: Tensor) -> BlockStruct | None:
        """Return the block for the kernel, None if it is not as the kernel takes it, was altered, or is watched."""
        parts = self._parts = self._parts or BlockGuard(self.layer)
        watched = watching._global_forward_hooks or watching._global_forward_pre_hooks
        if watched or x.device.type != "cpu" or not parts.untouched():
            return None
        dtype, weights = x.dtype, [norm._parameters["weight"] for norm in parts.norms]
        matrices = [linear.matrix_for(dtype) for linear in parts.linears]
        key = dtype, *(weight.data_ptr() for weight in weights)
        if self._built is None or self._built[0] != key or not all(map(is_, self._built[1], matrices)):
            fits = None not in matrices and all(weight.dtype == dtype for weight in weights)
            self._built = key, matrices, *(_block_struct(self.layer, matrices, dtype) if fits else (None, None))
        return self._built[2]

    def __getstate__(self) -> dict:  # addresses and libraries are neither copied nor pickled
        return {"layer": self.layer}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)


def _addresses_of_angles(
    embeddings: tuple | None, x: Tensor, size: int, config: PreTrainedConfig
) -> tuple[list, list | None]:
    """Return the tensors that must stay alive, and what ``RotaryCache.angles`` returns."""
    fit = embeddings is not None and all(e.shape[1:] == (1, size) and len(e) in (1, len(x)) for e in embeddings)
    if not fit or config._attn_implementation != GROUPED_SDPA:
        return [], None
    tensors = [e.to(x.dtype).contiguous() for e in embeddings]
    stride = size if len(tensors[0]) > 1 else 0  # 0: all sequences share one position
    return tensors, [*(e.data_ptr() for e in tensors), stride]


def _linears(layer: nn.Module) -> list[nn.Module]:
    return [layer.get_submodule(name) for name in chain.from_iterable(PRODUCTS)]


def _norms(layer: nn.Module) -> list[nn.Module]:
    return [layer.input_layernorm, layer.post_attention_layernorm]


def _block_struct(layer: nn.Module, matrices: Sequence[MatrixStruct], dtype: torch.dtype) -> tuple[BlockStruct, list]:
    """Return the block for the kernel, and the arrays whose addresses it holds."""
    rest, arrays = list(matrices), []
    for names in PRODUCTS:
        arrays.append((MatrixStruct * len(names))(*rest[: len(names)]))
        del rest[: len(names)]
    norms, size = _norms(layer), layer.self_attn.head_dim
    block = BlockStruct(
        *map(ctypes.addressof, arrays),
        *(norm.weight.data_ptr() for norm in norms),
        *(norm.eps for norm in norms),
        matrices[0].columns,
        matrices[0].rows // size,
        matrices[1].rows // size,
        size,
        matrices[4].rows,
        dtype == torch.float16,
    )
    return block, arrays


def compile_steps(model: PreTrainedModel, kernel: Kernel | None = None) -> int:
    """Let blocks that are built like a LLaMA's take compiled steps, in place; return how many do.

    A trial on random tokens shows for each block whether the step computes what its own forward pass does: blocks of
    one class may differ, for example in whether they rotate.
    """
    if model.config._attn_implementation != GROUPED_SDPA:
        return 0
    shared = RotaryCache()
    steps = [CompiledBlock(layer, kernel, shared) for layer in model.modules() if _is_llama(layer)]
    agreeing = [step for step in steps if _agrees(step)]
    for step in agreeing:
        step.layer.forward = step
    return len(agreeing)


def _is_llama(layer: nn.Module) -> bool:
    inside = {name for name, _ in layer.named_modules()} - {""}
    if inside != {*chain.from_iterable(PRODUCTS), *OTHER_MODULES} or any(True for _ in layer.parameters(recurse=False)):
        return False
    packable = all(isinstance(linear, SparseLinear | DenseLinear) for linear in _linears(layer))
    plain = all(type(norm) is nn.RMSNorm for norm in _norms(layer))  # as ``fuse`` leaves those that compute the same
    needed = all(hasattr(layer.self_attn, name) for name in ("head_dim", "scaling", "layer_idx", "config"))
    return packable and plain and needed and _shapes_fit(layer) and _is_silu(layer.mlp.act_fn)


def _shapes_fit(layer: nn.Module) -> bool:
    """Return whether the matrices have the shapes that step.cpp takes for granted."""
    q, k, v, o, gate, up, down = ((linear.out_features, linear.in_features) for linear in _linears(layer))
    size, width, inner = layer.self_attn.head_dim, q[1], gate[0]
    heads = size > 0 and size % 2 == 0 and k[0] % size == 0 and k[0] > 0 and q[0] % k[0] == 0
    attention = k == v == (k[0], width) and o == (width, q[0])
    return heads and attention and gate == up == (inner, width) and down == (width, inner)


@torch.no_grad()
def _is_silu(function: nn.Module) -> bool:
    x = torch.linspace(-12, 12, 1001)
    try:
        return torch.allclose(function(x), nn.functional.silu(x), rtol=1e-5, atol=1e-6)
    except Exception:  # a module that takes something else
        return False


@torch.no_grad()
def _agrees(step: CompiledBlock) -> bool:
    """Return whether ``step`` computes what the layer's own forward pass does, up to rounding, for two sequences."""
    layer = step.layer
    attention, dtype = layer.self_attn, layer.input_layernorm.weight.dtype
    draw = torch.Generator().manual_seed(0)
    width = attention.q_proj.in_features
    tokens = torch.randn(TRIAL_TOKENS, 2, 1, width, generator=draw).to(dtype)
    angles = torch.rand(TRIAL_TOKENS, 2, 1, attention.head_dim // 2, generator=draw).mul(6).repeat(1, 1, 1, 2)
    results = []
    for forward in (step.plain_forward, step):
        cache, outs = DynamicCache(), []
        try:
            for x, angle in zip(tokens, angles, strict=True):
                arguments = {
                    "attention_mask": None,
                    "position_embeddings": (angle.cos().to(dtype), angle.sin().to(dtype)),
                }
                outs.append(forward(x, **arguments, **{_cache_name(layer): cache}).float())
            held = cache.layers[attention.layer_idx]
            rest = {name: value for name, value in vars(held).items() if name not in ("keys", "values")}
            results.append((torch.stack(outs) - tokens.float(), held.keys.float(), held.values.float(), rest))
        except Exception:  # any failure means that this is not a plain LLaMA block
            return False
    (*expected, expected_rest), (*computed, computed_rest) = results
    eps = torch.finfo(dtype).eps
    # Some ten roundings of what the block adds, and one of the sum, about as large as the tokens. Keys and values are
    # rounded less often: there another rotation, or none, shows.
    bounds = [10 * eps * expected[0].abs().max() + 2 * eps * tokens.float().abs().max()]
    bounds += [3 * eps * values.abs().max() for values in expected[1:]]
    triples = zip(expected, computed, bounds, strict=True)
    close = all(a.shape == b.shape and bool((a - b).abs().max() <= bound) for a, b, bound in triples)
    return (
        close and computed_rest == expected_rest
    )  # ``KeyValueStore`` knows nothing of what else a cache may keep count of


def _cache_name(layer: nn.Module) -> str:
    named = inspect.signature(inspect.unwrap(type(layer).forward)).parameters
    return "cache" if "cache" in named else "past_key_values"  # in older versions of transformers
