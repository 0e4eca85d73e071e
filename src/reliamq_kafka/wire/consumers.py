"""Consumers that belong to no group's members: for looking at a log, and for writing a group's first offsets.

Partitions are assigned by hand, so nothing is rebalanced by them.  Connecting and closing are bounded here, what is
done between by who does it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, TypeVar

import aiokafka
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import IllegalStateError, KafkaError

from reliamq.spi import BrokerUnavailable
from reliamq.spi.closing import close_in_time, start_whole
from reliamq_kafka.settings import KafkaSettings
from reliamq_kafka.wire.connecting import UNREACHABLE, close_whole, unreachable

__all__ = [
    "ANSWER_SECONDS",
    "SAFE_READING",
    "answered_in_time",
    "bounded",
    "join_group",
    "known_positions",
    "open_consumer",
    "stop",
]

T = TypeVar("T")
ANSWER_SECONDS = 30.0
SAFE_READING: Mapping[str, object] = {
    "enable_auto_commit": False,
    "auto_offset_reset": "earliest",
    "isolation_level": "read_committed",
}
"""Nothing is committed that was not handled, nothing is skipped, and what a transaction aborted is no message.
The audit looks at it too."""
WHOLE_LOG: Mapping[str, object] = {"isolation_level": "read_uncommitted"}
"""For who looks at a log and handles nothing: it ends where it ends, and not before the first open transaction."""


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


async def answered_in_time(settings: KafkaSettings, group: str, call: Coroutine[Any, Any, T]) -> T:
    """What a member's client answers.  It waits for a rebalance without end: one that does not end is a client that is
    stuck, and another one must take its place.  Raises BrokerUnavailable.

    Cancelled, or late: the client must not be used any more; a call that was broken off counts as work for ever.
    """
    patience = 2 * settings.rebalance_timeout_seconds + settings.session_timeout_seconds
    calling = asyncio.ensure_future(call)
    try:
        finished, _ = await asyncio.wait({calling}, timeout=patience)
    finally:
        calling.cancel()
    if not finished:
        raise BrokerUnavailable(settings.url, f"group {group} has settled on nothing for {patience} s")
    return calling.result()


async def join_group(consumer: AIOKafkaConsumer, topic: str, listener: aiokafka.ConsumerRebalanceListener) -> None:
    """Start a consumer as a member of its group and wait until the group has settled; how long is up to the caller.

    Raises the client's exceptions.  Cancelled: it must be stopped, and leaves no connection behind.
    """
    # First without a topic, which is short: who is cancelled in there lets it come to its end
    await start_whole(consumer.start(), partial(_stop_started, consumer), "a member")
    await consumer._client._wait_on_metadata(topic)  # it raises what is not allowed
    # Nothing is awaited in between: the client waits for the next assignment, and tells failures to who waits already
    consumer.subscribe([topic], listener=listener)
    await consumer._subscription.wait_for_assignment()


async def known_positions(consumer: AIOKafkaConsumer, parts: Iterable[TopicPartition]) -> dict[TopicPartition, int]:
    """The offsets at which the consumer goes on.  None at all while it looks for one of them: it does not wait."""
    with suppress(IllegalStateError, TimeoutError):  # one changes hands just now, or its place is looked for
        async with asyncio.timeout(0):  # what is known is told at once
            return {part: await consumer.position(part) for part in parts}
    return {}


async def stop(consumer: AIOKafkaConsumer) -> None:
    """Stop a consumer; see ``close_whole``."""
    await close_whole(consumer.stop(), consumer._client)


async def _stop_started(consumer: AIOKafkaConsumer) -> None:
    """Also one that was told to stop before it had started."""
    consumer._closed = False
    await stop(consumer)


@asynccontextmanager
async def open_consumer(
    settings: KafkaSettings, group_id: str | None = None, **options: object
) -> AsyncIterator[AIOKafkaConsumer]:
    """Connect and close.  Raises BrokerUnavailable.

    group_id: whose offsets it may write; it does not become a member.  options: more of the client's, or others.
    """
    consumer = AIOKafkaConsumer(**settings.connection(), group_id=group_id, **{**SAFE_READING, **WHOLE_LOG, **options})
    try:
        async with bounded(settings, "connecting"):
            try:
                await start_whole(consumer.start(), partial(_stop_started, consumer), "a consumer")
            except UNREACHABLE as error:
                raise await unreachable(settings, error) from error
        yield consumer
    finally:
        await close_in_time(stop(consumer), "a consumer")
