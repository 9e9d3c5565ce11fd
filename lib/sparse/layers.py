"""Linear layers on the CPU that multiply a few tokens by the compiled kernel, with a packed or dense weight."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from lib.core import cpu
from lib.sparse.kernel import KERNEL_DTYPES, MAX_TOKENS, Kernel, MatrixStruct, load_kernel
from lib.sparse.packed import PackedTensor, pack, row_starts

# Fraction of zeros from which the float32 product of many tokens is faster if it skips them.
SKIP_FROM = 0.45
# Rows that are unpacked at a time for many tokens: that many stay in the second-level cache.
ROWS_AT_ONCE = 512


def by_tiles(
    flat: torch.Tensor, rows: Callable[[int, int], torch.Tensor], count: int, bias: torch.Tensor | None
) -> torch.Tensor:
    """Return the product of ``flat`` [tokens, columns] and a weight of ``count`` rows, in the dtype of ``flat``.

    ``rows`` returns the weight's rows from the first to before the last, [last - first, columns]. ROWS_AT_ONCE of them
    are multiplied at a time, in float32 where the CPU has no instructions for the dtype.
    """
    dtype = flat.dtype if cpu.multiplies(flat.dtype) else torch.float32
    y, flat = flat.new_empty(len(flat), count), flat.to(dtype)
    for first in range(0, count, ROWS_AT_ONCE):
        last = min(first + ROWS_AT_ONCE, count)
        tile_bias = None if bias is None else bias[first:last].to(dtype)
        y[:, first:last] = F.linear(flat, rows(first, last).to(dtype), tile_bias)
    return y


class SparseLinear(nn.Module):
    """A linear layer, y = W x + b, for inference on the CPU: 1 + 16 (1 - sparsity) bits a weight, or half of the 16.

    ``weight``: result of ``packed.pack`` or ``pack_int8`` for a bfloat16 or float16 [out_features, columns]; ``bias``
    of the same dtype. Sums are float32, rounded once. Up to MAX_TOKENS rows of ``x`` go to the kernel, and are rounded
    to int8 for int8 values. So do more of them on AMX in bfloat16, and where at least SKIP_FROM of the weights are zero
    and the CPU has no instructions for the dtype; otherwise ROWS_AT_ONCE rows of the weight at a time are unpacked and
    multiplied by torch.

    The tensors are neither parameters nor buffers: they stay where they are if the model is moved.

    Raises:
        RuntimeError: ``x`` of another dtype or on another device, or gradients.
    """

    def __init__(
        self, weight: PackedTensor, columns: int, bias: torch.Tensor | None = None, kernel: Kernel | None = None
    ) -> None:
        super().__init__()
        self.mask, self.values, _, self.scales = weight
        self.in_features, self.out_features = columns, len(self.values if self.mask is None else self.mask)
        self.dtype, self.kernel = weight.dtype, kernel or load_kernel()
        self.starts = None if self.mask is None else row_starts(self.mask)
        self.bias = None if bias is None else bias.detach().to(self.dtype).contiguous()
        kept = self.values.count_nonzero() if self.mask is None else self.starts[-1]
        self.sparsity = 1 - int(kept) / (columns * self.out_features)  # the fraction of zeros
        tensors = self.mask, self.values, self.starts, self.bias, self.scales
        *places, scales = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
        words = self.values.shape[1] // 32 if self.mask is None else self.mask.shape[1]
        sizes = self.out_features, columns, words, self.dtype == torch.float16
        self._matrix = MatrixStruct(*places, *sizes, scales)

    @classmethod
    @torch.no_grad()
    def from_dense(cls, dense: nn.Module, kernel: Kernel | None = None, packer: Callable = pack) -> "SparseLinear":
        """Return the packed form of a dense layer; ``packer``: ``packed.pack`` or ``pack_int8``."""
        return cls(packer(dense.weight), dense.weight.shape[1], getattr(dense, "bias", None), kernel)

    def matrix(self, dtype: torch.dtype) -> MatrixStruct | None:
        """Return the weight for the kernel if it is of this ``dtype``."""
        return self._matrix if dtype == self.dtype else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        *lead, columns = x.shape
        if x.dtype != self.dtype or x.device.type != "cpu" or columns != self.in_features:
            raise RuntimeError(
                f"SparseLinear multiplies [..., {self.in_features}] {self.dtype} on the CPU, not {list(x.shape)} "
                f"{x.dtype} on {x.device}; for a GPU or another dtype unpack the model with scripts/speedup/pack.py"
            )
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("SparseLinear has no gradients: use torch.no_grad(), or unpack the model to train it")
        if 1 <= x.numel() // columns <= MAX_TOKENS:
            return self.kernel.multiply(self._matrix, x)
        flat = x.reshape(-1, columns)
        if len(flat) and self.kernel.has_tiles and self.dtype == torch.bfloat16:
            return self.kernel.multiply_tiles(self._matrix, flat).view(*lead, self.out_features)
        if len(flat) and self.mask is not None and not cpu.multiplies(self.dtype) and self.sparsity >= SKIP_FROM:
            y = self.kernel.multiply_many(self._matrix, flat.float().contiguous(), self.bias).to(self.dtype)
            return y.view(*lead, self.out_features)
        tile = flat.new_empty(min(ROWS_AT_ONCE, self.out_features), self._matrix.words * 32)

        def rows(first: int, last: int) -> torch.Tensor:
            self.kernel.unpack(self._matrix, torch.arange(first, last), tile)
            return tile[: last - first, : self.in_features]

        return by_tiles(flat, rows, self.out_features, self.bias).view(*lead, self.out_features)

    def _save_to_state_dict(self, *_) -> None:
        raise RuntimeError("a packed model is not saved again: copy its folder, or unpack it with pack.py --unpack")


class SparseEmbedding(SparseLinear):
    """An embedding whose rows are unpacked for the tokens that ask for them; a tied lm_head holds the same tensors."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = ids.flatten().to("cpu", torch.int64).contiguous()
        if not ((rows >= 0) & (rows < self.out_features)).all():
            raise IndexError(f"token ids must be 0 to {self.out_features - 1}")
        out = torch.empty(len(rows), self._matrix.words * 32, dtype=self.dtype)
        self.kernel.unpack(self._matrix, rows, out)
        return out[:, : self.in_features].reshape(*ids.shape, self.in_features)


