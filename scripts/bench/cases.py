"""Cases of the benchmark: what lib computes, beside its plain formulation, on random weights of a LLaMA's shapes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lib.allocation import price_model
from lib.allocation.price import EFFORTS
from lib.calibration.hidden import enter_blocks
from lib.calibration.statistics import STATISTICS, as_float32
from lib.core.lazy import torch, transformers
from lib.models.weights import weights_of
from lib.pruning.plan import SparsityPlan
from lib.pruning.pruners import PRUNERS, VARIANTS, Pruner
from lib.pruning.walk import walk
from lib.spectra.spectrum import DRIVERS, spectrum
from lib.spectra.tail import fit_tail
from scripts.bench import plain

RATIO = 0.5
NM = (2, 4)


class Sizes(NamedTuple):
    """A LLaMA of ``blocks`` blocks, or the ``experts`` of a mixture's block, and ``samples`` windows of ``tokens``."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    tokens: int
    blocks: int = 2
    samples: int = 8
    experts: int = 4

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Return the shapes [out, in] of a block's matrices, each once."""
        return [(self.hidden, self.hidden), (self.intermediate, self.hidden), (self.hidden, self.intermediate)]


SIZES = {
    "smollm2-135m": Sizes(576, 1536, 9, 3, 49152, tokens=512),
    "llama-7b": Sizes(4096, 11008, 32, 32, 32000, tokens=2048),
    "olmoe-1b-7b": Sizes(2048, 1024, 16, 16, 50304, tokens=2048),
    "qwen3-30b-a3b": Sizes(2048, 768, 32, 4, 151936, tokens=2048),
}


class Case(NamedTuple):
    """A case to time: ``ours`` and ``plain`` give the same result, to the extent measured by ``alike`` (a share).

    Untimed, ``reset`` prepares for each call and ``read`` extracts from its result the values to compare.
    ``flops``: the operations of the plain formulation's products.
    """

    name: str
    ours: Callable[[], Any]
    plain: Callable[[], Any] | None = None
    alike: Callable[[Any, Any], float] | None = None
    reset: Callable[[], Any] = lambda: None
    read: Callable[[Any], Any] = lambda result: result
    flops: float | None = None


def same_zeros(one: torch.Tensor, two: torch.Tensor) -> float:
    """Return the share of entries that are zero in both or in neither."""
    return ((one == 0) == (two == 0)).float().mean().item()


def same_numbers(one: torch.Tensor | float, two: torch.Tensor | float) -> float:
    """Return the share of entries within a hundredth of each other, or within a millionth of the largest."""
    one, two = (torch.as_tensor(numbers, dtype=torch.float64, device="cpu") for numbers in (one, two))
    return torch.isclose(one, two, rtol=1e-2, atol=1e-6 * two.abs().max().item()).double().mean().item()


def random_weight(shape: tuple[int, int], device: torch.device) -> torch.Tensor:
    """Return a float16 matrix with heavy-tailed rows, as far as random numbers go."""
    return (0.02 * torch.randn(shape, device=device) / torch.rand(shape[0], 1, device=device).sqrt().clamp_(0.1)).half()


