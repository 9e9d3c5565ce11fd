"""What the tests share: one thread, tiny models and texts made on the spot, and SmolLM2."""

import gc
import json
import os
import random
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

gc.disable()  # until all tests are collected: a quarter of the time of the imports
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches for the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of programs that tests start

import machines
import numpy as np
import pytest
import torch
import torch.utils.collect_env
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import main
from lib.allocation import price
from lib.cli.command import parse
from lib.cli.settings import Experiment
from lib.core import cpu
from lib.models.load import load_llm
from lib.models.locate import locate
from lib.models.weights import Weights, weights_of
from lib.sparse import kernel

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).resolve().parent / "golden"

# The order of float32 sums, and so the last digit, depends on the number of threads; the suite passes with any.
torch.set_num_threads(int(os.environ.get("TEST_THREADS", 1)))

# lm-eval describes the environment after each evaluation, for which pip would list its packages for a second or two.
torch.utils.collect_env.get_pip_packages = lambda *_: ("pip", "")

# Nobody cuts the power while tests run; to wait for the disk takes a third of a short run.
os.fsync = lambda _: None

# What the program finds out about the machine is the same everywhere, also while tests are collected.
machines.pretend(os.environ.get("TEST_MACHINE", "plain"))


def pytest_addoption(parser):
    text = "also run what takes longest: published figures of whole runs, launchers, exports"
    parser.addoption("--slow", action="store_true", help=text)


def pytest_configure(config):
    if "gpu" not in config.getoption("-m"):  # the figures of all other tests are those of a CPU
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    gc.freeze()


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and -m gpu"))
    if not config.getoption("--slow"):  # a thousand, of which each that is skipped would be reported by itself
        config.hook.pytest_deselected(items=[item for item in items if "slow" in item.keywords])
        items[:] = [item for item in items if "slow" not in item.keywords]


def pytest_collection_finish():
    # What is imported by now stays: no collection of garbage, of which accelerate asks for one after each training and
    # pytest for five at the end, has to look through it.
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def metrics_stay_with_the_test(monkeypatch):
    """Cache metrics below the current folder, which tests change, and not in the repository."""
    monkeypatch.setattr("lib.cli.settings.in_repository", lambda name: name)


@pytest.fixture
def machine(monkeypatch):
    """Return a function of a name in machines.MACHINES: the test goes on on that machine."""
    return lambda name: machines.pretend(name, monkeypatch.setattr)


@pytest.fixture(params=kernel.LEVELS)
def level(request, monkeypatch):
    """Return each level of the compiled kernel in turn; a test is skipped where the CPU lacks the instructions."""
    monkeypatch.setattr(cpu, "processor", machines.REAL_PROCESSOR)
    if request.param not in kernel.levels():
        pytest.skip(f"this CPU has no {request.param}")
    return request.param


@pytest.fixture(scope="session")
def golden():
    """Return a function of a file's name in tests/golden: its content."""

    def read(name: str):
        path = GOLDEN / name
        return json.loads(path.read_text()) if path.suffix == ".json" else np.load(path)

    return read


def settings(flags: str | list[str]) -> Experiment:
    """Return main.py's settings of a command line, checked."""
    return parse(Experiment, flags.split() if isinstance(flags, str) else flags, main.PARSER)


def across(pruners: Iterable[str], suffixes: Iterable[str]) -> list:
    """Return every pair for parametrize: every pruner and every suffix in the fast tests, all pairs with --slow."""
    pairs = [(pruner, suffix) for pruner in pruners for suffix in suffixes]
    first = [pair for pair in pairs if pair[0] == "wanda" or pair[1] in ("", "ww")]
    return fast([*first, *(pair for pair in pairs if pair not in first)], len(first))


def fast(values: Iterable, count: int) -> list:
    """Return ``values`` for parametrize: the first ``count`` of them in the fast tests, the rest with --slow."""
    values = list(values)
    slow = [pytest.param(*value) if type(value) is tuple else value for value in values[count:]]
    slow = [value if isinstance(value, type(pytest.param())) else pytest.param(value) for value in slow]
    return values[:count] + [param._replace(marks=(*param.marks, pytest.mark.slow)) for param in slow]


