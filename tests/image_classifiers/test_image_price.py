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
from lib.allocation.price import SearchOptions, search
from lib.core.errors import UserError

pytestmark = pytest.mark.machine

IMAGES = some_images(12).double()
GROUPS = list(IMAGES.split(3))


def parts_of(make):
    return find_parts(make().double()).pruned


@pytest.fixture(scope="module")
def digits():
    """Return a ViT that has learnt some digits, and the digits."""
    images = data.digits(None, None, train=True)
    prepared = data.Prepared(images, range(600), data.evaluation_transform(8, None, data.MEAN_STD[True]))
    (found,) = data.batches(prepared, 600, 0)
    pixels, labels = found
    model = tiny_vit().train()
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(60):
        part = slice(step % 9 * 64, step % 9 * 64 + 64)
        torch.nn.functional.cross_entropy(model(pixels[part]), labels[part]).backward()
        optimiser.step()
        optimiser.zero_grad()
    return model.eval(), pixels


class Oracle(PriceOracle):
    """KL of a pruned copy of a model in float64; weights compete within whole matrices."""

    def __init__(self, make) -> None:
        self.model = make().double()
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


@pytest.mark.parametrize("make", fast(TINY.values(), 2))
def test_prices_are_derivatives_along_the_band(make):
    weights, oracle, batch = parts_of(make), Oracle(make), [2, 0]
    ratios = some_ratios(weights)
    model = ImagePriceModel(weights, (GROUPS, GROUPS), chunk=2)  # of 3 images a group: a whole chunk and a rest
    assert all(torch.equal(model.masks.ranks[name].long(), rank) for name, rank in oracle.ranks.items())
    loss, found = model.prices(ratios, batch)
    # KL adds in float64, but for transformed logits.
    assert loss == pytest.approx(oracle.kl(oracle.masked(ratios), batch), rel=1e-6)
    for name in oracle.dense:
        assert found[name] == pytest.approx(oracle.price(name, ratios, batch), rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize("make", fast(TINY.values(), 2))
def test_kl_is_that_of_the_pruned_model_and_the_weights_stay_as_they_were(make):
    weights, oracle = parts_of(make), Oracle(make)
    before = {name: (layer.weight, layer.weight.detach().clone()) for name, layer in matrices(weights).items()}
    ratios = some_ratios(weights)
    model = ImagePriceModel(weights, (GROUPS, GROUPS))
    assert model.kl(ratios) == pytest.approx(oracle.kl(oracle.masked(ratios), [0, 1, 2, 3]), rel=1e-9)
    assert model.kl(dict.fromkeys(ratios, 0.0)) == 0
    model.prices(ratios, [1])
    for name, layer in matrices(weights).items():
        assert layer.weight is before[name][0] and torch.equal(layer.weight, before[name][1])
        assert layer.weight.grad is None and not layer.weight._post_accumulate_grad_hooks


def test_half_precision_changes_little():
    weights = find_parts(tiny_vit()).pruned
    images = [group.float() for group in GROUPS]
    plain, half = (ImagePriceModel(weights, (images, images), dtype) for dtype in (None, torch.bfloat16))
    ratios = some_ratios(weights)
    assert half.kl(ratios) == pytest.approx(plain.kl(ratios), rel=0.1)  # 3 digits of logits, whose differences count
    assert half.kl(ratios) != plain.kl(ratios)


def test_renewed_ranks_are_those_of_pruned_predecessors():
    weights = find_parts(tiny_vit()).pruned
    images = [group.float() for group in GROUPS]
    model = ImagePriceModel(weights, (images, images))
    dense = dict(model.masks.ranks)
    model.renew(dict.fromkeys(dense, 0.5))
    first = [layer.name for layer in weights.layers if layer.block == 0]
    assert all(torch.equal(model.masks.ranks[name], dense[name]) for name in first)
    assert any(not torch.equal(model.masks.ranks[name], rank) for name, rank in dense.items())
    model.renew(dict.fromkeys(dense, 0.0))
    assert all(torch.equal(model.masks.ranks[name], rank) for name, rank in dense.items())


def test_a_search_improves_on_uniform(digits):
    weights = find_parts(copy.deepcopy(digits[0])).pruned
    fit, held = (list(digits[1][part].split(50)) for part in map(list, split(range(600))))
    assert [len(part) for part in (fit, held)] == [FIT, HELD]
    found = search(ImagePriceModel(weights, (fit, held)), weights.layers, 0.6, None, SearchOptions(8, effort=EFFORT))
    sizes = {layer.name: layer.size for layer in weights.layers}
    mean = sum(sizes[name] * ratio for name, ratio in found.ratios.items()) / sum(sizes.values())
    assert mean == pytest.approx(0.6, abs=1e-9)
    assert found.kept == "end" and found.held["end"] < 0.9 * found.held["uniform"]


@pytest.mark.parametrize("count", [12, 23, 24, 5000])
def test_parts_are_of_whole_groups_and_share_no_image(count):
    fit, held = split(range(count))
    size = min(count // 12, 256)
    assert (len(fit), len(held)) == (FIT * size, HELD * size) and set(fit).isdisjoint(held)


def test_images_drawn_twice_are_in_one_part():
    drawn = torch.randint(100, (240,), generator=torch.Generator().manual_seed(0)).tolist()
    fit, held = split(drawn)
    assert set(fit).isdisjoint(held) and len(held) % HELD == len(fit) % FIT == 0 < len(held)
    with pytest.raises(UserError, match="at least 12 different images"):
        split([5] * 100)


# ---------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize(
    "more", fast(["wanda_price", "magnitude_price --price_start ww", "sparsegpt_price --price_refresh 1"], 2)
)
def test_a_run_records_its_search(more, digits, tmp_path, capsys):
    save_classifier(digits[0], 8, tmp_path / "tiny")
    method = more.split()[0]
    flags = f"--model {tmp_path}/tiny --data_set digits --prune_metric {more} --sparsity 0.6 --price_steps 3"
    flags += f" --nsamples 50 --num_workers 0 --save_dir {tmp_path}/out --price_dtype float32"
    flags += f" --metric_cache {tmp_path}/cache" if "ww" in more else ""
    assert call(capsys, *flags.split())[0] == 0
    record = json.loads((tmp_path / f"out/run_{method}_sparsity_0.6.json").read_text())
    search = record["price_search"]
    assert search["dtype"] == "float32"
    among = ["before refresh", "refreshed"] if "refresh" in more else search["held_out_kl"]  # of the same ranks
    assert search["kept"] == min(among, key=search["held_out_kl"].get)
    assert len(search["steps"]) == 3 + ("refresh" in more) and ("start" in search["held_out_kl"]) == ("start" in more)
    assert record["calibration"] == 50 and record["sparsity"] == pytest.approx(0.6, abs=5e-3)
    assert (tmp_path / f"out/price_{method}_sparsity_0.6.png").stat().st_size > 1000
    rows = [line.split("\t") for line in (tmp_path / f"out/layers_{method}_sparsity_0.6.tsv").read_text().splitlines()]
    assert len({row[3] for row in rows[1:]}) > 2


def test_too_few_images_are_refused(tmp_path, capsys):
    save_classifier(tiny_vit(), 8, tmp_path / "tiny")
    flags = f"--model {tmp_path}/tiny --data_set digits --sparsity 0.6 --save_dir {tmp_path}/out --nsamples 11"
    status, err = call(capsys, *flags.split(), "--prune_metric", "wanda_price")
    assert status == 2 and "--nsamples 11: the search for prices needs at least 12 different images" in err
