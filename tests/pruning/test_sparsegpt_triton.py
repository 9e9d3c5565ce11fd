"""SparseGPT's Triton kernel: in the interpreter against a plain loop, bit for bit, and through the compiler."""

import os
import subprocess
import sys
import warnings
from importlib.util import find_spec

import pytest
import torch
from conftest import ROOT, fast

from lib.pruning.sparsegpt import Factor, block_solver, inverse_factor, repair, solve_block

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
slow = pytest.mark.slow  # the interpreter runs each of the kernel's operations in Python

# Processes of their own: Triton reads TRITON_INTERPRET when it is imported, and then it holds for all kernels.
INTERPRET = """
import sys, torch
from lib.pruning import sparsegpt
from lib.pruning.sparsegpt_triton import solve_block_on_gpu as solve_block

blocks, matrices = torch.load(sys.argv[1])
errors = [solve_block(*case) for case in blocks]  # the blocks are changed in place
sparsegpt.block_solver = lambda device, group: solve_block
matrices = [sparsegpt.repair(weight, sparsegpt.Factor(*factor), *rest) for weight, factor, *rest in matrices]
torch.save(([case[0] for case in blocks], errors, matrices), sys.argv[2])
"""

COMPILE = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lib.pruning.sparsegpt_triton import TILE, _solve

architecture, group, padded = map(int, sys.argv[1:])
kinds = dict.fromkeys(("block", "errors", "upper"), "*fp32") | {"drop": "*i32" if group else "*fp32"}
sizes = {"GROUP": group, "STEP": group or padded, "COLUMNS": padded, "OUTPUTS": TILE}
kinds |= dict.fromkeys(("outputs", "columns"), "i32") | dict.fromkeys(sizes, "constexpr")
source = ASTSource(fn=_solve, signature=kinds, constexprs=sizes)
options = {"num_warps": 4, "enable_fp_fusion": True}
kernel = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
assert kernel.asm["cubin"], "no machine code"
print(kernel.asm["ptx"].count("div.rn.f32"))
"""


def run(code, *arguments, **env):
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | env
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rounded_twice(column, factor, error):
    return column - factor * error


def plain_loop(block, upper, drop, group, subtract=rounded_twice):
    """Do what ``solve_block`` does, from its definition; each product is rounded before it is taken off.

    The torch loop's addr_ fuses the two roundings into one, where the CPU can: another ``subtract``.
    """
    errors, diagonal = torch.zeros_like(block), upper.diagonal()
    mask = torch.zeros_like(block, dtype=torch.bool) if group else drop == 1
    for i in range(len(block)):
        if group and i % group == 0:
            score = (block[i : i + group].square() / diagonal[i : i + group, None].square()).T.tolist()
            for output, column in enumerate(score):
                order = sorted(range(group), key=column.__getitem__)  # stable: ties to the lower column
                mask[[i + c for c in order[: drop[output]]], output] = True
        errors[i] = torch.where(mask[i], block[i], 0) / diagonal[i]
        block[i] = torch.where(mask[i], 0, block[i])
        block[i + 1 :] = subtract(block[i + 1 :], upper[i, i + 1 :, None], errors[i])
    return errors


def random_block(columns, outputs, group, ratio=0.5):
    draw = torch.Generator().manual_seed(columns + outputs)
    upper = (0.1 * torch.randn(columns, columns, generator=draw)).triu(1)
    upper += torch.diag(0.5 + torch.rand(columns, generator=draw))
    block = torch.randn(columns, outputs, generator=draw)
    if group:
        return block, upper, torch.randint(0, group + 1, (outputs,), generator=draw, dtype=torch.int32), group
    return block, upper, (torch.rand(columns, outputs, generator=draw) < ratio).float(), group


CASES = [
    (128, 40, None, 0.5),
    (128, 3, None, 0.0),
    (128, 33, None, 1.0),
    (20, 70, None, 0.7),  # a last, ragged block
    (1, 1, None, 1.0),
    (128, 33, 4, None),  # from none to all of each group, another number for each output
    (128, 40, 8, None),
    (125, 31, 5, None),
    (44, 5, 4, None),
]


def ties():
    return torch.ones(8, 6), torch.eye(8), torch.arange(6, dtype=torch.int32).clamp(max=4), 4


def matrix_case(columns, nm, ratio):
    draw = torch.Generator().manual_seed(columns)
    x = torch.randn(400, columns, generator=draw)
    x[:, [0, 7, columns - 1]] = 0  # dead columns
    return torch.randn(20, columns, generator=draw), tuple(inverse_factor(2 * (x.T @ x))), ratio, nm


def all_blocks():
    return [random_block(*case) for case in CASES] + [ties()]


MATRICES = [(300, None, 0.5), (300, None, 1.0), (280, (2, 4), 0.0), (264, (4, 8), 0.0)]


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """Return what the interpreter makes of all cases: blocks, errors, matrices."""
    folder = tmp_path_factory.mktemp("interpreted")
    torch.save((all_blocks(), [matrix_case(*case) for case in MATRICES]), folder / "cases.pt")
    run(INTERPRET, folder / "cases.pt", folder / "results.pt", TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    return torch.load(folder / "results.pt")


@slow
@pytest.mark.parametrize("index", range(len(CASES) + 1), ids=lambda i: str([*CASES, "ties"][i]))
def test_kernel_has_the_bits_of_a_plain_loop(index, interpreted):
    found, errors, case = interpreted[0][index], interpreted[1][index], all_blocks()[index]
    expected, torchs = case[0].clone(), case[0].clone()
    wanted = plain_loop(expected, *case[1:])
    assert torch.equal(found, expected) and torch.equal(errors, wanted)
    # The torch loop may round less often. Each of up to 127 steps differs by half a unit in the last place of numbers
    # of order one (6e-8), and is passed on, times some 0.1, to the columns that follow.
    looped = solve_block(torchs, *case[1:])
    assert torch.equal(torchs == 0, found == 0)
    torch.testing.assert_close(looped, errors, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(torchs, found, rtol=1e-5, atol=2e-5)


@slow
@pytest.mark.parametrize("index", range(len(MATRICES)), ids=lambda i: str(MATRICES[i]))
def test_whole_matrices_by_the_kernel(index, interpreted):
    weight, factor, ratio, nm = matrix_case(*MATRICES[index])
    expected, found = repair(weight, Factor(*factor), ratio, nm), interpreted[2][index]
    assert torch.equal(found == 0, expected == 0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # of roundings, as above


@pytest.mark.parametrize(
    ("architecture", "group", "padded"),
    fast([(90, 0, 16), (75, 0, 128), (80, 4, 128), (90, 4, 128), (100, 8, 128)], 1),
)
def test_kernel_compiles(architecture, group, padded, tmp_path):
    divisions = run(COMPILE, architecture, group, padded, TRITON_CACHE_DIR=str(tmp_path))  # with Triton's own assembler
    assert int(divisions) > 0  # exact ones: an approximate one would move the masks of N:M


@pytest.mark.gpu
@pytest.mark.parametrize("group", [None, 4, 8])
def test_kernel_on_cuda(group):
    warnings.simplefilter("error")
    device = torch.device("cuda")
    solver = block_solver(device, group)
    assert solver is not solve_block
    case = [x.to(device) if isinstance(x, torch.Tensor) else x for x in random_block(128, 1000, group)]
    found, expected = case[0].clone(), case[0].clone()
    torch.testing.assert_close(solver(found, *case[1:]), solve_block(expected, *case[1:]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
