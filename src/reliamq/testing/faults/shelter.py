"""What can be wrong with declaring, auditing and keeping."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import ClassVar

from reliamq.spi import Ack, Delivery, Finding, TopicSpec
from reliamq.testing.faults.fault import Fault, PassingStorage, PassingSubscription, breaks

__all__ = ["FAULTS"]


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


class _UnfinishedRemoved(PassingSubscription):
    """With :class:`_RetentionNoted`: what is older than its topic's retention is gone, whoever has not finished it."""

    async def receive(self, limit: int, *, max_bytes: int, wait: timedelta) -> Sequence[Delivery]:
        deliveries = await self.inner.receive(limit, max_bytes=max_bytes, wait=wait)
        now, kept_for = datetime.now(UTC), _RetentionNoted.retentions
        gone = [one for one in deliveries if now - one.message.time > kept_for[one.message.topic]]
        await self.inner.settle([Ack(delivery) for delivery in gone])
        return [one for one in deliveries if one not in gone]


FAULTS: dict[str, Fault] = {
    "differences hidden": Fault(breaks("S1"), storage=_DifferencesHidden),
    "audit blind": Fault(breaks("S2", "S3"), storage=_AuditBlind),
    "durability ignored": Fault(breaks("S3"), storage=_DurabilityIgnored),
    "groups start late": Fault(breaks("C9"), storage=_GroupsStartLate),
    "unfinished removed": Fault(breaks("C9"), storage=_RetentionNoted, subscription=_UnfinishedRemoved),
}
