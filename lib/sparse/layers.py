"""Linear layers on the CPU whose product of a few tokens is the compiled kernel's, with a packed or a dense weight."""

import logging
from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from lib import UserError
from lib.sparse.attention import group_attention
from lib.sparse.kernel import KINDS, MOST_TOKENS, Kernel, Matrix, Unavailable, load
from lib.sparse.packed import Packed, pack, row_starts, unpack

log = logging.getLogger(__name__)

LEAST_ZEROS = 0.3  # of a matrix: a bit and 16 (1 - zeros) bits a weight are to be clearly less than 16
TILE = 512  # rows that are unpacked at once for many tokens: they stay in the second-level cache


class SparseLinear(nn.Module):
    """A linear layer, y = W x + b, for inference on the CPU: 1 + 16 (1 - sparsity) bits a weight.

    ``weight``: as ``packed.pack`` makes it of a bfloat16 or float16 [out_features, columns]; ``bias`` of the same kind.
    Sums are float32, rounded once. Up to MOST_TOKENS rows of ``x`` go to the kernel; for more, TILE rows of the weight
    at a time are unpacked and multiplied by torch.

    Raises:
        RuntimeError: another kind of ``x``, gradients, training, or a move to another device or kind.
    """

    def __init__(self, weight: Packed, columns: int, bias: Tensor | None = None, kernel: Kernel | None = None) -> None:
        super().__init__()
        if weight.values.dtype not in KINDS:
            raise UserError(
                None, f"SparseLinear: its weight is {weight.values.dtype}; load the model in bfloat16 or float16"
            )
        self.in_features, self.out_features = columns, weight.mask.shape[0]
        self.kind = weight.values.dtype
        for name, tensor in (("mask", weight.mask), ("values", weight.values), ("starts", row_starts(weight.mask))):
            self.register_buffer(name, tensor.contiguous(), persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach().to(self.kind).contiguous(), False)
        self.training = False
        self._kernel = kernel or load()
        self._address()

    @classmethod
    def from_linear(cls, linear: nn.Linear, kernel: Kernel | None = None) -> "SparseLinear":
        """Return the packed form of a dense layer."""
        return cls(pack(linear.weight.detach()), linear.in_features, linear.bias, kernel)

    @property
    def sparsity(self) -> float:
        """The fraction of zeros."""
        return 1 - int(self.starts[-1]) / (self.in_features * self.out_features)

    def dense(self) -> Tensor:
        """Return the weight, [out_features, in_features]."""
        return unpack(Packed(self.mask, self.values), [self.out_features, self.in_features])

    def forward(self, x: Tensor) -> Tensor:
        *lead, columns = x.shape
        if x.dtype != self.kind or x.device.type != "cpu" or columns != self.in_features:
            raise RuntimeError(
                f"SparseLinear multiplies [..., {self.in_features}] {self.kind} on the CPU, not {list(x.shape)} "
                f"{x.dtype} on {x.device}"
            )
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("SparseLinear has no gradients: use torch.no_grad(), or unpack the model to train it")
        tokens = x.numel() // columns
        if not 1 <= tokens <= MOST_TOKENS:
            return self._many(x.reshape(-1, columns)).view(*lead, self.out_features)
        y = torch.empty(*lead, self.out_features, dtype=self.kind)
        return self._kernel.multiply(self._matrix, x.contiguous(), y, tokens)

    def _many(self, flat: Tensor) -> Tensor:
        y = flat.new_empty(flat.shape[0], self.out_features)
        tile = flat.new_empty(min(TILE, self.out_features), self.mask.shape[1] * 32)
        for first in range(0, self.out_features, TILE):
            last = min(first + TILE, self.out_features)
            self._kernel.unpack(self._matrix, first, last, tile)
            bias = None if self.bias is None else self.bias[first:last]
            y[:, first:last] = F.linear(flat, tile[: last - first, : self.in_features], bias)
        return y

    def _address(self) -> None:
        bias = None if self.bias is None else self.bias.data_ptr()
        places = (self.mask.data_ptr(), self.values.data_ptr(), self.starts.data_ptr(), bias)
        half = int(self.kind == torch.float16)
        self._matrix = Matrix(*places, self.out_features, self.in_features, self.mask.shape[1], half)

    def _apply(self, fn, recurse: bool = True) -> "SparseLinear":
        moved = fn(torch.empty(0, dtype=self.kind))
        if moved.device.type != "cpu" or moved.dtype != self.kind:
            raise RuntimeError(
                f"SparseLinear stays on the CPU in {self.kind}; for a GPU or another kind of numbers unpack the model: "
                "python scripts/speedup/pack.py PACKED --unpack --save DIR"
            )
        return self

    def train(self, mode: bool = True) -> "SparseLinear":
        if mode:
            raise RuntimeError("SparseLinear cannot be trained; unpack the model: scripts/speedup/pack.py --unpack")
        return self

    def _save_to_state_dict(self, *_) -> None:
        raise RuntimeError("a packed model is not saved again: copy its folder, or unpack it with pack.py --unpack")

    def __getstate__(self) -> dict:  # addresses and libraries are neither copied nor pickled
        return {key: value for key, value in self.__dict__.items() if key not in ("_matrix", "_kernel")}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._kernel = load()
        self._address()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, sparsity={self.sparsity:.3f}"


