"""The bound on what has been handed over and has no outcome yet, in messages and in bytes (P6).

Callers over the bound wait in the order they came; memory does not grow.  State of the event loop's one thread.
"""

from __future__ import annotations

import asyncio
import sys
from collections import deque

__all__ = ["InFlight"]


class InFlight:
    """Counts messages and bytes; admits while below both limits.

    A single message larger than ``max_bytes`` is admitted when nothing else is in flight, so that it cannot wait for
    ever.
    """

    def __init__(self, *, max_messages: int, max_bytes: int) -> None:
        self._max_messages, self._max_bytes = max_messages, max_bytes
        self.messages = 0
        self.bytes = 0
        self._waiting: deque[tuple[asyncio.Future[None], int]] = deque()

    def try_enter(self, size: int) -> bool:
        """Take a place at once, unless it is full or somebody waits already."""
        if self._waiting or not self._fits(size):
            return False
        self._take(size)
        return True

    async def enter(self, size: int) -> None:
        """Wait for a place.  Cancelled: the place, if it was just given, is passed on."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((turn, size))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.leave(size)
            raise

    def leave(self, size: int) -> None:
        """Give a place back and let those in who fit now."""
        self.messages -= 1
        self.bytes -= size
        while self._waiting:
            turn, wanted = self._waiting[0]
            if turn.done():  # its caller gave up
                self._waiting.popleft()
                continue
            if not self._fits(wanted):
                return
            self._waiting.popleft()
            self._take(wanted)
            turn.set_result(None)

    def open(self) -> None:
        """Let everybody in who waits, and who comes later: there is nothing to be bounded any more."""
        self._max_messages = self._max_bytes = sys.maxsize
        while self._waiting:
            turn, size = self._waiting.popleft()
            if not turn.done():
                self._take(size)
                turn.set_result(None)

    def _fits(self, size: int) -> bool:
        if self.messages == 0:
            return True
        return self.messages < self._max_messages and self.bytes + size <= self._max_bytes

    def _take(self, size: int) -> None:
        self.messages += 1
        self.bytes += size
