"""Image classifiers: spectra, statistics, the walk with dense and pruned predecessors, and masks."""

import copy
import weakref

import numpy as np
import pytest
import torch
from test_image_models import TINY, matrices, some_images, tiny_convnext, tiny_vit

from image_classifiers.models import IMAGE_PRUNERS, block_inputs, find_parts, wanda_of_matrix
from lib.allocation.formulas import ALLOCATIONS, heavy_tailed, uniform
from lib.calibration.hidden import PROPAGATE
from lib.calibration.statistics import STATISTICS
from lib.pruning.plan import SparsityPlan
from lib.pruning.pruners import Pruner
from lib.pruning.walk import walk
from lib.spectra.measure import measure
from lib.spectra.spectrum import spectrum
from lib.spectra.tail import alpha_mid

IMAGES = some_images(11)
makes = pytest.mark.parametrize("make", TINY.values(), ids=TINY)


def in_batches(size: int, images: torch.Tensor = IMAGES):
    """Yield ``images`` with labels that nobody reads."""
    for batch in images.split(size):
        yield batch, torch.zeros(len(batch), dtype=torch.long)


def prune(
    model,
    method: str,
    ratios: dict | float = 0.5,
    propagate: str = "dense",
    size: int = 4,
    pruner: Pruner | None = None,
):
    parts = find_parts(model)
    pruner = pruner or IMAGE_PRUNERS[method]
    ratios = uniform(parts.pruned.layers, ratios) if isinstance(ratios, float) else ratios
    inputs = block_inputs(parts.pruned, in_batches(size), None) if pruner.statistic else None
    return walk(parts.pruned, SparsityPlan(0.5, ratios), pruner, inputs, None, propagate)


def statistics(model, statistic: str, propagate: str = "dense", size: int = 4) -> list[torch.Tensor]:
    """Return the statistic of every pruned layer as the walk hands it to the pruner, which zeroes half of W."""
    seen = []

    def note(weight, prepared, ratio, nm):
        seen.append(prepared.clone())
        return IMAGE_PRUNERS["magnitude"].prune(weight, None, ratio, nm)

    prune(model, "", 0.5, propagate, size, Pruner(note, statistic))
    return seen


def exact(model, statistic: str, images: torch.Tensor = IMAGES) -> list[torch.Tensor]:
    """Return the same from hooks on a whole forward pass of ``model`` in float64, all images at once."""
    model, seen = copy.deepcopy(model).double(), []

    def note(module, args):
        x = args[0].permute(0, 2, 3, 1) if isinstance(module, torch.nn.Conv2d) else args[0]
        x = x.reshape(-1, x.shape[-1])
        seen.append(x.square().mean(0) if statistic == "squared_norms" else 2 * x.T @ x / len(x))

    for matrix in matrices(find_parts(model).pruned).values():
        matrix.register_forward_pre_hook(note)
    with torch.no_grad():
        model(images.double())
    return seen


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    # float32 sums of a few hundred tokens, through at most a dozen layers, against float64
    return torch.allclose(found.double(), wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())


# ------------------------------------------------------------------------------------------------------ spectra


