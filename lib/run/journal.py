"""Journal of finished blocks: a killed run resumes after its last complete block, and runs are never mixed."""

from __future__ import annotations

import json
import logging
import shutil
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

from lib import sparse
from lib.core import files, processes
from lib.core.digests import checksum, first_difference
from lib.core.errors import UserError, flag_name
from lib.models.safetensors_io import write_shard
from lib.models.weights import Weights

log = logging.getLogger(__name__)

# What made the model, in its finished folder.
MANIFEST = "pruning.json"
# What was finished, line by line; it stays there until all is measured, so that a stopped evaluation can be resumed.
PROGRESS = "progress.jsonl"
_RESTART = "add --restart to begin again"


def partial_folder(target: Path) -> Path:
    """Return the folder in which the model for ``target`` is built."""
    return target.with_name(f".{target.name}.partial")


def can_reopen(target: Path, restart: bool) -> bool:
    """Return whether a run resumes from its finished folder ``target``: it was stopped during its evaluation."""
    return not restart and not partial_folder(target).exists() and (target / PROGRESS).is_file()


def read_manifest(folder: Path) -> dict:
    """Return what made the pruned model in ``folder``, as main.py wrote it there; empty if it wrote nothing."""
    path = folder / MANIFEST
    with files.reading(path, field="model"):
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


