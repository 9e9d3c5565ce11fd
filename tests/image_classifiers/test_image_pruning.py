"""Image classifiers: spectra, statistics, the walk with dense and pruned predecessors, and masks."""

import copy
import weakref

import numpy as np
import pytest
import torch
from test_image_models import TINY, matrices, some_images, tiny_convnext, tiny_vit

from image_classifiers.models import IMAGE_PRUNERS, block_inputs, find_parts, wanda_of_matrix
from lib.allocation.formulas import uniform
from lib.calibration.statistics import STATISTICS
from lib.pruning.plan import SparsityPlan
from lib.pruning.pruners import Pruner
from lib.pruning.walk import walk
from lib.spectra.spectrum import spectrum
from lib.spectra.tail import alpha_mid

IMAGES = some_images(11)
makes = pytest.mark.parametrize("make", TINY.values(), ids=TINY)


def in_batches(size: int, images: torch.Tensor = IMAGES):
    """Yield ``images`` with labels that nobody reads."""
    for batch in images.split(size):
        yield batch, torch.zeros(len(batch), dtype=torch.long)


def prune(model, pruner: Pruner, ratios: dict | float = 0.5, propagate: str = "dense", size: int = 4):
    weights = find_parts(model).pruned
    ratios = uniform(weights.layers, ratios) if isinstance(ratios, float) else ratios
    inputs = block_inputs(weights, in_batches(size), None) if pruner.statistic else None
    return walk(weights, SparsityPlan(0.5, ratios), pruner, inputs, None, propagate)


def statistics(model, statistic: str, propagate: str = "dense", size: int = 4) -> list[torch.Tensor]:
    """Return the statistic of every pruned layer as the walk hands it to the pruner, which zeroes half of W."""
    seen = []

    def note(weight, prepared, ratio, nm):
        seen.append(prepared.clone())
        return IMAGE_PRUNERS["magnitude"].prune(weight, None, ratio, nm)

    prune(model, Pruner(note, statistic), 0.5, propagate, size)
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


# ------------------------------------------------------------------------------------------------------ statistics


@makes
@pytest.mark.parametrize(("statistic", "size"), [*((name, 4) for name in STATISTICS), ("squared_norms", 11)])
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


def test_images_are_freed_and_hidden_states_are_kept_on_their_device():
    weights = find_parts(tiny_vit()).pruned
    alive, numbers = [], []

    def watched():
        for images, labels in in_batches(2):
            images = images.clone()
            alive.append(weakref.ref(images))
            numbers.append(sum(ref() is not None for ref in alive))
            yield images, labels

    inputs = block_inputs(weights, watched(), "cpu")
    assert max(numbers) <= 2 and all(ref() is None for ref in alive)  # the one under way, and the one before it
    assert [h.shape for h in inputs.hidden] == [(2, 17, 24)] * 5 + [(1, 17, 24)]
    assert {h.device.type for h in block_inputs(weights, in_batches(4), "meta").hidden} == {"meta"}
    assert not weights.modules[0]._forward_pre_hooks


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
    report = prune(model, IMAGE_PRUNERS[method], ratios)
    pruned = matrices(find_parts(model).pruned)
    assert list(pruned) == list(layers)
    for (name, before), after, s, row in zip(layers.items(), pruned.values(), means, report, strict=True):
        w = before.weight.detach().flatten(1)
        score = w.abs() * s.sqrt() if method == "wanda" else w.abs()
        gone = oracle_mask(score.numpy(), ratios[name])
        wanted = torch.from_numpy(np.where(gone, 0, w.numpy())).view_as(before.weight)
        assert torch.equal(after.weight, wanted)
        assert (row.name, row.ratio, row.sparsity) == (name, ratios[name], gone.mean())


@pytest.mark.parametrize(("method", "propagate"), [*((name, "dense") for name in IMAGE_PRUNERS), ("wanda", "pruned")])
@makes
def test_every_pruner_prunes_what_it_should_and_nothing_else(make, method, propagate):
    dense, model = make(), make()
    report = prune(model, IMAGE_PRUNERS[method], 0.5, propagate)
    touched = {f"{layer.name}.weight" for layer in find_parts(model).pruned.layers}
    for (name, old), new in zip(dense.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(old, new) == (name not in touched), name
    for row in report:  # a threshold takes one entry more than the share, SparseGPT's one more per 128 columns
        assert 0.5 < row.sparsity <= 0.5 + 2 / (row.shape[0] * row.shape[1])


@pytest.mark.parametrize("method", IMAGE_PRUNERS)
def test_1x1_convolutions_are_pruned_as_the_linear_layers_that_they_are(method):
    linear, convolution = tiny_convnext(), tiny_convnext(conv_mlp=True)
    weights = convolution.state_dict()
    convolution.load_state_dict({name: w.view_as(weights[name]) for name, w in linear.state_dict().items()})
    for model in (linear, convolution):
        prune(model, IMAGE_PRUNERS[method])
    pairs = zip(*(matrices(find_parts(model).pruned).values() for model in (linear, convolution)), strict=True)
    for a, b in pairs:
        a, b = a.weight, b.weight.flatten(1)
        assert torch.equal(a == 0, b == 0)
        # the order of float32 sums differs between the two; SparseGPT's updates carry that into the weights
        assert torch.allclose(a, b, rtol=0, atol=1e-5 if method in ("sparsegpt", "alps") else 0)
