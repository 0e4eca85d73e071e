"""The contracts of the two ends: the outbox beside the producer, idempotency and locks beside the consumer.

A store takes no part in the broker's work and a broker none in theirs.  Sessions and connections of the user's database
cross these contracts as plain objects: the SPI does not know SQLAlchemy.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Protocol

from reliamq.spi.messages import Message
from reliamq.spi.outcomes import Rejection

__all__ = [
    "DistributedLock",
    "EffectBusy",
    "EffectGuard",
    "FencingToken",
    "IdempotencyStore",
    "LeaseGrant",
    "LeaseState",
    "OutboxRow",
    "OutboxStatus",
    "OutboxStore",
    "ParkedRow",
    "ProcessedId",
]


# --- outbox -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OutboxRow:
    """A row that a relay has claimed.

    position: the row's number; grows within a key in commit order, and travels as ``Message.sequence`` (O3).
    attempts: how often a broker has judged and rejected it (O5).
    """

    position: int
    message: Message
    attempts: int


@dataclass(frozen=True, slots=True)
class ParkedRow:
    """A row set aside after its attempts, with what the broker said last (O5)."""

    row: OutboxRow
    error: str
    parked_at: datetime


@dataclass(frozen=True, slots=True)
class OutboxStatus:
    """waiting: rows to send.  parked: rows set aside.  oldest_seconds: age of the oldest waiting row, by the database's
    clock.
    """

    waiting: int
    parked: int
    oldest_seconds: float | None


class OutboxStore(Protocol):
    """The relay's side of the table.  Time is the database's (O8)."""

    async def claim(self, relay: str, *, limit: int, lease: timedelta) -> Sequence[OutboxRow]:
        """Take rows to send: each key's in order, no key that another live relay holds, none that waits for its retry
        (O3).

        What a dead relay held is free after its lease.  No lock or transaction is held on return.
        Cancelled: the claim runs out with its lease.
        """
        ...

    async def settle(
        self, relay: str, *, confirmed: Sequence[OutboxRow], rejected: Sequence[tuple[OutboxRow, Rejection]]
    ) -> None:
        """Write down what the broker said, in one transaction, and end the claim of ``relay``.

        Confirmed rows leave the table (O2), also when the claim was lost meanwhile: a confirm stays true.
        Rejected rows count one attempt each where the reason judges the message, wait, and are parked after their
        last one (O5).  Rows claimed and named in neither list are free again.
        Cancelled: nothing is written, or all of it.
        """
        ...

    async def status(self) -> OutboxStatus:
        """Count what is there."""
        ...

    async def parked(self, *, limit: int) -> Sequence[ParkedRow]:
        """The parked rows, oldest first."""
        ...

    async def requeue(self, message_ids: Sequence[str] | None) -> int:
        """Make parked rows wait for sending again, attempts from 0; ``None``: all.  Returns how many."""
        ...


# --- idempotency ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ProcessedId:
    """What takes effect once: a message of a topic, for one handler of one group (I1).  Identity is the id, never the
    content; ids are unique within their topic.
    """

    topic: str
    group: str
    handler: str
    message_id: str


@dataclass(frozen=True, slots=True)
class FencingToken:
    """Proof of the newest lease: ``value`` grows with each grant; the guarded side refuses smaller ones (I3)."""

    name: str
    value: int


class EffectBusy(Exception):
    """The effect cannot start right now: somebody else holds its lease, or the store is away.

    A signal, not an error: try again after ``retry_after``; no attempt is counted, because nobody failed.
    """

    def __init__(self, retry_after: timedelta, why: str = "in progress elsewhere") -> None:
        self.retry_after = retry_after
        super().__init__(f"{why}; try again after {retry_after.total_seconds():.1f} s")


class EffectGuard(Protocol):
    """Runs an effect so that it happens once for each :class:`ProcessedId`.  The three kinds of ``effects=`` are three
    guards.
    """

    async def apply(self, identity: ProcessedId, effect: Callable[[Any], Awaitable[None]]) -> bool:
        """Run ``effect`` unless it was applied before; True if it ran and is durable now, with its mark.

        ``effect`` gets what this guard has to give: the database session of the transaction that the mark joins, or the
        FencingToken, or None.  The mark is never written before the effect (I1).
        Raises what ``effect`` raises, with nothing marked and its transaction rolled back; EffectBusy.
        Cancelled: rolled back, or (during the commit) unknown: the next delivery finds out.
        """
        ...

    async def apply_in_thread(self, identity: ProcessedId, effect: Callable[[Any], None]) -> bool:
        """The same for a plain function, which runs in a worker thread together with its synchronous session."""
        ...


@dataclass(frozen=True, slots=True)
class LeaseGrant:
    """The right to produce one effect now.  token: the fencing token's value.  seconds: how long without renewal."""

    identity: ProcessedId
    token: int
    seconds: float


@dataclass(frozen=True, slots=True)
class LeaseState:
    """Why there was no grant: ``done`` with its kept ``result``, or held by another for ``busy_seconds`` more."""

    done: bool
    result: bytes | None = None
    busy_seconds: float = 0.0


class IdempotencyStore(Protocol):
    """Leases for effects outside a database: started, done, result kept (I3).  Time is the store's."""

    async def acquire(self, identity: ProcessedId, *, lease: timedelta) -> LeaseGrant | LeaseState:
        """Start, or say why not.  Atomic between all callers.  A crashed holder's lease runs out by itself."""
        ...

    async def extend(self, grant: LeaseGrant, *, lease: timedelta) -> bool:
        """Renew; False: a later holder was granted, and this one must not claim success."""
        ...

    async def complete(self, grant: LeaseGrant, *, result: bytes | None, keep: timedelta) -> bool:
        """Mark as done and keep the mark for ``keep``; False: too late, a later holder was granted (I3)."""
        ...

    async def abandon(self, grant: LeaseGrant) -> None:
        """The effect failed: let the next attempt start at once."""
        ...

    async def clean(self, *, limit: int) -> int:
        """Remove up to ``limit`` expired marks; how many (I5)."""
        ...


class DistributedLock(Protocol):
    """Mutual exclusion between processes, with a fencing token, because any lease can run out under its holder (I4)."""

    def hold(self, name: str, *, lease: timedelta, wait: timedelta) -> AbstractAsyncContextManager[FencingToken]:
        """Hold the lock named ``name`` for the block, renewing ``lease`` inside.

        Waits up to ``wait``, then TimeoutError.  When the lease is lost nevertheless, the block is cancelled and
        LeaseLost raised on leaving.
        """
        ...
