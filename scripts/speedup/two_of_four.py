"""Semi-structured (2:4) matrices of a checkpoint on a CUDA device, timed against the dense ones by the benchmark."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch

from lib.calibration.hidden import entry_device
from lib.core.errors import UserError, first_line
from lib.models.layers import prunable_modules
from lib.models.load import context_length, load_llm
from scripts.bench.bench import compare, table
from scripts.bench.cases import Case
from scripts.speedup.checkpoints import Checkpoint

TOKENS = (1, 128, 2048)  # of the timed windows; a window of 1 is one step of decoding without its cache
# Both models multiply in float16 and sum in float32, in another order: 11 bits of every activation, through all blocks.
TOLERANCE = 0.05


def convert(linears: Mapping[str, torch.nn.Linear]) -> tuple[int, int]:
    """Replace every matrix by a semi-structured one; return the bytes before and after.

    Raises:
        UserError: a matrix that is not 2:4, or has no kernel.
    """
    before = after = 0
    for name, linear in linears.items():
        dense = linear.weight.data
        if dense.shape[1] % 4 or ((dense.unflatten(1, (-1, 4)) != 0).sum(dim=2) > 2).any():
            raise UserError(None, name, "is not 2:4", "prune it with --sparsity_type 2:4")
        try:
            sparse = torch.sparse.to_sparse_semi_structured(dense)
        except (RuntimeError, ValueError) as error:  # an older device, or shapes that are no multiple of a tile
            raise UserError(None, name, f"has no 2:4 kernel here ({first_line(error)})") from error
        if not torch.equal(sparse.to_dense(), dense):
            raise RuntimeError(f"{name}: the 2:4 form does not give the matrix back")
        # cuSPARSELt keeps values and places in one tensor, CUTLASS in two.
        tensors = [tensor for tensor in (sparse.packed, getattr(sparse, "meta", None)) if tensor is not None]
        before, after = before + dense.nbytes, after + sum(tensor.nbytes for tensor in tensors)
        linear.weight = torch.nn.Parameter(sparse, requires_grad=False)
    return before, after


@torch.inference_mode()
def measure(checkpoint: Checkpoint, rounds: int = 20) -> str:
    """Return a report of sizes and latencies of the dense and 2:4 models in float16 on the CUDA device.

    Raises:
        UserError: a matrix that is not 2:4, or logits that disagree.
    """
    dense, sparse = (load_llm(checkpoint.source, torch.float16) for _ in range(2))
    before, after = convert(prunable_modules(sparse))
    rows = [compare(case, torch.device("cuda"), rounds) for case in cases(dense, sparse)]
    if not all(row.alike for row in rows):
        raise UserError(None, checkpoint.source.given, "the logits of 2:4 kernels disagree with the dense model's")
    share = f"{after / before:.4f} of the {before / 1e6:.1f} MB of the blocks in float16"
    return f"2:4 on {torch.cuda.get_device_name()}: {share}\n\n{table(rows)}\n"


def cases(dense: torch.nn.Module, sparse: torch.nn.Module) -> Iterator[Case]:
    """Yield a case for each window length that the model takes; plain is the dense model."""

    def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, use_cache=False).logits.float()

    def close(one: torch.Tensor, two: torch.Tensor) -> float:
        return float((one - two).abs().max() <= TOLERANCE * two.abs().max())

    vocabulary = dense.get_input_embeddings().weight.shape[0]
    for tokens in TOKENS:
        if tokens <= (context_length(dense) or tokens):
            draw = torch.Generator().manual_seed(0)
            ids = torch.randint(vocabulary, (1, tokens), generator=draw).to(entry_device(dense))
            yield Case(f"2:4, {tokens} tokens", partial(logits, sparse, ids), partial(logits, dense, ids), close)
