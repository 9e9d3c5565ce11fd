"""Benchmark of streaming: peak memory and seconds per block on a generated LLaMA checkpoint, streamed and in memory."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console

from lib.cli.command import command, make_parser
from lib.cli.flags import Flags, flag
from lib.cli.settings import METHODS
from lib.core import files
from lib.core.errors import UserError
from lib.core.lazy import torch, transformers
from lib.core.names import check_name
from lib.models import load, locate, safetensors_io
from lib.run import report
from lib.run.record import provenance

if TYPE_CHECKING:
    from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
WAYS = ("auto", "always", "never")  # of main.py's --stream
MIB = 2**20  # bytes: the unit of a record's peaks


@dataclass(kw_only=True)
class Scale(Flags):
    _title: ClassVar[str] = "benchmark"

    methods: str = flag("magnitude,wanda,sparsegpt", "pruning methods, with commas between them", metavar="M,M")
    ways: str = flag("always,never", "values of main.py's --stream, with commas between them", metavar="W,W")
    blocks: int = flag(14, "of the generated model, a count", least=1, metavar="N")
    hidden: int = flag(4096, "width of the generated model", least=64, metavar="N")
    intermediate: int = flag(11008, "inner width of its MLP", least=64, metavar="N")
    nsamples: int = flag(4, "calibration windows, a count", least=1, metavar="N")
    seqlen: int = flag(128, "window length, tokens", least=2, metavar="N")
    work: str = flag("out/bench_scale", "where the checkpoint and the pruned models are made", metavar="DIR")
    save: str = flag("results/bench_scale", "where scale.json is written", metavar="DIR")

    def check(self) -> None:
        super().check()
        for method, way in self.runs():
            check_name("methods", method, METHODS)
            check_name("ways", way, WAYS)
            if method.endswith("_price") and way == "always":
                raise UserError("methods", f"{method}: a streamed model has no prices; give --ways never")

    def runs(self) -> list[tuple[str, str]]:
        """Return every method and way, each once.

        Raises:
            UserError: a list is empty.
        """
        lists = []
        for name in ("methods", "ways"):
            lists.append([word.strip() for word in getattr(self, name).split(",") if word.strip()])
            if not lists[-1]:
                raise UserError(name, f"{getattr(self, name)!r}: names nothing")
        return list(dict.fromkeys(product(*lists)))


PARSER = make_parser(
    Scale,
    "bench_scale.py",
    __doc__,
    "The checkpoint (float16, random weights, SmolLM2's tokenizer) is made once; with the defaults it takes 6.4 GB.",
)


def make_checkpoint(settings: Scale) -> Path:
    """Return the folder of a random float16 LLaMA, one shard per block, written with only one block in memory."""
    folder = Path(settings.work) / f"llama-{settings.hidden}x{settings.intermediate}x{settings.blocks}"
    if (folder / "model.safetensors.index.json").is_file():
        return folder
    small = locate.locate(locate.SMOLLM2, str(ROOT / "llm_weights"))
    tokenizer = load.load_tokenizer(small)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.blocks,
        num_attention_heads=settings.hidden // 128 or 1,
        num_key_value_heads=settings.hidden // 128 or 1,
        tie_word_embeddings=False,
        dtype="float16",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.device("meta"):
        skeleton = transformers.LlamaForCausalLM(config)
    shards: dict[str, list[str]] = {}
    for name, _ in skeleton.named_parameters():
        block = name.split(".")[2] if name.startswith("model.layers.") else "edges"
        shards.setdefault(block, []).append(name)
    folder.mkdir(parents=True, exist_ok=True)
    draw = torch.Generator().manual_seed(0)
    for block, names in shards.items():
        tensors = {name: _random(skeleton.get_parameter(name).shape, draw) for name in names}
        safetensors_io.write_shard(folder / f"model-{block}.safetensors", tensors, torch.float16)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    safetensors_io.write_index(folder)
    return folder


def _random(shape: tuple[int, ...], draw: torch.Generator) -> Tensor:
    """Return ones for a norm, and for a matrix random numbers that preserve the scale of its inputs."""
    if len(shape) == 1:
        return torch.ones(shape)
    return torch.randn(shape, generator=draw).mul_(shape[1] ** -0.5)


def measure(settings: Scale, folder: Path, method: str, way: str) -> dict:
    """Run main.py in a separate process and return the figures of its stages."""
    work = Path(settings.work)
    name = f"{method}_{way}"
    flags = {
        "--model": folder, "--dtype": "auto" if torch.cuda.is_available() else "float32", "--prune_method": method,
        "--sparsity_ratio": 0.5, "--calib_data": "wiki_leads", "--nsamples": settings.nsamples,
        "--seqlen": settings.seqlen, "--eval_data": "wiki_leads", "--eval_windows": settings.nsamples,
        "--stream": way, "--save": work / name, "--save_model": work / name, "--cache_dir": ROOT / "llm_weights",
    }  # fmt: skip
    start = time.perf_counter()
    words = [str(part) for item in flags.items() for part in item]
    done = subprocess.run([sys.executable, str(ROOT / "main.py"), *words, "--restart"])
    if done.returncode:
        return {"method": method, "stream": way, "failed": done.returncode}
    record = json.loads((work / name / f"run_{method}_sparsity_0.5.json").read_text())
    stages = record["stages"].values()
    cuda = [max(stage["peak_cuda_mb"].values()) for stage in stages if stage.get("peak_cuda_mb")]
    return {
        "method": method,
        "stream": way,
        "peak_rss_mb": max(stage["peak_rss_mb"] for stage in stages),
        "peak_cuda_mb": max(cuda, default=None),
        "seconds": round(time.perf_counter() - start, 1),
        "seconds_per_block": round(record["stages"]["prune"]["seconds"] / settings.blocks, 2),
        "perplexity": record["perplexity"],
    }


def run(settings: Scale) -> int:
    """Make the checkpoint, measure every method both ways, print and write the figures; return 1 if a run failed."""
    for name in ("save", "work"):
        files.check_writable(name, Path(getattr(settings, name)))
    folder = make_checkpoint(settings)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    console = Console()
    rows = []
    for method, way in settings.runs():
        print(f"\n{method}, --stream {way}", flush=True)
        rows.append(measure(settings, folder, method, way))
    cells = [
        (
            row["method"],
            {"always": "streamed", "never": "in memory"}.get(row["stream"], row["stream"]),
            "failed" if "failed" in row else f"{row['peak_rss_mb'] * MIB / 1e9:.2f} GB",
            f"{row['peak_cuda_mb'] * MIB / 1e9:.2f} GB" if row.get("peak_cuda_mb") else "-",
            f"{row.get('seconds', 0):.0f}",
            f"{row.get('seconds_per_block', 0):.2f}",
        )
        for row in rows
    ]
    headings = ("method", "weights", "peak RSS", "peak GPU", "seconds", "seconds per block")
    title = f"{settings.blocks} blocks of LLaMA, hidden {settings.hidden}, {files.readable(size)} in float16"
    report.show(console, title, headings, cells)
    text = json.dumps({"rows": rows, "checkpoint_bytes": size, "settings": settings.flags()} | provenance(), indent=1)
    files.write_atomically(Path(settings.save) / "scale.json", text + "\n")
    print(f"written: {settings.save}/scale.json")
    return int(any("failed" in row for row in rows))


def main(argv: list[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit status: 0, 1 if a run failed, 2 for a wrong flag."""
    return command(Scale, run, argv, PARSER)


if __name__ == "__main__":
    sys.exit(main())
