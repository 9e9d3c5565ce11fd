"""Output files and folders: checked before work begins, written under a temporary name, durable when they appear."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from lib.core import processes
from lib.core.errors import UserError, first_line

ROOT = Path(__file__).resolve().parents[2]


def in_repository(name: str) -> str:
    """Return the path of ``name`` in the repository: relative if the command is started there, else absolute."""
    return name if Path.cwd() == ROOT else str(ROOT / name)


def readable(size: float) -> str:
    """Return a size in bytes with three digits: ``1.50MiB``."""
    return tqdm.format_sizeof(size, "iB", 1024)


def check_writable(field: str, folder: Path, need_bytes: int = 0) -> None:
    """Refuse a ``folder`` that cannot be made or written, or whose disk has less than ``need_bytes`` free."""
    if not processes.is_main():
        return
    with writing(folder, field):
        place = next(path for path in (folder, *folder.parents) if path.exists())
        with tempfile.TemporaryFile(dir=place):
            free = shutil.disk_usage(place).free
    if free < need_bytes:
        problem = f"the disk is too full, {readable(need_bytes)} are needed and {readable(free)} are free"
        raise UserError(field, folder, problem, "give a folder on another disk")


def check_folder(field: str | None, folder: Path) -> None:
    """Refuse a ``folder`` to write where a file or a link stands, which would be moved out of the way and be lost."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        problem = f"is {'a link' if folder.is_symlink() else 'not a folder'}, and would be replaced"
        raise UserError(field, folder, problem, "move it away, or give another folder")


@contextmanager
def writing(path: Path, field: str | None = None) -> Iterator[None]:
    """Turn a failure to write ``path``, such as a full disk, into a UserError."""
    try:
        yield
    except Exception as error:  # safetensors and tokenizers have classes of their own for what the system refuses
        if not isinstance(error, OSError) and "os error" not in str(error):
            raise
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(field, path, f"cannot be written ({reason})") from error


@contextmanager
def reading(
    path: Path, problem: str = "is damaged", field: str | None = None, fix: str | None = None
) -> Iterator[None]:
    """Turn whatever readers raise on a missing or damaged ``path`` into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # json, numpy and safetensors each have several, and what they return may be anything
        raise UserError(field, path, f"{problem} ({first_line(error)})", fix) from error


@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """Yield a file that durably takes the place of ``path`` when the with statement ends without an error."""
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tmp.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(tmp, path)
            sync_folder(path.parent)
        finally:
            tmp.unlink(missing_ok=True)


def write_atomically(path: Path, content: str) -> None:
    """Write ``content`` to a file as ``atomic`` does; only the main process writes."""
    if processes.is_main():
        with atomic(path) as file:
            file.write(content.encode())


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1):
    """Return a matplotlib figure of ``width`` x ``height`` inches, and an array of its axes, row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).ravel()


def draw_losses(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], title: str | None = None):
    """Return a matplotlib figure of training: by label the steps, and the loss at each of them."""
    figure, (axes,) = new_figure(6, 4)
    for label, (steps, losses) in curves.items():
        axes.plot(steps, losses, marker=".", linewidth=1, label=label)
    axes.set(xlabel="optimizer step", ylabel="loss", title=title)
    axes.legend()
    return figure


def save_figure(figure, path: Path) -> None:
    """Write a matplotlib ``figure`` as a PNG; only the main process writes."""
    if processes.is_main():
        with atomic(path) as file:
            figure.savefig(file, dpi=130, format="png")


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Progress:
    """What was finished so far, in a file of lines ``{"kind": ..., "key": ..., "value": ...}``.

    A process that is killed while it writes leaves a last line that is cut off; the next line takes its place. Of two
    lines with the same kind and key, the later one counts. Only one process at a time may add to a file.
    """

    def __init__(self, path: Path) -> None:
        """Read the file ``path``, which the first ``add`` makes; a UserError if it is damaged before its last line."""
        self.path = path
        self._values: dict[tuple[str, str], Any] = {}
        content = path.read_bytes() if path.exists() else b""
        self._size = content.rfind(b"\n") + 1  # of the lines that are whole

        with reading(path):
            for line in content[: self._size].splitlines():
                entry = json.loads(line)
                self._values[entry["kind"], entry["key"]] = entry["value"]

    def add(self, kind: str, key: str, value: Any) -> None:
        """Append a finished thing, any ``value`` that JSON can hold; it then survives a kill and a power failure.

        A full disk is a UserError, and earlier lines stay.
        """
        line = json.dumps({"kind": kind, "key": key, "value": value}).encode() + b"\n"
        with writing(self.path), open(os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o666), "wb") as file:
            file.truncate(self._size)
            file.seek(self._size)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
            if not self._size:
                sync_folder(self.path.parent)

        self._size += len(line)
        self._values[kind, key] = value

    def get(self, kind: str, key: str) -> Any:
        """Return the value of a finished thing, None if it is not finished."""
        return self._values.get((kind, key))


@contextmanager
def locked(folder: Path, field: str | None = None, wait: bool = False) -> Iterator[None]:
    """Hold a ``folder``, which need not exist yet, against other processes, until this one dies at the latest.

    If another process holds it, ``wait`` for that, or raise a UserError.
    """
    from filelock import FileLock, Timeout

    path = folder.with_name(f".{folder.name.removeprefix('.')}.lock")
    lock = FileLock(path, timeout=-1 if wait else 0)
    with writing(path, field):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            fix = "wait for it, or give another folder"
            raise UserError(field, folder, "another process is at work there", fix) from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # before the release: a process that gets the lock finds its own file there
        lock.release()


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder that takes the place of ``target`` when the with statement ends without an error.

    It waits while another process does the same. A full disk, a path that cannot be written, or something else than a
    folder there is a UserError.
    """
    check_folder(None, target)
    folder = target.with_name(f".{target.name}.new")
    with locked(target, wait=True), writing(target):
        remove_leftovers(target)
        try:
            folder.mkdir()
            yield folder
            for path in folder.rglob("*"):  # safetensors makes its files private
                if path.is_file():
                    path.chmod(folder.stat().st_mode & 0o666)
            replace_folder(folder, target)
        finally:
            remove_leftovers(target)


def replace_folder(folder: Path, target: Path) -> None:
    """Put ``folder`` durably in the place of ``target``; killed in between, ``remove_leftovers`` loses neither."""
    if target.exists():
        target.rename(target.with_name(f".{target.name}.old"))
    folder.rename(target)
    sync_folder(target.parent)
    remove_leftovers(target)


def remove_leftovers(target: Path) -> None:
    """Remove what a killed process left beside ``target``; an old one that had no new one yet is brought back."""
    old, new = (target.with_name(f".{target.name}.{age}") for age in ("old", "new"))
    if old.exists() and not target.exists():
        old.rename(target)
    for leftover in (old, new):
        shutil.rmtree(leftover, ignore_errors=True)
