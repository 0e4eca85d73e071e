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
from aiokafka.errors import KafkaTimeoutError, ProducerClosed
from aiokafka.producer.message_accumulator import BatchBuilder

from reliamq.spi import BrokerUnavailable
from reliamq.spi.closing import CLOSE_SECONDS, keep_until_it_ends, start_whole, to_its_end
from reliamq_kafka.settings import KafkaSettings
from reliamq_kafka.wire.connecting import UNREACHABLE, unreachable

__all__ = ["LARGEST_BATCH", "SAFE_SENDING", "Producers", "open_producers"]

logger = logging.getLogger("reliamq.kafka")
LARGEST_BATCH = 512 * 1024
HANDING_SECONDS = 20.0
"""How long the client may take to learn who leads a partition, and to have room."""
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
            await start_whole(producer.start(), producer.stop, "a producer")
        except UNREACHABLE as error:
            await producer.stop()
            raise await unreachable(self._settings, error) from error
        self._producer = producer

    def new_batch(self) -> BatchBuilder:
        """See Wire."""
        return self._producer.create_batch()

    async def deliver(self, batch: BatchBuilder, topic: str, partition: int) -> int:
        """See Wire."""
        producer = self._producer
        if producer._closed:  # it waits for news of a topic that a closed client never gets
            raise ProducerClosed
        try:
            async with asyncio.timeout(HANDING_SECONDS):  # cancelled in here: the client does not have it
                on_its_way = await producer.send_batch(batch, topic, partition=partition)
        except TimeoutError:
            raise KafkaTimeoutError("the client has not taken it") from None
        on_its_way.add_done_callback(_look_at)
        stored = await on_its_way
        return -1 if stored is None or stored.offset is None else int(stored.offset)

    async def replace(self, generation: int) -> None:
        """See Wire."""
        async with self._lock:
            if generation != self.generation:
                return
            old = self._producer
            with suppress(BrokerUnavailable):  # then the old one stays, closed sooner or later, and this is tried again
                await self.start()
            self.generation += 1
            if old not in self._retired.values():
                retired = asyncio.create_task(_retire(old), name="retired producer")
                keep_until_it_ends(retired)
                self._retired[retired] = old
                retired.add_done_callback(self._retired.pop)

    async def stop(self) -> None:
        """Close; bounded, because the client would wait for replicas for ever.  What is on its way may be stored."""
        await to_its_end(self._stop_all())

    async def _stop_all(self) -> None:
        retiring = dict(self._retired)
        for task, producer in retiring.items():
            if not producer._closed:  # it waits for what may never be stored
                task.cancel()
        open_ones = [one for one in {self._producer, *retiring.values()} if not one._closed]
        stopping = [asyncio.create_task(_stop(one, self._settings.url), name="closing producer") for one in open_ones]
        for task in stopping:
            keep_until_it_ends(task)
        ending = {*stopping, *(task for task, producer in retiring.items() if producer not in open_ones)}
        if ending:  # who is late waits for the answer to one request, which has a limit
            await asyncio.wait(ending, timeout=2 * CLOSE_SECONDS)


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
        try:
            await producer._sender.close()
        finally:
            await producer.client.close()
    else:
        await producer.stop()


def _look_at(stored: asyncio.Future[object]) -> None:
    """Also where nobody waits for it any more; else its failure would be reported as never looked at."""
    if not stored.cancelled():
        stored.exception()


@asynccontextmanager
async def open_producers(settings: KafkaSettings) -> AsyncIterator[Producers]:
    """Connect and close.  Raises BrokerUnavailable."""
    producers = Producers(settings)
    await producers.start()
    try:
        yield producers
    finally:
        await producers.stop()
