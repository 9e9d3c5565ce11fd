"""ALPS and the refit against loops written from their definitions, invariances, and SmolLM2's block 16."""

import logging
from functools import partial

import numpy as np
import pytest
import torch
from test_memory import peak_bytes

from lib.pruning import alps as alps_module
from lib.pruning.alps import ALPS_DAMPING, _largest, alps, alps_group, prepare, refit
from lib.pruning.sparsegpt import NotPositiveDefinite, inverse_factor, repair

RAMPS = {1: [0.3], 10: [0.3, 0.3 ** (2 / 3), 0.3 ** (1 / 3), 1], 30: [0.1 * 30 ** (j / 9) for j in range(10)]}


def random_case(rows=24, columns=40, seed=0, dead=(), common=0.5):
    """Return a weight [rows, columns] and the Hessian of 300 inputs with ``common`` noise and unlike scales."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=draw)
    x = torch.randn(300, columns, generator=draw) + common * torch.randn(300, 1, generator=draw)
    if common:
        x = x @ torch.randn(columns, columns, generator=draw)
    x *= torch.rand(columns, generator=draw).mul(2).exp()
    x[:, list(dead)] = 0
    return weight, 2 * x.T @ x / 300


def solve(weight, hessian, ratio=0.5, nm=None, damping=ALPS_DAMPING, **options):
    return alps(weight, prepare(hessian.clone(), damping), ratio, nm, **options)


def sparsegpt(weight, hessian, ratio=0.5, nm=None):
    return repair(weight, inverse_factor(hessian.clone()), ratio, nm)


def layer_error(weight, pruned, hessian):
    """Return tr(E H E') / tr(W H W')."""
    h, w = hessian.double(), weight.double()
    e = pruned.double() - w
    return (((e @ h) * e).sum() / ((w @ h) * w).sum()).item()


def assert_alike(got, expected, rtol=1e-4):
    # The condition of the damped Hessian is at most (1 + columns) / damping, some 1e3, and float32 rounds by 6e-8.
    assert torch.equal(got == 0, expected == 0)
    torch.testing.assert_close(got.double(), expected.double(), rtol=rtol, atol=rtol * expected.abs().max().item())


def oracle_top(score, ratio, nm):
    """Return the mask of what stays, by sorting lists."""
    if nm is None:
        ordered = sorted(v for row in score.tolist() for v in row)
        index = int(len(ordered) * ratio)
        return score > ordered[index] if index < len(ordered) else torch.zeros_like(score, dtype=torch.bool)
    keep = torch.zeros_like(score, dtype=torch.bool)
    for r, row in enumerate(score.tolist()):
        for left in range(0, len(row), nm[1]):
            keep[r, sorted(range(left, left + nm[1]), key=lambda c, row=row: (row[c], c))[nm[1] - nm[0] :]] = True
    return keep


def oracle_admm(weight, hessian, ratio, nm, ramp, iterations, damping):
    """ALPS' three steps and its scaled dual as published, in float64, with the final D; no refit."""
    d = hessian.double().diagonal().sqrt()
    a = hessian.double() / torch.outer(d, d)
    w0, eye = weight.double() * d, torch.eye(len(d), dtype=torch.float64)
    goal = w0 @ (a + damping * eye)
    kept, dual, last = w0 * oracle_top(w0.abs(), ratio, nm), torch.zeros_like(w0), None
    for t in range(iterations):
        rho = ramp[t // 3]
        if last is not None:
            dual = dual * (last / rho)
        last = rho
        w = (goal + rho * (kept - dual)) @ torch.linalg.inv(a + (damping + rho) * eye)
        s = w + dual
        kept = s * oracle_top(s.abs(), ratio, nm)
        dual = s - kept
    return kept / d


def oracle_fixed_mask(weight, support, hessian, damping):
    """The best values of each row's support by least squares, in float64."""
    d = hessian.double().diagonal().sqrt()
    a = hessian.double() / torch.outer(d, d) + damping * torch.eye(len(d), dtype=torch.float64)
    root, w0 = torch.linalg.cholesky(a).T, weight.double() * d  # a = root' root
    best = torch.zeros_like(w0)
    for r, row in enumerate(support):
        if row.any():
            best[r, row] = torch.linalg.lstsq(root[:, row], (root @ w0[r])[:, None]).solution[:, 0]
    return best / d


CASES = [(0.3, None), (0.5, None), (0.7, None), (0.9, None), (0.5, (2, 4)), (0.5, (4, 8)), (0.75, (1, 4))]
OTHER_RAMPS = [(*goal, *how) for goal in ((0.7, None), (0.5, (2, 4))) for how in ((30, 0.1), (10, 0.01), (1, 0.1))]


@pytest.mark.parametrize(
    ("ratio", "nm", "iterations", "damping"), [*((*goal, 10, 0.1) for goal in CASES), *OTHER_RAMPS], ids=str
)
def test_admm(ratio, nm, iterations, damping, monkeypatch):
    # The comparison with SparseGPT is set aside.
    monkeypatch.setattr(alps_module, "repair", lambda weight, *_: torch.zeros_like(weight))
    weight, hessian = random_case()
    got = solve(weight, hessian, ratio, nm, damping, iterations=iterations, steps=0)
    assert_alike(got, oracle_admm(weight, hessian, ratio, nm, RAMPS[iterations], iterations, damping))


@pytest.mark.parametrize("damping", [0.1, 0.01])
def test_refit_ends_at_least_squares(damping):
    weight, hessian = random_case(8, 12)
    mask = torch.rand(8, 12, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[2], mask[5] = False, True  # an empty row stays empty, a full one becomes the dense one
    pruned = weight * mask * 3
    got = refit(weight, pruned, prepare(hessian.clone(), damping), steps=60)
    assert_alike(got, oracle_fixed_mask(weight, mask, hessian, damping), rtol=1e-3 if damping < 0.1 else 1e-4)
    torch.testing.assert_close(got[5], weight[5], rtol=1e-3, atol=1e-3)


def test_alps_ends_near_the_best_values_of_its_mask():
    weight, hessian = random_case(seed=3)
    got = solve(weight, hessian, 0.6, iterations=30, steps=30)
    assert_alike(got, oracle_fixed_mask(weight, got != 0, hessian, ALPS_DAMPING), rtol=1e-3)


def test_refit_pencil():
    # A = [[1, .5], [.5, 1]] without damping: when w0 = 2 is removed, w1 becomes 4 + .5 * 2; H's diagonal is 4 and 1,
    # so in H's own units w1 moves by h01 / h11 * w0 = 1 / 1 * 2.
    problem = prepare(torch.tensor([[4.0, 1.0], [1.0, 1.0]]), damping=0)
    assert problem.damped.tolist() == [[1, 0.5], [0.5, 1]]
    got = refit(torch.tensor([[2.0, 4.0]]), torch.tensor([[0.0, 4.0]]), problem, steps=1)
    assert got.tolist() == [[0, 6]]


@pytest.mark.parametrize("seed", range(20))
def test_selection_is_a_sorts(seed):
    draw = torch.Generator().manual_seed(seed)
    rows, columns = torch.randint(1, 20, (2,), generator=draw).tolist()
    state = torch.randn(3 * rows, 4 * columns, generator=draw)
    if seed % 2:
        state = (2 * state).round() / 2  # ties, zeros and -0.0
    if seed % 5 == 0:
        state.mul_(torch.rand(state.shape, generator=draw) < 0.2)
    nm = [(2, 4), (1, 2), (3, 4), (4, 4)][seed % 4]
    goals = [(torch.rand((), generator=draw).item(), None), (0.5, nm), (1.0, None)]
    expected = [oracle_top(rows.abs(), *goal) for rows, goal in zip(state.split(rows), goals, strict=True)]
    assert torch.equal(_largest(state, [rows] * 3, goals), torch.cat(expected))


def test_everything_that_ties_with_the_threshold_goes():
    # With a diagonal Hessian nothing can be made up for: of 1 2 2 3 2 4 5 6 the third smallest is a 2.
    weight = torch.tensor([[1.0, -2.0, 2.0, 3.0], [2.0, 4.0, -5.0, 6.0]])
    got = solve(weight, 7 * torch.eye(4), 0.25)
    assert_alike(got, torch.tensor([[0.0, 0, 0, 3], [0, 4, -5, 6]]), rtol=1e-6)
    assert not solve(torch.ones(4, 8), torch.eye(8), 0.1).any()


@pytest.mark.parametrize(("ratio", "nm"), CASES, ids=str)
def test_order_of_the_pruners(ratio, nm):
    weight, hessian = random_case(48, 64)
    problem, plain = prepare(hessian.clone()), sparsegpt(weight, hessian, ratio, nm)
    before = problem.damped.clone(), problem.scale.clone()
    each = (plain, refit(weight, plain, problem), alps(weight, problem, ratio, nm))
    errors = [layer_error(weight, pruned, hessian) for pruned in each]
    assert errors[0] > errors[1] > errors[2]
    assert torch.equal(problem.damped, before[0]) and torch.equal(problem.scale, before[1])  # for the next layer


@pytest.mark.parametrize(("ratio", "nm"), [(0.3, None), (0.9, None), (0.5, (2, 4))], ids=str)
@pytest.mark.parametrize("common", [0, 0.5])
@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_never_worse_than_sparsegpt(ratio, nm, common, iterations, caplog):
    # Without correlations three iterations get nowhere, and ten fall short at times.
    weight, hessian = random_case(48, 64, common=common)
    with caplog.at_level(logging.WARNING):
        got = solve(weight, hessian, ratio, nm, iterations=iterations)
    repaired = sparsegpt(weight, hessian, ratio, nm)
    error, error_repaired = layer_error(weight, got, hessian), layer_error(weight, repaired, hessian)
    assert error <= error_repaired * (1 + 1e-5)  # both sums are rounded
    assert len(caplog.records) in (0, 1)
    if caplog.records:
        assert_alike(got, repaired)
        assert "a matrix of 48x64: SparseGPT's weights are taken" in caplog.text
    assert caplog.records or common or iterations != 3


def test_errors_are_compared_without_damping():
    # Inputs of rank 4 and a little noise: with damping .1 ALPS minimises something else than SparseGPT does with .01.
    for seed in range(3):
        draw = torch.Generator().manual_seed(seed)
        x = torch.randn(400, 4, generator=draw) @ torch.randn(4, 64, generator=draw)
        x += 0.05 * torch.randn(400, 64, generator=draw)
        weight, hessian = torch.randn(48, 64, generator=draw), 2 * x.T @ x / 400
        got, other = solve(weight, hessian, 0.2), sparsegpt(weight, hessian, 0.2)
        # What is compared is a small difference of damped sums: 6e-8 * (1 + columns) / (share of error, some 1e-3).
        assert layer_error(weight, got, hessian) <= layer_error(weight, other, hessian) * (1 + 1e-2)


def test_a_group_shares_the_inverse_and_a_warning_names_the_layer(caplog, monkeypatch):
    rhos, inverse = [], alps_module._inverse
    monkeypatch.setattr(alps_module, "_inverse", lambda a, rho, work: rhos.append(rho) or inverse(a, rho, work))
    weights = {name: random_case(24, 64, seed, common=0)[0] for seed, name in enumerate(("q_proj", "k_proj"))}
    hessian = random_case(24, 64, 0, common=0)[1]
    with caplog.at_level(logging.WARNING):
        alps_group(weights, prepare(hessian), dict.fromkeys(weights, 0.5), dict.fromkeys(weights), iterations=3)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["q_proj", "k_proj"]
    assert rhos == [0.3]


@pytest.mark.parametrize("nm", [None, (2, 4)], ids=str)
def test_invariances(nm):
    weight, hessian = random_case(seed=8, dead=(3,))
    expected = solve(weight, hessian, 0.6, nm)
    pruned = sparsegpt(weight, hessian, 0.6, nm)
    refitted = refit(weight, pruned, prepare(hessian.clone()))
    for factor in (1e-12, 0.3, 1e12):  # of the Hessian
        assert_alike(solve(weight, hessian * factor, 0.6, nm), expected)
        assert_alike(refit(weight, pruned, prepare(hessian * factor)), refitted)
    for factor in (1e-6, -1.0, 1e6):  # of the weights
        assert_alike(solve(weight * factor, hessian, 0.6, nm) / factor, expected)
    if nm is None:
        order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
        assert_alike(solve(weight[:, order], hessian[order][:, order], 0.6), expected[:, order])


@pytest.mark.parametrize(("ratio", "nm"), [(0.05, None), (0.5, None), (0.5, (2, 4))], ids=str)
def test_dead_inputs(ratio, nm):
    dead, alive = [1, 4, 30], [c for c in range(40) if c not in (1, 4, 30)]
    weight, hessian = random_case(seed=11, dead=dead)
    got = solve(weight, hessian, ratio, nm)
    assert not got[:, dead].any() and torch.isfinite(got).all()
    if nm is None:  # the rest is pruned as if they were not there, of what is left to remove
        share = (int(weight.numel() * ratio) - len(dead) * len(weight)) / (len(alive) * len(weight))
        if share > 0:
            expected = solve(weight[:, alive], hessian[alive][:, alive], share + 1e-9)
            assert_alike(got[:, alive], expected)
    assert not solve(weight, torch.zeros(40, 40), ratio, nm).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("nm", [None, (2, 4)], ids=str)
def test_short_dtypes_are_computed_in_float32(dtype, nm):
    weight, hessian = random_case(seed=12)
    short = weight.to(dtype)
    assert torch.equal(solve(short, hessian, 0.5, nm), solve(short.float(), hessian, 0.5, nm).to(dtype))
    pruned = solve(short, hessian, 0.5, nm)
    got, wide = (refit(w, p, prepare(hessian.clone())) for w, p in ((short, pruned), (short.float(), pruned.float())))
    assert got.dtype == dtype and torch.equal(got, wide.to(dtype))


@pytest.mark.parametrize(("ratio", "nm"), [(0.5, None), (1.0, None), (0.5, (2, 4))], ids=str)
def test_minus_zero_is_not_written(ratio, nm):
    weight, hessian = random_case(seed=13, dead=(2,))
    got = solve(weight.half(), hessian, ratio, nm)
    again = refit(weight.half(), got, prepare(hessian.clone()))
    # With a diagonal Hessian the best values are the dense ones, and float16 ends at 6e-8: the first underflows.
    tiny = refit(torch.tensor([[-1e-9, -2.0]]), torch.ones(1, 2).half(), prepare(torch.eye(2)), steps=2)
    for result in (got, again, tiny):
        assert (result == 0).any() and not (torch.signbit(result) & (result == 0)).any()


@pytest.mark.parametrize("nm", [None, pytest.param((2, 4), marks=pytest.mark.slow)], ids=str)
def test_at_most_three_matrices_of_the_hessians_size(nm):
    size, rows = 2048, 8
    matrix, copy = 4 * size * size, 4 * size * rows
    hessian = 2 * torch.eye(size) + 1
    address, held = hessian.untyped_storage().data_ptr(), []
    assert peak_bytes(lambda: held.append(prepare(hessian))) <= 16 * 4 * size  # vectors
    assert held[0].damped.untyped_storage().data_ptr() == address
    weights = {name: torch.randn(rows, size, generator=torch.Generator().manual_seed(1)) for name in ("gate", "up")}
    # The inverse, SparseGPT's triangle in its room and strips of 128 columns, and some 20 copies of the two weights.
    work = partial(alps_group, weights, held[0], dict.fromkeys(weights, 0.5), dict.fromkeys(weights, nm))
    assert peak_bytes(work) <= 2 * matrix + 2 * 4 * size * 128 + 40 * copy
    assert peak_bytes(lambda: refit(weights["up"], weights["up"], held[0])) <= 20 * copy


def test_hessian_that_is_not_positive_definite():
    weight, hessian = random_case()
    with pytest.raises(NotPositiveDefinite):
        solve(weight, hessian - 1e9 * torch.eye(40))
    broken = torch.eye(40)
    broken[0, 1] = broken[1, 0] = 5  # a correlation of 5
    with pytest.raises(NotPositiveDefinite):
        solve(weight, broken)


def test_precision_of_products_is_left_alone_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch, "set_float32_matmul_precision", None)
    solve(*random_case())


@pytest.mark.gpu
@pytest.mark.parametrize("nm", [None, (2, 4)], ids=str)
def test_cuda_does_as_the_cpu(nm):
    weight, hessian = random_case(256, 256, seed=15)
    precision = torch.get_float32_matmul_precision()
    here, there = solve(weight, hessian, 0.5, nm), solve(weight.cuda(), hessian.cuda(), 0.5, nm).cpu()
    assert torch.get_float32_matmul_precision() == precision
    errors = [layer_error(weight, pruned, hessian) for pruned in (here, there)]
    assert errors[1] == pytest.approx(errors[0], rel=5e-3)  # iterations in TF32, of 10 bits, choose another mask


@pytest.fixture(scope="module")
def block_16(smollm2_source, golden):
    """Return the dense model's weights in block 16 by name, grouped by input, each group with its Hessian."""
    from lib.models.load import load_llm

    model = load_llm(smollm2_source, "float32")
    model.model.layers = model.model.layers[:17]
    prefix, total = "model.layers.16", {}
    groups = ("self_attn", ["q_proj", "k_proj", "v_proj"]), ("self_attn", ["o_proj"])
    groups += ("mlp", ["gate_proj", "up_proj"]), ("mlp", ["down_proj"])
    modules = dict(model.named_modules())
    named = [[f"{prefix}.{part}.{name}" for name in names] for part, names in groups]

    def watch(name, _, args):
        x = args[0].flatten(0, -2)
        total[name] = total.get(name, 0) + 2 * x.T @ x / len(windows)

    windows = torch.from_numpy(golden("windows.npz")["calibration"].astype(np.int64))
    for names in named:
        modules[names[0]].register_forward_pre_hook(partial(watch, names[0]))
    with torch.no_grad():
        for window in windows:
            model.model(window[None], use_cache=False)
    return [({name: modules[name].weight.detach() for name in names}, total[names[0]]) for names in named]


@pytest.mark.slow
@pytest.mark.parametrize("key", ["0.7", "2:4"])
@pytest.mark.parametrize("column", ["alps_10", "alps_30", "sparsegpt_refit10"])
def test_published_layer_errors(key, column, block_16, golden, caplog):
    expected = golden("reconstruction.json")["layer_error"][key]
    for weights, hessian in block_16:
        problem, nm = prepare(hessian.clone()), (2, 4) if key == "2:4" else None
        if column.startswith("alps"):
            iterations = int(column.removeprefix("alps_"))
            pruned = alps_group(weights, problem, dict.fromkeys(weights, 0.7), dict.fromkeys(weights, nm), iterations)
        else:
            factor = inverse_factor(hessian.clone())
            pruned = {n: refit(w, repair(w, factor, 0.7, nm), problem, steps=10) for n, w in weights.items()}
        d = hessian.diagonal().sqrt()
        for name, weight in weights.items():
            error = layer_error(weight * d, pruned[name] * d, hessian / torch.outer(d, d))
            assert error == pytest.approx(expected[name][column], rel=0.02)
    assert not caplog.records
