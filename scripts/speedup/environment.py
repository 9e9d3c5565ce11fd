"""Virtual environment of DeepSparse, whose Python and packages are older than the main environment's."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lib.core import cpu
from lib.core.errors import UserError

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ENGINE = "deepsparse"
VERSION = "1.8.0"
ENGINE_VENV = ROOT / ".venv-deepsparse"
ENGINE_REQUIREMENTS = HERE / "requirements-deepsparse.txt"
OLDEST, NEWEST = (3, 8), (3, 11)  # Pythons for which the engine's package was built
WITHOUT = "to measure without it, leave out --deepsparse"
LICENCE = (
    "DeepSparse (discontinued) is closed source: its licence allows evaluation only, no use in production and no\n"
    "redistribution. It comes from the package index into {}; nothing of it is part of this repository."
)


def check_deepsparse() -> None:
    """Refuse, before anything is created, a machine or Python on which the engine cannot be installed."""
    check_machine(platform.machine(), set(cpu.processor().get("flags", "").split()))
    if not _is_made(ENGINE_VENV, ENGINE_REQUIREMENTS):
        find_python()


def deepsparse_python() -> str:
    """Return the interpreter of ``.venv-deepsparse``; created if needed, after printing its licence.

    Raises:
        UserError: a machine or Python on which the engine cannot run, or an unreachable package index.
    """
    check_deepsparse()
    if not _is_made(ENGINE_VENV, ENGINE_REQUIREMENTS):
        print(LICENCE.format(ENGINE_VENV), file=sys.stderr)
        _make_venv(find_python(), ENGINE_VENV)
        _install(ENGINE_VENV, ENGINE_REQUIREMENTS)
    check_version(ENGINE_VENV)
    return str(_python(ENGINE_VENV))


def check_machine(machine: str, flags: set[str]) -> None:
    """Refuse a processor that the engine does not support."""
    if machine.lower() not in ("x86_64", "amd64"):
        raise UserError(None, f"{ENGINE}: runs on x86-64 only and this machine is {machine}; {WITHOUT}")
    if "avx2" not in flags:
        raise UserError(None, f"{ENGINE}: needs a processor with AVX2 and this one has none; {WITHOUT}")


def find_python() -> str:
    """Return a Python for which the engine was built: $DEEPSPARSE_PYTHON, this one, or another installed one."""
    asked = os.environ.get("DEEPSPARSE_PYTHON")
    names = [asked] if asked else [sys.executable, *(f"python3.{minor}" for minor in (11, 10, 9, 8)), "python3"]
    seen = []
    for name in names:
        path = shutil.which(name)
        version = _python_version(path) if path else None
        if version and OLDEST <= version <= NEWEST:
            return path
        seen.append(f"{name} is {'.'.join(map(str, version))}" if version else f"{name} not found")
    raise UserError(
        None,
        f"{ENGINE}: needs Python 3.8 to 3.11, and {', '.join(seen)}; install one and set "
        f"DEEPSPARSE_PYTHON=/path/to/python3.11, or {WITHOUT}",
    )


def _python_version(path: str) -> tuple[int, int] | None:
    done = subprocess.run([path, "-c", "import sys; print(*sys.version_info[:2])"], capture_output=True, text=True)
    return tuple(map(int, done.stdout.split())) if done.returncode == 0 else None


def check_version(folder: Path) -> None:
    """Refuse an environment with another release of the engine: 1.9.0 is a package without an engine."""
    code = f"import importlib.metadata as m; print(m.version('{ENGINE}'))"
    done = subprocess.run([str(_python(folder)), "-c", code], capture_output=True, text=True)
    found = done.stdout.strip() or "missing"
    if found != VERSION:
        stub = ", an end-of-life stub without an engine" if found.startswith("1.9") else ""
        raise UserError(
            None,
            f"{ENGINE}: {folder} has {found}{stub}; {VERSION} is the last that runs, "
            f"type: rm -r {folder}, and pin {ENGINE}=={VERSION} in scripts/speedup/requirements-deepsparse.txt",
        )


def _check_pin(requirements: Path) -> None:
    pins = [line.split("#")[0].strip() for line in requirements.read_text().splitlines()]
    for pin in pins:
        if pin.startswith(ENGINE) and pin != f"{ENGINE}=={VERSION}":
            raise UserError(
                None,
                f"{requirements}: asks for {pin}; 1.9.0 is an end-of-life stub that refuses to install, "
                f"write {ENGINE}=={VERSION}",
            )


def _python(folder: Path) -> Path:
    return folder / "bin" / "python"


def _stamp(folder: Path) -> Path:
    return folder / "installed.txt"


def _is_made(folder: Path, requirements: Path) -> bool:
    """Return whether the environment matches its requirements file; after a change or a failed install it does not."""
    _check_pin(requirements)
    return _stamp(folder).is_file() and _stamp(folder).read_bytes() == requirements.read_bytes()


def _make_venv(python: str, folder: Path) -> None:
    print(f"making {folder.name} with {python}", file=sys.stderr)
    done = subprocess.run([python, "-m", "venv", "--clear", str(folder)], capture_output=True, text=True)
    if done.returncode:
        hint = "on Debian: apt-get install python3-venv"
        raise UserError(None, f"{folder}: {python} -m venv failed ({_last_line(done)}); {hint}")


def _install(folder: Path, requirements: Path) -> None:
    print(f"installing {requirements.name} into {folder.name}, once", file=sys.stderr)
    pip = [str(_python(folder)), "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
    done = subprocess.run([*pip, "-r", str(requirements)], capture_output=True, text=True)
    if done.returncode:
        hint = "is the package index reached?"
        raise UserError(None, f"{folder.name}: pip could not install {requirements.name} ({_last_line(done)}); {hint}")
    shutil.copy(requirements, _stamp(folder))


def _last_line(done: subprocess.CompletedProcess) -> str:
    return ((done.stderr or done.stdout).strip().splitlines() or ["no message"])[-1][:300]
