"""Facts about what happened, written outside the pipeline: one append-only file for each process.

A line is written by one ``write`` call to a file opened for appending, so a SIGKILL leaves whole lines.  The truth
about commits and effects is in the database; the ledger adds when, and what the broker said.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Event", "Ledger", "LedgerReader"]


@dataclass(frozen=True, slots=True)
class Event:
    """kind: committed, rolled_back, confirmed, delivered.  at: wall-clock seconds.  ids: of messages; of orders where
    they were rolled back.
    """

    kind: str
    at: float
    ids: tuple[str, ...] = ()


class Ledger:
    """One process's own file; it is there when the process has come to its work."""

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"{name}-{os.getpid()}.ndjson"
        self._file: int | None = None

    def begin(self) -> int:
        """The process has reached its broker; the file."""
        if self._file is None:
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        return self._file

    def write(self, kind: str, ids: Sequence[str] = ()) -> None:
        """Append one line."""
        os.write(self.begin(), json.dumps([kind, time.time(), list(ids)]).encode() + b"\n")


@dataclass(slots=True)
class LedgerReader:
    """Reads all files of a folder, again and again, each time only what is new."""

    folder: Path
    events: list[Event] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    _offsets: dict[Path, int] = field(default_factory=dict)
    _receivers: set[Path] = field(default_factory=set)

    def read(self) -> Sequence[Event]:
        """The events since the last call."""
        new = [event for path in sorted(self.folder.glob("*.ndjson")) for event in self._tail(path)]
        self.events += new
        for event in new:
            self.counts[event.kind] += max(1, len(event.ids))
        return new

    def is_ready(self, name: str, pid: int) -> bool:
        """Whether the process has come to its work."""
        return self._path(name, pid).exists()

    def has_received(self, name: str, pid: int) -> bool:
        """Whether the process was given a message."""
        return self._path(name, pid) in self._receivers

    def _path(self, name: str, pid: int) -> Path:
        return self.folder / f"{name}-{pid}.ndjson"

    def _tail(self, path: Path) -> Iterator[Event]:
        with path.open("rb") as file:
            file.seek(self._offsets.get(path, 0))
            for line in file:
                if not line.endswith(b"\n"):
                    break  # its writer is in the middle of it, or died there
                self._offsets[path] = self._offsets.get(path, 0) + len(line)
                kind, at, ids = json.loads(line)
                if kind == "delivered":
                    self._receivers.add(path)
                yield Event(kind, at, tuple(ids))
