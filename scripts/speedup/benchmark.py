"""Speed-up benchmark: time, size and quality of pruned models, torch and llama.cpp: bash scripts/speedup/run.sh"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lib.calibration.texts import check_text, evaluation_windows
from lib.cli.command import command, make_parser
from lib.cli.flags import Flags, flag
from lib.core import cpu, files
from lib.core.errors import UserError
from lib.models.load import Source, load_tokenizer
from lib.models.locate import SMOLLM2, locate, smollm2_gguf
from lib.run.record import provenance
from scripts.speedup.engines import ENGINES, TOKENS
from scripts.table import formatted

LLAMA_CPP = "LLAMA_CPP_PYTHON"  # variable that names the interpreter of an environment with llama-cpp-python


@dataclass(kw_only=True)
class SpeedUp(Flags):
    _title: ClassVar[str] = "benchmark"

    model: Sequence[str] = flag(
        (), f"the dense model (default: {SMOLLM2}), then folders of pruned ones, packed or not", positional=True,
        nargs="*", metavar="MODEL",
    )  # fmt: skip
    engines: Sequence[str] = flag(
        ("packed", "torch_bfloat16"), "what to measure with; all but packed run the dense model alone", nargs="+",
        choices=tuple(ENGINES),
    )  # fmt: skip
    prompts: Sequence[int] = flag((32, 128, 512), "lengths of prompts, tokens", nargs="+", least=2, metavar="N")
    context: int = flag(128, "tokens before the single ones", least=1, metavar="N")
    text: str = flag("wiki_leads", "a name of main.py's --eval_data or a .txt, .json or .jsonl file", metavar="TEXT")
    eval_windows: int = flag(10, "windows of the perplexity", least=1, metavar="N")
    seqlen: int = flag(512, "their length, tokens", least=2, metavar="N")
    cores: int = flag(1, "threads of every engine", least=1, metavar="N")
    rounds: int = flag(5, "turns of each model", least=1, metavar="N")
    save: str = flag("results/speedup", "where the figures and their plot go", metavar="DIR")

    def check(self) -> None:
        self.model = self.model or (SMOLLM2,)
        if len(self.model) > 1 and "packed" not in self.engines:
            raise UserError("engines", " ".join(self.engines), "run the first MODEL alone", "add packed")
        cores = cpu.physical_cores()
        if self.cores > cores:
            raise UserError("cores", self.cores, f"this machine has {cores} physical cores", "give fewer")
        needed, tokens = max(*self.prompts, self.context + 1 + TOKENS), self.eval_windows * self.seqlen
        if tokens < needed:
            problem = f"make a text of {tokens} tokens, and {needed} are read"
            raise UserError("eval_windows", self.eval_windows, problem, "give more")
        if "llama_cpp" in self.engines:
            gguf_of(self.model[0])
            python = shutil.which(os.environ.get(LLAMA_CPP, sys.executable))
            if not python or subprocess.run([python, "-c", "import llama_cpp"], capture_output=True).returncode:
                fix = f"set {LLAMA_CPP}=DIR/bin/python of its environment (docs/speedup.md says how to make it)"
                raise UserError("engines", "llama_cpp", "has no interpreter with llama-cpp-python", fix)
        check_text("text", self.text)
        files.check_writable("save", Path(self.save))


PARSER = make_parser(SpeedUp, "run.sh", __doc__)


def gguf_of(model: str) -> str:
    """Return the GGUF file of the dense ``model``, which llama.cpp reads."""
    if model != SMOLLM2 and not model.endswith(".gguf"):
        raise UserError("engines", "llama_cpp", f"cannot read {model}", "give a .gguf file as the dense MODEL")
    return str(smollm2_gguf() if model == SMOLLM2 else Path(model).expanduser())


class Worker:
    """Process of engines.py that runs one engine, until the ``stack`` is left."""

    def __init__(self, engine: str, cores: int, stack: ExitStack) -> None:
        self.engine = engine
        self.errors = stack.enter_context(tempfile.TemporaryFile("w+"))
        python = os.environ.get(LLAMA_CPP, sys.executable) if engine == "llama_cpp" else sys.executable
        variables = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(cores)) | {"CUDA_VISIBLE_DEVICES": ""}
        self.process = stack.enter_context(
            subprocess.Popen(
                [python, Path(__file__).with_name("engines.py")], env=os.environ | variables, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
            )
        )  # fmt: skip

    def ask(self, request: object) -> list:
        """Return the answer to a request (``engines.answers``); if the process dies, a UserError with its last line."""
        with suppress(BrokenPipeError):  # it has died: there is no answer either
            print(json.dumps(request), file=self.process.stdin, flush=True)
        if line := self.process.stdout.readline():
            return json.loads(line)
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        code = self.process.wait()
        self.errors.seek(0)
        last = (self.errors.read().strip().splitlines() or ["no message"])[-1][:500]
        raise UserError(None, self.engine, f"killed by signal {-code} (out of memory?): {last}" if code < 0 else last)


def entries(engine: str, sources: Sequence[Source]) -> list[dict]:
    """Return the names and paths of what an engine runs of the dense model and the pruned ones."""
    if engine == "llama_cpp":
        path = gguf_of(sources[0].given)
        return [{"name": name, "path": path} for name in (Path(path).stem, "Q8_0")]
    names = [{"name": source.name, "path": source.path} for source in sources]
    return names if engine == "packed" else names[:1]


def measure(settings: SpeedUp) -> dict:
    """Return the record of all engines: a row for each model, with seconds of every round; the engines take turns."""
    sources = [locate(model, files.in_repository("llm_weights")) for model in settings.model]
    windows = evaluation_windows(
        settings.text, load_tokenizer(sources[0]), settings.seqlen, settings.eval_windows, "text"
    )
    longest = max(*settings.prompts, settings.seqlen, settings.context + 1 + TOKENS)
    spec = {"windows": windows.tolist(), "context": settings.context, "cores": settings.cores, "longest": longest}
    asked, failed = [], []  # (worker, number of its model, row)
    with ExitStack() as stack:
        for engine in settings.engines:
            print(f"{engine} ...", file=sys.stderr, flush=True)
            worker, models = Worker(engine, settings.cores, stack), entries(engine, sources)
            try:
                described = worker.ask(spec | {"engine": engine, "models": models})
            except UserError as error:
                failed.append(str(error))
                continue
            rows = [
                {"engine": engine, "model": model["name"]} | of for model, of in zip(models, described, strict=True)
            ]
            asked += [(worker, index, row | {"seconds": {}}) for index, row in enumerate(rows)]
        if not asked:
            raise UserError(None, "no engine could run", failed[0])
        for turn in range(settings.rounds):
            first = turn % len(asked)  # nobody is always first
            for worker, index, row in asked[first:] + asked[:first]:
                for tokens in (0, *settings.prompts):
                    name = f"prompt of {tokens}" if tokens else f"token after {settings.context}"
                    row["seconds"].setdefault(name, []).extend(worker.ask([index, tokens]))
    record = {"complete": True, "processor": cpu.model_name(), "loadavg": os.getloadavg(), "flags": settings.flags()}
    return record | {"rows": [row for *_, row in asked], "failed": failed} | provenance()


def table(record: dict) -> str:
    """Return a Markdown table of the record's rows: least milliseconds."""
    names = list(record["rows"][0]["seconds"])
    lines = [["engine", "model", "MB", *names, "perplexity"]]
    for row in record["rows"]:
        least = (min(row["seconds"][name]) * 1e3 for name in names)
        times = [f"{ms:.1f}" if ms < 100 else f"{ms:.0f}" for ms in least]
        lines.append([row["engine"], row["model"], f"{row['megabytes']:.0f}", *times, f"{row['perplexity']:.2f}"])
    return formatted(lines, "markdown")


