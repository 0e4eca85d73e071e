"""Backends that are broken on purpose, one promise each: how we know that the conformance kit can fail.

Each fault wraps a sound backend and changes one thing.  ``breaks`` are the promises whose tests must fail, all of them
and no others; where one fault cannot but break two, both are named.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import ClassVar

import anyio

from reliamq.spi import (
    Ack,
    Backend,
    Capabilities,
    Confirmation,
    DeadLetterRecord,
    DeadLetters,
    Delivery,
    Durability,
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


SECOND = timedelta(seconds=1)


# --- what passes everything on ----------------------------------------------------------------------------------------


class PassingPublisher:
    """Sends as it is."""

    def __init__(self, publisher: Publisher) -> None:
        self.inner = publisher
        self.route = publisher.route

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
        self.may_start = subscription.may_start

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


def _as_they_are(capabilities: Capabilities) -> Capabilities:
    return capabilities


@dataclass(frozen=True)
class Fault:
    """breaks: promises whose tests must fail.  The rest: which part is replaced, and by what."""

    breaks: frozenset[str]
    publisher: Callable[[Publisher], Publisher] = PassingPublisher
    storage: Callable[[Storage], Storage] = PassingStorage
    subscription: Callable[[Subscription], Subscription] = PassingSubscription
    dead_letters: Callable[[DeadLetters], DeadLetters] = PassingDeadLetters
    lease: timedelta | None = None
    claims: Callable[[Capabilities], Capabilities] = _as_they_are

    def wrap(self, backend: Backend) -> Backend:
        """The backend with this fault."""
        return _Broken(backend, self)


class _Broken:
    def __init__(self, backend: Backend, fault: Fault) -> None:
        self._inner, self._fault = backend, fault
        self.name, self.url, self.capabilities = backend.name, backend.url, fault.claims(backend.capabilities)

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


class _DeadlineIgnored(PassingPublisher):
    async def send(self, batch: Sequence[Message], *, deadline: float) -> Sequence[Outcome]:
        if deadline < time.monotonic() + 1:
            await anyio.sleep(30)
        return await self.inner.send(batch, deadline=time.monotonic() + 1)


def _survives_restart(capabilities: Capabilities) -> Capabilities:
    return replace(capabilities, survives_restart=True)


def _shared(capabilities: Capabilities) -> Capabilities:
    return replace(capabilities, shared_between_processes=True)


def _on_the_disk(capabilities: Capabilities) -> Capabilities:
    return replace(capabilities, durability=Durability.FSYNCED)


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


class _RetentionNoted(PassingStorage):
    retentions: ClassVar[dict[str, timedelta]] = {}

    async def declare(self, topics: Sequence[TopicSpec]) -> Sequence[Finding]:
        self.retentions.update({one.name: one.retention for one in topics})
        return await self.inner.declare(topics)


# --- arrival ----------------------------------------------------------------------------------------------------------


class _AckFirst(PassingSubscription):
    async def receive(self, limit: int, *, max_bytes: int, wait: timedelta) -> Sequence[Delivery]:
        deliveries = await self.inner.receive(limit, max_bytes=max_bytes, wait=wait)
        await self.inner.settle([Ack(delivery) for delivery in deliveries])
        return deliveries

    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[Settlement]:
        return []


class _UnfinishedRemoved(PassingSubscription):
    """With :class:`_RetentionNoted`: what is older than its topic's retention is gone, whoever has not finished it."""

    async def receive(self, limit: int, *, max_bytes: int, wait: timedelta) -> Sequence[Delivery]:
        deliveries = await self.inner.receive(limit, max_bytes=max_bytes, wait=wait)
        now, kept_for = datetime.now(UTC), _RetentionNoted.retentions
        gone = [one for one in deliveries if now - one.message.time > kept_for[one.message.topic]]
        await self.inner.settle([Ack(delivery) for delivery in gone])
        return [one for one in deliveries if one not in gone]