def random_llama(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> transformers.LlamaForCausalLM:
    """Return a random LLaMA, always the same on a given device."""
    config = transformers.LlamaConfig(
        vocab_size=sizes.vocabulary, hidden_size=sizes.hidden, intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.blocks, num_attention_heads=sizes.heads, num_key_value_heads=sizes.kv_heads,
        max_position_embeddings=sizes.tokens,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        return transformers.LlamaForCausalLM(config).to(dtype).eval()


def metrics(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """Yield a case for each driver and shape, and one for the fit over all candidates."""
    for shape in sizes.shapes[:2]:
        weight = random_weight(shape, device)
        for driver in DRIVERS:
            name, ours = f"spectrum, {driver}, {shape[0]}x{shape[1]}", partial(spectrum, weight, driver)
            slow = partial(plain.spectrum, weight)
            yield Case(name, ours, slow, same_numbers, read=lambda result: getattr(result, "eigs", result))

    count = sizes.hidden
    eigs = spectrum(random_weight(sizes.shapes[0], device), "exact").eigs  # on the CPU, where fits are computed
    ours, slow = partial(fit_tail, eigs, torch.arange(count - 1)), partial(plain.best_fit, eigs, range(count - 1))
    # Both must start the tail at the same eigenvalue.
    yield Case(f"alpha, all of {count} candidates", ours, slow, lambda one, two: float(one.index == two[0]))


def statistics(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """Yield a case for each statistic, on two samples of the widest layer's input."""
    samples = [torch.randn(sizes.tokens, sizes.intermediate, device=device).half() for _ in range(2)]

    def ours(name: str) -> torch.Tensor:
        total = None
        for x in samples:
            total = STATISTICS[name](x, total)
        return as_float32(total.div_(len(samples)))

    def slow(name: str) -> torch.Tensor:
        mean = None
        for seen, x in enumerate(samples):
            mean = getattr(plain, name)(x, mean, seen)
        return mean

    for name in STATISTICS:
        title = f"{name} of {len(samples)} x {sizes.tokens} tokens, {sizes.intermediate} columns"
        flops = 2 * len(samples) * sizes.tokens * sizes.intermediate**2 if name == "hessian" else None
        yield Case(title, partial(ours, name), partial(slow, name), same_numbers, flops=flops)


def pruners(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """Yield a case for each pruner, variant and N:M, on the widest layer, with the statistic already computed."""
    weight = random_weight(sizes.shapes[2], device)
    x = torch.randn(2 * weight.shape[1], weight.shape[1], device=device)  # enough for a Hessian of full rank
    statistic = {name: as_float32(add(x, None)) for name, add in STATISTICS.items()}
    del x

    def ours(pruner: Pruner, nm: tuple[int, int] | None) -> torch.Tensor:
        needed = statistic.get(pruner.statistic)
        prepared = pruner.prepare(None if needed is None else needed.clone())  # prepare() uses it up
        return pruner.prune(weight, prepared, RATIO, nm)

    shape = f"{weight.shape[0]}x{weight.shape[1]}"
    for name, pruner in PRUNERS.items():
        for nm in (None, NM):
            slow = None
            if name in plain.METHODS:
                slow = partial(plain.METHODS[name].prune, weight, statistic.get(pruner.statistic), RATIO, nm)
            title = f"{name}, {f'{nm[0]}:{nm[1]}' if nm else RATIO}, {shape}"
            yield Case(title, partial(ours, pruner, nm), slow, same_zeros if slow else None)
    for name, pruner in VARIANTS.items():
        yield Case(f"{name}, variant, {shape}", partial(ours, pruner, None))


def experts(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """Yield a case for each calibrated pruner on the experts of a block, statistics of their tokens included."""
    groups = []  # of matrices that share an input: gate and up, down
    for _ in range(sizes.experts):
        for shapes in (sizes.shapes[1:2] * 2, sizes.shapes[2:]):
            columns = shapes[0][1]
            x = torch.randn(2 * columns, columns, device=device)  # enough for a Hessian of full rank
            groups.append((x, [random_weight(shape, device) for shape in shapes]))

    def ours(pruner: Pruner) -> torch.Tensor:
        pruned = []
        for x, weights in groups:
            prepared = pruner.prepare(as_float32(STATISTICS[pruner.statistic](x, None)))
            pruned += [pruner.prune(weight, prepared, RATIO, None).flatten() for weight in weights]
        return torch.cat(pruned)

    def slow(method: plain.Method) -> torch.Tensor:
        pairs = [(x, weight) for x, weights in groups for weight in weights]
        return torch.cat([method.prune(w, method.statistic(x, None, 0), RATIO, None).flatten() for x, w in pairs])

    for name in ("wanda", "sparsegpt"):
        title = f"{name}, {sizes.experts} experts of {sizes.intermediate}x{sizes.hidden}"
        yield Case(title, partial(ours, PRUNERS[name]), partial(slow, plain.METHODS[name]), same_zeros)


def prices(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """Yield a case for the ranks of the widest matrix, and one for the prices of a search's step, in float32."""
    score = random_weight(sizes.shapes[2], device).float().abs()
    name = f"ranks, {score.shape[0]}x{score.shape[1]}"
    yield Case(name, partial(price_model.row_ranks, score), partial(plain.row_ranks, score), same_numbers)

    model, effort = random_llama(sizes, device, torch.float32), EFFORTS["full"]
    windows = torch.randint(sizes.vocabulary, (effort.windows_per_step, sizes.tokens)).to(device)
    searched = price_model.LanguagePriceModel(weights_of(model), (windows, windows), effort)
    ranks = searched.masks.ranks
    ratios = dict.fromkeys(ranks, RATIO)

    yield Case(
        f"prices, {sizes.blocks} blocks, {len(windows)} x {sizes.tokens} tokens",
        lambda: searched.prices(ratios, range(len(windows)))[1],
        partial(plain.prices, model, windows, ranks, ratios, effort.token_stride, price_model.BAND),
        same_numbers,
        read=lambda by_layer: torch.tensor([by_layer[layer] for layer in ranks]),
    )


def walks(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """Yield a case for each pruner: the whole walk over a few blocks, including calibration."""
    # Models are pruned in float16 on a GPU; a CPU multiplies in float32.
    model = random_llama(sizes, device, torch.float16 if device.type == "cuda" else torch.float32)
    weights = weights_of(model)
    dense = weights.snapshot()
    windows = torch.randint(sizes.vocabulary, (sizes.samples, sizes.tokens)).to(device)
    plan = SparsityPlan(RATIO, {layer.name: RATIO for layer in weights.layers})

    def ours(pruner: Pruner) -> None:
        walk(weights, plan, pruner, enter_blocks(weights, windows) if pruner.statistic else None)

    def kept(_: None) -> torch.Tensor:
        # Differences of rounding grow from block to block: the first two show whether the methods are the same.
        names = [layer.name for layer in weights.layers if layer.block < 2]
        return torch.cat([(model.get_submodule(name).weight != 0).flatten().cpu() for name in names])

    multiplied = 4 * sizes.samples * sizes.tokens * sum(layer.size for layer in weights.layers)  # in two passes
    for name, pruner in PRUNERS.items():
        slow = partial(plain.walk, model, windows, plain.METHODS[name], RATIO) if name in plain.METHODS else None
        flops = multiplied if name == "wanda" else None  # the others do more than multiply
        title = f"walk, {name}, {sizes.blocks} blocks, {sizes.samples} x {sizes.tokens} tokens"
        reset = partial(weights.restore, dense)
        yield Case(title, partial(ours, pruner), slow, same_zeros if slow else None, reset, kept, flops)


# Each yields its cases for a model's sizes on a device; --parts selects them by name.
PARTS: dict[str, Callable[[Sizes, torch.device], Iterator[Case]]] = {
    "metrics": metrics,
    "statistics": statistics,
    "pruners": pruners,
    "experts": experts,
    "price": prices,
    "walk": walks,
}
