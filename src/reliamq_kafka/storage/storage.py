"""Safe shelter: declaring topics and groups.

Declaring creates what is missing and never weakens or deletes; what is there otherwise is left alone and said (S1).
A group is written down before it has offsets: from then on its topic is not trimmed past it (C9).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

from aiokafka import TopicPartition
from aiokafka.admin import NewTopic
from aiokafka.errors import BrokerResponseError, CommitFailedError

from reliamq.spi import Durability, Finding, GroupSpec, Severity, TopicSpec
from reliamq_kafka.audit.audit import audit
from reliamq_kafka.audit.topic import own_topic_findings
from reliamq_kafka.catalog.groups import DeclaredGroup, Groups, retention_of
from reliamq_kafka.catalog.own_topics import GROUPS_TOPIC
from reliamq_kafka.settings import KafkaSettings
from reliamq_kafka.storage.expectations import (
    differences,
    is_replicated,
    retention_difference,
    topic_configs,
)
from reliamq_kafka.wire.admin import Admin, Broker, Partition, open_admin
from reliamq_kafka.wire.consumers import ANSWER_SECONDS, bounded, open_consumer

__all__ = ["KafkaStorage", "open_storage"]


class KafkaStorage:
    """A :class:`~reliamq.spi.Storage`."""

    def __init__(self, admin: Admin, settings: KafkaSettings) -> None:
        self._admin, self._settings = admin, settings
        self._groups = Groups(admin, settings)

    async def declare(self, topics: Sequence[TopicSpec]) -> Sequence[Finding]:
        """Create what is missing; see the contract."""
        if not topics:
            return ()
        await self._groups.create()
        brokers, findings = await self._admin.brokers(), list[Finding]()
        if any(is_replicated(spec) for spec in topics):
            async with bounded(self._settings, f"looking at {GROUPS_TOPIC}", 2 * ANSWER_SECONDS):
                findings += await self._look_at_groups(brokers, max(spec.durability for spec in topics))
        for spec in topics:
            async with bounded(self._settings, f"declaring topic {spec.name}", 3 * ANSWER_SECONDS):
                findings += await self._declare(spec, brokers)
        return findings

    async def audit(self, topics: Sequence[TopicSpec]) -> Sequence[Finding]:
        """Read the live values; see the contract."""
        return await audit(self._admin, self._settings, topics)

    async def _look_at_groups(self, brokers: Sequence[Broker], durability: Durability) -> list[Finding]:
        """The table of groups must be as safe as the topics that need it."""
        partitions = await self._admin.led_partitions(GROUPS_TOPIC)
        live = await self._admin.topic_settings(GROUPS_TOPIC)
        return own_topic_findings(GROUPS_TOPIC, partitions, brokers, live, durability, self._settings)

    async def _declare(self, spec: TopicSpec, brokers: Sequence[Broker]) -> Sequence[Finding]:
        if await self._admin.partitions(spec.name) is None:
            try:
                await self._create(spec)
            except BrokerResponseError as error:  # not permitted, too few brokers for its replicas, …
                return [_refused(spec, error)]
        partitions = await self._admin.led_partitions(spec.name)
        live = await self._admin.topic_settings(spec.name)
        known = await self._groups.of(spec.name)
        declared = await self._declare_groups(spec, partitions, known)
        return [
            *differences(spec, self._settings, partitions, brokers, live),
            *retention_difference(spec, retention_of(declared)),
        ]

    async def _create(self, spec: TopicSpec) -> None:
        replicas = self._settings.replication_factor
        if not is_replicated(spec):
            replicas = min(replicas, len(await self._admin.brokers()))
        configs = topic_configs(spec, self._settings, replicas)
        await self._admin.create(NewTopic(spec.name, self._settings.partitions, replicas, topic_configs=configs))

    async def _declare_groups(
        self, spec: TopicSpec, partitions: Sequence[Partition], known: Sequence[DeclaredGroup]
    ) -> Sequence[DeclaredGroup]:
        """Write down the groups that are new, then give offsets to those that have none.  All groups of the topic."""
        groups = {each.group: each for each in known}
        new = [group for group in spec.groups if group.name not in groups]
        if new:
            ends = await self._ends(spec.name, partitions)
            groups |= {group.name: _declared(spec, group, ends) for group in new}
        asked = {group.name for group in spec.groups}
        kept_longer = {
            name: replace(each, retention=spec.retention)
            for name, each in groups.items()
            if name in asked and each.retention < spec.retention
        }
        groups |= kept_longer
        await self._groups.add([groups[name] for name in {*kept_longer, *(group.name for group in new)}])
        for name in asked:
            await self._place(groups[name], partitions)
        return list(groups.values())

    async def _ends(self, topic: str, partitions: Sequence[Partition]) -> Mapping[int, tuple[int, int]]:
        """The first offset and the one after the last, by partition."""
        parts = [TopicPartition(topic, part.number) for part in partitions]
        async with open_consumer(self._settings) as consumer:
            first = await consumer.beginning_offsets(parts)
            last = await consumer.end_offsets(parts)
        return {part.partition: (first[part], last[part]) for part in parts}

    async def _place(self, group: DeclaredGroup, partitions: Sequence[Partition]) -> None:
        """Commit the first offset wherever the group has none.

        It may have had one that Kafka forgot; then it begins again, because how far it was nobody knows.
        """
        numbers = [part.number for part in partitions]
        committed = await self._admin.committed(group.id, group.topic, numbers)
        missing = [number for number in numbers if number not in committed]
        if not missing:
            return
        ends = await self._ends(group.topic, partitions)
        offsets = {number: max(ends[number][0], _first(group, number)) for number in missing}
        async with open_consumer(self._settings, group.id) as consumer:
            consumer.assign([TopicPartition(group.topic, number) for number in missing])
            try:
                await consumer.commit({TopicPartition(group.topic, number): at for number, at in offsets.items()})
            except CommitFailedError:
                return  # it has members, so it was declared; they begin where nothing is committed with its first


def _declared(spec: TopicSpec, group: GroupSpec, ends: Mapping[int, tuple[int, int]]) -> DeclaredGroup:
    side = 0 if group.start == "earliest" else 1
    first = tuple(ends[number][side] for number in sorted(ends))
    return DeclaredGroup(spec.name, group.name, first, spec.retention)


def _first(group: DeclaredGroup, number: int) -> int:
    """Of a partition that was added since: its beginning."""
    return group.first[number] if number < len(group.first) else 0


def _refused(spec: TopicSpec, error: BrokerResponseError) -> Finding:
    why = f"The cluster refuses to create it ({error}); publishing to it is rejected as unroutable."
    fix = "Use a cluster of three brokers, or require 'development'; or have an administrator create it."
    return Finding(Severity.LOSES, f"topic {spec.name}", "topic", "missing", "declared", why, fix, "S1")


@asynccontextmanager
async def open_storage(settings: KafkaSettings) -> AsyncIterator[KafkaStorage]:
    """Connect and close.  Raises BrokerUnavailable."""
    async with open_admin(settings) as admin:
        yield KafkaStorage(admin, settings)
