"""The shape of the repository: what lies at the top, how fast commands answer, and that every command parses."""

import ast
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from conftest import ROOT, settings

import main
from image_classifiers import main as image_main
from lora_ft import finetune_lm
from lora_ft.training import TrainerParser
from scripts.make_docs import has_parser, parser_of

TOP = (
    "main.py lib scripts data docs lora_ft image_classifiers README.md INSTALL.md CONTRIBUTING.md CHANGELOG.md "
    "LICENSE requirements.txt tests .ci pyproject.toml .gitignore"
)

ROOMS = sorted((ROOT / "lib").rglob("*.py"))
COMMANDS = sorted(p for folder in ("", "lora_ft", "image_classifiers") for p in (ROOT / folder).glob("*.py"))
SLOW_TO_IMPORT = ["torch", "transformers", "accelerate", "datasets", "lm_eval", "weightwatcher", "timm", "peft"]


def tracked() -> list[str]:
    """Return the files that git keeps, and those that it would: neither ignored nor committed yet."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in out.split("\0") if name and (ROOT / name).exists()]


@pytest.mark.parametrize("program", ["main.py", "image_classifiers/main.py", "lora_ft/merge.py"])
@pytest.mark.parametrize("flags", [["--help"], ["--no_such_flag"]], ids=str)
def test_help_and_a_wrong_flag_are_answered_before_torch_is_imported(program, flags):
    code = "import runpy, sys\nsys.argv = sys.argv[1:]\ntry: runpy.run_path(sys.argv[0], run_name='__main__')\n"
    code += f"finally: print([m for m in {SLOW_TO_IMPORT} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code, program, *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]" and done.returncode == (0 if flags == ["--help"] else 2), done.stderr


def longest_function(path: Path) -> tuple[int, str]:
    functions = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]
    return max(((n.end_lineno - n.lineno + 1, n.name) for n in functions), default=(0, ""))


@pytest.mark.parametrize("path", [*ROOMS, *COMMANDS], ids=lambda p: str(p.relative_to(ROOT)))
def test_functions_can_be_read_at_a_glance(path):
    # What ruff has no rule for. The rest of the style and the order of the rooms are in pyproject.toml.
    assert longest_function(path)[0] <= 70, longest_function(path)
    assert ".cuda(" not in path.read_text(), "the weight's own device, whatever it is"


ASKED_IN_ONE_PLACE = [
    "/proc/cpuinfo", "os.cpu_count", "sched_getaffinity", "virtual_memory", "getrlimit", "mem_get_info",
    "cuda.is_available", "cuda.device_count",
]  # fmt: skip


def test_what_the_machine_can_do_is_asked_in_one_place():
    # Tests fix the answers there (tests/machines.py), and could not do so elsewhere.
    files = {*ROOMS, *COMMANDS, *(ROOT / "scripts").rglob("*.py")}
    files -= {ROOT / "lib/core/cpu.py", ROOT / "lib/models/memory.py"}
    asked = {path: [call for call in ASKED_IN_ONE_PLACE if call in path.read_text()] for path in files}
    assert {path: calls for path, calls in asked.items() if calls} == {}


def test_main_is_the_experiment_and_no_more():
    assert len((ROOT / "main.py").read_text().splitlines()) <= 130
    scripts = (ROOT / "scripts").rglob("*.py")
    importers = {p.name for p in scripts if re.search(r"^(import|from) main\b", p.read_text(), re.M)}
    assert importers <= {"sweep.py"}


def test_rooms_are_few_small_and_all_in_the_contract():
    rooms = {path.name for path in (ROOT / "lib").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms == {*"core models spectra sparse calibration pruning evaluation recovery allocation cli run".split()}
    for room in [ROOT / "lib" / name for name in (*rooms, "sparse/csrc")]:
        assert len([path for path in room.iterdir() if path.is_file()]) <= 9, room
    contract = (ROOT / "pyproject.toml").read_text().partition("[[tool.importlinter.contracts]]")[2]
    assert set(re.findall(r"lib\.(\w+)", contract)) == rooms


def test_no_public_name_means_two_things():
    defined = defaultdict(list)
    for path in (path for folder in ("lib", "lora_ft", "image_classifiers") for path in (ROOT / folder).rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            for name in [*names, *([node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else [])]:
                defined[name].append(path.name)
    once_a_command = {"PARSER", "run", "main"}  # what a command has, each its own
    twice = {name: paths for name, paths in defined.items() if len(paths) > 1 and not name.startswith("_")}
    assert {name: paths for name, paths in twice.items() if name not in once_a_command | {"log"}} == {}


def test_the_top_level_holds_nothing_else():
    assert {name.split("/")[0] for name in tracked()} <= set(TOP.split())


def test_no_large_file_is_committed():
    assert {name: size for name in tracked() if (size := (ROOT / name).stat().st_size) > 300_000} == {}


# ------------------------------------------------------------------------------------------------------ the commands

SCRIPTS = [name for name in tracked() if name.endswith(".sh") or name.startswith(".ci/")]


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_parses(name):
    first = (ROOT / name).read_text().splitlines()[0]
    assert re.fullmatch(r"#!.*\b(ba)?sh|# .*", first), "says what runs it, or that it is sourced"
    done = subprocess.run(["bash", "-n", name], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_command_in_the_scripts_parses():
    # Commands of the programs in scripts, as far as their flags go: values may be variables.
    programs = [path for path in COMMANDS if has_parser(path)]
    known = {str(path.relative_to(ROOT)): set(parser_of(path)._option_string_actions) for path in programs}
    known["lora_ft/finetune_lm.py"] |= set(TrainerParser(finetune_lm.PARSER)._option_string_actions)
    for name in SCRIPTS:
        for line in (ROOT / name).read_text().replace("\\\n", " ").splitlines():
            words = [] if line.lstrip().startswith("#") else line.split()
            for program in known.keys() & set(words):
                rest = words[words.index(program) + 1 :]
                flags = {word.split("=")[0] for word in rest if word.startswith("--")}
                assert flags <= known[program], (name, flags - known[program])


@pytest.mark.parametrize("parser", [main.PARSER, image_main.PARSER], ids=lambda parser: parser.prog)
def test_help_explains_every_flag_in_groups(parser):
    assert all(action.help for action in parser._actions)
    text = parser.format_help()
    for group in ("model", "data", "pruning", "allocation", "evaluation", "output"):
        assert re.search(rf"^{group}\b.*:$", text, flags=re.M), group


PUBLISHED_DEFAULTS = {
    "seed": 0, "nsamples": 128, "sparsity_ratio": 0, "sparsity_type": "unstructured",
    "use_variant": False, "ww_metric": "alpha_peak", "epsilon": 0.3, "mapping_type": "block_wise",
    "eval_zero_shot": False,
    # fixed or new
    "save": "results", "eval_wikitext": True, "dtype": "auto", "seqlen": 2048, "calib_data": "c4",
    "eval_data": "wikitext2", "eval_windows": None, "num_fewshot": 0, "limit": None, "eval_batch_size": "auto",
    "tasks": "boolq,rte,hellaswag,winogrande,arc_easy,arc_challenge,openbookqa", "include_path": None,
}  # fmt: skip


def test_defaults_are_the_published_ones():
    args = settings("--model m")
    assert {name: getattr(args, name) for name in PUBLISHED_DEFAULTS} == PUBLISHED_DEFAULTS


def test_published_command_is_understood():
    command = (
        "--model meta-llama/Llama-2-7b-hf --cache_dir llm_weights/ --prune_method wanda_ww --sparsity_ratio 0.7 "
        "--save results/ --ww_metric alpha_peak --ww_metric_cache ./data/llama2-7b-hf/ --epsilon 0.3"
    )
    task = settings(command).task()
    assert (task.method, task.target, task.nm) == ("wanda_ww", 0.7, None)
