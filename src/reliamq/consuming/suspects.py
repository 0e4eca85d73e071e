"""Keeps a message that may kill its process apart from all others, so that a neighbour is never blamed (C4).

One object is shared by all members of a process.  Who is a suspect is decided by the member.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio

__all__ = ["Suspects"]


class Suspects:
    """Lets attempts run together, or one suspect alone."""

    def __init__(self) -> None:
        self._running = 0
        self._turn = anyio.Lock()
        self._quiet = anyio.Event()
        self.gate: anyio.Event | None = None
        """Closed while a suspect runs or waits to run; ask before :meth:`enter`, and wait."""

    def enter(self) -> None:
        """An attempt starts beside others; :meth:`leave` must follow."""
        self._running += 1

    def leave(self) -> None:
        """It has ended."""
        self._running -= 1
        if not self._running:
            self._quiet.set()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Keep new attempts out, wait until those that run have ended, and run.  Cancelled: the others go on."""
        async with self._turn:
            self.gate = gate = anyio.Event()
            try:
                while self._running:
                    self._quiet = anyio.Event()
                    await self._quiet.wait()
                yield
            finally:
                self.gate = None
                gate.set()