class Journal:
    """The folder in which a pruned model is built, one shard per finished block.

    A block is finished when the progress file names its checksum and its rows; that line is written after the shard,
    both durably. The folder replaces ``target`` when all blocks are finished.
    With several processes, the main one reads and writes it and shares its contents with the others.

    Attributes:
        scratch: folder for files that need not outlive the run.
        finished: what was given to ``add`` with each finished block, by its index.
        failure: the error of a block that could not be written.
    """

    def __init__(self, target: Path, restart: bool = False) -> None:
        """Open the journal for ``target``, which no other process may have open; ``restart`` discards what it holds."""
        self.target, self.folder = target, partial_folder(target)
        self.scratch = self.folder / "scratch"
        self.finished: dict[int, list] = {}
        self.failure: UserError | None = None
        self._undo = ExitStack()  # of what is to be released in the end
        self._reopened = False  # whether the folder is a finished model that this run has not accepted yet
        self._progress: files.Progress  # in the main process only
        processes.on_main(lambda: self._open(restart))

    def _open(self, restart: bool) -> None:
        with ExitStack() as undo, files.writing(self.folder, "save_model"):
            undo.enter_context(files.locked(self.folder, "save_model"))
            with files.locked(self.target, wait=True):
                files.remove_leftovers(self.target)
            undo.callback(self._release)
            if restart and self.folder.exists():
                shutil.rmtree(self.folder)
            try:
                if can_reopen(self.target, restart):
                    self._reopen()
                self.folder.mkdir(exist_ok=True)
                self._progress = files.Progress(self.folder / PROGRESS)
            except UserError as error:
                raise UserError("save_model", None, error.message, _RESTART) from error
            for path in self.folder.glob(".*.tmp"):  # that a killed process was writing
                path.unlink()
            shutil.rmtree(self.scratch, ignore_errors=True)
            self._undo = undo.pop_all()

    def _reopen(self) -> None:
        """Turn the finished folder into the working folder again; a packed one is unpacked first, bit for bit."""
        if sparse.is_packed(self.target):
            if sparse.holds_int8(self.target):
                raise UserError(None, None, "its values are int8, from which the pruned weights do not come back")
            with files.new_folder(self.target) as folder:
                sparse.unpack_files(self.target, folder)
        self.target.rename(self.folder)
        self._reopened = True

    def _release(self) -> None:
        """Leave a finished folder that this run has not accepted as it was, and no empty one."""
        if self.folder.is_dir():
            shutil.rmtree(self.scratch, ignore_errors=True)
            if self._reopened:
                self.folder.rename(self.target)
            elif not any(self.folder.iterdir()):
                self.folder.rmdir()

    def close(self) -> None:
        """Release the folder for another run."""
        self._undo.close()

    def get(self, kind: str, key: str) -> Any:
        """Return a result of this run or of an earlier one, None if there is none; all processes must ask."""
        return processes.on_main(lambda: self._progress.get(kind, key))

    def put(self, kind: str, key: str, value: Any) -> None:
        """Store a result durably for a resumed run: any value that JSON can hold."""
        processes.on_main(lambda: self._progress.add(kind, key, value))

    def begin(self, identity: dict[str, Any]) -> None:
        """Resume where an earlier run with the same ``identity`` stopped, or start; another run is a UserError.

        The identity holds ``flags`` and ``versions`` by name, digests of the ``plan`` and the ``calibration`` windows,
        and the ``fingerprints`` of the dense weights by layer. Its ``bits``, by name, may differ, with a warning.
        """
        self.finished = processes.on_main(lambda: self._begin(json.loads(json.dumps(identity))))
        if self.finished:
            log.info("resuming after block %d of the run in %s", max(self.finished), self.folder)

    def _begin(self, now: dict) -> dict[int, list]:
        """Return the rows of the blocks that are whole, and remove all else that would become part of the model."""
        before, finished = self._progress.get("run", "identity"), {}
        if before is None:
            self._progress.add("run", "identity", now)
        elif difference := _difference(before, now):
            problem = f"an unfinished run there is another one, {difference}"
            raise UserError("save_model", self.target, problem, _RESTART)
        self._reopened = False  # accepted
        for name, value in now.get("bits", {}).items():
            if before and before.get("bits", {}).get(name) != value:
                text = "%s was %s and is %s now: later blocks are rounded otherwise than the finished ones"
                log.warning(text, name, before.get("bits", {}).get(name), value)

        for index in count():
            entry, path = self._progress.get("block", str(index)), self.path(index)
            if entry is None:
                break
            if not path.is_file() or checksum(path) != entry["sha256"]:
                log.warning("%s is damaged: its block and those after it are pruned again", path)
                break
            finished[index] = entry["rows"]
        for path in {*self.folder.glob("*.safetensors")} - {self.path(index) for index in finished}:
            path.unlink()
        return finished

    def path(self, index: int) -> Path:
        """Return the file of a block."""
        return self.folder / f"model-block-{index:05d}.safetensors"

    def add(self, index: int, weights: Weights, rows: list) -> None:
        """Store a lent block durably: its shard, then the line that makes it a finished one."""

        def store() -> None:
            sha256 = write_shard(self.path(index), weights.tensors(index), weights.save_dtypes(index))
            self._progress.add("block", str(index), {"sha256": sha256, "rows": rows})

        processes.on_main(store)
        weights.set_block_file(index, self.path(index))
        self.finished[index] = rows

    def finish(self, packed: str | None = None) -> None:
        """Replace the target by the finished folder, ``packed`` with such values or unchanged."""
        with files.writing(self.target, "save_model"):
            shutil.rmtree(self.scratch, ignore_errors=True)
            made_by = self._progress.get("run", "identity")
            files.write_atomically(self.folder / MANIFEST, json.dumps(made_by, indent=1) + "\n")
            if packed:
                with files.new_folder(self.target) as folder:
                    sparse.pack_files(self.folder, folder, packed)
                shutil.rmtree(self.folder)
            else:
                files.replace_folder(self.folder, self.target)


def _difference(before: dict, now: dict) -> str | None:
    """Return in words what the identity of an earlier run differs in, None if it is the same."""
    for kind in ("flags", "versions"):
        for name, value in now[kind].items():
            earlier = before[kind].get(name)
            if earlier != value:
                return f"{flag_name(name) if kind == 'flags' else name} was {earlier} and is {value} now"
    if before["calibration"] != now["calibration"]:
        return "its calibration windows were others"
    if layer := first_difference(before["fingerprints"], now["fingerprints"]):
        return f"the dense weights were others (see {layer})"
    return None if before["plan"] == now["plan"] else "its plan of ratios was another"
