"""Output files and folders: checked before work begins, written to a temporary name and renamed."""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from lib.core import processes
from lib.core.errors import UserError, first_line

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[2]


def in_repository(name: str) -> str:
    """Return the path of ``name`` in the repository: relative if the command is started there, else absolute."""
    return name if Path.cwd() == ROOT else str(ROOT / name)


def prepare(field: str, folder: Path, need_bytes: int = 0) -> None:
    """Refuse a ``folder`` that is not writable or whose disk has less than ``need_bytes`` free; leave no trace."""
    if not processes.first():
        return
    made = [path for path in (folder, *folder.parents) if not path.exists()]  # innermost first
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except OSError as error:
        reason = error.strerror or error
        raise UserError(field, f"{folder}: cannot be written ({reason}); give another folder") from error
    finally:
        for path in made:
            with suppress(OSError):
                path.rmdir()
    if free < need_bytes:
        short = f"{readable(need_bytes)} are needed and {readable(free)} are free"
        raise UserError(field, f"{folder}: the disk is too full, {short}; give a folder on another disk")


def check_file(field: str, path: Path) -> None:
    """Refuse a ``path`` to write where something else than an ordinary file stands, such as a folder or a device."""
    if path.is_dir():
        raise UserError(field, f"{path}: is a folder; give a file")
    if os.path.lexists(path) and not path.is_file():
        raise UserError(field, f"{path}: is not an ordinary file, and would be replaced by one; give another file")


def check_folder(field: str | None, folder: Path) -> None:
    """Refuse a ``folder`` to write where a file or a link stands, which would be moved out of the way and be lost."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        what = "a link" if folder.is_symlink() else "not a folder"
        raise UserError(field, f"{folder}: is {what}, and would be replaced; move it away, or give another folder")


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**24):
            digest.update(piece)
    return digest.hexdigest()


def readable(size: float) -> str:
    """Return a human-readable size in bytes: ``1.5 MiB``."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "bytes" or size >= 100 else f"{size:.1f} {unit}"


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` under a temporary name beside ``path`` and rename it."""
    write_files(path.parent, {path.name: text})


def write_files(folder: Path, texts: Mapping[str, str]) -> None:
    """Write each of ``texts`` {file name: content} to ``folder``, all of them or none; only the first process writes.

    Raises:
        UserError: the disk is full or the folder cannot be written; existing files are left as they are.
    """
    if not processes.first():
        return
    written: dict[Path, Path] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            tmp = folder / f".{name}.{os.getpid()}"
            written[tmp] = folder / name
            tmp.write_text(text, encoding="utf-8")
        for tmp, path in written.items():
            tmp.rename(path)
    except OSError as error:
        for tmp in written:
            with suppress(OSError):
                tmp.unlink()
        raise UserError(None, f"{folder / name}: cannot be written ({error.strerror or error})") from error


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``target`` that replaces it when the with statement ends without an error.

    Leftovers of killed processes' attempts at the same target are removed, with a line that names them.

    Raises:
        UserError: the disk is full, the path is not writable, or something else than a folder stands there.
    """
    check_folder(None, target)
    tmp = target.with_name(f".{target.name}-{_me()}")
    old = target.with_name(f".{target.name}-old-{_me()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        tmp.mkdir()
        yield tmp
        for path in tmp.rglob("*"):  # safetensors makes its files private
            if path.is_file():
                path.chmod(tmp.stat().st_mode & 0o666)
        if target.exists():
            target.rename(old)
        try:
            tmp.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
    except Exception as error:  # safetensors has its own error class for a full disk
        if not isinstance(error, OSError) and "os error" not in str(error):
            raise
        raise UserError(None, f"{target}: the model cannot be saved there ({first_line(error)})") from error
    finally:
        for leftover in (tmp, old):
            shutil.rmtree(leftover, ignore_errors=True)


def _me() -> str:
    return f"{socket.gethostname()}-{os.getpid()}"


def _remove_leftovers(target: Path) -> None:
    for path in target.parent.glob(f".{glob.escape(target.name)}-*"):
        owner = re.fullmatch(r"(?:old-)?(.+)-(\d+)", path.name.removeprefix(f".{target.name}-"))
        if not owner or not path.is_dir() or owner[1] != socket.gethostname():  # of another machine: unknown
            continue
        if not is_alive(int(owner[2])):
            if path.name.startswith(f".{target.name}-old-") and not target.exists():  # killed between two renames
                path.rename(target)
                continue
            log.warning("%s was left by a process that was killed: removed", path)
            shutil.rmtree(path, ignore_errors=True)


def is_alive(process: int) -> bool:
    """Return whether a process on this machine is running."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def save_figure(figure, path: Path, dpi: int) -> None:
    """Write a matplotlib ``figure`` as a PNG, under a temporary name first; only the first process writes.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    if not processes.first():
        return
    tmp = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(tmp, dpi=dpi, format="png")
        tmp.rename(path)
    except OSError as error:
        tmp.unlink(missing_ok=True)
        raise UserError(None, f"{path}: cannot be written ({error.strerror or error})") from error