class DenseLinear(nn.Linear):
    """A dense linear layer whose product of a few tokens is the kernel's: the lm_head, and a baseline for SparseLinear.

    What the kernel is not for (gradients, other devices or kinds of numbers, many tokens) is nn.Linear's.
    """

    def __init__(self, linear: nn.Linear, kernel: Kernel | None = None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.training = linear.training
        self._kernel = kernel or load()

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        tokens = x.numel() // self.in_features if x.shape[-1] == self.in_features else 0
        kinds = x.dtype == weight.dtype and weight.dtype in KINDS and x.device.type == weight.device.type == "cpu"
        gradients = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        if not kinds or gradients or not 1 <= tokens <= MOST_TOKENS or not weight.is_contiguous():
            return F.linear(x, weight, bias)
        matrix = Matrix(None, weight.data_ptr(), None, None if bias is None else bias.data_ptr(), self.out_features,
                        self.in_features, -(-self.in_features // 32), weight.dtype == torch.float16)  # fmt: skip
        y = torch.empty(*x.shape[:-1], self.out_features, dtype=x.dtype)
        return self._kernel.multiply(matrix, x.contiguous(), y, tokens)

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "_kernel"}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._kernel = load()


def sparsify(model: nn.Module, least: float = LEAST_ZEROS, kernel: Kernel | None = None) -> int:
    """Pack, in place, every linear layer of ``model`` with at least ``least`` zeros; return how many there are.

    The other linear layers stay dense, with the kernel's product (so does one that shares its weight, as a tied
    lm_head). On a machine without the kernel all stays as it is, and one line of warning says why.

    Raises:
        UserError: a model that is not on the CPU in bfloat16 or float16.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, module in linears.items():
        if module.weight.device.type != "cpu" or module.weight.dtype not in KINDS:
            where = f"{module.weight.dtype} on {module.weight.device}"
            raise UserError(None, f"sparsify: {name} is {where}; load the model on the CPU in bfloat16 or float16")
    try:
        kernel = kernel or load()
    except Unavailable as error:
        log.warning("no sparse kernel, %s; the model stays dense", error)
        return 0
    owners = Counter(id(getattr(module, "weight", None)) for module in model.modules())
    count = 0
    for name, module in linears.items():
        zeros = 1 - torch.count_nonzero(module.weight).item() / module.weight.numel()
        sparse = zeros >= least and owners[id(module.weight)] == 1
        model.set_submodule(name, (SparseLinear.from_linear if sparse else DenseLinear)(module, kernel))
        count += sparse
    if isinstance(model, PreTrainedModel):
        group_attention(model)
    return count
