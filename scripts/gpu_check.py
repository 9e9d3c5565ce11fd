"""GPU check: every method timed on random LLaMA-7B blocks against plain formulations; bash scripts/gpu_check.sh"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import plain_methods
import torch
from bench_metrics import plain_fit, plain_spectrum
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lib.allocation import block_scores as scores
from lib.calibration.hidden import enter_blocks
from lib.calibration.statistics import STATISTICS, completed
from lib.models.weights import weights_of
from lib.pruning.plan import SparsityPlan
from lib.pruning.pruners import PRUNERS, VARIANTS, Pruner
from lib.pruning.walk import walk
from lib.spectra.measure import InFlight
from lib.spectra.spectrum import DRIVERS, spectrum
from lib.spectra.tail import alpha_mid, fit_tail

RATIO, NM = 0.5, (2, 4)
BLOCKS, SAMPLES = 32, 128  # of a LLaMA-7B, and of the published calibration
# TFLOP/s of dense products of halves with float32 sums, as the manufacturer gives them, by a part of the card's name.
PEAKS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312, "L40S": 362, "RTX 4090": 165, "RTX 3090": 71}
MATRICES = 6  # in flight, of which lib.metrics takes some at a time
LEAST_AGREEMENT = 0.98  # of zeros or numbers: float32 rounds otherwise in another order, near thresholds and near zero


class Sizes(NamedTuple):
    """A LLaMA of ``blocks`` blocks, and ``samples`` windows of ``tokens`` tokens; the defaults are LLaMA-7B's."""

    hidden: int = 4096
    intermediate: int = 11008
    heads: int = 32
    vocabulary: int = 32000
    blocks: int = 2
    samples: int = 8
    tokens: int = 2048

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Return the shapes [out, in] of a block's matrices, each once."""
        return [(self.hidden, self.hidden), (self.intermediate, self.hidden), (self.hidden, self.intermediate)]


class Case(NamedTuple):
    """A case to time: ``ours`` and ``plain`` give the same result, to the extent measured by ``alike`` (a share).

    Untimed, ``reset`` prepares for each call and ``read`` extracts from its result the values to compare.
    ``flops``: the operations of the plain formulation's products.
    """

    what: str
    ours: Callable[[], object]
    plain: Callable[[], object] | None = None
    alike: Callable[[object, object], float] | None = None
    reset: Callable[[], object] = lambda: None
    read: Callable[[object], object] = lambda result: result
    flops: float | None = None


class Cost(NamedTuple):
    """The minimum ``seconds`` of several calls, and the most additional memory that a call used (``gib``)."""

    seconds: float
    gib: float | None


class Row(NamedTuple):
    """The cost of a case; ``agree`` is the share of results that are alike, ``flops`` the case's."""

    what: str
    ours: Cost
    plain: Cost | None
    agree: float | None
    flops: float | None = None


class Disagreement(Exception):
    """A method and its plain formulation give different results."""


# ------------------------------------------------------------------------------------------------------- measuring


def measure(function: Callable[[], object], device: torch.device) -> tuple[object, Cost]:
    """Return the result of ``function`` and the cost of this call; memory only on a CUDA device."""
    cuda = device.type == "cuda"
    if cuda:
        torch.zeros(1, device=device)  # before CUDA is initialised, the counters cannot be reset
        torch.cuda.empty_cache()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    start = time.perf_counter()
    result = function()
    if cuda:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    return result, Cost(seconds, (torch.cuda.max_memory_allocated(device) - before) / 2**30 if cuda else None)


def compare(case: Case, device: torch.device, rounds: int) -> Row:
    """Return the row of ``case``: ours and plain take turns ``rounds`` times, after a first turn that is compared.

    Raises:
        Disagreement: less than LEAST_AGREEMENT of the results are alike.
    """
    functions = [case.ours] if case.plain is None else [case.ours, case.plain]
    results, costs = [], [[] for _ in functions]
    for turn in range(rounds + 1):
        for function, into in zip(functions, costs, strict=True):
            case.reset()
            result, cost = measure(function, device)
            if turn:
                into.append(cost)
            elif case.plain is not None:
                results.append(case.read(result))
            del result  # before the next call: its memory is not that call's
        if results:
            agree = case.alike(*results)
            if not agree >= LEAST_AGREEMENT:
                what = f"only {agree:.4f} of the result is that of the plain formulation"
                raise Disagreement(f"{case.what}: {what}")
            results.clear()
    ours, *plain = [Cost(min(c.seconds for c in cost), max((c.gib for c in cost), key=_or_zero)) for cost in costs]
    return Row(case.what, ours, *(plain[0], agree) if plain else (None, None), case.flops)


