"""Triton kernel for the columns of one SparseGPT block: a single launch where the torch loop needs hundreds."""

import torch
import triton
import triton.language as tl

TILE = 32  # outputs per program: a tile of 128 columns x 32 outputs is 32 numbers for each of 128 threads

# Checked: the arithmetic, in Triton's interpreter, bit for bit; that it compiles, for GPUs from Turing to Blackwell.
# NOT checked, for lack of a GPU: a run, its speed, its use of registers, and its last bits, since products and
# subtractions are fused into one rounding there. sparsegpt.block_solver tries it on a small block before its first use.
# Only masks, sums over one-hot selections and loads by address are used: no compiler slices a tensor in registers. The
# factor's square, 64 KiB, is read by every program; Triton has no say over shared memory, so it is left to the caches.


@triton.jit
def _solve(
    block, errors, upper, drop, outputs, columns,
    GROUP: tl.constexpr, STEP: tl.constexpr, COLUMNS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, COLUMNS)  # a power of two, as arange wants it; beyond ``columns`` nothing is kept
    output = (tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)).to(tl.int64)
    inside = (column < columns)[:, None] & (output < outputs)[None, :]
    places = column[:, None] * outputs + output[None, :]
    w = tl.load(block + places, mask=inside, other=0.0)
    diagonal = tl.load(upper + column * (columns + 1), mask=column < columns, other=1.0)
    if GROUP == 0:
        chosen = tl.load(drop + places, mask=inside, other=0.0)
    else:
        chosen = tl.zeros([COLUMNS, OUTPUTS], dtype=tl.float32)
        limit = tl.load(drop + output, mask=output < outputs, other=0)
    for left in range(0, columns, STEP):
        if GROUP > 0:
            score = tl.div_rn(w * w, (diagonal * diagonal)[:, None])
            rank = tl.zeros([COLUMNS, OUTPUTS], dtype=tl.int32)
            for rival in range(left, left + GROUP):
                one = tl.sum(tl.where((column == rival)[:, None], score, 0.0), axis=0)[None, :]
                tied = (one == score) & (rival < column)[:, None]  # of equals the lower column goes
                rank += ((one < score) | tied).to(tl.int32)
            members = ((column >= left) & (column < left + GROUP))[:, None]
            chosen = tl.where(members, (rank < limit[None, :]).to(tl.float32), chosen)
        for i in range(left, tl.minimum(left + STEP, columns)):
            here = (column == i)[:, None]
            error = tl.sum(tl.where(here, w * chosen, 0.0), axis=0)
            w = tl.where(here, w - error[None, :], w)
            error = tl.div_rn(error, tl.load(upper + i * columns + i))
            row = tl.load(upper + i * columns + column, mask=(column > i) & (column < columns), other=0.0)
            w = w - row[:, None] * error[None, :]
            tl.store(errors + i * outputs + output, error, mask=output < outputs)
    tl.store(block + places, w, mask=inside)


def solve_block_on_gpu(block: torch.Tensor, upper: torch.Tensor, drop: torch.Tensor, group: int | None) -> torch.Tensor:
    """Do what ``sparsegpt.solve_block`` does, on contiguous tensors of one GPU."""
    columns, outputs = block.shape
    errors = torch.empty_like(block)
    padded = max(16, triton.next_power_of_2(columns))
    sizes = {"GROUP": group or 0, "STEP": group or padded, "COLUMNS": padded, "OUTPUTS": TILE}
    with torch.cuda.device_of(block):  # a kernel starts on the current GPU, which need not be the tensors'
        launch = _solve[(triton.cdiv(outputs, TILE),)]
        launch(block, errors, upper, drop, outputs, columns, **sizes, num_warps=4, enable_fp_fusion=True)
    return errors
