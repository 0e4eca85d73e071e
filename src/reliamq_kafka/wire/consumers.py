"""Consumers that belong to no group's members: for looking at a log, and for writing a group's first offsets.

Partitions are assigned by hand, so nothing is rebalanced by them.  Connecting and closing are bounded here, what is
done between by who does it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from aiokafka import AIOKafkaConsumer
from aiokafka.errors import KafkaError

from reliamq.spi import BrokerUnavailable
from reliamq_kafka.settings import KafkaSettings
from reliamq_kafka.wire.closing import close_in_time
from reliamq_kafka.wire.connecting import UNREACHABLE, unreachable

__all__ = ["ANSWER_SECONDS", "SAFE_READING", "bounded", "open_consumer"]

ANSWER_SECONDS = 30.0
SAFE_READING: Mapping[str, object] = {"enable_auto_commit": False, "auto_offset_reset": "earliest"}
"""Nothing is committed that was not handled, and nothing is skipped; the audit looks at it too."""


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


@asynccontextmanager
async def open_consumer(settings: KafkaSettings, group_id: str | None = None) -> AsyncIterator[AIOKafkaConsumer]:
    """Connect and close.  Raises BrokerUnavailable.

    group_id: whose offsets it may write; it does not become a member.
    """
    consumer = AIOKafkaConsumer(**settings.connection(), **SAFE_READING, group_id=group_id)
    try:
        async with bounded(settings, "connecting"):
            try:
                await consumer.start()
            except UNREACHABLE as error:
                raise await unreachable(settings, error) from error
        yield consumer
    finally:
        await close_in_time(consumer.stop(), "a consumer")
