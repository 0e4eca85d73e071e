"""Consumers that belong to no group's members: for looking at a log, and for writing a group's first offsets.

Partitions are assigned by hand, so nothing is rebalanced by them.  Every use is bounded, and no exception of the client
leaves it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiokafka import AIOKafkaConsumer
from aiokafka.errors import KafkaError

from reliamq.spi import BrokerUnavailable
from reliamq_kafka.settings import KafkaSettings
from reliamq_kafka.wire.connecting import UNREACHABLE, unreachable

__all__ = ["ANSWER_SECONDS", "bounded", "open_consumer", "stop_in_time"]

ANSWER_SECONDS = 30.0
CLOSE_SECONDS = 5.0


@asynccontextmanager
async def bounded(settings: KafkaSettings, what: str, seconds: float = ANSWER_SECONDS) -> AsyncIterator[None]:
    """Give the block ``seconds``; raise BrokerUnavailable for a longer wait and for the client's exceptions.

    what: is being done, for the error.
    """
    try:
        async with asyncio.timeout(seconds):
            yield
    except (KafkaError, OSError) as error:  # a TimeoutError is an OSError
        raise BrokerUnavailable(settings.url, f"{what}: {error!r}") from error


async def stop_in_time(consumer: AIOKafkaConsumer) -> None:
    """Have a member leave its group; where its coordinator does not answer, its session ends by itself."""
    stopping = asyncio.ensure_future(consumer.stop())
    _, late = await asyncio.wait({stopping}, timeout=CLOSE_SECONDS)
    for task in late:
        task.cancel()


@asynccontextmanager
async def open_consumer(settings: KafkaSettings, group_id: str | None = None) -> AsyncIterator[AIOKafkaConsumer]:
    """Connect and close.  Raises BrokerUnavailable.

    group_id: whose offsets it may write; it does not become a member.
    """
    consumer = AIOKafkaConsumer(
        **settings.connection(), group_id=group_id, enable_auto_commit=False, auto_offset_reset="earliest"
    )
    try:
        async with bounded(settings, "connecting"):
            try:
                await consumer.start()
            except UNREACHABLE as error:
                raise await unreachable(settings, error) from error
        yield consumer
    finally:
        await consumer.stop()
