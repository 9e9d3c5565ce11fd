"""Generated text of a model folder, packed or dense, with tokens per second and resident memory."""

import argparse
import json
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from subprocess import PIPE

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lib.cli.command import answer
from lib.cli.flags import Flags
from lib.core import cpu
from lib.core.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 5  # of --compare: each model as many times, in turns


def resident_mb() -> int:
    """Return the resident memory of this process, including mapped files, in MB; -1 if not on Linux."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 // 10**6 for line in lines if line.startswith("VmRSS")), -1)


class Timing:
    """A streamer for ``generate`` that passes tokens on to ``text``, if given, and records when each one arrives."""

    def __init__(self, text=None) -> None:
        self.text, self.times = text, []

    def put(self, ids) -> None:
        self.times.append(time.perf_counter())  # the first call brings the prompt, before it is read
        if self.text:
            self.text.put(ids)

    def end(self) -> None:
        if self.text:
            self.text.end()


def load(model: str, cache_dir: str):
    """Return the model of a packed folder, or a dense one in bfloat16 on the CPU, and its tokenizer."""
    import torch

    from lib import sparse
    from lib.models import load as loading
    from lib.models import locate

    source = locate.locate(model, cache_dir)
    if sparse.is_packed(Path(source.path)):
        return sparse.load_packed(source.path), loading.load_tokenizer(source)
    return loading.load_llm(source, torch.bfloat16, torch.device("cpu")), loading.load_tokenizer(source)


def generate(model, tokenizer, args: argparse.Namespace, before: int, stream: bool) -> dict:
    """Return time and memory of one greedy run; ``before``: the resident memory before the model was loaded, MB."""
    import torch
    from transformers import TextStreamer

    ids = tokenizer(args.prompt, return_tensors="pt").input_ids
    timing = Timing(TextStreamer(tokenizer) if stream else None)
    limits = {"max_new_tokens": args.tokens} | ({} if stream else {"min_new_tokens": args.tokens})  # all do the same
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), streamer=timing, do_sample=False, **limits)
    start, first, *rest = timing.times
    return {
        "new_tokens": out.shape[1] - ids.shape[1],
        "prompt_tokens_per_second": ids.shape[1] / (first - start),
        "tokens_per_second": len(rest) / (rest[-1] - first) if rest else 0.0,
        "resident_mb": resident_mb(),
        "model_mb": resident_mb() - before,
    }


def describe(run: dict) -> str:
    return (
        f"{run['tokens_per_second']:.1f} tokens/s, prompt {run['prompt_tokens_per_second']:.1f} tokens/s, "
        f"{run['resident_mb']} MB resident ({run['model_mb']} MB more than before the model was loaded)"
    )


def medians(runs: list[dict]) -> dict:
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def serve(args: argparse.Namespace) -> None:
    """Answer each line of standard input with a run, as a line of JSON: one model of --compare in its own process."""
    before = resident_mb()
    model, tokenizer = load(args.model, args.cache_dir)
    for _ in sys.stdin:
        print(json.dumps(generate(model, tokenizer, args, before, stream=False)), flush=True)


def compare(args: argparse.Namespace) -> None:
    """Run the model and the dense one in turns, each in a separate process, and print both and the ratio."""
    names, runs = [args.model, args.compare], [[], []]
    about = ["--tokens", str(args.tokens), "--cache_dir", args.cache_dir, "--threads", str(args.threads), "--serve"]
    command, pipes = [sys.executable, str(Path(__file__)), *about, "--"], {"stdin": PIPE, "stdout": PIPE, "text": True}
    servers: list[subprocess.Popen] = []
    try:
        for name in names:  # a session of its own: Ctrl-C reaches this process alone, which ends them
            words = [*command, name, args.prompt]
            servers.append(subprocess.Popen(words, start_new_session=True, **pipes))
        for turn in range(1 + ROUNDS):  # the first warms up
            for name, server, found in zip(names, servers, runs, strict=True):
                with suppress(BrokenPipeError):
                    print("run", file=server.stdin, flush=True)
                line = server.stdout.readline()
                if not line:
                    raise UserError(None, f"{name}: could not be run, see above")
                if turn:
                    found.append(json.loads(line))
    finally:
        for server in servers:
            server.kill()
            server.wait()
    one, other = map(medians, runs)
    print(f"\n{args.model}: {describe(one)}\n{args.compare}: {describe(other)}")
    ratios = [one[key] / other[key] for key in ("tokens_per_second", "prompt_tokens_per_second", "model_mb")]
    print("ratio: {:.2f} times the tokens/s, {:.2f} of a prompt's, {:.2f} of the memory".format(*ratios), end="; ")
    print(f"medians of {ROUNDS} turns, {args.threads} threads")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="generate.py", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("model", metavar="MODEL", help="a packed folder, a model's folder, a .gguf file or smollm2-135m")
    add("prompt", metavar="PROMPT", help="the text to continue")
    add("--tokens", type=int, default=64, metavar="N", help="new tokens at most (default: %(default)s)")
    add("--compare", metavar="DENSE", help="run this model too, in turns, and print the ratio")
    add("--threads", type=int, default=0, metavar="N", help="threads (default: as many as torch takes)")
    add("--cache_dir", default=str(ROOT / "llm_weights"), metavar="DIR", help="where models are kept")
    add("--serve", action="store_true", help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit status."""
    resume = "the same command starts again"
    return answer("generate.py", Flags, lambda: work(make_parser().parse_args(argv)), resume, False, "use the CPU")


