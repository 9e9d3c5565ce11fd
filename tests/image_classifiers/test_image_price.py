"""Prices of image classifiers against finite differences of the whole model, and runs that search for them."""

import copy
import json
import random

import pytest
import torch
from conftest import fast
from test_image_main import call
from test_image_models import TINY, matrices, some_images, tiny_vit
from test_image_pruning import exact

from image_classifiers import data
from image_classifiers.models import find_parts, save
from image_classifiers.price import EFFORT, FIT, HELD, ImagePrices, split
from lib.allocation.price import BAND, Options, equalise
from lib.core.errors import UserError

IMAGES = some_images(12).double()
GROUPS = list(IMAGES.split(3))
OPTIONS = Options(effort=EFFORT)


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


def some_ratios(weights) -> dict[str, float]:
    draw = random.Random(3)
    return {layer.name: draw.uniform(0.2, 0.8) for layer in weights.layers}


class Oracle:
    """KL of a pruned copy of a model, and ranks within whole matrices, in plain loops in float64."""

    def __init__(self, make) -> None:
        self.model = make().double()
        self.layers = matrices(find_parts(self.model).pruned)
        self.dense = {name: layer.weight.detach().clone() for name, layer in self.layers.items()}
        self.ranks = {}
        for (name, weight), squares in zip(self.dense.items(), exact(self.model, "squared_norms", IMAGES), strict=True):
            score = (weight.flatten(1).abs() * squares.double().sqrt()).flatten().tolist()
            rank = torch.zeros(len(score), dtype=torch.long)
            for place, entry in enumerate(sorted(range(len(score)), key=lambda i: (score[i], i))):
                rank[entry] = place
            self.ranks[name] = rank.view_as(weight)
        self.logits = self._logits(self.dense)

    @torch.no_grad()
    def _logits(self, weights) -> torch.Tensor:
        for name, layer in self.layers.items():
            layer.weight.data = weights[name]
        return torch.log_softmax(self.model(IMAGES), -1)

    def kl(self, weights: dict[str, torch.Tensor], batch: list[int]) -> float:
        each = (self.logits.exp() * (self.logits - self._logits(weights))).sum(-1)
        return torch.cat([each.split(3)[i] for i in batch]).mean().item()

    def masked(self, ratios: dict[str, float]) -> dict[str, torch.Tensor]:
        return {n: w * (self.ranks[n] >= int(w.numel() * ratios[n])) for n, w in self.dense.items()}


@pytest.mark.parametrize("make", fast(TINY.values(), 2))
def test_prices_are_derivatives_along_the_band(make):
    weights, oracle, batch = parts_of(make), Oracle(make), [2, 0]
    ratios = some_ratios(weights)
    mine = ImagePrices(weights, GROUPS, OPTIONS, part=2)  # of 3 images a group: a whole part and a rest
    assert {name: rank.tolist() for name, rank in mine.ranks.items()} == {
        name: [rank.flatten().tolist()] for name, rank in oracle.ranks.items()
    }
    loss, found = mine.prices(ratios, batch)
    masked = oracle.masked(ratios)
    assert loss == pytest.approx(oracle.kl(masked, batch), rel=1e-6)  # KL adds in float64, but for transformed logits
    step = 1e-4
    for name, dense in oracle.dense.items():
        size = dense.numel()
        middle, half = int(size * ratios[name]), max(1, int(BAND / 2 * size))
        low, high = max(0, middle - half), min(size, middle + half)
        band = dense * ((oracle.ranks[name] >= low) & (oracle.ranks[name] < high))
        kls = [oracle.kl(masked | {name: masked[name] - sign * step * band}, batch) for sign in (1, -1)]
        # The error of a central difference is step^2 of a third derivative of order 1, by the width: 1e-7.
        wanted = (kls[0] - kls[1]) / (2 * step) * size / (high - low)
        assert found[name] == pytest.approx(wanted, rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize("make", fast(TINY.values(), 2))
def test_kl_is_that_of_the_pruned_model_and_the_weights_stay_as_they_were(make):
    weights, oracle = parts_of(make), Oracle(make)
    before = {name: (layer.weight, layer.weight.detach().clone()) for name, layer in matrices(weights).items()}
    ratios = some_ratios(weights)
    mine = ImagePrices(weights, GROUPS, OPTIONS)
    assert mine.kl(ratios) == pytest.approx(oracle.kl(oracle.masked(ratios), [0, 1, 2, 3]), rel=1e-9)
    assert mine.kl(dict.fromkeys(ratios, 0.0)) == 0
    mine.prices(ratios, [1])
    for name, layer in matrices(weights).items():
        assert layer.weight is before[name][0] and torch.equal(layer.weight, before[name][1])
        assert layer.weight.grad is None and not layer.weight._post_accumulate_grad_hooks


def test_half_precision_changes_little():
    weights = find_parts(tiny_vit()).pruned
    images = [group.float() for group in GROUPS]
    plain, half = (ImagePrices(weights, images, OPTIONS._replace(dtype=dtype)) for dtype in (None, torch.bfloat16))
    ratios = some_ratios(weights)
    assert half.kl(ratios) == pytest.approx(plain.kl(ratios), rel=0.1)  # 3 digits of logits, whose differences count
    assert half.kl(ratios) != plain.kl(ratios)


def test_renewed_ranks_are_those_of_pruned_predecessors():
    weights = find_parts(tiny_vit()).pruned
    mine = ImagePrices(weights, [group.float() for group in GROUPS], OPTIONS)
    renewed = mine.renewed_ranks(dict.fromkeys(mine.ranks, 0.5))
    first = [layer.name for layer in weights.layers if layer.block == 0]
    assert all(torch.equal(renewed[name], mine.ranks[name]) for name in first)
    assert any(not torch.equal(renewed[name], rank) for name, rank in mine.ranks.items())
    same = mine.renewed_ranks(dict.fromkeys(mine.ranks, 0.0))
    assert all(torch.equal(same[name], rank) for name, rank in mine.ranks.items())


def test_a_search_improves_on_uniform(digits):
    weights = find_parts(copy.deepcopy(digits[0])).pruned
    fit, held = (list(digits[1][part].split(50)) for part in map(list, split(range(600))))
    assert [len(part) for part in (fit, held)] == [FIT, HELD]
    mine = ImagePrices(weights, fit, OPTIONS._replace(steps=8))
    found = equalise(mine, ImagePrices(weights, held, mine.options, mine.ranks), 0.6, None)
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
    save(digits[0], 8, tmp_path / "tiny")
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


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("wanda_price --nsamples 11", "--nsamples 11: the search for prices needs at least 12 different images"),
        ("wanda --price_steps 3", "--price_steps does nothing with wanda; it is for the methods with _price"),
        ("wanda_price --price_start price", "--price_start price:"),
    ],
)
def test_what_cannot_be_is_one_line(flags, said, tmp_path, capsys):
    save(tiny_vit(), 8, tmp_path / "tiny")
    given = f"--model {tmp_path}/tiny --data_set digits --sparsity 0.6 --save_dir {tmp_path}/out --prune_metric {flags}"
    status, err = call(capsys, *given.split())
    assert status == 2 and said in err and len(err.splitlines()) == 1