def _or_zero(gib: float | None) -> float:
    return gib or 0.0


def same_zeros(one: Tensor, other: Tensor) -> float:
    """Return the share of entries that are zero in both or in neither."""
    return ((one == 0) == (other == 0)).float().mean().item()


def same_numbers(one: Tensor | float, other: Tensor | float) -> float:
    """Return the share of entries within a hundredth of each other, or within a millionth of the largest."""
    one, other = (torch.as_tensor(numbers, dtype=torch.float64) for numbers in (one, other))
    return torch.isclose(one, other, rtol=1e-2, atol=1e-6 * other.abs().max().item()).double().mean().item()


def same_fit(one: tuple, other: tuple) -> float:
    """Return whether two fits start their tails at the same eigenvalue, as 1 or 0."""
    return float(one[0] == other[0])


def table(rows: list[Row], peak: float | None = None) -> str:
    """Return a Markdown table; ``peak``: the card's TFLOP/s in half precision, None if unknown."""
    headings = "what | seconds | GiB | TFLOP/s | of peak | plain seconds | plain GiB | plain / ours | alike"
    lines = [f"| {headings} |", "|---|" + "---:|" * 8]
    for row in rows:
        rate = None if row.flops is None else row.flops / row.ours.seconds / 1e12
        cells = [_number(row.ours.seconds, ".4f"), _number(row.ours.gib, ".2f"), _number(rate, ".1f")]
        cells.append(_number(None if rate is None or peak is None else rate / peak, ".1%"))
        if row.plain is None:
            cells += ["-"] * 4
        else:
            cells += [_number(row.plain.seconds, ".4f"), _number(row.plain.gib, ".2f")]
            cells += [f"{row.plain.seconds / row.ours.seconds:.1f}", _number(row.agree, ".4f")]
        lines.append(f"| {row.what} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def whole_run(short: float, long: float, samples: int, blocks: int, passes: int) -> float:
    """Return the seconds of a whole run, BLOCKS blocks with SAMPLES windows, from those of two walks over ``blocks``.

    Args:
        short: seconds with ``samples`` windows; the ``long`` walk had twice as many.
        passes: of each window through a block, in these walks: ours skips the last block's second one.
    """
    per_pass = (long - short) / samples / passes
    per_block = (2 * short - long) / blocks
    left_out = 2 * blocks - passes
    return BLOCKS * per_block + SAMPLES * (2 * BLOCKS - left_out) * per_pass


def whole_runs(rows: list[Row], sizes: Sizes) -> list[str]:
    """Return a line for each pruner that was walked with two numbers of windows: an extrapolated whole run."""
    lines, seconds = [], {row.what: row for row in rows}
    for name, pruner in PRUNERS.items():
        found = [seconds.get(_walk_name(name, sizes, count)) for count in (sizes.samples, 2 * sizes.samples)]
        if pruner.statistic is None or None in found:
            continue
        short, long = found
        times = [whole_run(short.ours.seconds, long.ours.seconds, sizes.samples, sizes.blocks, 2 * sizes.blocks - 1)]
        if short.plain and long.plain:
            plain = (short.plain.seconds, long.plain.seconds)
            times.append(whole_run(*plain, sizes.samples, sizes.blocks, 2 * sizes.blocks))
        each = ", plain ".join(f"{time:.0f} s" for time in times)
        lines.append(f"{name}, {BLOCKS} blocks, {SAMPLES} x {sizes.tokens} tokens, extrapolated: {each}")
    return lines


def _walk_name(pruner: str, sizes: Sizes, samples: int) -> str:
    return f"walk, {pruner}, {sizes.blocks} blocks, {samples} x {sizes.tokens} tokens"


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


# --------------------------------------------------------------------------------------------------- what is timed


def random_weight(shape: tuple[int, int], device: torch.device) -> Tensor:
    """Return a float16 matrix with heavy-tailed rows, as far as random numbers go."""
    return (0.02 * torch.randn(shape, device=device) / torch.rand(shape[0], 1, device=device).sqrt().clamp_(0.1)).half()


def spectra(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """Yield a case for each driver and shape, one for the fit over all candidates, and one for matrices in flight."""

    def eigs_of(weight: Tensor, driver: str) -> Tensor:
        return spectrum(weight, driver).eigs

    def ours() -> tuple[int, float]:
        fit = fit_tail(eigs, every)
        return fit.index, fit.alpha

    for shape in sizes.shapes[:2]:
        weight = random_weight(shape, device)
        for driver in DRIVERS:
            plain = None if driver == "exact" else partial(plain_spectrum, weight)  # exact is the plain one
            what = f"spectrum, {driver}, {shape[0]}x{shape[1]}"
            yield Case(what, partial(eigs_of, weight, driver), plain, same_numbers)
    eigs = eigs_of(random_weight(sizes.shapes[0], device), "fast")
    every = torch.arange(len(eigs) - 1, device=device)
    yield Case(f"alpha, all candidates, N = {len(eigs)}", ours, partial(plain_fit, eigs, every), same_fit)
    if device.type == "cuda":
        yield _in_flight([random_weight(sizes.shapes[0], device) for _ in range(MATRICES)])


def _in_flight(weights: list[Tensor]) -> Case:
    """Return the case of the fast driver with several matrices at a time; plain is one after another."""

    def value(weight: Tensor) -> float:
        return alpha_mid(spectrum(weight, "fast"))

    def ours() -> Tensor:
        with InFlight() as in_flight:
            pending = [in_flight.submit(value, weight) for weight in weights]
            return torch.tensor([future.result() for future in pending])

    what = f"alpha_mid, fast, {len(weights)} matrices in flight"
    return Case(what, ours, lambda: torch.tensor([value(weight) for weight in weights]), same_numbers)


def statistics(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """Yield a case for each statistic, on two samples of the widest layer's input."""
    samples = [torch.randn(sizes.tokens, sizes.intermediate, device=device).half() for _ in range(2)]

    def ours(name: str) -> Tensor:
        total = None
        for x in samples:
            total = STATISTICS[name](x, total)
        return completed(total.div_(len(samples)))

    def plain(name: str) -> Tensor:
        mean = None
        for seen, x in enumerate(samples):
            mean = getattr(plain_methods, name)(x, mean, seen)
        return mean

    for name in STATISTICS:
        what = f"{name} of {len(samples)} x {sizes.tokens} tokens, {sizes.intermediate} columns"
        flops = 2 * len(samples) * sizes.tokens * sizes.intermediate**2 if name == "hessian" else None
        yield Case(what, partial(ours, name), partial(plain, name), same_numbers, flops=flops)


def pruners(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """Yield a case for each pruner, variant and N:M, on the widest layer, with the statistic already computed."""
    weight = random_weight(sizes.shapes[2], device)
    x = torch.randn(2 * weight.shape[1], weight.shape[1], device=device)  # enough for a Hessian of full rank
    given = {name: completed(add(x, None)) for name, add in STATISTICS.items()} | {None: None}
    del x

    def ours(pruner: Pruner, nm: tuple[int, int] | None) -> Tensor:
        statistic = given[pruner.statistic]
        statistic = None if statistic is None else statistic.clone()  # prepare() uses it up
        return pruner.prune(weight, pruner.prepare(statistic), RATIO, nm)

    shape = f"{weight.shape[0]}x{weight.shape[1]}"
    for name, pruner in PRUNERS.items():
        for nm in (None, NM):
            plain = None
            if name in plain_methods.METHODS:
                plain = partial(plain_methods.METHODS[name].prune, weight, given[pruner.statistic], RATIO, nm)
            what = f"{name}, {f'{nm[0]}:{nm[1]}' if nm else RATIO}, {shape}"
            yield Case(what, partial(ours, pruner, nm), plain, same_zeros if plain else None)
    for name, pruner in VARIANTS.items():
        yield Case(f"{name}, variant, {shape}", partial(ours, pruner, None))


def block_scores(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """Yield a case for each value that an allocation needs of a block's scores or of a matrix."""
    found = [random_weight(shape, device).float().abs() for shape in sizes.shapes]

    def plain_median() -> float:
        flat = torch.cat([score.flatten() for score in found]).sort().values
        return flat[(len(flat) - 1) // 2].item()

    def plain_outliers() -> float:
        flat = torch.cat([score.flatten() for score in found])
        return 100 * (flat > 5 * flat.mean(dtype=torch.float64)).double().mean().item()

    what = f"of {sum(score.numel() for score in found) / 1e6:.0f} million scores"
    yield Case(f"median {what}", partial(scores.median_score, found), plain_median, same_numbers)
    outliers = partial(scores.outlier_ratio, found, multiple=5.0)
    yield Case(f"outliers {what}", outliers, plain_outliers, same_numbers)
    yield Case(f"LAMP scores, {found[0].shape[0]}x{found[0].shape[1]}", partial(scores.lamp_score, found[0]))


def random_llama(sizes: Sizes, device: torch.device, dtype: torch.dtype = torch.float16) -> LlamaForCausalLM:
    """Return a random LLaMA, always the same on a given device."""
    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.blocks,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        max_position_embeddings=sizes.tokens,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(config).to(dtype).eval()


def walks(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """Yield a case for each pruner: the whole walk over a few blocks, including calibration."""
    model = random_llama(sizes, device)
    weights = weights_of(model)
    dense = weights.snapshot()
    every = torch.randint(sizes.vocabulary, (2 * sizes.samples, sizes.tokens)).to(device)
    plan = SparsityPlan(RATIO, {layer.name: RATIO for layer in weights.layers})

    def reset() -> None:
        weights.restore(dense)

    def kept(_: object) -> Tensor:
        return torch.cat([*weights.map(lambda _, weight: (weight != 0).flatten().cpu()).values()])

    def prune(pruner: Pruner, windows: Tensor) -> None:
        walk(weights, plan, pruner, enter_blocks(weights, windows) if pruner.statistic else None)

    products = 2 * sizes.tokens * sum(layer.size for layer in weights.layers)  # of a pass of one window
    for name, pruner in PRUNERS.items():
        for samples in (sizes.samples, 2 * sizes.samples) if pruner.statistic else (sizes.samples,):
            windows, plain = every[:samples], None
            if name in plain_methods.METHODS:
                plain = partial(plain_methods.walk, model, windows, plain_methods.METHODS[name], RATIO)
            alike = same_zeros if plain else None
            flops = 2 * samples * products if name == "wanda" else None  # the others do more than multiply
            what = _walk_name(name, sizes, samples)
            yield Case(what, partial(prune, pruner, windows), plain, alike, reset, kept, flops)


PARTS = (spectra, statistics, pruners, block_scores, walks)


def check(sizes: Sizes, device: torch.device, rounds: int) -> list[Row]:
    """Return all rows; each is printed as soon as it is known."""
    rows = []
    for part in PARTS:
        torch.manual_seed(0)
        for case in part(sizes, device):
            rows.append(compare(case, device, rounds))
            print(f"{case.what}: {rows[-1].ours.seconds:.4f} s", file=sys.stderr, flush=True)
    return rows


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gpu_check.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="of which the fastest counts (default: 3)")
    parser.add_argument("--blocks", type=int, default=2, metavar="N", help="blocks that are walked (default: 2)")
    parser.add_argument("--samples", type=int, default=8, metavar="N", help="calibration windows (default: 8)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Print the table; return 0, 1 if a result differs from its plain formulation, 2 without a GPU."""
    parser = make_parser()
    args = parser.parse_args(argv)
    for flag, value in vars(args).items():
        if value < 1:
            parser.error(f"--{flag} {value}: must be at least 1")
    if not torch.cuda.is_available():
        print("gpu_check.py: error: no CUDA device here, nothing was measured", file=sys.stderr)
        return 2
    sizes = Sizes(blocks=args.blocks, samples=args.samples)
    try:
        rows = check(sizes, torch.device("cuda", 0), args.rounds)
    except Disagreement as error:
        print(f"gpu_check.py: error: {error}", file=sys.stderr)
        return 1
    print(f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}, random float16 weights, the fastest of")
    print(f"{args.rounds}; GiB: the most memory beyond weights and inputs.\n")
    peak = next((peak for part, peak in PEAKS.items() if part in torch.cuda.get_device_name(0)), None)
    print(table(rows, peak))
    print("\n".join(whole_runs(rows, sizes)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
