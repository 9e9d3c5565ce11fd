"""Packed and fused layers of a model in memory: sparse ones packed, norms one torch call, tokens compiled."""

import logging
from collections import Counter
from functools import cache

import torch
from torch import nn
from transformers import PreTrainedModel

from lib.core.errors import UserError
from lib.sparse.decode import compile_tokens
from lib.sparse.kernel import KERNEL_DTYPES, Kernel, Unavailable, load_kernel
from lib.sparse.layers import DenseLinear, SparseEmbedding, SparseLinear
from lib.sparse.packed import can_round, pack_int8

log = logging.getLogger(__name__)

# Fraction of zeros from which a matrix is packed: 1 + 16 (1 - zeros) bits a weight are then clearly less than 16.
LEAST_ZEROS = 0.3


def fuse(model: nn.Module, kernel: Kernel) -> None:
    """Fuse calls, in place, where the result is the same up to rounding: those of RMS norms, and ``compile_tokens``."""
    for name, module in list(model.named_modules()):
        norm = _torch_norm(module)
        if norm is not None:
            model.set_submodule(name, norm)
    if isinstance(model, PreTrainedModel):
        compile_tokens(model, kernel)


@torch.no_grad()
def _torch_norm(module: nn.Module) -> nn.RMSNorm | None:
    """Return torch's norm with the weight of ``module`` if a trial shows that it computes the same."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    parameters = dict(module.named_parameters())
    weight = parameters.get("weight")
    if type(module) is nn.RMSNorm or len(parameters) != 1 or weight is None or weight.ndim != 1 or eps is None:
        return None
    norm = nn.RMSNorm(len(weight), eps, device="meta")
    norm.weight, norm.training = weight, module.training
    x = torch.linspace(-3, 2, 4 * len(weight), dtype=torch.float32).reshape(4, -1).sin().mul(3).to(weight)
    expected, computed = module(x).float(), norm(x).float()
    # Some round before the weight is multiplied and some after: two units in the last place.
    close = (computed - expected).abs() <= 2 * torch.finfo(weight.dtype).eps * expected.abs() + eps
    return norm if computed.shape == expected.shape and bool(close.all()) else None


@torch.no_grad()
def sparsify(model: nn.Module, least: float = LEAST_ZEROS, kernel: Kernel | None = None, values: str = "exact") -> int:
    """Pack, in place, every linear layer of ``model`` with at least ``least`` zeros; return how many there are.

    The other linear layers stay dense, with the kernel's product (as does one that shares its weight, such as a tied
    lm_head). With int8 for ``values`` all are packed, and the embedding, and rounded as in files. Without the kernel
    nothing changes, and a one-line warning gives the reason.

    Raises:
        UserError: the model is not on the CPU in bfloat16 or float16.
    """
    embedding = model.get_input_embeddings() if isinstance(model, PreTrainedModel) and values == "int8" else None
    embedding = embedding if type(embedding) is nn.Embedding else None
    tables = {name: each for name, each in model.named_modules() if isinstance(each, nn.Linear) or each is embedding}
    for name, module in tables.items():
        if module.weight.device.type != "cpu" or module.weight.dtype not in KERNEL_DTYPES:
            problem = f"{name} is {module.weight.dtype} on {module.weight.device}"
            raise UserError(None, "sparsify", problem, "load the model on the CPU in bfloat16 or float16")
    try:
        kernel = kernel or load_kernel()
    except Unavailable as error:
        log.warning("no sparse kernel, %s; the model stays dense", error)
        return 0
    owners = Counter(id(getattr(module, "weight", None)) for module in model.modules())
    count, rounded = 0, cache(pack_int8)  # a tied lm_head shares what its embedding holds
    for name, module in tables.items():
        weight, is_table = module.weight, module is embedding
        if values == "int8" and can_round(weight):
            new = (SparseEmbedding if is_table else SparseLinear).from_dense(module, kernel, rounded)
        elif not is_table:
            zeros = 1 - torch.count_nonzero(weight).item() / weight.numel()
            sparse = zeros >= least and owners[id(weight)] == 1
            new = (SparseLinear.from_dense if sparse else DenseLinear)(module, kernel)
        else:
            continue
        model.set_submodule(name, new)
        count += type(new) is SparseLinear
    fuse(model, kernel)
    return count
