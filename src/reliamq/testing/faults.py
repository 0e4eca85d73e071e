"""Backends that are broken on purpose, one promise each: how we know that the conformance kit can fail.

Each fault wraps a sound backend and changes one thing.  ``breaks`` are the promises whose tests must fail, all of them
and no others; where one fault cannot but break two, both are named.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import timedelta

from reliamq.spi import (
    Ack,
    Backend,
    Confirmation,
    DeadLetterRecord,
    DeadLetters,
    Delivery,
    Finding,
    Message,
    Outcome,
    Publisher,
    Rejection,
    RejectionReason,
    Release,
    Retry,
    Settlement,
    Storage,
    Subscription,
    TopicSpec,
)

__all__ = ["FAULTS", "Fault"]


# --- what passes everything on ----------------------------------------------------------------------------------------


class PassingPublisher:
    """Sends as it is."""

    def __init__(self, publisher: Publisher) -> None:
        self.inner = publisher

    async def send(self, batch: Sequence[Message], *, deadline: float) -> Sequence[Outcome]:
        """Pass on."""
        return await self.inner.send(batch, deadline=deadline)


class PassingStorage:
    """Declares and audits as it is."""

    def __init__(self, storage: Storage) -> None:
        self.inner = storage

    async def declare(self, topics: Sequence[TopicSpec]) -> Sequence[Finding]:
        """Pass on."""
        return await self.inner.declare(topics)

    async def audit(self, topics: Sequence[TopicSpec]) -> Sequence[Finding]:
        """Pass on."""
        return await self.inner.audit(topics)


class PassingSubscription:
    """Consumes as it is."""

    def __init__(self, subscription: Subscription) -> None:
        self.inner = subscription
        self.lease_seconds = subscription.lease_seconds

    async def receive(self, limit: int, *, max_bytes: int, wait: timedelta) -> Sequence[Delivery]:
        """Pass on."""
        return await self.inner.receive(limit, max_bytes=max_bytes, wait=wait)

    async def begin(self, deliveries: Sequence[Delivery]) -> Sequence[Delivery]:
        """Pass on."""
        return await self.inner.begin(deliveries)

    async def extend(self, deliveries: Sequence[Delivery]) -> Sequence[Delivery]:
        """Pass on."""
        return await self.inner.extend(deliveries)

    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[Settlement]:
        """Pass on."""
        return await self.inner.settle(settlements)


class PassingDeadLetters:
    """Keeps dead letters as it is."""

    def __init__(self, dead_letters: DeadLetters) -> None:
        self.inner = dead_letters

    async def add(self, records: Sequence[DeadLetterRecord], *, deadline: float) -> Sequence[Outcome]:
        """Pass on."""
        return await self.inner.add(records, deadline=deadline)

    async def find(
        self, *, topic: str | None = None, group: str | None = None, message_id: str | None = None, limit: int = 100
    ) -> Sequence[DeadLetterRecord]:
        """Pass on."""
        return await self.inner.find(topic=topic, group=group, message_id=message_id, limit=limit)

    async def remove(self, records: Sequence[DeadLetterRecord]) -> int:
        """Pass on."""
        return await self.inner.remove(records)


@dataclass(frozen=True)
class Fault:
    """breaks: promises whose tests must fail.  The rest: which part is replaced, and by what."""

    breaks: frozenset[str]
    publisher: Callable[[Publisher], Publisher] = PassingPublisher
    storage: Callable[[Storage], Storage] = PassingStorage
    subscription: Callable[[Subscription], Subscription] = PassingSubscription
    dead_letters: Callable[[DeadLetters], DeadLetters] = PassingDeadLetters
    lease: timedelta | None = None

    def wrap(self, backend: Backend) -> Backend:
        """The backend with this fault."""
        return _Broken(backend, self)


class _Broken:
    def __init__(self, backend: Backend, fault: Fault) -> None:
        self._inner, self._fault = backend, fault
        self.name, self.url, self.capabilities = backend.name, backend.url, backend.capabilities

    @asynccontextmanager
    async def storage(self) -> AsyncIterator[Storage]:
        async with self._inner.storage() as storage:
            yield self._fault.storage(storage)

    @asynccontextmanager
    async def publisher(self) -> AsyncIterator[Publisher]:
        async with self._inner.publisher() as publisher:
            yield self._fault.publisher(publisher)

    @asynccontextmanager
    async def subscription(self, topic: str, group: str, *, lease: timedelta) -> AsyncIterator[Subscription]:
        async with self._inner.subscription(topic, group, lease=self._fault.lease or lease) as subscription:
            yield self._fault.subscription(subscription)

    @asynccontextmanager
    async def dead_letters(self) -> AsyncIterator[DeadLetters]:
        async with self._inner.dead_letters() as dead_letters:
            yield self._fault.dead_letters(dead_letters)


# --- departure --------------------------------------------------------------------------------------------------------


class _OutcomesReversed(PassingPublisher):
    async def send(self, batch: Sequence[Message], *, deadline: float) -> Sequence[Outcome]:
        outcomes = list(await self.inner.send(batch, deadline=deadline))
        return outcomes[::-1] if len(batch) > 2 else outcomes


class _UnroutableConfirmed(PassingPublisher):
    async def send(self, batch: Sequence[Message], *, deadline: float) -> Sequence[Outcome]:
        outcomes = await self.inner.send(batch, deadline=deadline)
        alone = outcomes[0] if len(batch) == 1 else None
        if isinstance(alone, Rejection) and alone.reason is RejectionReason.UNROUTABLE:
            return [Confirmation(alone.message_id)]
        return outcomes


class _HeadersDropped(PassingPublisher):
    async def send(self, batch: Sequence[Message], *, deadline: float) -> Sequence[Outcome]:
        return await self.inner.send([replace(message, headers={}) for message in batch], deadline=deadline)


class _MixedBatchesReversed(PassingPublisher):
    async def send(self, batch: Sequence[Message], *, deadline: float) -> Sequence[Outcome]:
        keys = {message.key for message in batch}
        if len(keys) > 1 and None not in keys and len(batch) > len(keys):
            outcomes = await self.inner.send(batch[::-1], deadline=deadline)
            return outcomes[::-1]
        return await self.inner.send(batch, deadline=deadline)


class _TooLargeConfirmed(PassingPublisher):
    async def send(self, batch: Sequence[Message], *, deadline: float) -> Sequence[Outcome]:
        outcomes = await self.inner.send(batch, deadline=deadline)
        return [
            Confirmation(one.message_id)
            if isinstance(one, Rejection) and one.reason is RejectionReason.TOO_LARGE
            else one
            for one in outcomes
        ]


# --- shelter ----------------------------------------------------------------------------------------------------------


class _DifferencesHidden(PassingStorage):
    async def declare(self, topics: Sequence[TopicSpec]) -> Sequence[Finding]:
        await self.inner.declare(topics)
        return []


class _AuditBlind(PassingStorage):
    async def audit(self, topics: Sequence[TopicSpec]) -> Sequence[Finding]:
        return []


class _DurabilityIgnored(PassingStorage):
    async def audit(self, topics: Sequence[TopicSpec]) -> Sequence[Finding]:
        return [one for one in await self.inner.audit(topics) if one.setting != "durability"]


class _GroupsStartLate(PassingStorage):
    async def declare(self, topics: Sequence[TopicSpec]) -> Sequence[Finding]:
        late = [replace(one, groups=tuple(replace(group, start="latest") for group in one.groups)) for one in topics]
        return await self.inner.declare(late)


# --- arrival ----------------------------------------------------------------------------------------------------------


class _AckFirst(PassingSubscription):
    async def receive(self, limit: int, *, max_bytes: int, wait: timedelta) -> Sequence[Delivery]:
        deliveries = await self.inner.receive(limit, max_bytes=max_bytes, wait=wait)
        await self.inner.settle([Ack(delivery) for delivery in deliveries])
        return deliveries

    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[Settlement]:
        return []


class _FailuresForgotten(PassingSubscription):
    async def receive(self, limit: int, *, max_bytes: int, wait: timedelta) -> Sequence[Delivery]:
        deliveries = await self.inner.receive(limit, max_bytes=max_bytes, wait=wait)
        return [replace(delivery, failures=0) for delivery in deliveries]


class _StartsNotRecorded(PassingSubscription):
    async def begin(self, deliveries: Sequence[Delivery]) -> Sequence[Delivery]:
        return deliveries


class _BytesIgnored(PassingSubscription):
    async def receive(self, limit: int, *, max_bytes: int, wait: timedelta) -> Sequence[Delivery]:
        return await self.inner.receive(limit, max_bytes=1 << 30, wait=wait)


class _UndecodableDropped(PassingSubscription):
    async def receive(self, limit: int, *, max_bytes: int, wait: timedelta) -> Sequence[Delivery]:
        deliveries = await self.inner.receive(limit, max_bytes=max_bytes, wait=wait)
        broken = [one for one in deliveries if one.message.content_type.endswith("json") and not _is_text(one)]
        await self.inner.settle([Ack(delivery) for delivery in broken])
        return [one for one in deliveries if one not in broken]


def _is_text(delivery: Delivery) -> bool:
    try:
        delivery.message.body.decode()
    except UnicodeDecodeError:
        return False
    return True


class _ReleaseCounts(PassingSubscription):
    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[Settlement]:
        counted = [Retry(one.delivery, timedelta(0)) if isinstance(one, Release) else one for one in settlements]
        return await self.inner.settle(counted)


class _RetriesAtOnce(PassingSubscription):
    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[Settlement]:
        return await self.inner.settle(
            [replace(one, delay=timedelta(0)) if isinstance(one, Retry) else one for one in settlements]
        )


class _AlwaysGivesWay(PassingSubscription):
    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[Settlement]:
        return await self.inner.settle(
            [replace(one, keep_order=False) if isinstance(one, Retry) else one for one in settlements]
        )


class _NeverGivesWay(PassingSubscription):
    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[Settlement]:
        return await self.inner.settle(
            [replace(one, keep_order=True) if isinstance(one, Retry) else one for one in settlements]
        )


class _LateSettlementsHidden(PassingSubscription):
    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[Settlement]:
        await self.inner.settle(settlements)
        return []


class _ExtendDoesNothing(PassingSubscription):
    async def extend(self, deliveries: Sequence[Delivery]) -> Sequence[Delivery]:
        return deliveries


class _HeadersOfTheDeadLost(PassingDeadLetters):
    async def add(self, records: Sequence[DeadLetterRecord], *, deadline: float) -> Sequence[Outcome]:
        poorer = [replace(one, message=replace(one.message, headers={})) for one in records]
        return await self.inner.add(poorer, deadline=deadline)


def _breaks(*numbers: str) -> frozenset[str]:
    return frozenset(numbers)


FAULTS: dict[str, Fault] = {
    "outcomes reversed": Fault(_breaks("P2"), publisher=_OutcomesReversed),
    "unroutable confirmed": Fault(_breaks("P3"), publisher=_UnroutableConfirmed),
    "headers dropped": Fault(_breaks("P4"), publisher=_HeadersDropped),
    # The order in which a batch is stored is the order in which members get it.
    "mixed batches reversed": Fault(_breaks("P5", "C3"), publisher=_MixedBatchesReversed),
    # The test of outcomes in a batch uses a message that is too large.
    "too large confirmed": Fault(_breaks("P2", "P6"), publisher=_TooLargeConfirmed),
    "differences hidden": Fault(_breaks("S1"), storage=_DifferencesHidden),
    "audit blind": Fault(_breaks("S2", "S3"), storage=_AuditBlind),
    "durability ignored": Fault(_breaks("S3"), storage=_DurabilityIgnored),
    "groups start late": Fault(_breaks("C9"), storage=_GroupsStartLate),
    # Once acknowledged, nothing that is promised of unsettled deliveries can hold.
    "acknowledged first": Fault(_breaks("C1", "C2", "C3", "C4", "C6", "C7", "C8", "C12"), subscription=_AckFirst),
    # Without an end of leases nothing is late and no crash is noticed.
    "leases never end": Fault(_breaks("C2", "C4", "C12"), lease=timedelta(hours=1)),
    "failures forgotten": Fault(_breaks("C4"), subscription=_FailuresForgotten),
    "starts not recorded": Fault(_breaks("C4"), subscription=_StartsNotRecorded),
    "headers of the dead lost": Fault(_breaks("C5"), dead_letters=_HeadersOfTheDeadLost),
    "retries at once": Fault(_breaks("C6"), subscription=_RetriesAtOnce),
    "always gives way": Fault(_breaks("C6"), subscription=_AlwaysGivesWay),
    "never gives way": Fault(_breaks("C6"), subscription=_NeverGivesWay),
    # Who does not renew does not learn either that the lease was lost.
    "extend does nothing": Fault(_breaks("C7", "C12"), subscription=_ExtendDoesNothing),
    "release counts as a failure": Fault(_breaks("C8"), subscription=_ReleaseCounts),
    "bytes ignored": Fault(_breaks("C10"), subscription=_BytesIgnored),
    "undecodable dropped": Fault(_breaks("C11"), subscription=_UndecodableDropped),
    "late settlements hidden": Fault(_breaks("C12"), subscription=_LateSettlementsHidden),
}
