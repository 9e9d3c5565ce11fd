"""Journal of finished blocks: a killed run resumes after its last complete block, and runs are never mixed."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lib import sparse
from lib.core import digests, processes
from lib.core.errors import UserError
from lib.core.files import checksum, is_alive, new_folder
from lib.core.lazy import torch
from lib.models import safetensors_io
from lib.pruning.walk import LayerReport

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

MANIFEST = "pruning.json"  # stays in the finished folder: what made the model
_LOCK = ".lock"
_WRITTEN_WITHIN = 10  # seconds: an empty lock that is older was left by a process that died as it made it


class Identity(NamedTuple):
    """Identity that a run must share to be resumed: in words for errors, and as the values compared."""

    flags: Mapping[str, object]
    plan: str
    calibration: str
    versions: Mapping[str, str]
    fingerprints: Mapping[str, str]


def _is_manifest(found: object) -> bool:
    """Return whether ``found``, as read from a file, has a manifest's parts and those have theirs."""
    try:
        identity, blocks, notes = found["identity"], found["blocks"], found.get("notes", {})
        identities = [Identity(**identity)] if identity else []
        marks = [mark for one in identities for mark in one.fingerprints.values()]
        parts = [(part, dict) for one in identities for part in (one.flags, one.versions)]
        parts += [(notes, dict), *((note["found"], dict) for note in notes.values())]
        for key, about in blocks.items():
            parts += [(int(key), int), (about["shard"], str), (about["sha256"], str), (about["rows"], list)]
            parts += [(row[5], (list, type(None))) for row in about["rows"]]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        return False
    return all(isinstance(part, kind) for part, kind in parts) and all(map(digests.is_fingerprint, marks))


def partial_folder(target: Path) -> Path:
    """Return the folder in which the model for ``target`` is built."""
    return target.with_name(f".{target.name}.partial")


def can_take_back(target: Path, restart: bool, unmeasured: bool) -> bool:
    """Return whether a run resumes from its finished folder ``target``; for the arguments see ``Journal``."""
    return unmeasured and not restart and not partial_folder(target).exists() and (target / MANIFEST).is_file()