def check_flags(args: argparse.Namespace) -> None:
    """Refuse values of the flags that no model can be run with."""
    if args.tokens < 2:
        raise UserError("tokens", f"{args.tokens}: must be at least 2, or there is no speed to measure")
    most = len(cpu.usable())
    if not 0 <= args.threads <= most:
        raise UserError("threads", f"{args.threads}: must be between 1 and {most}, this machine's processors")
    if not args.prompt:
        raise UserError(None, "the prompt is empty; give the text to continue")
    try:
        args.prompt.encode("utf-8")
    except UnicodeEncodeError:  # Python keeps what it cannot decode as surrogates
        raise UserError(None, "the prompt is not UTF-8; give it in this encoding") from None


def check_model(model: str, args: argparse.Namespace) -> None:
    """Refuse a model that cannot continue the prompt by as many tokens, as far as its files tell without weights."""
    from lib.models import load as loading
    from lib.models import locate

    source = locate.locate(model, args.cache_dir)
    skeleton, tokenizer = loading.load_skeleton(source), loading.load_tokenizer(source)
    ids = tokenizer(args.prompt, return_tensors="pt", verbose=False).input_ids
    count, context = ids.shape[1], loading.context_length(skeleton)
    if not count:
        raise UserError(None, f"{model}: its tokenizer finds no token in the prompt; give a longer one")
    loading.check_vocabulary(model, skeleton, ids)
    if context is None or count + args.tokens <= context:
        return
    has = f"the prompt has {count} tokens and {model} a context of {context}"
    if count + 2 > context:
        raise UserError(None, f"{has}; give a shorter one")
    raise UserError("tokens", f"{args.tokens}: {has}; give at most {context - count}")


def work(args: argparse.Namespace) -> None:
    """Generate, and compare if asked."""
    import torch

    pass  # noqa: F401  (with transformers, before the memory is measured)

    check_flags(args)
    try:
        if args.threads:
            torch.set_num_threads(args.threads)
        args.threads = torch.get_num_threads()
        if args.serve:
            serve(args)
            return
        before = resident_mb()
        for model in filter(None, (args.model, args.compare)):  # both before the first one is loaded
            check_model(model, args)
        run = generate(*load(args.model, args.cache_dir), args, before, stream=True)
        print(f"\n{describe(run)}")
        if args.compare:
            compare(args)
    except UserError as error:
        raise UserError(None if error.field == "model" else error.field, error.text) from error  # which is no flag here


if __name__ == "__main__":
    sys.exit(main())
