"""What the tests of Redis are written with."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import anyio

from reliamq import Rejected, Unconfirmed
from reliamq.publishing.publisher import ConfirmingPublisher
from reliamq.spi import Ack, BrokerUnavailable, DeadLetterRecord, GroupSpec, Message, TopicSpec
from reliamq_redis.consuming.subscription import open_subscription
from reliamq_redis.publisher import open_publisher
from reliamq_redis.settings import RedisSettings
from reliamq_redis.storage.storage import open_storage

LEASE = timedelta(seconds=30)


async def declare(settings: RedisSettings, *groups: str, **fields: Any) -> str:
    """A topic of its own; its name."""
    topic = f"test-{uuid.uuid4()}"
    async with open_storage(settings) as storage:
        await storage.declare([TopicSpec(topic, tuple(GroupSpec(group) for group in groups), **fields)])
    return topic


def message(topic: str, text: str, key: str | None = "k", **fields: Any) -> Message:
    values: dict[str, Any] = {"id": str(uuid.uuid4()), "type": "Order", "source": "tests", "time": datetime.now(UTC)}
    return Message(topic, text.encode(), key=None if key is None else key.encode(), **{**values, **fields})


def record_of(topic: str, text: str, **fields: Any) -> DeadLetterRecord:
    """A dead letter of the group ``g``."""
    values: dict[str, Any] = {"reason": "no", "traceback": "", "attempts": 3, "died_at": datetime.now(UTC)}
    values |= {"message": message(topic, text), "group": "g", "handler": "handler", "position": "0/1-0"}
    return DeadLetterRecord(**{**values, **fields})


async def drain(settings: RedisSettings, topic: str, at_least: int, *, idle: float = 1.0) -> Sequence[Message]:
    """Everything that is there, taken: at least so many, and then until nothing comes for a while."""
    taken: list[Message] = []
    async with open_subscription(settings, topic, "g", LEASE) as member:
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


@asynccontextmanager
async def publishing(settings: RedisSettings) -> AsyncIterator[ConfirmingPublisher]:
    """What an application publishes with."""
    async with open_publisher(settings) as sender, anyio.create_task_group() as tasks:
        publisher = ConfirmingPublisher(sender)
        tasks.start_soon(publisher.run)
        yield publisher
        tasks.cancel_scope.cancel()


async def outcome_of(publisher: ConfirmingPublisher, one: Message, deadline: timedelta = timedelta(seconds=30)) -> str:
    """The name of how it ended."""
    try:
        await publisher.publish(one, deadline=deadline)
    except (Rejected, Unconfirmed) as error:
        return type(error).__name__
    return "confirmed"


async def outcomes_of(
    publisher: ConfirmingPublisher, messages: Sequence[Message], deadline: timedelta = timedelta(seconds=30)
) -> Sequence[str]:
    """Of all, published side by side."""
    return await asyncio.gather(*[outcome_of(publisher, one, deadline) for one in messages])


def soon(seconds: float = 30) -> float:
    """A deadline."""
    return time.monotonic() + seconds