def digest(value: object) -> str:
    """Return a hash of a tensor's values or of any JSON value."""
    if isinstance(value, torch.Tensor):
        data = value.cpu().contiguous().numpy().tobytes()
    else:
        data = json.dumps(value, sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()[:32]


class Journal:
    """The folder in which a pruned model is built, one shard per finished block.

    A block is finished when the manifest names its shard, its checksum and its rows; the manifest is written after the
    shard, both durably. The folder replaces ``target`` when all blocks are finished.
    With several processes, the first one reads and writes it and shares its contents with the others.
    """

    def __init__(self, target: Path, restart: bool = False, unmeasured: bool = False) -> None:
        """Open the journal for ``target``.

        Args:
            restart: discard an unfinished run.
            unmeasured: a complete model in ``target`` comes from a run stopped during its evaluation, which is resumed.
        """
        self.target, self.folder = target, partial_folder(target)
        self.finished: dict[int, dict] = {}
        self.notes: dict[str, object] = {}  # what a search found
        self.failure: UserError | None = None  # of a block that could not be written
        self._identity: dict = {}
        self._taken = False  # whether the folder is a whole model, taken back and not yet accepted
        self._found = processes.by_first(lambda: self._open(restart, unmeasured))

    def _open(self, restart: bool, unmeasured: bool) -> dict:
        """Lock the folder and return its manifest."""
        target = self.target
        try:
            if can_take_back(target, restart, unmeasured):
                self._take_back()
                self._taken = True
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock()
            for pattern in (".*.safetensors.*", f".{MANIFEST}.*", f"{_LOCK}.*"):
                for path in self.folder.glob(pattern):  # that a run which was killed had not renamed yet
                    path.unlink()
            if restart:
                for path in self.folder.iterdir():
                    if path.name != _LOCK:
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
            shutil.rmtree(self.scratch, ignore_errors=True)
        except OSError as error:
            text = f"{self.folder}: cannot be written ({error.strerror or error})"
            raise UserError("save_model", text) from error
        return self._read_manifest()

    def _take_back(self) -> None:
        """Turn the finished folder into the working folder again; a packed one's shards are restored bit for bit."""
        if not sparse.is_packed(self.target):
            self.target.rename(self.folder)
            return
        try:
            with new_folder(self.folder) as folder:
                sparse.unpack_files(self.target, folder)
        except UserError as error:
            raise UserError("save_model", f"{error.text}; add --restart to begin again") from error
        shutil.rmtree(self.target)

    @property
    def scratch(self) -> Path:
        """Folder for files that need not outlive the run."""
        return self.folder / "scratch"

    # ------------------------------------------------------------------------------------------------ who is at work

    def _lock(self) -> None:
        path, me = self.folder / _LOCK, {"host": socket.gethostname(), "process": os.getpid()}
        text = json.dumps(me)
        try:
            with path.open("x") as file:  # the file system decides between two that come at once
                file.write(text)
            return
        except FileExistsError:
            pass
        try:
            owner = json.loads(path.read_text())
            owner = owner if {"host": str, "process": int} == {key: type(value) for key, value in owner.items()} else {}
        except (OSError, ValueError, AttributeError):
            owner = {}
        elsewhere = owner.get("host") not in (None, me["host"])
        fresh = not owner and time.time() - path.stat().st_mtime < _WRITTEN_WITHIN
        if fresh or (owner and owner != me and (elsewhere or is_alive(owner.get("process", 0)))):
            who = f"process {owner.get('process')} on {owner.get('host')}" if owner else "another process"
            wayout = f"give another folder, or wait for it; if it is gone, delete {path}"
            raise UserError("save_model", f"{self.target}: {who} is at work there; {wayout}")
        if owner and owner != me:
            log.warning("%s: process %s, which was at work there, is gone; taking over", self.folder, owner["process"])
        tmp = path.with_name(f"{_LOCK}.{os.getpid()}")
        tmp.write_text(text)
        tmp.rename(path)

    def close(self) -> None:
        """Release the folder for another run."""
        if processes.first() and self.folder.is_dir():
            (self.folder / _LOCK).unlink(missing_ok=True)
            shutil.rmtree(self.scratch, ignore_errors=True)
            if self._taken and not self.target.exists():
                self.folder.rename(self.target)  # as whole as it was found
            elif not any(self.folder.iterdir()):
                self.folder.rmdir()

    def finish(self, packed: bool = False) -> None:
        """Replace the target by the finished folder, ``packed`` or unchanged."""
        if packed:
            with new_folder(self.target) as folder:
                sparse.pack_files(self.folder, folder)
                (folder / _LOCK).unlink(missing_ok=True)
            shutil.rmtree(self.folder)
            return
        shutil.rmtree(self.scratch, ignore_errors=True)
        old = self.target.with_name(f".{self.target.name}-old-{socket.gethostname()}-{os.getpid()}")
        try:
            (self.folder / _LOCK).unlink(missing_ok=True)
            if self.target.exists():
                self.target.rename(old)
            self.folder.rename(self.target)
            safetensors_io.sync_folder(self.target.parent)
        except OSError as error:
            text = f"{self.target}: cannot be written ({error.strerror or error})"
            raise UserError("save_model", text) from error
        shutil.rmtree(old, ignore_errors=True)

    # -------------------------------------------------------------------------------------------- what is known so far

    def _read_manifest(self) -> dict:
        path = self.folder / MANIFEST
        try:
            found = json.loads(path.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError):
            found = None
        if not _is_manifest(found):
            log.warning("%s is damaged: the run begins again", path)
            return {}
        return found

    def begin(self, identity: Identity) -> None:
        """Resume where an earlier run with the same identity stopped, or start.

        Raises:
            UserError: the folder holds blocks of a run with other flags, weights, calibration or versions.
        """
        self._identity = json.loads(json.dumps(identity._asdict()))
        self.finished = processes.by_first(self._whole_blocks)
        self._taken = False  # accepted
        if self.finished:
            log.info("resuming after block %d of the run in %s", max(self.finished), self.folder)
        self._write()
        processes.by_first(self._remove_others)

    def _remove_others(self) -> None:
        """Remove shards that belong to no finished block: they would become part of the model."""
        known = {about["shard"] for about in self.finished.values()}
        for path in self.folder.glob("*.safetensors"):
            if path.name not in known:
                path.unlink()

    def _whole_blocks(self) -> dict[int, dict]:
        """Return the manifest's entries for complete blocks."""
        before, finished = self._found.get("identity"), {}
        if not before:
            return finished
        self._check_same(before, self._identity)
        for key, about in sorted(self._found["blocks"].items(), key=lambda item: int(item[0])):
            if int(key) != len(finished):
                break
            path = self.path(int(key))
            if not path.is_file() or checksum(path) != about["sha256"]:
                log.warning("%s is damaged: its block and those after it are pruned again", path)
                break
            finished[int(key)] = about
        return finished

    def _check_same(self, before: dict, now: dict) -> None:
        other = [k for k in now["flags"] if before["flags"].get(k, now["flags"][k]) != now["flags"][k]]
        if other:
            what = f"--{other[0]} was {before['flags'][other[0]]} and is {now['flags'][other[0]]} now"
        elif before["calibration"] != now["calibration"]:
            what = "its calibration windows were others"
        elif before["versions"] != now["versions"]:
            name = next(n for n in now["versions"] if before["versions"].get(n) != now["versions"][n])
            what = f"{name} was {before['versions'].get(name)} and is {now['versions'][name]} now"
        elif changed := digests.first_difference(before["fingerprints"], now["fingerprints"]):
            what = f"the dense weights were others (see {changed})"
        elif before["plan"] != now["plan"]:
            what = "its plan of ratios was another"
        else:
            return
        text = f"{self.target}: an unfinished run there is another one, {what}; add --restart to begin again"
        raise UserError("save_model", text)

    def note(self, name: str, value: object) -> None:
        """Store an intermediate result for a resumed run."""
        self.notes[name] = value
        self._write()

    def noted(self, name: str) -> object:
        """Return an intermediate result of an earlier run."""
        return self._found.get("notes", {}).get(name)

    def _write(self) -> None:
        if not processes.first():
            return
        content = {
            "identity": self._identity or self._found.get("identity"),
            "blocks": self.finished if self._identity else self._found.get("blocks", {}),
            "notes": self._found.get("notes", {}) | self.notes,
        }
        path = self.folder / MANIFEST
        tmp = path.with_name(f".{MANIFEST}.{os.getpid()}")
        try:
            with tmp.open("w") as file:
                json.dump(content, file)
                file.flush()
                os.fsync(file.fileno())
            tmp.rename(path)
        except OSError as error:
            raise UserError("save_model", f"{path}: cannot be written ({error.strerror or error})") from error
        safetensors_io.sync_folder(self.folder)

    # ------------------------------------------------------------------------------------------------------- blocks

    def __contains__(self, index: int) -> bool:
        return index in self.finished

    def path(self, index: int) -> Path:
        """Return the file of a block."""
        return self.folder / f"model-block-{index:05d}.safetensors"

    def rows(self, index: int) -> list[LayerReport]:
        """Return the layer reports of a finished block."""
        return [
            LayerReport(r[0], tuple(r[1]), *r[2:5], None if r[5] is None else tuple(r[5]))
            for r in self.finished[index]["rows"]
        ]

    def tensors(self, index: int) -> dict[str, Tensor]:
        """Return the parameters of a finished block by name."""
        return {
            name: safetensors_io.read_tensor(entry)
            for name, entry in safetensors_io.read_header(self.path(index)).items()
        }

    def add(self, index: int, tensors: Mapping[str, Tensor], dtype: torch.dtype, rows: list[LayerReport]) -> None:
        """Store a block durably: its shard, then the manifest that names it."""
        path = self.path(index)
        sha256 = processes.by_first(lambda: safetensors_io.write_shard(path, tensors, dtype))
        self.finished[index] = {"shard": path.name, "sha256": sha256, "rows": [list(row) for row in rows]}
        processes.by_first(self._write)
