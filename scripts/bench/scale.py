"""Needs of LLaMAs and of mixtures, computed from shapes; --make writes a random LLaMA, to measure main.py on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lib.allocation import price
from lib.cli.command import command, make_parser
from lib.cli.flags import Flags, flag
from lib.core import files
from lib.core.errors import UserError
from lib.core.lazy import torch, transformers
from lib.models import memory
from lib.models.layers import prunable_layers
from lib.models.load import load_tokenizer
from lib.models.locate import SMOLLM2, locate
from lib.models.safetensors_io import write_index, write_shard
from lib.pruning import alps
from lib.pruning.pruners import PRUNERS
from lib.recovery.adam import STATES
from lib.recovery.distill import RecoveryOptions
from scripts.table import formatted, forward_passes

ROOT = Path(__file__).resolve().parents[2]
# Hidden and inner width, blocks, heads, heads of keys and values, vocabulary: LLaMA 1 and 2, LLaMA 3.1's 405B.
SIZES = {
    "7B": (4096, 11008, 32, 32, 32, 32000),
    "13B": (5120, 13824, 40, 40, 40, 32000),
    "70B": (8192, 28672, 80, 64, 8, 32000),
    "405B": (16384, 53248, 126, 128, 8, 128256),
}
# Mixtures of experts: the class of their config, and what differs from its defaults.
MIXTURES = {
    "Mixtral-8x7B": ("MixtralConfig", {}),
    "OLMoE-1B-7B": ("OlmoeConfig", {"intermediate_size": 1024}),
    "Qwen3-30B-A3B": ("Qwen3MoeConfig", {
        "num_hidden_layers": 48, "hidden_size": 2048, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936,
    }),
    "GLM-4.5-Air": ("Glm4MoeConfig", {
        "num_hidden_layers": 46, "hidden_size": 4096, "intermediate_size": 10944, "head_dim": 128, "vocab_size": 151552,
    }),
    "DeepSeek-V3": ("DeepseekV3Config", {}),
}  # fmt: skip
COMPUTED = ("magnitude", "wanda", "sparsegpt", "alps", "wanda_price")
SEARCH = price.EFFORTS["full"]  # the settings of _price
SHARED = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))  # by their input
HEADINGS = ("model", "method", "GPU, weights in memory", "GPU, streamed", "RAM for hidden states", "disk", "PFLOP")


@dataclass(kw_only=True)
class Scale(Flags):
    _title: ClassVar[str] = "scale"

    nsamples: int = flag(128, "calibration windows, a count", least=1, metavar="N")
    seqlen: int = flag(2048, "window length, tokens", least=2, metavar="N")
    make: str | None = flag(None, "write a LLaMA with random float16 weights to this folder instead", metavar="DIR")
    blocks: int = flag(14, "of that model, a count", only="make", least=1, metavar="N")
    hidden: int = flag(4096, "width of that model", only="make", least=64, metavar="N")
    intermediate: int = flag(11008, "inner width of its MLP", only="make", least=64, metavar="N")


PARSER = make_parser(Scale, "scale.py", __doc__)


@cache
def skeleton(shape: tuple[int, int, int, int, int, int], **config) -> transformers.LlamaForCausalLM:
    """Return a LLaMA of a ``shape`` as in SIZES, without weights."""
    hidden, inner, blocks, heads, kv, vocabulary = shape
    config = transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=blocks, num_attention_heads=heads,
        num_key_value_heads=kv, vocab_size=vocabulary, tie_word_embeddings=False, dtype="float16", **config,
    )  # fmt: skip
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config)


def mixture_rows(nsamples: int, seqlen: int) -> Iterator[tuple[str, ...]]:
    """Yield a row for each of MIXTURES: its size, and the memory of Wanda and SparseGPT, upper bounds."""
    for name, (kind, options) in MIXTURES.items():
        config = getattr(transformers, kind)(**options, dtype="float16")
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        layers, weights = prunable_layers(model), 2 * sum(p.numel() for p in model.parameters())
        experts = len({layer.expert for layer in layers if layer.block == layers[-1].block and layer.expert})
        hessians = 4 * sum(x.shape[1] ** 2 for x in layers if x.block == layers[-1].block and "gate_proj" not in x.name)
        needed = [
            memory.working_set(model, torch.float16, name == "sparsegpt", count, seqlen, PRUNERS[name].copies)
            for name in ("wanda", "sparsegpt")
            for count in (nsamples, 0)
        ]
        gigabytes = (weights + needed[0], weights + needed[2], needed[1], needed[3], hessians, 2 * weights)
        yield (name, f"{weights / 2e9:.0f}B", str(experts), *(f"{size / 1e9:.0f} GB" for size in gigabytes))


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
    for names in SHARED if PRUNERS[pruner].statistic == "hessian" else ():
        inside = shapes[names[0]][1]
        out = sum(shapes[name][0] for name in names)
        total += 2 * tokens * inside**2  # the Hessian
        if pruner == "sparsegpt":
            total += inside**3 / 3 + inside**3 / 3 + out * inside**2  # Cholesky, triangular inverse, propagation
        else:
            inverses = -(-alps.ITERATIONS // alps.PER_RHO)
            total += inverses * inside**3 + 2 * (alps.ITERATIONS + alps.REFIT_STEPS + 2) * out * inside**2
    if allocation == "price":  # and once more where blocks are run twice
        windows = forward_passes(SEARCH) + SEARCH.windows_per_step * SEARCH.steps
        total += windows * tokens * forward
    return total * blocks


def needs(size: str, nsamples: int, seqlen: int) -> Iterator[dict]:
    """Yield what each of COMPUTED needs for a model of SIZES: bytes, and operations (``work``).

    ``streamed`` is None where a method cannot be.
    """
    model, half = skeleton(SIZES[size]), torch.float16
    layers = prunable_layers(model)
    shapes = {layer.name.rpartition(".")[2]: layer.shape for layer in layers if layer.block == 0}
    blocks, weights = layers[-1].block + 1, 2 * sum(p.numel() for p in model.parameters())
    for method in COMPUTED:
        pruner, _, allocation = method.partition("_")
        windows, hessians = (0 if pruner == "magnitude" else nsamples), PRUNERS[pruner].statistic == "hessian"
        beside, streamed = (
            memory.working_set(model, half, hessians, count, seqlen, PRUNERS[pruner].copies) for count in (windows, 0)
        )
        operations = work(shapes, blocks, pruner, nsamples * seqlen)
        if allocation == "price":
            length = SEARCH.length(seqlen)
            counts = SEARCH.windows_per_step, price.FIT_WINDOWS + SEARCH.held_out_windows
            search = memory.rank_bytes(layers) + memory.price_working_set(model, layers, half, length, *counts)
            beside, streamed = max(beside, search), None
            operations += work(shapes, blocks, method, length) - work(shapes, blocks, pruner, length)
        yield {
            "size": size, "method": method, "weights": weights, "gpu": weights + beside, "streamed": streamed,
            "hidden": 2 * windows * seqlen * SIZES[size][0], "disk": 2 * weights, "work": operations,
        }  # fmt: skip


def recovery_needs(size: str, sparsity: float, states: str, batch: int, seqlen: int) -> tuple[int, int]:
    """Return the bytes that recovery of a model of SIZES needs, end to end and block by block, with 16-bit weights."""
    model, half, options = skeleton(SIZES[size]), torch.float16, RecoveryOptions(0, states=states)
    layers = prunable_layers(model)
    work = memory.price_working_set(model, layers, half, seqlen, batch, batch)
    kept = {layer.name: memory.trained_bytes([layer], 1 - sparsity, options) for layer in layers}
    block = memory.trained_block_bytes(model, layers, kept, half, batch * seqlen)
    return 2 * sum(p.numel() for p in model.parameters()) + sum(kept.values()) + work, block


def show_recovery(settings: Scale) -> None:
    """Print what recovery needs by size and sparsity, and block by block."""
    rows = []
    for size in SIZES:
        for sparsity in (0.5, 0.7):
            needed = {states: recovery_needs(size, sparsity, states, 1, settings.seqlen) for states in STATES}
            whole = [f"{needed[states][0] / 1e9:.0f} GB" for states in STATES]
            rows.append((size, str(sparsity), *whole, f"{needed['float32'][1] / 1e9:.0f} GB"))
    headings = ("model", "sparsity", *(f"recovery, {states}" for states in STATES), "recovery by block")
    print(formatted([headings, *rows], "markdown"))


def show_needs(settings: Scale) -> None:
    """Print the computed tables."""
    nsamples, seqlen, rows = settings.nsamples, settings.seqlen, []
    for need in (need for size in SIZES for need in needs(size, nsamples, seqlen)):
        gpu, streamed, hidden, disk = (
            f"{need[key] / 1e9:.{digits}f} GB" if need[key] else "-"
            for key, digits in (("gpu", 0), ("streamed", 0), ("hidden", 1), ("disk", 0))
        )
        rows.append((need["size"], need["method"], gpu, streamed, hidden, disk, f"{need['work'] / 1e15:.1f}"))
    print(formatted([HEADINGS, *rows], "markdown"))
    print(f"\n{nsamples} windows of {seqlen}. Disk: checkpoint and pruned copy, 16 bits a weight.\n")
    headings = "mixture|weights|experts|GPU, wanda|GPU, sparsegpt|streamed, wanda|streamed, sparsegpt".split("|")
    headings += ["Hessians of a block", "disk"]
    print(formatted([headings, *mixture_rows(nsamples, seqlen)], "markdown"))
    show_recovery(settings)


def make_checkpoint(settings: Scale, folder: Path) -> None:
    """Write a random LLaMA with SmolLM2's tokenizer to ``folder``, a shard per block, with one block in memory."""
    tokenizer = load_tokenizer(locate(SMOLLM2, str(ROOT / "llm_weights")))
    heads = settings.hidden // 128 or 1
    shape = (settings.hidden, settings.intermediate, settings.blocks, heads, heads, len(tokenizer))
    model = skeleton(shape, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    shards: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        block = name.split(".")[2] if name.startswith("model.layers.") else "edges"
        shards.setdefault(block, []).append(name)

    draw = torch.Generator().manual_seed(0)
    with files.new_folder(folder) as tmp:
        for block, names in shards.items():
            sizes = {name: model.get_parameter(name).shape for name in names}
            # Norms are ones; a matrix preserves the scale of its inputs.
            tensors = {
                name: torch.ones(size) if len(size) == 1 else torch.randn(size, generator=draw).mul_(size[1] ** -0.5)
                for name, size in sizes.items()
            }
            write_shard(tmp / f"model-{block}.safetensors", tensors, dict.fromkeys(tensors, torch.float16))
        model.config.architectures = ["LlamaForCausalLM"]
        model.config.save_pretrained(tmp)
        tokenizer.save_pretrained(tmp)
        write_index(tmp)


def run(settings: Scale) -> None:
    """Print the table, or write the model."""
    if settings.make is None:
        show_needs(settings)
        return
    folder = Path(settings.make)
    if folder.exists():
        raise UserError("make", folder, "already exists", "give another folder, or remove it")
    files.check_writable("make", folder.parent)
    make_checkpoint(settings, folder)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    print(f"written: {folder}, {settings.blocks} blocks, {files.readable(size)}")


def main(argv: list[str] | None = None) -> int:
    return command(Scale, run, argv, PARSER)


if __name__ == "__main__":
    sys.exit(main())