class _FirstAddressStays(PassingSubscription):
    """An id that is replayed to another group still says whom it was for at first."""

    addresses: ClassVar[dict[str, str | None]] = {}

    async def receive(self, limit: int, *, max_bytes: int, wait: timedelta) -> Sequence[Delivery]:
        deliveries = await self.inner.receive(limit, max_bytes=max_bytes, wait=wait)
        return [replace(one, message=self._as_at_first(one.message)) for one in deliveries]

    def _as_at_first(self, message: Message) -> Message:
        return replace(message, only_group=self.addresses.setdefault(message.id, message.only_group))


class _FailuresForgotten(PassingSubscription):
    async def receive(self, limit: int, *, max_bytes: int, wait: timedelta) -> Sequence[Delivery]:
        deliveries = await self.inner.receive(limit, max_bytes=max_bytes, wait=wait)
        return [replace(delivery, failures=0) for delivery in deliveries]


class _StartsNotRecorded(PassingSubscription):
    async def begin(self, deliveries: Sequence[Delivery]) -> Sequence[Delivery]:
        return deliveries


class _LateStartsGranted(PassingSubscription):
    async def begin(self, deliveries: Sequence[Delivery]) -> Sequence[Delivery]:
        await self.inner.begin(deliveries)
        return deliveries


class _FailuresStopAtThree(PassingSubscription):
    async def receive(self, limit: int, *, max_bytes: int, wait: timedelta) -> Sequence[Delivery]:
        deliveries = await self.inner.receive(limit, max_bytes=max_bytes, wait=wait)
        return [replace(delivery, failures=min(delivery.failures, 3)) for delivery in deliveries]


class _CrashesStopAtOne(PassingSubscription):
    async def receive(self, limit: int, *, max_bytes: int, wait: timedelta) -> Sequence[Delivery]:
        deliveries = await self.inner.receive(limit, max_bytes=max_bytes, wait=wait)
        return [replace(delivery, crashes=min(delivery.crashes, 1)) for delivery in deliveries]


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


class _DelaysCutToASecond(PassingSubscription):
    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[Settlement]:
        return await self.inner.settle(
            [replace(one, delay=min(one.delay, SECOND)) if isinstance(one, Retry) else one for one in settlements]
        )


