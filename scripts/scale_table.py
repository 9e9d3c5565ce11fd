"""Table of what LLaMA-shaped models of 7B to 405B need per method: memory and disk from shapes, hours from a rate."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib.allocation import price
from lib.cli.command import command, make_parser
from lib.cli.flags import Flags, flag
from lib.core.lazy import torch, transformers
from lib.models import memory as models
from lib.models.layers import prunable_layers
from lib.pruning import alps
from lib.pruning.pruners import PRUNERS

# Hidden and inner width, blocks, heads, heads of keys and values, vocabulary: LLaMA 1 and 2, LLaMA 3.1's 405B.
SIZES = {
    "7B": (4096, 11008, 32, 32, 32, 32000),
    "13B": (5120, 13824, 40, 40, 40, 32000),
    "70B": (8192, 28672, 80, 64, 8, 32000),
    "405B": (16384, 53248, 126, 128, 8, 128256),
}
METHODS = ("magnitude", "wanda", "sparsegpt", "alps", "wanda_price")
SEARCH = price.Options()  # of _price
ALIKE = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))  # share an input


@dataclass(kw_only=True)
class Table(Flags):
    _title: ClassVar[str] = "table"

    nsamples: int = flag(128, "calibration windows, a count", least=1, metavar="N")
    seqlen: int = flag(2048, "window length, tokens", least=2, metavar="N")
    tflops: float | None = flag(
        None, "what the machine reaches, TFLOP/s (default: measured here by a product)", above=0, metavar="X"
    )


PARSER = make_parser(Table, "scale_table.py", __doc__)


class Needs(NamedTuple):
    """Needs of a method in bytes, and its ``work`` in floating-point operations; ``streamed``: None if unsupported."""

    size: str
    method: str
    weights: int
    gpu: int
    streamed: int | None
    hidden: int
    work: float


def skeleton(size: str):
    """Return the LLaMA named in SIZES, without weights."""
    hidden, inner, blocks, heads, kv, vocabulary = SIZES[size]
    config = transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=blocks, num_attention_heads=heads,
        num_key_value_heads=kv, vocab_size=vocabulary, tie_word_embeddings=False, dtype="float16",
    )  # fmt: skip
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config)


def work(shapes: dict[str, tuple[int, int]], blocks: int, method: str, tokens: int) -> float:
    """Return the operations of pruning with ``method`` and of its search: products and factorisations.

    Args:
        shapes: [out, in] of a block's matrices by the last part of their names.
        tokens: number of calibration tokens.
    """
    if method == "magnitude":
        return 0.0
    forward = 2 * sum(out * inside for out, inside in shapes.values())  # per token and block
    total = 2.0 * tokens * forward  # once dense, once pruned
    pruner, _, allocation = method.partition("_")
    for names in ALIKE if pruner in ("sparsegpt", "alps") else ():
        inside = shapes[names[0]][1]
        out = sum(shapes[name][0] for name in names)
        total += 2 * tokens * inside**2  # the Hessian
        if pruner == "sparsegpt":
            total += inside**3 / 3 + inside**3 / 3 + out * inside**2  # Cholesky, triangular inverse, propagation
        else:
            inverses = -(-alps.ITERATIONS // alps.PER_RHO)
            total += inverses * inside**3 + 2 * (alps.ITERATIONS + alps.REFIT_STEPS + 2) * out * inside**2
    if allocation == "price":  # and once more where blocks are run twice
        windows = price.forward_passes(SEARCH, started=False) + SEARCH.effort.windows_per_step * SEARCH.steps
        total += windows * tokens * forward
    return total * blocks


def needs(size: str, settings: Table) -> Iterator[Needs]:
    """Yield the needs of each of METHODS for a model of this size."""
    model = skeleton(size)
    layers = prunable_layers(model)
    shapes = {layer.name.rpartition(".")[2]: layer.shape for layer in layers if layer.block == 0}
    blocks, half = layers[-1].block + 1, torch.float16
    weights = 2 * sum(p.numel() for p in model.parameters())
    tokens, length = settings.nsamples * settings.seqlen, SEARCH.effort.length(settings.seqlen)
    for method in METHODS:
        pruner, _, allocation = method.partition("_")
        windows = 0 if pruner == "magnitude" else settings.nsamples
        hessians = pruner in ("sparsegpt", "alps")
        beside, streamed = (
            models.working_set(model, half, hessians, count, settings.seqlen, PRUNERS[pruner].copies)
            for count in (windows, 0)
        )
        done = work(shapes, blocks, pruner, tokens)
        if allocation == "price":
            counts = SEARCH.effort.windows_per_step, price.FIT_WINDOWS + SEARCH.effort.held_out_windows
            ranks = models.rank_bytes(layers) + models.price_working_set(model, layers, half, length, *counts)
            beside, streamed = max(beside, ranks), None
            done += work(shapes, blocks, method, length) - work(shapes, blocks, pruner, length)
        hidden = 2 * windows * settings.seqlen * SIZES[size][0]
        yield Needs(size, method, weights, weights + beside, streamed, hidden, done)


def measured_rate() -> float:
    """Return the operations per second of a product at LLaMA-7B's shapes: half precision on a GPU, else float32."""
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.float16) if cuda else ("cpu", torch.float32)
    x, w = torch.randn(2048, 4096, device=device, dtype=dtype), torch.randn(11008, 4096, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        (x @ w.T)[0, 0].item()  # waits for the product
        best = min(best, time.perf_counter() - start)
    return 2 * 2048 * 4096 * 11008 / best


def table(rows: Sequence[Needs], rate: float) -> str:
    """Return the rows as Markdown; ``rate`` in operations per second."""
    lines = [
        "| model | method | GPU, weights in memory | GPU, streamed | RAM for hidden states | disk | PFLOP | hours |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        streamed = "-" if row.streamed is None else f"{row.streamed / 1e9:.0f} GB"
        hidden = f"{row.hidden / 1e9:.1f} GB" if row.hidden else "-"
        memory = f"{row.gpu / 1e9:.0f} GB | {streamed} | {hidden} | {2 * row.weights / 1e9:.0f} GB"
        hours = row.work / rate / 3600
        hours = f"{row.work / 1e15:.1f} | {hours:{'.0f' if hours >= 10 else '.2g'}}" if row.work else "0 | disk"
        lines.append(f"| {row.size} | {row.method} | {memory} | {hours} |")
    return "\n".join(lines)


def run(settings: Table) -> None:
    """Print the table and the source of its figures."""
    rate = settings.tflops * 1e12 if settings.tflops else measured_rate()
    print(table([row for size in SIZES for row in needs(size, settings)], rate))
    source = "as given" if settings.tflops else "a product at LLaMA-7B's shapes, measured on this machine"
    print(
        f"\n{settings.nsamples} windows of {settings.seqlen}. Memory and disk (checkpoint and pruned copy, 16 bits a "
        f"weight) are computed from shapes; hours are PFLOP at {rate / 1e12:.3g} TFLOP/s ({source}), without "
        "reading, writing and evaluation."
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit status."""
    return command(Table, run, argv, PARSER)


if __name__ == "__main__":
    sys.exit(main())
