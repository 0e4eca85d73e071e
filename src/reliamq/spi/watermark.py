"""The contiguous prefix of finished work.

Handlers finish out of order; brokers that settle cumulatively (Kafka offsets, RabbitMQ ``multiple=True``) may only be
told the point up to which *everything* is finished.  One implementation for all of them.  Positions need not be
contiguous numbers: gaps (transaction markers, compaction) are normal, so the order of delivery counts and not
arithmetic.
"""

from __future__ import annotations

from collections import deque

__all__ = ["Watermark"]


class Watermark:
    """Tracks positions in the order they were delivered and tells how far they are finished without a hole.

    Not thread-safe: state of one task.  ``len()`` is the number of positions that are not yet settled below the mark.
    """

    def __init__(self) -> None:
        self._window: deque[int] = deque()
        self._open: set[int] = set()
        self._newest: int | None = None

    def __len__(self) -> int:
        return len(self._window)

    def deliver(self, position: int) -> None:
        """Note that ``position`` was handed out.  Positions must grow; ValueError otherwise."""
        if self._newest is not None and position <= self._newest:
            raise ValueError(f"position {position} was delivered after {self._newest}")
        self._newest = position
        self._window.append(position)
        self._open.add(position)

    def finish(self, position: int) -> None:
        """Note that the work for ``position`` is finished.  Repeating it, or finishing an unknown position, is no error
        (C12).
        """
        self._open.discard(position)

    def advance(self) -> int | None:
        """Take the finished prefix off and return its last position; ``None`` if the mark has not moved."""
        last: int | None = None
        while self._window and self._window[0] not in self._open:
            last = self._window.popleft()
        return last
