"""Needs of large models, LLaMAs of 7B to 405B: computed from shapes; --measure runs main.py on a random model."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tabulate import tabulate

from lib.allocation import price
from lib.cli.command import command, make_parser
from lib.cli.flags import Flags, flag
from lib.cli.settings import METHODS
from lib.core import files
from lib.core.errors import UserError
from lib.core.lazy import torch, transformers
from lib.core.names import check_name
from lib.models import memory, safetensors_io
from lib.models.layers import prunable_layers
from lib.models.load import load_tokenizer
from lib.models.locate import SMOLLM2, locate
from lib.pruning import alps
from lib.pruning.pruners import PRUNERS
from lib.run.record import provenance

ROOT = Path(__file__).resolve().parents[2]
# Hidden and inner width, blocks, heads, heads of keys and values, vocabulary: LLaMA 1 and 2, LLaMA 3.1's 405B.
SIZES = {
    "7B": (4096, 11008, 32, 32, 32, 32000),
    "13B": (5120, 13824, 40, 40, 40, 32000),
    "70B": (8192, 28672, 80, 64, 8, 32000),
    "405B": (16384, 53248, 126, 128, 8, 128256),
}
COMPUTED = ("magnitude", "wanda", "sparsegpt", "alps", "wanda_price")
SEARCH = price.Options()  # the settings of _price
SHARED = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))  # by their input
WAYS = {"auto": "auto", "always": "streamed", "never": "in memory"}  # main.py's --stream, and what the table says
NEEDS = (
    "model", "method", "GPU, weights in memory", "GPU, streamed", "RAM for hidden states", "disk", "PFLOP", "hours"
)  # fmt: skip
MEASURED = ("method", "weights", "peak RSS", "peak GPU", "seconds", "seconds per block")


@dataclass(kw_only=True)
class Scale(Flags):
    _title: ClassVar[str] = "scale"

    nsamples: int | None = flag(None, "calibration windows (default: 128; with {measure} 4)", least=1, metavar="N")
    seqlen: int | None = flag(None, "window length, tokens (default: 2048; {measure}: 128)", least=2, metavar="N")
    tflops: float | None = flag(
        None, "what the machine reaches, TFLOP/s (default: measured here by a product)", above=0, metavar="X"
    )
    measure: bool = flag(False, "run main.py on a LLaMA with random weights (6.4 GB), which is made once")
    methods: str = flag("magnitude,wanda,sparsegpt", "pruning methods, with commas", needs="measure", metavar="M,M")
    ways: str = flag("always,never", "values of main.py's --stream, with commas", needs="measure", metavar="W,W")
    blocks: int = flag(14, "of the generated model, a count", needs="measure", least=1, metavar="N")
    hidden: int = flag(4096, "width of the generated model", needs="measure", least=64, metavar="N")
    intermediate: int = flag(11008, "inner width of its MLP", needs="measure", least=64, metavar="N")
    work: str = flag("out/scale", "where models are made", needs="measure", metavar="DIR")
    save: str = flag("results/scale", "where scale.json is written", needs="measure", metavar="DIR")

    def check(self) -> None:
        for method, way in self.runs():
            check_name("methods", method, METHODS)
            check_name("ways", way, WAYS)
            if method.endswith("_price") and way == "always":
                raise UserError("methods", method, "a streamed model has no prices", "give --ways never")

    def runs(self) -> list[tuple[str, str]]:
        """Return every method and way to measure, each once."""
        methods, ways = ([word.strip() for word in names.split(",")] for names in (self.methods, self.ways))
        return list(dict.fromkeys(product(methods, ways)))


PARSER = make_parser(Scale, "scale.py", __doc__)


def skeleton(shape: tuple[int, int, int, int, int, int], **config) -> transformers.LlamaForCausalLM:
    """Return a LLaMA of a ``shape`` as in SIZES, without weights."""
    hidden, inner, blocks, heads, kv, vocabulary = shape
    config = transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=blocks, num_attention_heads=heads,
        num_key_value_heads=kv, vocab_size=vocabulary, tie_word_embeddings=False, dtype="float16", **config,
    )  # fmt: skip
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config)


# ------------------------------------------------------------------------------------------------------------- computed


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
        windows = price.forward_passes(SEARCH, started=False) + SEARCH.effort.batch * SEARCH.steps
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
            length = SEARCH.effort.length(seqlen)
            search = price.rank_bytes(layers) + price.working_set(model, layers, half, length, SEARCH.effort)
            beside, streamed = max(beside, search), None
            operations += work(shapes, blocks, method, length) - work(shapes, blocks, pruner, length)
        yield {
            "size": size, "method": method, "weights": weights, "gpu": weights + beside, "streamed": streamed,
            "hidden": 2 * windows * seqlen * SIZES[size][0], "disk": 2 * weights, "work": operations,
        }  # fmt: skip


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


def show_needs(settings: Scale) -> None:
    """Print the computed table and the source of its figures."""
    rate = settings.tflops * 1e12 if settings.tflops else measured_rate()
    nsamples, seqlen = settings.nsamples or 128, settings.seqlen or 2048
    rows = []
    for need in (need for size in SIZES for need in needs(size, nsamples, seqlen)):
        gpu, streamed, hidden, disk = (
            f"{need[key] / 1e9:.{digits}f} GB" if need[key] else "-"
            for key, digits in (("gpu", 0), ("streamed", 0), ("hidden", 1), ("disk", 0))
        )
        hours = need["work"] / rate / 3600
        hours = f"{hours:{'.0f' if hours >= 10 else '.2g'}}" if need["work"] else "disk"
        rows.append((need["size"], need["method"], gpu, streamed, hidden, disk, f"{need['work'] / 1e15:.1f}", hours))
    print(markdown(rows, NEEDS, words=2))
    source = "as given" if settings.tflops else "a product at LLaMA-7B's shapes, measured on this machine"
    print(
        f"\n{nsamples} windows of {seqlen}. Memory and disk (checkpoint and pruned copy, 16 bits a weight) are "
        f"computed from shapes; hours are PFLOP at {rate / 1e12:.3g} TFLOP/s ({source}), without reading, writing and "
        "evaluation."
    )


# ------------------------------------------------------------------------------------------------------------- measured


def make_checkpoint(settings: Scale) -> Path:
    """Return the folder of a random float16 LLaMA, one shard per block, written with only one block in memory."""
    folder = Path(settings.work) / f"llama-{settings.hidden}x{settings.intermediate}x{settings.blocks}"
    if (folder / "model.safetensors.index.json").is_file():
        return folder
    tokenizer = load_tokenizer(locate(SMOLLM2, str(ROOT / "llm_weights")))
    heads = settings.hidden // 128 or 1
    shape = (settings.hidden, settings.intermediate, settings.blocks, heads, heads, len(tokenizer))
    model = skeleton(shape, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    shards: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        block = name.split(".")[2] if name.startswith("model.layers.") else "edges"
        shards.setdefault(block, []).append(name)

    folder.mkdir(parents=True, exist_ok=True)
    draw = torch.Generator().manual_seed(0)
    for block, names in shards.items():
        shapes = {name: model.get_parameter(name).shape for name in names}
        tensors = {
            # Norms are ones; a matrix preserves the scale of its inputs.
            name: torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=draw).mul_(shape[1] ** -0.5)
            for name, shape in shapes.items()
        }
        safetensors_io.write_shard(folder / f"model-{block}.safetensors", tensors, torch.float16)
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    safetensors_io.write_index(folder)
    return folder


def measure(settings: Scale, folder: Path, method: str, way: str) -> dict:
    """Run main.py in a separate process and return the figures of its stages."""
    save, windows = Path(settings.work) / f"{method}_{way}", settings.nsamples or 4
    flags = {
        "--model": folder, "--dtype": "auto" if torch.cuda.is_available() else "float32", "--prune_method": method,
        "--sparsity_ratio": 0.5, "--calib_data": "wiki_leads", "--nsamples": windows,
        "--seqlen": settings.seqlen or 128, "--eval_data": "wiki_leads", "--eval_windows": windows,
        "--stream": way, "--save": save, "--save_model": save, "--cache_dir": ROOT / "llm_weights",
    }  # fmt: skip
    words = [str(word) for item in flags.items() for word in item]
    start = time.perf_counter()
    done = subprocess.run([sys.executable, str(ROOT / "main.py"), *words, "--restart"])
    if done.returncode:
        return {"method": method, "stream": way, "failed": done.returncode}
    record = json.loads((save / f"run_{method}_sparsity_0.5.json").read_text())
    stages = record["stages"].values()
    return {
        "method": method,
        "stream": way,
        "peak_rss_mb": max(stage["peak_rss_mb"] for stage in stages),
        "peak_cuda_mb": max((mb for stage in stages for mb in stage.get("peak_cuda_mb", {}).values()), default=None),
        "seconds": round(time.perf_counter() - start, 1),
        "seconds_per_block": round(record["stages"]["prune"]["seconds"] / settings.blocks, 2),
        "perplexity": record["perplexity"],
    }


def measure_all(settings: Scale) -> int:
    """Make the checkpoint, measure every method both ways, print and write the figures; return 1 if a run failed."""
    for field in ("save", "work"):
        files.check_writable(field, Path(getattr(settings, field)))
    folder, rows = make_checkpoint(settings), []
    for method, way in settings.runs():
        print(f"\n{method}, --stream {way}", flush=True)
        rows.append(measure(settings, folder, method, way))
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    cells = []
    for row in rows:
        peaks = [f"{row[key] * 2**20 / 1e9:.2f} GB" if row.get(key) else "-" for key in ("peak_rss_mb", "peak_cuda_mb")]
        peaks[0] = "failed" if "failed" in row else peaks[0]
        seconds = [f"{row.get('seconds', 0):.0f}", f"{row.get('seconds_per_block', 0):.2f}"]
        cells.append((row["method"], WAYS[row["stream"]], *peaks, *seconds))
    print(f"\n{settings.blocks} blocks of LLaMA, hidden {settings.hidden}, {files.readable(size)} in float16\n")
    print(markdown(cells, MEASURED, words=2))
    content = {"rows": rows, "checkpoint_bytes": size, "settings": settings.flags()} | provenance()
    files.write_atomically(Path(settings.save) / "scale.json", json.dumps(content, indent=1) + "\n")
    print(f"written: {settings.save}/scale.json")
    return int(any("failed" in row for row in rows))


def markdown(rows: list[tuple], headings: tuple, words: int) -> str:
    """Return a Markdown table whose first columns are ``words`` and the others numbers."""
    align = ("left",) * words + ("right",) * (len(headings) - words)
    return tabulate(rows, headings, tablefmt="pipe", colalign=align, disable_numparse=True)


def run(settings: Scale) -> int:
    """Compute, or measure; return 1 if a measured run failed."""
    if settings.measure:
        return measure_all(settings)
    show_needs(settings)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit status: 0, 1 if a run failed, 2 for a wrong flag."""
    return command(Scale, run, argv, PARSER)


if __name__ == "__main__":
    sys.exit(main())
