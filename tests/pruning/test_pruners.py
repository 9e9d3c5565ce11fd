"""Every pruner against an oracle written from its definition, and cases a pencil can check."""

import logging
import math

import oracles
import pytest
import torch
from test_alps import layer_error

from lib.allocation.formulas import uniform
from lib.calibration.hidden import enter_blocks
from lib.core.errors import UserError
from lib.models.weights import weights_of
from lib.pruning.plan import SparsityPlan
from lib.pruning.pruners import PRUNERS, VARIANTS, configured
from lib.pruning.sparsegpt import NotPositiveDefinite, inverse_factor, repair
from lib.pruning.thresholds import group_ranks
from lib.pruning.walk import walk

RATIOS = [0.05, 0.37, 0.5, 0.73, 0.9]
GROUPS = [(2, 4), (4, 8), (1, 4), (3, 5)]


def random_case(rows=24, columns=40, seed=0, dead=()):
    """Return a weight [rows, columns], the squared norms [columns] and the Hessian [columns, columns] of 300 inputs."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=draw)
    x = torch.randn(300, columns, generator=draw) * torch.rand(columns, generator=draw).mul(2).exp()
    x += 0.5 * torch.randn(300, 1, generator=draw)  # correlated columns
    x[:, list(dead)] = 0
    return weight, x.square().sum(0), 2 * x.T @ x


def statistic_of(pruner, norms, hessian):
    """Return what ``pruner`` gets to see, prepared; its own copy."""
    return pruner.prepare({None: None, "squared_norms": norms.clone(), "hessian": hessian.clone()}[pruner.statistic])


def assert_repaired_alike(got, expected, hessian):
    # float32 against float64: the factor of a Hessian of condition k carries k * 6e-8 of relative error, k some 1e3
    # after damping. A score nearer than that to the threshold may fall on the other side: none does in these cases.
    assert torch.equal(got == 0, expected == 0)
    torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("name", ["magnitude", "wanda"])
@pytest.mark.parametrize("ties", [False, True])
def test_masks(ties, name, ratio):
    weight, norms, _ = random_case()
    if ties:
        weight, norms = weight.sign() * weight.abs().ceil(), torch.ones(40)
    got = PRUNERS[name].prune(weight, norms, ratio, None)
    assert torch.equal(got, getattr(oracles, name)(weight, norms, ratio, None))


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.7])
def test_wanda_variant(ratio):
    weight, norms, _ = random_case(60, 50)
    got, expected = VARIANTS["wanda"].prune(weight, norms, ratio, None), oracles.wanda_variant(weight, norms, ratio)
    assert abs((got == 0).float().mean().item() - ratio) <= 0.001
    assert torch.equal(got, expected)


def test_wanda_variant_says_when_no_share_will_do(caplog):
    # At a share of 0.8, its upper end, equal weights lose 0.8 of a row; 0.95 is out of reach.
    with caplog.at_level(logging.WARNING):
        got = VARIANTS["wanda"].prune(torch.ones(4, 100), torch.ones(100), 0.95, None)
    assert (got == 0).float().mean().item() == pytest.approx(0.8, abs=0.011)  # one weight of 100 by rounding of the sum
    assert [r.levelname for r in caplog.records] == ["WARNING"] and "0.95" in caplog.records[0].getMessage()


@pytest.mark.parametrize("nm", GROUPS, ids=str)
@pytest.mark.parametrize("ties", [False, True])
def test_groups_of_magnitude_and_wanda(nm, ties):
    weight, norms, _ = random_case(16, 120)
    if ties:
        weight, norms = weight.sign() * weight.abs().ceil(), torch.ones(120)
    for name in ("magnitude", "wanda"):
        got = PRUNERS[name].prune(weight, norms, 1 - nm[0] / nm[1], nm)
        assert torch.equal(got, getattr(oracles, name)(weight, norms, 0, nm))


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize(("columns", "dead"), [(40, ()), (40, (0, 7, 39)), (300, (130,)), (256, ())])
def test_sparsegpt(ratio, columns, dead):
    weight, _, hessian = random_case(10, columns, seed=columns, dead=dead)
    expected = oracles.sparsegpt_by_elimination(weight, hessian, ratio, None)
    assert_repaired_alike(oracles.sparsegpt(weight, hessian, ratio, None), expected, hessian)
    assert_repaired_alike(repair(weight, inverse_factor(hessian.clone()), ratio, None), expected, hessian)


@pytest.mark.parametrize("nm", GROUPS, ids=str)
def test_sparsegpt_groups(nm):
    weight, _, hessian = random_case(10, 280 if nm[1] != 5 else 290, seed=9)
    expected = oracles.sparsegpt_by_elimination(weight, hessian, 0.0, nm)
    if nm[1] != 5:  # The published loop has no groups that span two of its blocks.
        assert_repaired_alike(oracles.sparsegpt(weight, hessian, 0.0, nm), expected, hessian)
    assert_repaired_alike(repair(weight, inverse_factor(hessian.clone()), 0.0, nm), expected, hessian)


@pytest.mark.parametrize("group", [4, 300])
def test_ranks_by_pencil(group):
    order = torch.randperm(group, generator=torch.Generator().manual_seed(2))
    assert group_ranks(order[:, None].float())[:, 0].tolist() == order.tolist()
    assert group_ranks(torch.ones(group, 2))[:, 1].tolist() == list(range(group))  # of equals the upper ones count


def test_wanda_pencil():
    # [1, 2, 3, 4] with norms [100, 10, 1, .1]: scores 100 20 3 .4; at one half 1 and 2 stay. Magnitude keeps 3 and 4.
    weight, norms = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([100.0, 10.0, 1.0, 0.1]) ** 2
    assert PRUNERS["wanda"].prune(weight, norms, 0.5, None).tolist() == [[1, 2, 0, 0]]
    assert PRUNERS["wanda"].prune(weight, norms, 0.5, (2, 4)).tolist() == [[1, 2, 0, 0]]
    assert PRUNERS["magnitude"].prune(weight, None, 0.5, (2, 4)).tolist() == [[0, 0, 3, 4]]
    assert PRUNERS["magnitude"].prune(weight, None, 0.25, None).tolist() == [[0, 0, 3, 4]]  # int(4/4) = 1: up to the 2


def test_sparsegpt_pencil():
    # Two columns, H = [[2, 1], [1, 2]], no damping to speak of: the inverse is [[2, -1], [-1, 2]] / 3. Removing w0 = 1
    # moves w1 by -1 * (-1/3) / (2/3) = +1/2.
    factor = inverse_factor(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
    got = repair(torch.tensor([[1.0, 4.0]]), factor, 0.0, None)
    damped = 2 * 1.01  # the mean diagonal is 2, 1 % of it is added
    assert got.tolist()[0] == pytest.approx([0, 4 + 1 / damped], rel=1e-6)


# ------------------------------------------------------------------------------- what holds for every pruner listed

ALL = {**PRUNERS, **{f"{name}-variant": pruner for name, pruner in VARIANTS.items()}}


@pytest.fixture(params=ALL)
def pruner(request):
    return ALL[request.param]


@pytest.mark.parametrize("ratio", [*RATIOS[:4], 1.0])
def test_planned_sparsity_is_met(pruner, ratio):
    if ratio == 1 and pruner in VARIANTS.values():
        pytest.skip("the variant removes 0.8 at most")
    weight, norms, hessian = random_case(100, 128, seed=4)
    got = pruner.prune(weight, statistic_of(pruner, norms, hessian), ratio, None)
    # Wanda rounds down to whole columns, the variant searches to 0.001, the others count one more than asked.
    assert (got == 0).float().mean().item() == pytest.approx(ratio, abs=1 / 128 if ratio < 1 else 0)


@pytest.mark.parametrize("nm", [*GROUPS[:3], (150, 300)], ids=str)
@pytest.mark.parametrize("name", PRUNERS)
def test_groups_keep_exactly_n_of_m(name, nm):
    weight, norms, hessian = random_case(6, 600, seed=5)
    got = PRUNERS[name].prune(weight, statistic_of(PRUNERS[name], norms, hessian), 1 - nm[0] / nm[1], nm)
    assert ((got != 0).view(6, -1, nm[1]).sum(2) == nm[0]).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_and_shape_stay_and_the_weight_is_left_alone(pruner, dtype):
    weight, norms, hessian = random_case(seed=8)
    weight, before = weight.to(dtype), weight.to(dtype, copy=True)
    got = pruner.prune(weight, statistic_of(pruner, norms, hessian), 0.5, None)
    assert torch.equal(weight, before)
    assert got.dtype == dtype and got.shape == weight.shape and torch.isfinite(got).all()
    if pruner.statistic != "hessian":  # the others repair what is left
        assert torch.equal(got[got != 0], weight[got != 0])


@pytest.mark.parametrize("nm", [None, (2, 4)], ids=str)
def test_order_of_rows_does_not_matter(pruner, nm):
    if nm and pruner in VARIANTS.values():
        pytest.skip("the variant is unstructured only")
    weight, norms, hessian = random_case(50, 64, seed=9)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    got = pruner.prune(weight, statistic_of(pruner, norms, hessian), 0.5, nm)
    moved = pruner.prune(weight[order], statistic_of(pruner, norms, hessian), 0.5, nm)
    assert torch.equal(moved == 0, got[order] == 0)
    torch.testing.assert_close(moved, got[order], rtol=1e-5, atol=1e-6)  # a matrix product may sum in another order


def indefinite(lowest: float, size: int = 64) -> torch.Tensor:
    """Return the unit matrix with one eigenvalue ``lowest``."""
    hessian = torch.eye(size)
    hessian[3, 3] = lowest
    return hessian


@pytest.mark.parametrize(("lowest", "warnings"), [(0.5, 0), (-0.05, 1), (-0.5, 2)])
def test_damping_is_raised_tenfold(caplog, lowest, warnings):
    hessian = indefinite(lowest)
    damping = 0.01 * 10**warnings * hessian.diagonal().mean()
    with caplog.at_level(logging.WARNING):
        upper = inverse_factor(hessian.clone()).upper
    assert [r.levelname for r in caplog.records] == ["WARNING"] * warnings
    exact = torch.linalg.inv((hessian + damping * torch.eye(64)).double())
    torch.testing.assert_close((upper.T @ upper).double(), exact, rtol=1e-4, atol=1e-5)
    assert torch.equal(upper, upper.triu())


def test_damping_is_given_up(caplog):
    with pytest.raises(NotPositiveDefinite):
        inverse_factor(indefinite(-5.0))
    assert len(caplog.records) == 2


def prune(model, pruner, windows) -> None:
    """Prune a tiny LLaMA by half."""
    weights = weights_of(model)
    plan = SparsityPlan(0.5, uniform(weights.layers, 0.5))
    walk(weights, plan, pruner, enter_blocks(weights, windows) if pruner.statistic else None)


def test_walk_names_the_layer(tiny_model, tiny_windows):
    pruner = PRUNERS["sparsegpt"]
    broken = pruner._replace(prepare=lambda hessian: pruner.prepare(hessian - 1e9 * torch.eye(len(hessian))))
    with pytest.raises(UserError, match=r"model\.layers\.0\.self_attn\.q_proj.*positive definite") as caught:
        prune(tiny_model, broken, tiny_windows)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", PRUNERS)
def test_weights_that_are_not_finite_name_the_layer(name, tiny_model, tiny_windows):
    bad = "model.layers.0.mlp.down_proj"  # which spoils no input of its block
    tiny_model.get_submodule(bad).weight.data[0, 0] = math.nan
    with pytest.raises(UserError, match=bad):
        prune(tiny_model, PRUNERS[name], tiny_windows)


@pytest.mark.parametrize("name", [name for name in PRUNERS if PRUNERS[name].statistic])
def test_inputs_that_are_not_finite_name_the_layer(name, tiny_model, tiny_windows):
    tiny_model.model.layers[1].input_layernorm.weight.data[2] = math.inf
    with pytest.raises(UserError, match=weights_of(tiny_model).layers[7].name):
        prune(tiny_model, PRUNERS[name], tiny_windows)


@pytest.mark.parametrize("name", [name for name in PRUNERS if name != "alps"])
@pytest.mark.parametrize("nm", [None, (2, 4)], ids=str)
def test_refit_keeps_the_mask_and_lowers_the_error(name, nm):
    weight, norms, hessian = random_case(12, 40)
    plain = PRUNERS[name].prune(weight, statistic_of(PRUNERS[name], norms / 2, hessian), 0.5, nm)
    errors = [layer_error(weight, plain, hessian)]
    for steps in (1, 3, 10):
        pruner = configured(name, PRUNERS, None, None, steps)
        assert pruner.statistic == "hessian"
        refitted = pruner.prune(weight, pruner.prepare(hessian.clone()), 0.5, nm)
        assert torch.equal(refitted == 0, plain == 0)
        errors.append(layer_error(weight, refitted, hessian))
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0]


def test_options_reach_the_pruner():
    for refit in (None, 0):
        assert configured("wanda", PRUNERS, None, None, refit) is PRUNERS["wanda"]
    weight, _, hessian = random_case(12, 40)
    of_alps = [(None, None, None), (30, None, None), (None, 0.5, None), (None, None, 0)]
    options = [("alps", *each) for each in of_alps] + [("sparsegpt", None, damping, None) for damping in (None, 0.3)]
    results = []
    for name, *each in options:
        pruner = configured(name, PRUNERS, *each)
        results.append(pruner.prune(weight, pruner.prepare(hessian.clone()), 0.6, None))
    assert not any(torch.equal(a, b) for i, a in enumerate(results) for b in results[:i])


@pytest.mark.parametrize("name", [name for name in PRUNERS if PRUNERS[name].group])
@pytest.mark.parametrize(
    "nms",
    [[None] * 4, [(2, 4)] * 4, [(4, 8), (1, 8), (8, 8), (0, 8)], [(2, 4), (4, 8), None, (2, 4)]],
    ids=["ratios", "2:4", "mixed N", "mixed M"],
)
def test_layers_that_share_an_input_are_pruned_as_each_alone(name, nms):
    # The factor's blocks are of 128 columns: three of them, with dead ones.
    weight, _, hessian = random_case(24, 280, seed=3, dead=(4, 150)) if name == "sparsegpt" else random_case(24, 40)
    weights = dict(zip("abcd", weight.split([10, 1, 7, 6]), strict=True)) | {"c": weight[11:18].bfloat16()}
    ratios, pruner = {"a": 0.3, "b": 0.0, "c": 0.7, "d": 1.0, "another": 0.1}, PRUNERS[name]
    nm = dict(zip("abcd", nms, strict=True))
    together = dict(pruner.prune_all(weights, pruner.prepare(hessian.clone()), ratios, nm))
    assert list(together) == list(weights)
    for key, weight in weights.items():
        alone = pruner.prune(weight, pruner.prepare(hessian.clone()), ratios[key], nm[key])
        assert torch.equal(together[key] == 0, alone == 0) and together[key].dtype == weight.dtype
        assert together[key].is_contiguous()
        # Products of other shapes round otherwise.
        tolerance = 1e-2 if weight.dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(together[key], alone, rtol=tolerance, atol=tolerance / 10)


@pytest.mark.gpu
@pytest.mark.parametrize("nm", [None, (2, 4)], ids=str)
def test_pruners_on_cuda_do_as_on_the_cpu(pruner, nm, monkeypatch):
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)  # ALPS iterates in TF32: other masks
    if nm and pruner in VARIANTS.values():
        pytest.skip("the variant is unstructured only")
    weight, norms, hessian = random_case(64, 256, seed=11)
    here = pruner.prune(weight, statistic_of(pruner, norms, hessian), 0.5, nm)
    there = pruner.prune(weight.cuda(), statistic_of(pruner, norms.cuda(), hessian.cuda()), 0.5, nm).cpu()
    assert ((here == 0) != (there == 0)).float().mean().item() <= 1e-3  # SparseGPT: rounding near the threshold
    same = (here == 0) == (there == 0)
    torch.testing.assert_close(there[same], here[same], rtol=1e-2, atol=1e-3)
