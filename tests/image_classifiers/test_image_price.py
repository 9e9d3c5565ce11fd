"""Prices of image classifiers against finite differences of the whole model, and runs that search for them."""

import copy
import json

import pytest
import torch
from conftest import fast
from test_image_main import call
from test_image_models import TINY, matrices, some_images, tiny_vit
from test_image_pruning import exact
from test_price_model import PriceOracle, some_ratios

from image_classifiers import data
from image_classifiers.models import find_parts, save_classifier
from image_classifiers.price import EFFORT, FIT, HELD, ImagePriceModel, split
from lib.allocation.price import search
from lib.core.errors import UserError

pytestmark = pytest.mark.machine

IMAGES = some_images(12).double()
GROUPS = list(IMAGES.split(3))


@pytest.fixture(scope="module")
def digits():
    """Return a ViT that has learnt some digits, and the digits."""
    images = data.digits(None, None, train=True)
    prepared = data.PreparedImages(images, range(600), data.evaluation_transform(8, None, data.MEAN_STD[True]))
    ((pixels, labels),) = data.batches(prepared, 600, 0)
    model = tiny_vit().train()
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(60):
        batch = slice(step % 9 * 64, step % 9 * 64 + 64)
        torch.nn.functional.cross_entropy(model(pixels[batch]), labels[batch]).backward()
        optimiser.step()
        optimiser.zero_grad()
    return model.eval(), pixels


@pytest.fixture(scope="module", params=fast(TINY.values(), 2))
def oracle(request):
    """Return the oracle of each tiny model in turn, which also makes that model in float64."""
    return Oracle(request.param)


class Oracle(PriceOracle):
    """KL of a pruned copy of a model in float64; weights compete within whole matrices."""

    def __init__(self, make) -> None:
        self.make, self.model = make, make().double()
        self.layers = matrices(find_parts(self.model).pruned)
        dense = {name: layer.weight.detach().clone() for name, layer in self.layers.items()}
        squares = dict(zip(dense, exact(self.model, "squared_norms", IMAGES), strict=True))
        scores = {name: weight.flatten(1).abs() * squares[name].double().sqrt() for name, weight in dense.items()}
        super().__init__(dense, {name: [score.flatten().tolist()] for name, score in scores.items()})
        self.logits = self._logits(dense)

    @torch.no_grad()
    def _logits(self, weights) -> torch.Tensor:
        for name, layer in self.layers.items():
            layer.weight.data = weights[name]
        return torch.log_softmax(self.model(IMAGES), -1)

    def kl(self, weights: dict[str, torch.Tensor], batch: list[int]) -> float:
        each = (self.logits.exp() * (self.logits - self._logits(weights))).sum(-1)
        return torch.cat([each.split(3)[i] for i in batch]).mean().item()


def test_prices_are_derivatives_along_the_band(oracle):
    weights, batch = find_parts(oracle.make().double()).pruned, [2, 0]
    before = {name: (layer.weight, layer.weight.detach().clone()) for name, layer in matrices(weights).items()}
    ratios = some_ratios(weights)
    model = ImagePriceModel(weights, (GROUPS, GROUPS), chunk=2)  # of 3 images a group: a whole chunk and a rest
    assert all(torch.equal(model.masks.ranks[name].long(), rank) for name, rank in oracle.ranks.items())
    loss, prices = model.prices(ratios, batch)
    # KL adds in float64, but for transformed logits.
    assert loss == pytest.approx(oracle.kl(oracle.masked(ratios), batch), rel=1e-6)
    for name in oracle.dense:
        assert prices[name] == pytest.approx(oracle.price(name, ratios, batch), rel=1e-5, abs=1e-7), name
    for name, layer in matrices(weights).items():  # the weights stay as they were
        assert layer.weight is before[name][0] and torch.equal(layer.weight, before[name][1])
        assert layer.weight.grad is None and not layer.weight._post_accumulate_grad_hooks


def test_kl_is_that_of_the_pruned_model(oracle):
    weights = find_parts(oracle.make().double()).pruned
    ratios, model = some_ratios(weights), ImagePriceModel(weights, (GROUPS, GROUPS))
    assert model.kl(ratios) == pytest.approx(oracle.kl(oracle.masked(ratios), [0, 1, 2, 3]), rel=1e-9)
    assert model.kl(dict.fromkeys(ratios, 0.0)) == 0


def test_half_precision_changes_little():
    weights, images = find_parts(tiny_vit()).pruned, [group.float() for group in GROUPS]
    plain, half = (ImagePriceModel(weights, (images, images), dtype) for dtype in (None, torch.bfloat16))
    ratios = some_ratios(weights)
    assert half.kl(ratios) == pytest.approx(plain.kl(ratios), rel=0.1)  # 3 digits of logits, whose differences count
    assert half.kl(ratios) != plain.kl(ratios)


def test_a_search_improves_on_uniform(digits):
    weights = find_parts(copy.deepcopy(digits[0])).pruned
    groups = tuple(list(digits[1][indices].split(50)) for indices in map(list, split(range(600))))
    assert [len(group) for group in groups] == [FIT, HELD]
    result = search(ImagePriceModel(weights, groups), weights.layers, 0.6, EFFORT._replace(steps=8))
    assert result.kept == "end" and result.held["end"] < 0.9 * result.held["uniform"]


def test_groups_are_whole_and_share_no_image():
    drawn = torch.randint(100, (240,), generator=torch.Generator().manual_seed(0)).tolist()  # some of them twice
    for images, size in ((range(12), 1), (range(23), 1), (range(24), 2), (range(5000), 256), (drawn, None)):
        fit, held = split(images)
        assert set(fit).isdisjoint(held) and len(fit) // FIT == len(held) // HELD == (size or len(fit) // FIT) > 0
        assert len(fit) % FIT == len(held) % HELD == 0
    with pytest.raises(UserError, match="at least 12 different images"):
        split([5] * 100)


# ---------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("method", fast(["wanda_price", "magnitude_price", "sparsegpt_price"], 2))
def test_a_run_records_its_search(method, digits, tmp_path, capsys, machine):
    machine("plain")
    save_classifier(digits[0], 8, tmp_path / "tiny")
    run = f"{method}_sparsity_0.6"
    flags = f"--model {tmp_path}/tiny --data_set digits --prune_metric {method} --sparsity 0.6 --price_steps 3"
    flags += f" --nsamples 50 --num_workers 0 --save_dir {tmp_path}/out"
    assert call(capsys, flags)[0] == 0
    record = json.loads((tmp_path / f"out/run_{run}.json").read_text())
    recorded = record["price_search"]
    assert recorded["dtype"] == "float32"
    assert recorded["kept"] == min(recorded["held_out_kl"], key=recorded["held_out_kl"].get)
    assert len(recorded["steps"]) == 3
    assert record["calibration"] == 50 and record["sparsity"] == pytest.approx(0.6, abs=5e-3)
    assert (tmp_path / f"out/price_{run}.png").stat().st_size > 1000
    rows = [line.split("\t") for line in (tmp_path / f"out/layers_{run}.tsv").read_text().splitlines()]
    assert len({row[3] for row in rows[1:]}) > 2
