"""Float32 passes through pruned layers on the CPU that skip the zeros of the weights."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from lib.sparse.kernel import Kernel, Unavailable, load_kernel
from lib.sparse.layers import SKIP_FROM

log = logging.getLogger(__name__)

# For fewer tokens, or smaller matrices, looking for the zeros takes as long as the product.
MIN_TOKENS = 64
MIN_WEIGHTS = 1 << 16


@contextmanager
def zeros_skipped(modules: Iterable[nn.Module]) -> Iterator[int]:
    """Let the linear layers among ``modules`` skip their zeros, where that is faster; yield how many do.

    These are float32 layers on the CPU with at least SKIP_FROM zeros, whose weights do not change meanwhile. At 70 %
    zeros their products take 0.6 of the time; they differ from torch's in the order of float32 additions, as those of
    two BLAS libraries do. Hooks are called as usual. Layers stay as they are without a compiler, for few tokens, for
    inputs of another dtype, and for gradients.
    """
    suitable = [module for module in modules if _suits(module)]
    try:
        kernel = load_kernel() if suitable else None
    except Unavailable as error:
        log.debug("zeros are multiplied like other weights: %s", error)
        suitable = []
    for linear in suitable:
        linear.forward = partial(_product, linear, kernel)
    try:
        yield len(suitable)
    finally:
        for linear in suitable:
            del linear.forward


def _suits(module: nn.Module) -> bool:
    if type(module) is not nn.Linear or "forward" in vars(module):  # accelerate's hooks replace it
        return False
    weight = module.weight
    enough = _plain(weight) and weight.numel() >= MIN_WEIGHTS
    return enough and 1 - int(weight.count_nonzero()) / weight.numel() >= SKIP_FROM


def _plain(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32 and tensor.is_contiguous()


def _product(linear: nn.Linear, kernel: Kernel, x: torch.Tensor) -> torch.Tensor:
    weight, bias = linear.weight, linear.bias
    rows, columns = weight.shape
    x = x.contiguous()
    enough = x.shape[-1] == columns and x.numel() >= MIN_TOKENS * columns
    watched = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if not (enough and _plain(x) and _plain(weight)) or watched or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    return kernel.multiply_many(weight.detach(), x.view(-1, columns), bias).view(*x.shape[:-1], rows)