def dense_matrix(weight: torch.Tensor, bias: torch.Tensor | None = None) -> MatrixStruct | None:
    """Return a weight [rows, columns] for the kernel if it can take it."""
    if weight.dtype not in KERNEL_DTYPES or weight.device.type != "cpu" or not weight.is_contiguous():
        return None
    words, place = -(-weight.shape[1] // 32), None if bias is None else bias.data_ptr()
    return MatrixStruct(None, weight.data_ptr(), None, place, *weight.shape, words, weight.dtype == torch.float16)


class DenseLinear(nn.Linear):
    """A dense linear layer that multiplies a few tokens by the kernel: the lm_head, and a baseline for SparseLinear.

    nn.Linear handles whatever the kernel does not: gradients, other devices or dtypes, and many tokens, unless the CPU
    has no instructions for their dtype; then they are multiplied in float32.
    """

    def __init__(self, linear: nn.Linear, kernel: Kernel | None = None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.training, self.kernel = linear.training, kernel or load_kernel()

    def matrix(self, dtype: torch.dtype) -> MatrixStruct | None:
        """Return the weight for the kernel if it is of this ``dtype`` and on the CPU."""
        weight, bias = map(self._parameters.get, ("weight", "bias"))  # nn.Module's own lookup is slow
        return dense_matrix(weight, bias) if dtype == weight.dtype else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        watched = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        fits = x.shape[-1] == self.in_features and x.device.type == "cpu" and not watched
        matrix = self.matrix(x.dtype) if fits else None
        tokens = x.numel() // self.in_features
        if matrix is not None and 1 <= tokens <= MAX_TOKENS:
            return self.kernel.multiply(matrix, x)
        if matrix is not None and tokens > MAX_TOKENS and not cpu.multiplies(x.dtype):
            flat = x.reshape(tokens, self.in_features)
            y = by_tiles(flat, lambda first, last: self.weight[first:last], self.out_features, self.bias)
            return y.view(*x.shape[:-1], self.out_features)
        return F.linear(x, self.weight, self.bias)