@pytest.mark.parametrize("shape", [(6, 1, 3, 3), (5, 4, 1, 1), (4, 6, 2, 3)])
def test_spectrum_of_a_convolution_is_that_of_its_kernel_positions(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    out, into, height, width = shape
    eigs = []
    for i in range(height):
        for j in range(width):
            matrix = np.sqrt(0.5) * weight[:, :, i, j].double().numpy()
            gram = matrix @ matrix.T if out <= into else matrix.T @ matrix
            eigs += np.linalg.eigvalsh(gram).tolist()
    found = spectrum(weight)
    assert found.shape == shape and found.eigs.shape == (height * width * min(out, into),)
    # float32 singular values, squared: relative 1e-6 of the largest
    assert found.eigs.tolist() == pytest.approx(sorted(eigs), abs=2e-6 * max(eigs))


def test_a_1x1_convolution_has_the_alpha_of_its_matrix():
    weight = torch.randn(24, 16, generator=torch.Generator().manual_seed(2))
    matrix, convolution = spectrum(weight), spectrum(weight[:, :, None, None])
    assert torch.allclose(convolution.eigs, matrix.eigs / 2, rtol=1e-5)
    assert alpha_mid(convolution) == pytest.approx(alpha_mid(matrix), rel=1e-5)  # an exponent knows no scale


# ------------------------------------------------------------------------------------------------------ allocation


def test_pointwise_layers_get_their_own_values_by_name():
    # Metrics are measured over three layers a block; were values matched by position, depthwise ones would leak in.
    parts = find_parts(tiny_convnext())
    values = measure("alpha_mid", parts.measured).values
    assert list(values) == [layer.name for layer in parts.measured.layers]
    ratios = ALLOCATIONS["ww"].share(parts.pruned.layers, 0.5, values=values, epsilon=0.2, mapping_type="layer_wise")
    weights = [matrix.weight for matrix in matrices(parts.pruned).values()]
    own = list(map(alpha_mid, map(spectrum, weights)))
    shape = [0.8 + 0.4 * (v - min(own)) / (max(own) - min(own)) for v in own]
    sizes = [weight.numel() for weight in weights]
    scale = 0.5 * sum(sizes) / sum(n * s for n, s in zip(sizes, shape, strict=True))
    assert list(ratios.values()) == pytest.approx([scale * s for s in shape], rel=1e-9)


def test_what_is_cut_off_at_one_is_spread_over_the_others():
    parts = find_parts(tiny_vit())
    values = measure("alpha_mid", parts.measured).values
    ratios = heavy_tailed(parts.pruned.layers, 0.8, values=values, epsilon=0.9, mapping_type="layer_wise")
    sizes = {name: matrix.weight.numel() for name, matrix in matrices(parts.pruned).items()}
    assert max(ratios.values()) == 1
    assert sum(ratios[n] * sizes[n] for n in sizes) == pytest.approx(0.8 * sum(sizes.values()), rel=1e-12)


# ------------------------------------------------------------------------------------------------------ statistics


@makes
@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("size", [1, 4, 11])
def test_statistics_of_dense_predecessors_are_the_models_own(make, statistic, size):
    model = make()
    wanted = exact(model, statistic)  # before the walk prunes it
    found = statistics(model, statistic, "dense", size)
    assert len(found) == len(wanted) and all(map(close, found, wanted))


@makes
def test_statistics_of_pruned_predecessors_are_those_of_the_pruned_model(make):
    dense, model = make(), make()
    found = statistics(model, "squared_norms", "pruned")
    layers = find_parts(model).pruned.layers
    for index in sorted({layer.block for layer in layers}):
        # The block itself was still dense when it was looked at; what lies before it was pruned already.
        mixed = copy.deepcopy(model)
        block, own = (find_parts(which).pruned.modules[index] for which in (mixed, dense))
        block.load_state_dict(own.state_dict())
        wanted = exact(mixed, "squared_norms")
        here = [i for i, layer in enumerate(layers) if layer.block == index]
        assert all(close(found[i], wanted[i]) for i in here)


@makes
def test_dense_and_pruned_predecessors_differ_from_the_second_block_on(make):
    found = {how: statistics(make(), "squared_norms", how) for how in PROPAGATE}
    layers = find_parts(make()).pruned.layers
    first = layers[0].block
    for layer, a, b in zip(layers, found["dense"], found["pruned"], strict=True):
        assert torch.equal(a, b) == (layer.block == first), layer.name


def test_images_are_freed_and_hidden_states_are_kept_on_their_device():
    model = tiny_vit()
    alive, most = [], 0

    def watched():
        nonlocal most
        for batch in IMAGES.split(2):
            batch = batch.clone()
            alive.append(weakref.ref(batch))
            most = max(most, sum(ref() is not None for ref in alive))
            yield batch, None
            del batch

    weights = find_parts(model).pruned
    inputs = block_inputs(weights, watched(), "cpu")
    assert most <= 2 and not any(ref() is not None for ref in alive)  # the one under way, and the one before it
    assert [h.shape for h in inputs.hidden] == [(2, 17, 24)] * 5 + [(1, 17, 24)]
    meta = block_inputs(weights, in_batches(4), "meta")
    assert {h.device.type for h in meta.hidden} == {"meta"}
    assert not model.blocks[0]._forward_pre_hooks


# ------------------------------------------------------------------------------------------------------ masks


def oracle_mask(score: np.ndarray, ratio: float) -> np.ndarray:
    """Return what goes: everything up to the int(n * ratio)-th of the sorted scores."""
    return score <= np.sort(score.ravel())[int(score.size * ratio)]


def test_wanda_compares_within_the_matrix_a_pencil_case():
    weight = torch.tensor([[1.0, -2.0, 3.0, -4.0], [0.1, 0.2, -0.3, 50.0]])
    s = torch.tensor([1e4, 1e2, 1.0, 1e-2])  # norms 100, 10, 1, 0.1: scores 100 20 3 .4 / 10 2 .3 5
    kept = wanda_of_matrix(weight, s, 0.5)  # sorted: .3 .4 2 3 5 10 20 100, the 4th (from 0) is 5
    assert kept.tolist() == [[1.0, -2.0, 0.0, 0.0], [pytest.approx(0.1), 0.0, 0.0, 0.0]]


@makes
@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_masks_of_a_walk(make, method):
    dense, model = make(), make()
    layers = matrices(find_parts(dense).pruned)
    ratios = {name: 0.3 + 0.4 * i / len(layers) for i, name in enumerate(layers)}
    means = statistics(make(), "squared_norms")
    report = prune(model, method, ratios)
    pruned = matrices(find_parts(model).pruned)
    assert list(pruned) == list(layers)
    for (name, before), after, s, row in zip(layers.items(), pruned.values(), means, report, strict=True):
        w = before.weight.detach().flatten(1)
        score = w.abs() * s.sqrt() if method == "wanda" else w.abs()
        gone = oracle_mask(score.numpy(), ratios[name])
        wanted = torch.from_numpy(np.where(gone, 0, w.numpy())).view_as(before.weight)
        assert torch.equal(after.weight, wanted)
        assert (row.name, row.ratio, row.sparsity) == (name, ratios[name], gone.mean())


@pytest.mark.parametrize("method", IMAGE_PRUNERS)
@pytest.mark.parametrize("propagate", PROPAGATE)
def test_every_pruner_prunes_what_it_should_and_nothing_else(method, propagate):
    for make in TINY.values():
        dense, model = make(), make()
        report = prune(model, method, 0.5, propagate)
        touched = {f"{layer.name}.weight" for layer in find_parts(model).pruned.layers}
        for (name, old), new in zip(dense.state_dict().items(), model.state_dict().values(), strict=True):
            assert torch.equal(old, new) == (name not in touched), name
        for row in report:  # a threshold takes one entry more than the share, SparseGPT's one more per 128 columns
            entries = row.shape[0] * row.shape[1]
            assert 0.5 < row.sparsity <= 0.5 + 2 / entries


@pytest.mark.parametrize("method", IMAGE_PRUNERS)
def test_1x1_convolutions_are_pruned_as_the_linear_layers_that_they_are(method):
    one, other = tiny_convnext(), tiny_convnext(conv_mlp=True)
    other.load_state_dict({k: v.view_as(other.state_dict()[k]) for k, v in one.state_dict().items()})
    prune(one, method)
    prune(other, method)
    pairs = zip(*(matrices(find_parts(model).pruned).values() for model in (one, other)), strict=True)
    for a, b in pairs:
        a, b = a.weight, b.weight.flatten(1)
        assert torch.equal(a == 0, b == 0)
        # the order of float32 sums differs between the two; SparseGPT's updates carry that into the weights
        assert torch.allclose(a, b, rtol=0, atol=1e-5 if method in ("sparsegpt", "alps") else 0)


def test_sparsegpt_makes_up_for_what_it_removes():
    # Of one layer on its own calibration inputs: the repaired weights lose less of its output than plain removal does.
    losses = {}
    for method in ("magnitude", "wanda", "sparsegpt"):
        dense, model = tiny_vit(), tiny_vit()
        prune(model, method, 0.7)
        hessian = exact(dense, "hessian")[3].float()
        after, before = (list(matrices(find_parts(which).pruned).values())[3].weight for which in (model, dense))
        error = after - before
        losses[method] = (error @ hessian * error).sum().item()
    assert losses["sparsegpt"] < 0.9 * losses["wanda"] < 0.9 * losses["magnitude"]


def test_sparsity_of_the_whole_is_the_target():
    model = tiny_vit()
    parts = find_parts(model)
    values = measure("alpha_mid", parts.measured).values
    layers = parts.pruned.layers
    prune(model, "wanda", heavy_tailed(layers, 0.6, values=values, epsilon=0.2, mapping_type="layer_wise"))
    weights = torch.cat([matrix.weight.detach().flatten() for matrix in matrices(parts.pruned).values()])
    sparsity = (weights == 0).double().mean().item()
    # int() loses, and <= gains, at most one entry a matrix
    assert abs(sparsity - 0.6) <= len(layers) / len(weights)
    assert parts.pruned.sparsity() == pytest.approx(sparsity, rel=1e-12)
