"""Nothing that a declared group has not finished is removed, whatever its topic's retention is (C9)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import timedelta

import anyio
import pytest
from aiokafka import TopicPartition
from aiokafka.partitioner import murmur2

from reliamq.spi import Confirmation
from reliamq_kafka.catalog.groups import DeclaredGroup, Groups
from reliamq_kafka.publisher import open_publisher
from reliamq_kafka.settings import KafkaSettings
from reliamq_kafka.storage.retention import trim_topic
from reliamq_kafka.wire.admin import group_id, open_admin
from reliamq_kafka.wire.consumers import open_consumer
from tests.kafka.conftest import PARTITIONS, create_topic, log_of, message

pytestmark = [pytest.mark.anyio, pytest.mark.xdist_group("kafka")]

OLD = timedelta(seconds=0.1)


def partition_of(key: str) -> int:
    return int(murmur2(key.encode()) & 0x7FFFFFFF) % PARTITIONS


KEYS = [next(key for key in map(str, range(1_000)) if partition_of(key) == number) for number in range(PARTITIONS)]
"""One for each partition."""


async def declare(settings: KafkaSettings, topic: str, *groups: str, retention: timedelta = OLD) -> None:
    """Write groups down, the one of the fixture too."""
    async with open_admin(settings) as admin:
        entries = [DeclaredGroup(topic, group, (0,) * PARTITIONS, retention) for group in groups]
        await Groups(admin, settings).add(entries)


async def finish(settings: KafkaSettings, topic: str, group: str, offsets: Sequence[int]) -> None:
    """Have the group's messages below these offsets finished, partition by partition."""
    async with open_consumer(settings, group_id(topic, group)) as consumer:
        parts = [TopicPartition(topic, number) for number in range(PARTITIONS)]
        consumer.assign(parts)
        await consumer.commit(dict(zip(parts, offsets, strict=True)))


async def publish(settings: KafkaSettings, topic: str, count: int) -> None:
    """So many to each partition."""
    async with open_publisher(settings) as publisher:
        sent = [message(topic, str(number), key) for number in range(count) for key in KEYS]
        outcomes = await publisher.send(sent, deadline=time.monotonic() + 20)
    assert {type(one) for one in outcomes} == {Confirmation}


async def trim(settings: KafkaSettings, topic: str) -> Mapping[int, int]:
    await anyio.sleep(0.2)  # until all of it is old
    async with open_admin(settings) as admin:
        return await trim_topic(admin, settings, topic)


async def left(settings: KafkaSettings, topic: str) -> list[int]:
    """The first offset that is left of each partition, none where it is empty."""
    return [partition[0].offset if partition else -1 for partition in await log_of(settings, topic)]


async def test_what_every_group_has_finished_is_removed_and_nothing_else(settings: KafkaSettings, topic: str) -> None:
    await declare(settings, topic, "g", "slow")
    await publish(settings, topic, 5)
    await finish(settings, topic, "g", [5, 4, 5])
    await finish(settings, topic, "slow", [2, 5, 0])

    assert await trim(settings, topic) == {0: 2, 1: 4}
    assert await left(settings, topic) == [2, 4, 0]
    assert await trim(settings, topic) == {}

    await finish(settings, topic, "g", [5, 5, 5])
    await finish(settings, topic, "slow", [5, 5, 5])
    assert await trim(settings, topic) == {0: 3, 1: 1, 2: 5}
    assert await left(settings, topic) == [-1, -1, -1]


async def test_a_group_whose_offsets_kafka_forgot_keeps_everything(settings: KafkaSettings, topic: str) -> None:
    await declare(settings, topic, "g", "forgotten")
    await publish(settings, topic, 2)
    await finish(settings, topic, "g", [2, 2, 2])

    assert await trim(settings, topic) == {}
    assert await left(settings, topic) == [0, 0, 0]


async def test_what_is_finished_and_not_old_is_kept_for_groups_to_come(settings: KafkaSettings, topic: str) -> None:
    await declare(settings, topic, "h", retention=timedelta(hours=1))
    await declare(settings, topic, "g", retention=OLD)  # the longest that was asked counts
    await publish(settings, topic, 2)
    for group in ("g", "h"):
        await finish(settings, topic, group, [2, 2, 2])

    assert await trim(settings, topic) == {}
    assert await left(settings, topic) == [0, 0, 0]


async def test_only_what_is_old_is_removed(settings: KafkaSettings, topic: str) -> None:
    await declare(settings, topic, "g", retention=timedelta(seconds=5))
    await publish(settings, topic, 2)
    await anyio.sleep(5)
    await publish(settings, topic, 2)
    await finish(settings, topic, "g", [4, 4, 4])

    assert await trim(settings, topic) == {0: 2, 1: 2, 2: 2}
    assert await left(settings, topic) == [2, 2, 2]


async def test_several_may_trim_at_once_and_a_topic_without_groups_is_left_alone(
    settings: KafkaSettings, topic: str
) -> None:
    deserted = await create_topic(settings, group=None)
    await declare(settings, topic, "g")
    await publish(settings, topic, 4)
    await finish(settings, topic, "g", [3, 3, 3])

    async with anyio.create_task_group() as tasks:
        for each in (topic, topic, topic, deserted, "no-such-topic"):
            tasks.start_soon(trim, settings, each)

    assert await left(settings, topic) == [3, 3, 3]
