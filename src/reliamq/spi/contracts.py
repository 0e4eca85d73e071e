"""The contracts of a broker, in the order in which a message meets them.

A backend author writes these five and one plugin function.  Every method takes a batch, because group commit is where
the speed is; one message is a batch of one.  Batches may be empty, and then nothing happens.  The conveniences (a
single message, retries, deadlines for callers) are written once, above these contracts.  Numbers in brackets are the
promises in ``docs/promises.md``.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Protocol, runtime_checkable

from reliamq.spi.capabilities import Capabilities
from reliamq.spi.durability import Finding, TopicSpec
from reliamq.spi.messages import Delivery, Message
from reliamq.spi.outcomes import Outcome, Settlement

__all__ = ["Backend", "DeadLetterRecord", "DeadLetters", "Publisher", "Storage", "Subscription"]


class Storage(Protocol):
    """Safe shelter: what must exist on the broker before a message is trusted to it."""

    async def declare(self, topics: Sequence[TopicSpec]) -> Sequence[Finding]:
        """Create what is missing of each topic and its groups, to the required durability.

        Idempotent, also when several processes do it at once.  Never weakens and never deletes (S1); a declared group
        gets every message published from now on (C9), a new one also those that the topic still keeps.
        Returns a finding for each thing that exists otherwise than asked and was left alone; empty when all is well.
        Raises BrokerUnavailable when the broker could not be reached; what was created until then stays.
        Cancelled: some of it may have been created; call it again.
        """
        ...

    async def audit(self, topics: Sequence[TopicSpec]) -> Sequence[Finding]:
        """Read the live values and say what falls short (S2).  Changes nothing.

        A value that cannot be read is a finding of its own (``Severity.UNSEEN``), never a pass.
        Raises BrokerUnavailable.
        """
        ...


class Publisher(Protocol):
    """Safe departure.  The core has one call of :meth:`send` under way for each route: a batch that must be sent again
    could otherwise be overtaken by the next (P5).

    gathering_rounds: how often the event loop goes round after an answer before the next batch of the route is closed,
        so that callers who were just told publish into it.  1 where a batch costs little; more where what it costs
        hardly depends on how many it holds.
    """

    gathering_rounds: int

    def route(self, message: Message) -> Hashable:
        """Which messages it must wait for: messages of one topic and key have one route, always.

        A backend that stores all messages at one place gives a constant.  One with many (partitions) gives the place,
        so that a batch holds what is stored together, and a place that is stuck holds up nobody else.  Asked for every
        message, so it must be cheap, and ask nobody.
        """
        ...

    async def send(self, batch: Sequence[Message], *, deadline: float, chained: bool = False) -> Sequence[Outcome]:
        """Store a batch and wait until each message's fate is known or the deadline passes.

        One outcome per message, in the order given (P2).
        Confirmation: stored to the topic's durability (P1) and routed to every group of the topic (P3).
        Rejection: certainly not stored; may be forgotten or put right.
        InDoubt: may be stored; the caller repeats it with the same id (P4).
        Messages of one key are stored in the order given, across calls too (P5).
        chained: and none is stored behind one of its key, in this call, that is not confirmed: those are rejected as
        *behind* (O3).  See :mod:`reliamq.spi.chains`.
        Raises nothing for a message; BrokerUnavailable when none could be tried.
        Cancelled: every message not yet answered is in doubt.
        deadline: monotonic seconds (``time.monotonic()``); a client call is not cancelled to keep it.
        """
        ...


class Subscription(Protocol):
    """Safe arrival: one member's view of one group on one topic.

    lease_seconds: how long a delivery stays this member's without :meth:`extend`.
    """

    lease_seconds: float

    async def receive(self, limit: int, *, max_bytes: int, wait: timedelta) -> Sequence[Delivery]:
        """Take up to ``limit`` deliveries, waiting up to ``wait`` for the first (C10).

        Stops short of ``max_bytes`` of message size, but gives one delivery even if that is larger.
        Within a batch a key's messages are in order.  While a message of a key is unsettled, its later ones go to the
        same member or wait (C3).  Nothing is acknowledged by it (C1): what nobody settles comes back after the lease,
        marked ``redelivered``, with its attempts (C2, C4).  A message whose bytes are broken is delivered as it is
        (C11). Raises BrokerUnavailable; the core waits and calls again.
        Cancelled: what was already taken comes back after its lease, as not attempted.
        """
        ...

    def may_start(self, delivery: Delivery) -> bool:
        """Whether its handler may start now: it still is this member's, and the broker does not want it back.

        Asked before each start, so it must be cheap, and ask nobody.  After False the core releases it at once.  A
        backend that has to hand a share of the keys to another member answers False for what has not started, and
        waits, as long as it can, for what has (C3).
        """
        ...

    async def begin(self, deliveries: Sequence[Delivery]) -> Sequence[Delivery]:
        """Record durably that handlers of these are about to start (C4); give back those still owned.

        The core calls it for redelivered messages only, so the hot path pays nothing.  A recorded start that nobody
        settles is a crash: the next delivery has ``crashes`` one higher.
        Cancelled: the start may be recorded; then it counts.
        """
        ...

    async def extend(self, deliveries: Sequence[Delivery]) -> Sequence[Delivery]:
        """Renew the leases of slow handlers (C7); give back those still owned: the missing ones are somebody else's
        now.

        Cancelled: some are renewed.
        """
        ...

    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[Settlement]:
        """End deliveries; when it returns the broker has it, durably.

        Returns the settlements that came too late, because the lease was lost: they changed nothing for the new owner
        (C12). Settling twice is the same as once.  After ``Retry(keep_order=True)`` later messages of the key that this
        member holds are released too: they come again, after it.
        Raises BrokerUnavailable; the core repeats the same settlements.
        Cancelled: some are settled; what is not comes back after the lease.
        """
        ...


@dataclass(frozen=True, slots=True)
class DeadLetterRecord:
    """A message that was given up, and why (C5).

    message: the original, bytes and headers unchanged.
    group: whose handler gave up.
    handler: which handler, or empty where it did not come to one.
    reason: exception class and text, one line.
    traceback: whole, or empty.
    attempts: starts of the handler.
    died_at: when it was given up.
    position: where the original was on the broker.
    """

    message: Message
    group: str
    handler: str
    reason: str
    traceback: str
    attempts: int
    died_at: datetime
    position: str


class DeadLetters(Protocol):
    """Where given-up messages rest.  They do not expire (C5).  Identity is (topic, group, message id)."""

    async def add(self, records: Sequence[DeadLetterRecord], *, deadline: float) -> Sequence[Outcome]:
        """Store dead letters; one outcome each, in order, with the meaning of :meth:`Publisher.send`.

        Adding one again (after a crash before the original's ack) replaces it.
        """
        ...

    async def find(
        self, *, topic: str | None = None, group: str | None = None, message_id: str | None = None, limit: int = 100
    ) -> Sequence[DeadLetterRecord]:
        """Those that match, oldest first, at most ``limit``."""
        ...

    async def remove(self, records: Sequence[DeadLetterRecord]) -> int:
        """Remove these, durably; how many were there.  Only called after a replay was confirmed or a person said so.

        One that died again since it was found (another ``died_at``) is another dead letter and stays.
        """
        ...


@runtime_checkable
class Backend(Protocol):
    """One broker, by URL.  Making one does no I/O; the context managers connect and clean up.

    name: the plugin's name.  capabilities: what it can do.  url: without secrets.
    Everything entered is closed by who entered it, in reverse; closing a subscription gives back what it still holds
    (C8).
    """

    name: str
    url: str
    capabilities: Capabilities

    def storage(self) -> AbstractAsyncContextManager[Storage]:
        """Open the means to declare and audit.  Raises BrokerUnavailable on entry."""
        ...

    def publisher(self) -> AbstractAsyncContextManager[Publisher]:
        """Open a publisher.  Leaving it waits for nothing: the core has drained before (P7)."""
        ...

    def subscription(self, topic: str, group: str, *, lease: timedelta) -> AbstractAsyncContextManager[Subscription]:
        """Join a declared group on a topic as one more member."""
        ...

    def dead_letters(self) -> AbstractAsyncContextManager[DeadLetters]:
        """Open the dead letters of all topics."""
        ...