class _GivesWayAfterASecond(PassingSubscription):
    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[Settlement]:
        return await self.inner.settle(
            [
                replace(one, keep_order=one.keep_order and one.delay <= SECOND) if isinstance(one, Retry) else one
                for one in settlements
            ]
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


class _LateRetriesApply(PassingSubscription):
    """A late retry or release is told, and ends the new owner's delivery all the same."""

    owners: ClassVar[dict[tuple[str, str], tuple[Subscription, Delivery]]] = {}

    async def receive(self, limit: int, *, max_bytes: int, wait: timedelta) -> Sequence[Delivery]:
        deliveries = await self.inner.receive(limit, max_bytes=max_bytes, wait=wait)
        self.owners.update({(one.group, one.message.id): (self.inner, one) for one in deliveries})
        return deliveries

    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[Settlement]:
        late = await self.inner.settle(settlements)
        for one in late:
            if not isinstance(one, Ack):
                owner, owned = self.owners[one.delivery.group, one.delivery.message.id]
                await owner.settle([replace(one, delivery=owned)])
        return late


class _ExtendDoesNothing(PassingSubscription):
    async def extend(self, deliveries: Sequence[Delivery]) -> Sequence[Delivery]:
        return deliveries


class _HeadersOfTheDeadLost(PassingDeadLetters):
    async def add(self, records: Sequence[DeadLetterRecord], *, deadline: float) -> Sequence[Outcome]:
        poorer = [replace(one, message=replace(one.message, headers={})) for one in records]
        return await self.inner.add(poorer, deadline=deadline)


class _RemovalTakesAllGroups(PassingDeadLetters):
    async def remove(self, records: Sequence[DeadLetterRecord]) -> int:
        removed = await self.inner.remove(records)
        for one in records if removed else ():
            await self.inner.remove(await self.inner.find(topic=one.message.topic, message_id=one.message.id))
        return removed


class _RemovalTakesWhatDiedAgain(PassingDeadLetters):
    async def remove(self, records: Sequence[DeadLetterRecord]) -> int:
        removed = 0
        for one in records:
            topic, message_id = one.message.topic, one.message.id
            removed += await self.inner.remove(
                await self.inner.find(topic=topic, group=one.group, message_id=message_id)
            )
        return removed


def _breaks(*numbers: str) -> frozenset[str]:
    return frozenset(numbers)


FAULTS: dict[str, Fault] = {
    # Of a broker in memory they are not true.
    "claims to survive a restart": Fault(_breaks("P1"), claims=_survives_restart),
    "claims to be shared": Fault(_breaks("P1"), claims=_shared),
    "claims the disk": Fault(_breaks("P1"), claims=_on_the_disk),
    "outcomes reversed": Fault(_breaks("P2"), publisher=_OutcomesReversed),
    "unroutable confirmed": Fault(_breaks("P3"), publisher=_UnroutableConfirmed),
    "headers dropped": Fault(_breaks("P4"), publisher=_HeadersDropped),
    "first address stays": Fault(_breaks("P4"), subscription=_FirstAddressStays),
    # The order in which a batch is stored is the order in which members get it.
    "mixed batches reversed": Fault(_breaks("P5", "C3"), publisher=_MixedBatchesReversed),
    # The test of outcomes in a batch uses a message that is too large.
    "too large confirmed": Fault(_breaks("P2", "P6"), publisher=_TooLargeConfirmed),
    "deadline ignored": Fault(_breaks("P6"), publisher=_DeadlineIgnored),
    "differences hidden": Fault(_breaks("S1"), storage=_DifferencesHidden),
    "audit blind": Fault(_breaks("S2", "S3"), storage=_AuditBlind),
    "durability ignored": Fault(_breaks("S3"), storage=_DurabilityIgnored),
    "groups start late": Fault(_breaks("C9"), storage=_GroupsStartLate),
    "unfinished removed": Fault(_breaks("C9"), storage=_RetentionNoted, subscription=_UnfinishedRemoved),
    # Once acknowledged, nothing that is promised of unsettled deliveries can hold.
    "acknowledged first": Fault(_breaks("C1", "C2", "C3", "C4", "C6", "C7", "C8", "C9", "C12"), subscription=_AckFirst),
    # Without an end of leases nothing is late and no crash is noticed.
    "leases never end": Fault(_breaks("C2", "C4", "C12"), lease=timedelta(hours=1)),
    "failures forgotten": Fault(_breaks("C4"), subscription=_FailuresForgotten),
    "starts not recorded": Fault(_breaks("C4"), subscription=_StartsNotRecorded),
    "late starts granted": Fault(_breaks("C4"), subscription=_LateStartsGranted),
    "failures stop at three": Fault(_breaks("C4"), subscription=_FailuresStopAtThree),
    "crashes stop at one": Fault(_breaks("C4"), subscription=_CrashesStopAtOne),
    "headers of the dead lost": Fault(_breaks("C5"), dead_letters=_HeadersOfTheDeadLost),
    "removal takes all groups": Fault(_breaks("C5"), dead_letters=_RemovalTakesAllGroups),
    "removal takes what died again": Fault(_breaks("C5"), dead_letters=_RemovalTakesWhatDiedAgain),
    "retries at once": Fault(_breaks("C6"), subscription=_RetriesAtOnce),
    "delays cut to a second": Fault(_breaks("C6"), subscription=_DelaysCutToASecond),
    "gives way after a second": Fault(_breaks("C6"), subscription=_GivesWayAfterASecond),
    "always gives way": Fault(_breaks("C6"), subscription=_AlwaysGivesWay),
    "never gives way": Fault(_breaks("C6"), subscription=_NeverGivesWay),
    # Who does not renew does not learn either that the lease was lost.
    "extend does nothing": Fault(_breaks("C7", "C12"), subscription=_ExtendDoesNothing),
    "release counts as a failure": Fault(_breaks("C8"), subscription=_ReleaseCounts),
    "bytes ignored": Fault(_breaks("C10"), subscription=_BytesIgnored),
    "undecodable dropped": Fault(_breaks("C11"), subscription=_UndecodableDropped),
    "late settlements hidden": Fault(_breaks("C12"), subscription=_LateSettlementsHidden),
    "late retries apply": Fault(_breaks("C12"), subscription=_LateRetriesApply),
}
