"""Progress file of unfinished work: one appended, durable line per finished thing, so that a killed run continues."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from lib.core.files import reading, sync_folder, writing


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
