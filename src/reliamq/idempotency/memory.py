"""Leases in one process's memory: for tests, and where one process is all there is.

Lost with the process and unknown to others; everything else as the IdempotencyStore contract says.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable
from datetime import timedelta

from reliamq.spi import LeaseGrant, LeaseState, ProcessedId

__all__ = ["MemoryLeaseStore"]


class _Entry:
    __slots__ = ("done", "expires_at", "result", "token", "until")

    def __init__(self) -> None:
        self.token = 0
        self.until = 0.0
        self.done = False
        self.result: bytes | None = None
        self.expires_at = 0.0


class MemoryLeaseStore:
    """The IdempotencyStore contract in memory.  Nothing in it awaits, so each call is atomic on its event loop.

    remember: how long an effect that was never completed is remembered after its lease.  Its token must go on growing
        for as long as the message may come again, so it is at least the window of processed ids (I5).
    clock: seconds that only grow.
    """

    def __init__(
        self, *, remember: timedelta = timedelta(days=14), clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock, self._remember = clock, remember.total_seconds()
        self._entries: dict[ProcessedId, _Entry] = {}
        self._expiring: list[tuple[float, int, ProcessedId]] = []  # a heap; the number breaks ties
        self._numbers = itertools.count()

    async def acquire(self, identity: ProcessedId, *, lease: timedelta) -> LeaseGrant | LeaseState:
        """See :meth:`reliamq.spi.IdempotencyStore.acquire`."""
        now = self._clock()
        entry = self._entries.get(identity)
        if entry is None:
            entry = self._entries[identity] = _Entry()
            self._expire(identity, now + lease.total_seconds() + self._remember)
        elif entry.done:
            return LeaseState(done=True, result=entry.result)
        elif entry.until > now:
            return LeaseState(done=False, busy_seconds=entry.until - now)
        seconds = lease.total_seconds()
        entry.token += 1
        entry.until = now + seconds
        entry.expires_at = entry.until + self._remember
        return LeaseGrant(identity, entry.token, seconds)

    async def extend(self, grant: LeaseGrant, *, lease: timedelta) -> bool:
        """See :meth:`reliamq.spi.IdempotencyStore.extend`."""
        entry = self._held(grant)
        if entry is None:
            return False
        entry.until = self._clock() + lease.total_seconds()
        entry.expires_at = entry.until + self._remember
        return True

    async def complete(self, grant: LeaseGrant, *, result: bytes | None, keep: timedelta) -> bool:
        """See :meth:`reliamq.spi.IdempotencyStore.complete`."""
        entry = self._held(grant)
        if entry is None:
            return False
        entry.done, entry.result = True, result
        entry.expires_at = self._clock() + keep.total_seconds()
        self._expire(grant.identity, entry.expires_at)
        return True

    async def abandon(self, grant: LeaseGrant) -> None:
        """See :meth:`reliamq.spi.IdempotencyStore.abandon`."""
        entry = self._held(grant)
        if entry is not None:
            entry.until = 0.0

    async def clean(self, *, limit: int) -> int:
        """See :meth:`reliamq.spi.IdempotencyStore.clean`."""
        now, removed = self._clock(), 0
        while removed < limit and self._expiring and self._expiring[0][0] <= now:
            _, _, identity = heapq.heappop(self._expiring)
            entry = self._entries.get(identity)
            if entry is None:
                continue
            if entry.expires_at > now:  # it was renewed or completed meanwhile
                self._expire(identity, entry.expires_at)
                continue
            del self._entries[identity]
            removed += 1
        return removed

    def _expire(self, identity: ProcessedId, at: float) -> None:
        heapq.heappush(self._expiring, (at, next(self._numbers), identity))

    def _held(self, grant: LeaseGrant) -> _Entry | None:
        """The grant's entry while it is the newest and not done; a lease that ran out untaken still counts."""
        entry = self._entries.get(grant.identity)
        return entry if entry is not None and entry.token == grant.token and not entry.done else None
