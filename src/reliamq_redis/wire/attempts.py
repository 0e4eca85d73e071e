"""What is known of the attempts at one message, as it is written down: beside its lane, and in the fields of one that
comes back after a long wait.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["NONE", "Attempts"]

FURTHEST = 1e15
PARTS = 6


@dataclass(frozen=True, slots=True)
class Attempts:
    """failures, crashes: as a delivery tells them.  begun: a handler was about to start.  apart: it gave way to its
    key's others.  due: wall-clock milliseconds before which it must not go out; 0: it may.  redelivered: somebody may
    have started on it whose process died.
    """

    failures: int = 0
    crashes: int = 0
    begun: bool = False
    apart: bool = False
    due: int = 0
    redelivered: bool = False

    def text(self) -> str:
        """As it is written."""
        parts = (self.failures, self.crashes, self.begun, self.apart, self.due, self.redelivered)
        return ",".join(str(int(part)) for part in parts)

    @classmethod
    def read(cls, text: str) -> Attempts:
        """Read it back.  Raises ValueError for what nobody of ours wrote."""
        parts = [int(part) for part in text.split(",")]
        if len(parts) < PARTS or not all(0 <= part < FURTHEST for part in parts):  # a later version may know more
            raise ValueError(f"no attempts: {text[:100]!r}")
        failures, crashes, begun, apart, due, redelivered = parts[:PARTS]
        return cls(failures, crashes, bool(begun), bool(apart), due, bool(redelivered))

    @classmethod
    def carried(cls, notes: Mapping[str, str]) -> Attempts:
        """What an entry brings along; nothing, where nobody of ours wrote it.  notes: reliamq's own fields of it."""
        try:
            return cls.read(notes["attempts"]) if "attempts" in notes else NONE
        except ValueError:
            return NONE


NONE = Attempts()
