"""Waking the relays of this process when a transaction of this process has committed messages.

Only a help: who commits elsewhere, or dies before it wakes anybody, is found by the next look at the table.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Bell", "ringing", "wake_relays"]


class Bell:
    """What one relay sleeps by.  It may be rung from any thread."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._rung = asyncio.Event()

    def ring(self) -> None:
        """Wake the relay; if it does not sleep, it does not go to sleep the next time."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._rung.set)

    async def wait(self) -> None:
        """Until it is rung.  Cancelled: the ringing that came meanwhile counts for the next time."""
        await self._rung.wait()
        self._rung.clear()


_bells: set[Bell] = set()
_lock = threading.Lock()


@contextmanager
def ringing() -> Iterator[Bell]:
    """A bell that :func:`wake_relays` rings, for as long as the block runs."""
    bell = Bell()
    with _lock:
        _bells.add(bell)
    try:
        yield bell
    finally:
        with _lock:
            _bells.discard(bell)


def wake_relays() -> None:
    """Have the relays of this process look at their tables now, and not when their poll comes.  From any thread.

    Sessions to which messages were added do it by themselves when they commit; call it after the commit of a plain
    connection.
    """
    with _lock:
        bells = list(_bells)
    for bell in bells:
        bell.ring()
