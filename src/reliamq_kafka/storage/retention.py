"""Removing what every group has finished, once it is old enough.

Kafka's own retention would remove what a group has not finished, so topics are created without one (C9).  It promises
to remove nothing that a declared group may still need; a group whose offsets Kafka forgot keeps everything.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import timedelta

from aiokafka import AIOKafkaConsumer, TopicPartition

from reliamq_kafka.catalog.groups import DeclaredGroup, Groups, retention_of
from reliamq_kafka.settings import KafkaSettings
from reliamq_kafka.wire.admin import Admin
from reliamq_kafka.wire.consumers import ANSWER_SECONDS, bounded, open_consumer

__all__ = ["trim_topic"]


async def trim_topic(admin: Admin, settings: KafkaSettings, topic: str) -> Mapping[int, int]:
    """Remove what all groups of a topic have finished and what is older than it keeps; how many, by partition.

    Several may do it at once.  Raises BrokerUnavailable; some of it may be removed, now or later.
    Cancelled: likewise.
    """
    async with bounded(settings, f"trimming topic {topic}", 2 * ANSWER_SECONDS):
        groups = await Groups(admin, settings).of(topic)
        partitions = await admin.partitions(topic) if groups else None
        if not partitions:
            return {}
        # Before anything is looked up in the log: what a group finishes meanwhile is left for the next time
        finished = await _finished(admin, groups, [part.number for part in partitions])
        if not finished:
            return {}
        async with open_consumer(settings) as consumer:
            parts = [TopicPartition(topic, number) for number in finished]
            beginning = await consumer.beginning_offsets(parts)
            outdated = await _outdated(consumer, parts, retention_of(groups))
        limits = {part.partition: min(finished[part.partition], outdated[part]) for part in parts}
        first = {part.partition: beginning[part] for part in parts}
        limits = {number: limit for number, limit in limits.items() if limit > first[number]}
        if not limits:
            return {}
        left = await admin.delete_before(topic, limits)
    return {number: low - first[number] for number, low in left.items()}


async def _finished(admin: Admin, groups: Sequence[DeclaredGroup], numbers: Sequence[int]) -> dict[int, int]:
    """Below which offset every group has finished; a partition of which one of them has none is left out."""
    committed = [await admin.committed(group.id, group.topic, numbers) for group in groups]
    return {
        number: min(each[number] for each in committed) for number in numbers if all(number in c for c in committed)
    }


async def _outdated(
    consumer: AIOKafkaConsumer, parts: Sequence[TopicPartition], retention: timedelta
) -> dict[TopicPartition, int]:
    """Below which offset everything is older.

    Records have the broker's time and this is ours: clocks that differ keep a message for longer or shorter, and never
    remove one that is unfinished.
    """
    ends = await consumer.end_offsets(parts)
    oldest = max(0, int((time.time() - retention.total_seconds()) * 1000))
    kept = await consumer.offsets_for_times(dict.fromkeys(parts, oldest))
    return {part: ends[part] if kept[part] is None else min(kept[part].offset, ends[part]) for part in parts}
