"""A topic of its own for each test, on the cluster that all share."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import NewTopic

from reliamq.spi import Message
from reliamq_kafka.catalog.groups import DeclaredGroup, Groups
from reliamq_kafka.settings import KafkaSettings, read_settings
from reliamq_kafka.wire.admin import group_id, open_admin
from reliamq_kafka.wire.consumers import open_consumer
from tests.servers.kafka import KafkaCluster

PARTITIONS = 3


@pytest.fixture
def settings(kafka: KafkaCluster) -> KafkaSettings:
    return read_settings(kafka.url, {"request_timeout_seconds": 5})


async def create_topic(settings: KafkaSettings, group: str | None = "g", **configs: str) -> str:
    """A topic, and a group that stands at its beginning."""
    topic = f"test-{uuid.uuid4()}"
    async with open_admin(settings) as admin:
        await admin.create(NewTopic(topic, PARTITIONS, 3, topic_configs=configs))
        await admin.led_partitions(topic)
        if group is not None:
            groups = Groups(admin, settings)
            await groups.create()
            await groups.add([DeclaredGroup(topic, group, (0,) * PARTITIONS, timedelta(days=7))])
    if group is not None:
        async with open_consumer(settings, group_id(topic, group)) as consumer:
            parts = [TopicPartition(topic, number) for number in range(PARTITIONS)]
            consumer.assign(parts)
            await consumer.commit(dict.fromkeys(parts, 0))
    return topic


@pytest.fixture
async def topic(settings: KafkaSettings) -> str:
    return await create_topic(settings)


def message(topic: str, text: str, key: str | None = "k", **fields: Any) -> Message:
    values: dict[str, Any] = {"id": str(uuid.uuid4()), "type": "Order", "source": "tests", "time": datetime.now(UTC)}
    return Message(topic, text.encode(), key=None if key is None else key.encode(), **{**values, **fields})


async def log_of(settings: KafkaSettings, topic: str) -> list[list[Any]]:
    """All records, partition by partition."""
    consumer = AIOKafkaConsumer(bootstrap_servers=list(settings.servers))
    await consumer.start()
    try:
        parts = [TopicPartition(topic, number) for number in range(PARTITIONS)]
        consumer.assign(parts)
        await consumer.seek_to_beginning()
        ends = await consumer.end_offsets(parts)
        log: dict[TopicPartition, list[Any]] = {part: [] for part in parts}
        while any([await consumer.position(part) < ends[part] for part in parts]):
            for part, records in (await consumer.getmany(timeout_ms=500)).items():
                log[part] += records
        return list(log.values())
    finally:
        await consumer.stop()
