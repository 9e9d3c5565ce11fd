"""Semi-structured (2:4) matrices of a checkpoint on a CUDA device, timed against the dense ones."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from checkpoints import Checkpoint
from engines import agreement, take_turns
from torch import Tensor, nn

from lib.calibration.hidden import entry_device
from lib.core import files
from lib.core.errors import UserError
from lib.models import load
from lib.models.layers import prunable_modules
from lib.run.record import provenance

TOKENS = (1, 128, 2048)  # of the timed windows; a window of 1 is one step of decoding without its cache
# Both models multiply in float16 and sum in float32, in another order: 11 bits of every activation, through all blocks.
TOLERANCE = 0.05


def check_device() -> None:
    """Refuse a machine without a device that has 2:4 kernels."""
    if not torch.cuda.is_available():
        raise UserError("format", "2of4: needs a CUDA device and this machine has none; --format bitmask needs none")
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        name = torch.cuda.get_device_name()
        raise UserError("format", f"2of4: needs a device of compute capability 8.0; {name} has {major}.{minor}")


def breaks_two_of_four(weight: Tensor) -> int:
    """Return how many groups of four columns of ``weight`` [out, in] have more than two nonzeros; -1 without groups."""
    if weight.shape[1] % 4:
        return -1
    return int(((weight.reshape(-1, 4) != 0).sum(dim=1) > 2).sum())


def check_two_of_four(linears: dict[str, nn.Linear]) -> None:
    """Refuse a model whose blocks contain a matrix that is not 2:4."""
    for name, linear in linears.items():
        wrong = breaks_two_of_four(linear.weight)
        if wrong:
            what = "no multiple of 4 columns" if wrong < 0 else f"{wrong} groups of 4 hold more than 2 numbers"
            raise UserError(None, f"{name}: is not 2:4, {what}; prune it with --sparsity_type 2:4")


def _convert(linears: dict[str, nn.Linear]) -> tuple[int, int]:
    """Replace every matrix by a semi-structured one; return the bytes before and after."""
    before = after = 0
    for name, linear in linears.items():
        dense = linear.weight.data
        try:
            sparse = torch.sparse.to_sparse_semi_structured(dense)
        except (RuntimeError, ValueError) as error:  # shapes that are no multiple of the kernel's tile
            raise UserError(None, f"{name}: has no 2:4 kernel here ({str(error).splitlines()[0]})") from error
        if not torch.equal(sparse.to_dense(), dense):
            raise RuntimeError(f"{name}: the 2:4 form does not give the matrix back")
        parts = [getattr(sparse, part, None) for part in ("packed", "meta")]
        before, after = before + dense.nbytes, after + sum(part.nbytes for part in parts if part is not None)
        linear.weight = nn.Parameter(sparse, requires_grad=False)
    return before, after


def _timed(model: nn.Module, ids: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        logits = model(input_ids=ids, use_cache=False).logits
        torch.cuda.synchronize()
        return logits

    return run


@torch.inference_mode()
def measure(checkpoint: Checkpoint, rounds: int = 20) -> dict:
    """Return sizes, and latencies of the dense and 2:4 models in float16 on the CUDA device, measured in turns.

    Raises:
        UserError: a matrix that is not 2:4, or logits that disagree.
    """
    dense, sparse = (load.load_llm(checkpoint.source, torch.float16) for _ in range(2))
    linears = prunable_modules(sparse)
    check_two_of_four(linears)
    before, after = _convert(linears)
    vocabulary = dense.get_input_embeddings().weight.shape[0]
    rows = []
    for tokens in TOKENS:
        if tokens > (load.context_length(dense) or tokens):
            continue
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(vocabulary, (1, tokens), generator=draw).to(entry_device(dense))
        runs = [_timed(dense, ids), _timed(sparse, ids)]
        one, other = (run()[0].float().cpu().numpy() for run in runs)
        agrees = agreement(other, one)
        if not agrees["relative"] <= TOLERANCE:
            raise UserError(None, f"2:4 kernels: logits disagree with dense by {agrees['relative']:.1e} of the largest")
        seconds = take_turns(runs, warmup=3, rounds=rounds)
        ratios = sorted(d / s for d, s in zip(*seconds, strict=True))
        medians = [statistics.median(times) for times in seconds]
        rows.append(
            {"tokens": tokens, "dense_seconds": medians[0], "sparse_seconds": medians[1], "logits": agrees}
            | {"speedup": statistics.median(ratios), "speedup_range": [ratios[0], ratios[-1]]}
        )
    return {"bytes_dense": before, "bytes_2of4": after, "device": torch.cuda.get_device_name(), "rows": rows}


def leave(found: dict, checkpoint: Checkpoint, out: Path) -> None:
    """Print the measurements and write them to ``out``/2of4.json."""
    share = found["bytes_2of4"] / found["bytes_dense"]
    print(f"2:4 on {found['device']}: {share:.4f} of the {found['bytes_dense'] / 1e6:.1f} MB of the blocks in float16")
    for row in found["rows"]:
        low, high = row["speedup_range"]
        print(
            f"  {row['tokens']} tokens: dense {row['dense_seconds'] * 1e3:.2f} ms, "
            f"2:4 {row['sparse_seconds'] * 1e3:.2f} ms, {row['speedup']:.2f} times as fast ({low:.2f}-{high:.2f})"
        )
    record = {"complete": True, "model": checkpoint.source.given} | found | provenance()
    files.write_atomically(out / "2of4.json", json.dumps(record, indent=1) + "\n")
