"""What can be wrong with deliveries, their ends, and dead letters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import ClassVar

from reliamq.spi import (
    Ack,
    DeadLetterRecord,
    Delivery,
    Message,
    Outcome,
    Release,
    Retry,
    Settlement,
    Subscription,
)
from reliamq.testing.faults.fault import (
    Fault,
    PassingDeadLetters,
    PassingSubscription,
    breaks,
)

__all__ = ["FAULTS"]

SECOND = timedelta(seconds=1)


class _AckFirst(PassingSubscription):
    async def receive(self, limit: int, *, max_bytes: int, wait: timedelta) -> Sequence[Delivery]:
        deliveries = await self.inner.receive(limit, max_bytes=max_bytes, wait=wait)
        await self.inner.settle([Ack(delivery) for delivery in deliveries])
        return deliveries

    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[Settlement]:
        return []


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


FAULTS: dict[str, Fault] = {
    "first address stays": Fault(breaks("P4"), subscription=_FirstAddressStays),
    # Once acknowledged, nothing that is promised of unsettled deliveries can hold.
    "acknowledged first": Fault(breaks("C1", "C2", "C3", "C4", "C6", "C7", "C8", "C9", "C12"), subscription=_AckFirst),
    # Without an end of leases nothing is late and no crash is noticed.
    "leases never end": Fault(breaks("C2", "C4", "C12"), lease=timedelta(hours=1)),
    "failures forgotten": Fault(breaks("C4"), subscription=_FailuresForgotten),
    "starts not recorded": Fault(breaks("C4"), subscription=_StartsNotRecorded),
    "late starts granted": Fault(breaks("C4"), subscription=_LateStartsGranted),
    "failures stop at three": Fault(breaks("C4"), subscription=_FailuresStopAtThree),
    "crashes stop at one": Fault(breaks("C4"), subscription=_CrashesStopAtOne),
    "headers of the dead lost": Fault(breaks("C5"), dead_letters=_HeadersOfTheDeadLost),
    "removal takes all groups": Fault(breaks("C5"), dead_letters=_RemovalTakesAllGroups),
    "removal takes what died again": Fault(breaks("C5"), dead_letters=_RemovalTakesWhatDiedAgain),
    "retries at once": Fault(breaks("C6"), subscription=_RetriesAtOnce),
    "delays cut to a second": Fault(breaks("C6"), subscription=_DelaysCutToASecond),
    "gives way after a second": Fault(breaks("C6"), subscription=_GivesWayAfterASecond),
    "always gives way": Fault(breaks("C6"), subscription=_AlwaysGivesWay),
    "never gives way": Fault(breaks("C6"), subscription=_NeverGivesWay),
    # Who does not renew does not learn either that the lease was lost.
    "extend does nothing": Fault(breaks("C7", "C12"), subscription=_ExtendDoesNothing),
    "release counts as a failure": Fault(breaks("C8"), subscription=_ReleaseCounts),
    "bytes ignored": Fault(breaks("C10"), subscription=_BytesIgnored),
    "undecodable dropped": Fault(breaks("C11"), subscription=_UndecodableDropped),
    "late settlements hidden": Fault(breaks("C12"), subscription=_LateSettlementsHidden),
    "late retries apply": Fault(breaks("C12"), subscription=_LateRetriesApply),
}