def plot(record: dict, path: Path) -> None:
    """Write a PNG of size against perplexity; the area of a dot is the number of single tokens per second."""
    figure, (axes,) = files.new_figure(8, 4.5)
    for number, engine in enumerate(dict.fromkeys(row["engine"] for row in record["rows"])):
        rows = [row for row in record["rows"] if row["engine"] == engine]
        speeds = [1 / min(next(iter(row["seconds"].values()))) for row in rows]
        places = [(row["megabytes"], row["perplexity"]) for row in rows]
        axes.scatter(*zip(*places, strict=True), s=[4 * speed for speed in speeds], alpha=0.5, label=engine)
        for row, place, speed in zip(rows, places, speeds, strict=True):
            height = (12, -18, 20, -26)[number % 4]  # engines may coincide
            offset = {"xytext": (0, height), "textcoords": "offset points"}
            axes.annotate(f"{row['model']}, {speed:.0f}/s", place, fontsize="xx-small", ha="center", **offset)
    axes.set(yscale="log", xlabel="MB of weights", ylabel="perplexity", title="area of a dot: tokens per second")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.margins(0.2)
    for handle in axes.legend(fontsize="small").legend_handles:
        handle.set_sizes([40])
    files.save_figure(figure, path)


def run(settings: SpeedUp) -> None:
    """Measure, print the table, and write ``speedup.json`` and ``speedup.png``."""
    record, folder = measure(settings), Path(settings.save)
    print(f"\n{settings.cores} cores of {record['processor']}, load {record['loadavg'][0]:.1f}; least milliseconds\n")
    print(table(record))
    for reason in record["failed"]:
        print(f"could not run: {reason}")
    files.write_atomically(folder / "speedup.json", json.dumps(record, indent=1) + "\n")
    plot(record, folder / "speedup.png")
    print(f"written: {folder}/speedup.json, speedup.png")


def main(argv: Sequence[str] | None = None) -> int:
    return command(SpeedUp, run, argv, PARSER, out_of_memory="use a smaller model")


if __name__ == "__main__":
    sys.exit(main())
