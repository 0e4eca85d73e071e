"""A topic of its own for each test, on the cluster that all share."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import aio_pika
import anyio
import pytest

from reliamq.spi import Ack, BrokerUnavailable, GroupSpec, Message, TopicSpec
from reliamq_rabbitmq.consuming.subscription import open_subscription
from reliamq_rabbitmq.settings import RabbitmqSettings, read_settings
from reliamq_rabbitmq.storage.storage import open_storage
from tests.servers.rabbitmq import RabbitmqCluster

LANES = 2


@pytest.fixture
def settings(rabbitmq: RabbitmqCluster) -> RabbitmqSettings:
    return read_settings(rabbitmq.url, {"request_timeout_seconds": 5, "lanes": LANES})


async def declare(settings: RabbitmqSettings, *groups: str, **fields: Any) -> str:
    topic = f"test-{uuid.uuid4()}"
    async with open_storage(settings) as storage:
        await storage.declare([TopicSpec(topic, tuple(GroupSpec(group) for group in groups), **fields)])
    return topic


@pytest.fixture
async def topic(settings: RabbitmqSettings) -> str:
    return await declare(settings, "g")


def message(topic: str, text: str, key: str | None = "k", **fields: Any) -> Message:
    values: dict[str, Any] = {"id": str(uuid.uuid4()), "type": "Order", "source": "tests", "time": datetime.now(UTC)}
    return Message(topic, text.encode(), key=None if key is None else key.encode(), **{**values, **fields})


async def drain(settings: RabbitmqSettings, topic: str, at_least: int, *, idle: float = 1.0) -> Sequence[Message]:
    """Everything that is there, taken: at least so many, and then until nothing comes for a while."""
    taken: list[Message] = []
    async with open_subscription(settings, topic, "g", timedelta(seconds=30)) as member:
        while True:
            wait = timedelta(seconds=idle if len(taken) >= at_least else 30)
            try:
                came = await member.receive(1000, max_bytes=1 << 30, wait=wait)
            except BrokerUnavailable:  # just started again; whoever receives asks again
                await anyio.sleep(0.5)
                continue
            if not came:
                return taken
            await member.settle([Ack(one) for one in came])
            taken += [one.message for one in came]


def bodies(messages: Sequence[Message]) -> Counter[bytes]:
    return Counter(one.body for one in messages)


def amqp_url(cluster: RabbitmqCluster, node: int = 0, virtual_host: str = "") -> str:
    """One node, for the client without reliamq."""
    start, _, rest = cluster.url.replace("rabbitmq://", "amqp://").partition("@")
    return f"{start}@{rest.split(',')[node]}/{virtual_host}"


async def delete_exchange(cluster: RabbitmqCluster, name: str) -> None:
    async with await aio_pika.connect(amqp_url(cluster)) as connection:
        await (await connection.channel()).exchange_delete(name)


async def delete_queue(cluster: RabbitmqCluster, name: str, virtual_host: str = "") -> None:
    async with await aio_pika.connect(amqp_url(cluster, 0, virtual_host)) as connection:
        await (await connection.channel()).queue_delete(name)