@pytest.fixture(params=[1, 2])
def threads(request):
    """Let torch compute on one thread, and on two; return how many."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one_thread():
    """Let torch compute on one thread: a forked child has none of its other threads, and would wait for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def few_windows(monkeypatch):
    """Let a search for prices read few windows: each goes the same way."""
    monkeypatch.setattr(price, "FIT_WINDOWS", 4)
    for name, effort in price.EFFORTS.items():
        monkeypatch.setitem(price.EFFORTS, name, effort._replace(held_out_windows=2))


@pytest.fixture
def few_tasks(monkeypatch, tmp_path_factory):
    """Let lm-eval know the paper's tasks and few others: to list all ten thousand takes as long as a hundred tests."""
    from lm_eval.tasks import TaskManager

    lister = sys.modules[TaskManager.__module__]  # which lists what lies in its folder
    folder = tmp_path_factory.mktemp("tasks")
    for name in ("super_glue", "glue", "hellaswag", "winogrande", "arc", "openbookqa"):
        shutil.copytree(Path(lister.__file__).parent / name, folder / name)
    monkeypatch.setattr(lister, "__file__", str(folder / "__init__.py"))


def error_line(capsys, status: int) -> str:
    """Return the one line in which a command that ended with ``status`` said what is wrong."""
    out, err = capsys.readouterr()
    (line,) = [line for line in err.splitlines() if "error: " in line]
    assert status == 2 and "Traceback" not in out + err
    return line


def everything(folder: Path) -> dict[str, tuple[int, bytes] | None]:
    """Return each path in ``folder``, and of files when they were changed and what they hold."""
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) if p.is_file() else None for p in folder.rglob("*")}


def saved_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a saved folder, whatever the number of its files."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


# ------------------------------------------------------------------------------------------- a tiny text and model


def tiny_sentences(count: int, seed: int = 0) -> str:
    """Return ``count`` sentences of made-up words, always the same for a seed."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abdeiklmnorstu", k=draw.randint(2, 7))) for _ in range(150)]
    return "\n".join(" ".join(draw.choices(words, k=draw.randint(4, 12))).capitalize() + "." for _ in range(count))


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator([tiny_sentences(300)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory) -> Path:
    """Return a text file of a few thousand tokens, beside another, other.txt."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "other.txt").write_text(tiny_sentences(60, seed=4), encoding="utf-8")
    (folder / "tiny.txt").write_text(tiny_sentences(70, seed=1), encoding="utf-8")
    return folder / "tiny.txt"


@pytest.fixture(scope="session")
def other_text(tiny_text) -> Path:
    return tiny_text.parent / "other.txt"


def tiny_llama() -> LlamaForCausalLM:
    """Return a random LLaMA of three blocks with grouped-query attention, always the same."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.15,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, tiny_tokenizer) -> Path:
    """Return the folder of a saved tiny LLaMA and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def run_inputs(tmp_path_factory, tiny_folder, tiny_text, other_text) -> Path:
    """Return a folder with what a run reads: tiny-llama, text.txt and other.txt."""
    folder = tmp_path_factory.mktemp("inputs")
    shutil.copytree(tiny_folder, folder / "tiny-llama")
    shutil.copy(tiny_text, folder / "text.txt")
    shutil.copy(other_text, folder / "other.txt")
    return folder


@pytest.fixture
def tiny_model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture
def tiny_weights(tiny_model) -> Weights:
    return weights_of(tiny_model)


@pytest.fixture
def tiny_windows() -> torch.Tensor:
    """Return 7 windows of 24 token ids, [7, 24]."""
    return torch.randint(3, 300, (7, 24), generator=torch.Generator().manual_seed(5))


# --------------------------------------------------------------------------------------------------------- SmolLM2


@pytest.fixture(scope="session")
def smollm2_source():
    """Return SmolLM2-135M, converted to a folder at the first run; its package is a requirement of the tests."""
    return locate("smollm2-135m", str(ROOT / "llm_weights"))


def on_cpu(source, dtype: torch.dtype = torch.float32):
    """Return the model on the CPU, also where CUDA is present: figures and devices are then the same everywhere."""
    return load_llm(source, dtype, torch.device("cpu"))


@pytest.fixture
def smollm2(smollm2_source):
    """Return a fresh SmolLM2-135M in float32, on the CPU."""
    return on_cpu(smollm2_source)


@pytest.fixture(scope="session")
def smollm2_weights(smollm2_source) -> Weights:
    """Return the dense SmolLM2's weights, to be read only."""
    return weights_of(on_cpu(smollm2_source))
