"""The client's producer, replaced when it can no longer be used.

It promises that what is handed to it is written with acks=all and idempotently, and that a refused batch stops nobody:
who is to blame is found out by the partition's queue.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress

from aiokafka import AIOKafkaProducer
from aiokafka.producer.message_accumulator import BatchBuilder

from reliamq.spi import BrokerUnavailable
from reliamq_kafka.settings import KafkaSettings
from reliamq_kafka.wire.closing import CLOSE_SECONDS, keep_until_it_ends, to_its_end
from reliamq_kafka.wire.connecting import UNREACHABLE, unreachable

__all__ = ["LARGEST_BATCH", "SAFE_SENDING", "Producers", "open_producers"]

logger = logging.getLogger("reliamq.kafka")
LARGEST_BATCH = 512 * 1024
SAFE_SENDING: Mapping[str, object] = {"acks": "all", "enable_idempotence": True}
"""What makes a confirmation one; the audit looks at it too."""


class Producers:
    """The client's producer, replaced when it can no longer be used: a
    :class:`~reliamq_kafka.wire.partition_queue.Wire`.

    aiokafka's idempotent producer never recovers the numbering of a partition after one refused batch
    (aio-libs/aiokafka#1017), so a new one takes its place; the old one finishes what it has.
    """

    def __init__(self, settings: KafkaSettings) -> None:
        self._settings = settings
        self._lock = asyncio.Lock()
        self._retired: dict[asyncio.Task[None], AIOKafkaProducer] = {}
        self.generation = 0

    async def start(self) -> None:
        """Connect.  Raises BrokerUnavailable."""
        producer = AIOKafkaProducer(**self._settings.connection(), **SAFE_SENDING, max_batch_size=LARGEST_BATCH)
        try:
            await producer.start()
        except UNREACHABLE as error:
            await producer.stop()
            raise await unreachable(self._settings, error) from error
        except asyncio.CancelledError:
            await producer.stop()
            raise
        self._producer = producer

    def new_batch(self) -> BatchBuilder:
        """See Wire."""
        return self._producer.create_batch()

    async def deliver(self, batch: BatchBuilder, topic: str, partition: int) -> int:
        """See Wire."""
        # Shielded: the client's sender stumbles over a batch whose future somebody has cancelled.
        stored = await asyncio.shield(await self._producer.send_batch(batch, topic, partition=partition))
        return -1 if stored is None or stored.offset is None else int(stored.offset)

    async def replace(self, generation: int) -> None:
        """See Wire."""
        async with self._lock:
            if generation != self.generation:
                return
            old = self._producer
            with suppress(BrokerUnavailable):  # the next attempt finds the old one closed and comes back
                await self.start()
            self.generation += 1
            retired = asyncio.create_task(_retire(old), name="retired producer")
            self._retired[retired] = old
            retired.add_done_callback(self._retired.pop)

    async def stop(self) -> None:
        """Close; bounded, because the client would wait for replicas for ever.  What is on its way may be stored."""
        await to_its_end(self._stop_all())

    async def _stop_all(self) -> None:
        stopping = [
            asyncio.create_task(_stop(producer, self._settings.url), name="closing producer")
            for producer in (self._producer, *self._retired.values())
        ]
        _, late = await asyncio.wait(stopping, timeout=2 * CLOSE_SECONDS)
        for task in late:  # they wait for the answer to one request, which has a limit
            keep_until_it_ends(task)
        for task in list(self._retired):
            task.cancel()


async def _retire(producer: AIOKafkaProducer) -> None:
    """Close a producer when all that it has is stored, as long as that takes."""
    await producer.flush()
    await producer.stop()


async def _stop(producer: AIOKafkaProducer, url: str) -> None:
    """Close a producer, after a while with what it has.

    The client's own way waits until all is stored.  Cancelled, it leaves its sender and its connections behind, and
    they write when the replicas are back.
    """
    try:
        async with asyncio.timeout(CLOSE_SECONDS):
            await producer.flush()
    except TimeoutError:
        logger.warning("%s: closed while batches were on their way; they may be stored", url)
        producer._closed = True
        await producer._sender.close()
        await producer.client.close()
    else:
        await producer.stop()


@asynccontextmanager
async def open_producers(settings: KafkaSettings) -> AsyncIterator[Producers]:
    """Connect and close.  Raises BrokerUnavailable."""
    producers = Producers(settings)
    await producers.start()
    try:
        yield producers
    finally:
        await producers.stop()
