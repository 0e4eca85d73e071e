"""The contracts of the two ends: the outbox beside the producer, idempotency and locks beside the consumer.

A store takes no part in the broker's work and a broker none in theirs.  Sessions and connections of the user's database
cross these contracts as plain objects: the SPI does not know SQLAlchemy.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Protocol, runtime_checkable

from reliamq.spi.messages import Message
from reliamq.spi.outcomes import Rejection
from reliamq.spi.values import value

__all__ = [
    "CLAIM_BYTES",
    "DistributedLock",
    "EffectBusy",
    "EffectGuard",
    "FencingToken",
    "IdempotencyStore",
    "KeptTopic",
    "KeptWindow",
    "LeaseGrant",
    "LeaseState",
    "Leases",
    "OutboxRow",
    "OutboxStatus",
    "OutboxStore",
    "ParkedRow",
    "ProcessedId",
]


CLAIM_BYTES = 4 * 2**20
"""Bytes of bodies that one claim of the outbox may have, unless it is told otherwise."""

# --- outbox -----------------------------------------------------------------------------------------------------------


@value
class OutboxRow:
    """A row that a relay has claimed.

    position: the row's number; grows within a key in commit order, and travels as ``Message.sequence`` (O3).
    attempts: how often a broker has judged and rejected it (O5).
    replays: how many replays there had been when it was claimed: a confirm from before a replay may be of what the
        broker has lost, and counts no more (O7).
    """

    position: int
    message: Message
    attempts: int
    replays: int = 0


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

    kept: sent rows that can be sent again.  kept_since: when the oldest of them was sent (O7).
    retrying: waiting rows that the broker has rejected.  attempts: the most that one of them has had (O5).
    """

    waiting: int
    parked: int
    oldest_seconds: float | None
    kept: int = 0
    kept_since: datetime | None = None
    retrying: int = 0
    attempts: int = 0


@dataclass(frozen=True, slots=True)
class KeptTopic:
    """Sent rows of one topic: how many, and when the first and the last of them were sent, by the database's clock."""

    topic: str
    rows: int
    first_sent_at: datetime
    last_sent_at: datetime


@dataclass(frozen=True, slots=True)
class KeptWindow:
    """What is kept of a window of sent rows (O7).

    since, until: where it begins and ends; until None: it has no end.
    complete_from: what was sent before is gone or going, because rows are kept no
        longer.
    oldest_sent_at: when the oldest row that is kept at all was sent, of whatever topic; None: none is kept.
    topics: the window's rows, by topic.
    """

    since: datetime
    until: datetime | None
    complete_from: datetime
    oldest_sent_at: datetime | None
    topics: Sequence[KeptTopic]

    @property
    def rows(self) -> int:
        """How many, of all topics."""
        return sum(topic.rows for topic in self.topics)


class OutboxStore(Protocol):
    """The relay's side of the table.  Time is the database's (O8)."""

    async def claim(
        self, relay: str, *, limit: int, lease: timedelta, max_bytes: int = CLAIM_BYTES, resting: Sequence[str] = ()
    ) -> Sequence[OutboxRow]:
        """Take rows to send: each key's in order, no key that another live relay holds, none that waits for its retry
        (O3).

        limit, max_bytes: most rows, and of their bodies; the row that reaches ``max_bytes`` is the last.
        resting: topics of which none is taken.
        What a dead relay held is free after its lease.  No lock or transaction is held on return.
        Cancelled: the claim runs out with its lease.
        """
        ...

    async def settle(
        self, relay: str, *, confirmed: Sequence[OutboxRow], rejected: Sequence[tuple[OutboxRow, Rejection]]
    ) -> None:
        """Write down what the broker said, in one transaction, and end the claim of ``relay``.

        Confirmed rows leave the table (O2), also when the claim was lost meanwhile: a confirm stays true.  Where sent
        rows are kept, they can be sent again from then on; of rows that were claimed before the last replay no confirm
        counts, and they are sent again (O7).
        Rejected rows count one attempt each, wait, and are parked after their last one (O5); only reasons that judge
        the message count.  Rows claimed and named in neither list are free again.
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

    async def purge(self, message_ids: Sequence[str] | None) -> int:
        """Remove parked rows for good, unsent; ``None``: all.  Returns how many."""
        ...

    async def kept(
        self, *, since: datetime | timedelta, until: datetime | timedelta | None = None, topic: str | None = None
    ) -> KeptWindow:
        """What ``replay`` with the same arguments would send again.

        Raises ConfigurationError where sent rows are not kept, or a moment has no time zone.
        """
        ...

    async def replay(
        self, *, since: datetime | timedelta, until: datetime | timedelta | None = None, topic: str | None = None
    ) -> int:
        """Make the kept rows that were sent from ``since`` on wait for sending again; returns how many (O7).

        since, until: moments, or how long ago; rows sent from ``until`` on are left out.  topic: only its rows.
        They have their old ids and sequence numbers.  Within a key they go in their old order, and before what waits.
        What was confirmed before and is written down later is sent again as well.  Rows whose id waits are passed over.
        Raises ConfigurationError where sent rows are not kept, or a moment has no time zone.
        Cancelled: nothing is changed, or all of it.
        """
        ...

    async def clean(self, *, limit: int) -> int:
        """Remove up to ``limit`` kept rows whose window is over, oldest first; how many."""
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
    """Proof of the newest lease: ``value`` grows with each grant; the guarded side refuses smaller ones (I3).

    It has up to 63 bits, and where it begins, and by how much it grows, is the store's affair.
    """

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
    """Leases for effects outside a database: started, done, result kept (I3).  Time is the store's.

    A store that is away raises StoreUnavailable, OSError or SQLAlchemy's errors.  A call that is cancelled, or whose
    answer was lost, may have been carried out.
    """

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
        LeaseLost raised on leaving.  A store that is away raises as an :class:`IdempotencyStore`'s does.
        """
        ...


@runtime_checkable
class Leases(Protocol):
    """Where leases and locks are kept, by URL, when that is not the user's database.  Making one does no I/O; the
    context managers connect and clean up.

    Both raise BrokerUnavailable on entry when nobody answers, and DurabilityError when what is kept there could be
    lost.
    """

    def idempotency_store(self, *, remember: timedelta) -> AbstractAsyncContextManager[IdempotencyStore]:
        """Open the store of leases.

        remember: how long an effect that was never completed is remembered after its lease: its tokens must go on
        growing for as long as the message may come again (I5).
        """
        ...

    def lock(self) -> AbstractAsyncContextManager[DistributedLock]:
        """Open the locks."""
        ...
