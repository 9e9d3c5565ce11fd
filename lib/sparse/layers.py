"""Linear layers on the CPU that multiply a few tokens by the compiled kernel, with a packed or dense weight."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.core import cpu
from lib.core.errors import UserError
from lib.sparse.kernel import KERNEL_DTYPES, MAX_TOKENS, Kernel, MatrixStruct, load
from lib.sparse.packed import PackedTensor, pack, row_starts, unpack

# Fraction of zeros from which the float32 product of many tokens is faster if it skips them.
SKIP_FROM = 0.45
# Rows that are unpacked at a time for many tokens: that many stay in the second-level cache.
ROWS_AT_ONCE = 512


class FusedProjections:
    """Layers of one input, such as q, k and v: the first one called multiplies for all in one kernel call.

    The others are called next with the same tensor and take their results. It must not change in between.
    """

    def __init__(self, layers: Sequence["SparseLinear | DenseLinear"]) -> None:
        self.layers = list(layers)
        self._matrices = self._held = None
        for place, layer in enumerate(self.layers):
            layer.shared, layer.place = self, place

    def pop_result(self, place: int, x: Tensor) -> Tensor | None:
        """Return, once, the result stored for the layer at ``place`` and this ``x``."""
        held = self._held  # one tuple: another thread replaces all of it, or nothing
        if held is None or held[0] is not x:
            return None
        y, held[1][place] = held[1][place], None
        return y

    def multiply(self, place: int, x: Tensor, tokens: int) -> Tensor | None:
        """Return the product of the layer at ``place`` and store those of the others; None if they do not match."""
        matrices = [layer.matrix(x) for layer in self.layers]
        if None in matrices:
            return None
        if self._matrices is None or any(a is not b for a, b in zip(matrices, self._matrices[0], strict=True)):
            self._matrices = matrices, (MatrixStruct * len(matrices))(*matrices)
        lead = x.shape[:-1]
        ys = [torch.empty(*lead, matrix.rows, dtype=x.dtype) for matrix in matrices]
        self.layers[place].kernel.multiply_each(self._matrices[1], x.contiguous(), ys, tokens)
        self._held = x, [*ys[:place], None, *ys[place + 1 :]]
        return ys[place]

    def __getstate__(self) -> dict:
        return {"layers": self.layers, "_matrices": None, "_held": None}


def by_tiles(flat: Tensor, rows: Callable[[int, int], Tensor], count: int, bias: Tensor | None) -> Tensor:
    """Return the product of ``flat`` [tokens, columns] and a weight of ``count`` rows, in the dtype of ``flat``.

    ROWS_AT_ONCE rows are multiplied at a time, in float32 where the CPU has no instructions for the dtype.

    Args:
        rows: returns the weight's rows from the first to before the last, [last - first, columns].
    """
    dtype = flat.dtype if cpu.multiplies(flat.dtype) else torch.float32
    y, flat = flat.new_empty(len(flat), count), flat.to(dtype)
    for first in range(0, count, ROWS_AT_ONCE):
        last = min(first + ROWS_AT_ONCE, count)
        part = None if bias is None else bias[first:last].to(dtype)
        y[:, first:last] = F.linear(flat, rows(first, last).to(dtype), part)
    return y


class SparseLinear(nn.Module):
    """A linear layer, y = W x + b, for inference on the CPU: 1 + 16 (1 - sparsity) bits a weight.

    ``weight``: result of ``packed.pack`` for a bfloat16 or float16 [out_features, columns]; ``bias`` of the same dtype.
    Sums are float32, rounded once. Up to MAX_TOKENS rows of ``x`` go to the kernel. So do more of them where at least
    SKIP_FROM of the weights are zero and the CPU has no instructions for the dtype; otherwise ROWS_AT_ONCE rows of the
    weight at a time are unpacked and multiplied by torch.

    Raises:
        RuntimeError: another dtype of ``x``, gradients, training, or a move to another device or dtype.
    """

    def __init__(
        self, weight: PackedTensor, columns: int, bias: Tensor | None = None, kernel: Kernel | None = None
    ) -> None:
        super().__init__()
        if weight.values.dtype not in KERNEL_DTYPES:
            problem = f"its weight is {weight.values.dtype}"
            raise UserError(None, "SparseLinear", problem, "load the model in bfloat16 or float16")
        self.in_features, self.out_features = columns, weight.mask.shape[0]
        self.dtype = weight.values.dtype
        for name, tensor in (("mask", weight.mask), ("values", weight.values), ("starts", row_starts(weight.mask))):
            self.register_buffer(name, tensor.contiguous(), persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach().to(self.dtype).contiguous(), False)
        self.training = False
        self.shared, self.place = None, 0
        self.kernel = kernel or load()
        self.sparsity = 1 - int(self.starts[-1]) / (columns * self.out_features)  # the fraction of zeros
        self._address()

    @classmethod
    def from_linear(cls, linear: nn.Linear, kernel: Kernel | None = None) -> "SparseLinear":
        """Return the packed form of a dense layer."""
        return cls(pack(linear.weight.detach()), linear.in_features, linear.bias, kernel)

    def dense(self) -> Tensor:
        """Return the weight, [out_features, in_features]."""
        return unpack(PackedTensor(self.mask, self.values), [self.out_features, self.in_features])

    def matrix(self, x: Tensor) -> MatrixStruct | None:
        """Return the weight for the kernel if it can be multiplied with ``x``."""
        return self.matrix_for(x.dtype) if x.shape[-1] == self.in_features else None

    def matrix_for(self, dtype: torch.dtype) -> MatrixStruct | None:
        """Return the weight for the kernel if it is of this ``dtype``."""
        return self._matrix if dtype == self.dtype else None

    def forward(self, x: Tensor) -> Tensor:
        if self.shared is not None and (y := self.shared.pop_result(self.place, x)) is not None:
            return y
        *lead, columns = x.shape
        if x.dtype != self.dtype or x.device.type != "cpu" or columns != self.in_features:
            raise RuntimeError(
                f"SparseLinear multiplies [..., {self.in_features}] {self.dtype} on the CPU, not {list(x.shape)} "
                f"{x.dtype} on {x.device}"
            )
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("SparseLinear has no gradients: use torch.no_grad(), or unpack the model to train it")
        tokens = x.numel() // columns
        if not 1 <= tokens <= MAX_TOKENS:
            return self._many(x.reshape(-1, columns)).view(*lead, self.out_features)
        if self.shared is not None and (y := self.shared.multiply(self.place, x, tokens)) is not None:
            return y
        y = torch.empty(*lead, self.out_features, dtype=self.dtype)
        return self.kernel.multiply(self._matrix, x.contiguous(), y, tokens)

    def _many(self, flat: Tensor) -> Tensor:
        if len(flat) and not cpu.multiplies(self.dtype) and self.sparsity >= SKIP_FROM:
            return self.kernel.multiply_many(self._matrix, flat.float().contiguous(), self.bias).to(self.dtype)
        tile = flat.new_empty(min(ROWS_AT_ONCE, self.out_features), self.mask.shape[1] * 32)

        def rows(first: int, last: int) -> Tensor:
            self.kernel.unpack(self._matrix, first, last, tile)
            return tile[: last - first, : self.in_features]

        return by_tiles(flat, rows, self.out_features, self.bias)

    def _address(self) -> None:
        bias = None if self.bias is None else self.bias.data_ptr()
        places = (self.mask.data_ptr(), self.values.data_ptr(), self.starts.data_ptr(), bias)
        half = int(self.dtype == torch.float16)
        self._matrix = MatrixStruct(*places, self.out_features, self.in_features, self.mask.shape[1], half)

    def _apply(self, fn, recurse: bool = True) -> "SparseLinear":
        moved = fn(torch.empty(0, dtype=self.dtype))
        if moved.device.type != "cpu" or moved.dtype != self.dtype:
            raise RuntimeError(
                f"SparseLinear stays on the CPU in {self.dtype}; for a GPU or another dtype unpack the model: "
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
        return {key: value for key, value in self.__dict__.items() if key not in ("_matrix", "kernel")}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.kernel = load()
        self._address()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, sparsity={self.sparsity:.3f}"


class DenseLinear(nn.Linear):
    """A dense linear layer that multiplies a few tokens by the kernel: the lm_head, and a baseline for SparseLinear.

    nn.Linear handles whatever the kernel does not: gradients, other devices or dtypes, and many tokens, unless the CPU
    has no instructions for their dtype; then they are multiplied in float32.
    """

    def __init__(self, linear: nn.Linear, kernel: Kernel | None = None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.training = linear.training
        self.shared, self.place = None, 0
        self.kernel = kernel or load()
        self._cached_matrix = None, None

    def matrix(self, x: Tensor) -> MatrixStruct | None:
        """Return the weight for the kernel if it can be multiplied with ``x``: no gradients, one dtype, on the CPU."""
        if torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad):
            return None
        return self.matrix_for(x.dtype) if x.shape[-1] == self.in_features else None

    def matrix_for(self, dtype: torch.dtype) -> MatrixStruct | None:
        """Return the weight for the kernel if it is of this ``dtype`` and on the CPU."""
        weight, bias = map(self._parameters.get, ("weight", "bias"))  # nn.Module's own lookup is slow
        if dtype != weight.dtype:
            return None
        key = weight.data_ptr(), None if bias is None else bias.data_ptr(), weight.dtype  # another after a move
        if self._cached_matrix[0] != key:
            fits = weight.dtype in KERNEL_DTYPES and weight.device.type == "cpu" and weight.is_contiguous()
            words, half = -(-self.in_features // 32), weight.dtype == torch.float16
            matrix = MatrixStruct(None, key[0], None, key[1], self.out_features, self.in_features, words, half)
            self._cached_matrix = key, matrix if fits else None
        return self._cached_matrix[1]

    def forward(self, x: Tensor) -> Tensor:
        if self.shared is not None and (y := self.shared.pop_result(self.place, x)) is not None:
            return y
        tokens = x.numel() // self.in_features
        few, here = 1 <= tokens <= MAX_TOKENS, x.device.type == "cpu"
        if few and here and self.shared is not None and (y := self.shared.multiply(self.place, x, tokens)) is not None:
            return y
        matrix = self.matrix(x) if here else None
        if matrix is not None and tokens > MAX_TOKENS and not cpu.multiplies(x.dtype):
            flat = x.reshape(tokens, self.in_features)
            y = by_tiles(flat, lambda first, last: self.weight[first:last], self.out_features, self.bias)
            return y.view(*x.shape[:-1], self.out_features)
        if matrix is None or not few:
            return F.linear(x, self.weight, self.bias)
        y = torch.empty(*x.shape[:-1], self.out_features, dtype=x.dtype)
        return self.kernel.multiply(matrix, x.contiguous(), y, tokens)

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key not in ("_cached_matrix", "kernel")}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.kernel, self._cached_matrix = load(), (None, None)
