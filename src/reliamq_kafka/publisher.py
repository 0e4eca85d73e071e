"""Safe departure on Kafka: acks=all, idempotent, and an outcome for each message by the caller's deadline.

The client has no deadline of its own and retries for ever; so the caller stops waiting and the attempt goes on.  Who
repeats a message that is still on its way waits for that attempt instead of sending it twice (P4), and what was not
handed to the client yet is certainly not stored.  How a partition keeps its order is left to its queue.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress

from aiokafka import AIOKafkaProducer
from aiokafka.partitioner import murmur2
from aiokafka.producer.message_accumulator import BatchBuilder

from reliamq.spi import BrokerUnavailable, InDoubt, Message, Outcome, Rejection, RejectionReason
from reliamq_kafka.admin import open_admin
from reliamq_kafka.connecting import UNREACHABLE, unreachable
from reliamq_kafka.partition_queue import PartitionQueue, Sending, Waiter
from reliamq_kafka.records import headers_of
from reliamq_kafka.settings import KafkaSettings
from reliamq_kafka.topics import KnownTopics, TopicFacts

__all__ = ["SAFE_SENDING", "KafkaPublisher", "open_publisher"]

logger = logging.getLogger("reliamq.kafka")
LARGEST_BATCH = 512 * 1024
CLOSE_SECONDS = 5.0
SAFE_SENDING: Mapping[str, object] = {"acks": "all", "enable_idempotence": True}
"""What makes a confirmation one; the audit looks at it too."""


class Producers:
    """The client's producer, replaced when it can no longer be used.  A :class:`~reliamq_kafka.partition_queue.Wire`.

    aiokafka's idempotent producer never recovers the numbering of a partition after one refused batch
    (aio-libs/aiokafka#1017), so a new one takes its place; the old one finishes what it has.
    """

    def __init__(self, settings: KafkaSettings) -> None:
        self._settings = settings
        self._lock = asyncio.Lock()
        self._retired: set[asyncio.Task[None]] = set()
        self.generation = 0

    async def start(self) -> None:
        """Connect.  Raises BrokerUnavailable."""
        producer = AIOKafkaProducer(**self._settings.connection(), **SAFE_SENDING, max_batch_size=LARGEST_BATCH)
        try:
            await producer.start()
        except UNREACHABLE as error:
            await producer.stop()
            raise await unreachable(self._settings, error) from error
        self._producer = producer

    def new_batch(self) -> BatchBuilder:
        """See Wire."""
        return self._producer.create_batch()

    async def deliver(self, batch: BatchBuilder, topic: str, partition: int) -> int:
        """See Wire."""
        stored = await (await self._producer.send_batch(batch, topic, partition=partition))
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
            retired = asyncio.create_task(old.stop(), name="retired producer")
            self._retired.add(retired)
            retired.add_done_callback(self._retired.discard)

    async def stop(self) -> None:
        """Close; bounded, because the client would wait for replicas for ever."""
        closing = {asyncio.create_task(self._producer.stop(), name="closing producer"), *self._retired}
        _, late = await asyncio.wait(closing, timeout=CLOSE_SECONDS)
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late, timeout=CLOSE_SECONDS)
            logger.warning("%s: closed while batches were on their way; they may be stored", self._settings.url)


class KafkaPublisher:
    """A :class:`~reliamq.spi.Publisher`; called by one task."""

    def __init__(self, producers: Producers, topics: KnownTopics) -> None:
        self._producers, self._topics = producers, topics
        self._queues: dict[tuple[str, int], PartitionQueue] = {}
        self._on_the_way: dict[tuple[str, str], tuple[Sending, PartitionQueue]] = {}
        self._turn = 0

    async def send(self, batch: Sequence[Message], *, deadline: float) -> Sequence[Outcome]:
        """Store a batch; see the contract."""
        refused: dict[int, Rejection] = {}
        places: list[tuple[int, Sending, PartitionQueue]] = []
        added: dict[PartitionQueue, list[Sending]] = {}
        for index, message in enumerate(batch):
            known = self._on_the_way.get((message.topic, message.id))
            if known is None:
                facts = await self._topics.of(message.topic, group=message.only_group)
                rejection = _refusal(message, facts)
                if rejection is not None or facts is None:
                    refused[index] = rejection or _unroutable(message, "is not there")
                    continue
                known = Sending(message, headers_of(message)), self._queue_of(message, facts)
                added.setdefault(known[1], []).append(known[0])
                self._on_the_way[message.topic, message.id] = known
            places.append((index, *known))
        for queue, sendings in added.items():
            queue.add(sendings)
        await self._concluded([sending for _, sending, _ in places], deadline)
        outcomes: dict[int, Outcome] = {index: self._outcome(sending, queue) for index, sending, queue in places}
        return [refused.get(index) or outcomes[index] for index in range(len(batch))]

    async def _concluded(self, sendings: Sequence[Sending], deadline: float) -> None:
        """Wait for outcomes until the deadline.  Cancelled: the attempts go on."""
        open_ones = [sending for sending in sendings if sending.outcome is None]
        if not open_ones:
            return
        waiter = Waiter(len(open_ones))
        for sending in open_ones:
            sending.waiters.append(waiter)
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                await waiter.done.wait()

    def _outcome(self, sending: Sending, queue: PartitionQueue) -> Outcome:
        message = sending.message
        if sending.outcome is not None:
            self._on_the_way.pop((message.topic, message.id), None)
            return sending.outcome
        if sending.handed:
            return InDoubt(message.id, "Kafka has not confirmed it by the deadline; the attempt goes on")
        self._on_the_way.pop((message.topic, message.id), None)
        queue.withdraw(sending)
        detail = "not sent: an earlier batch to its partition is not confirmed yet (too few replicas, or no leader)"
        return Rejection(message.id, RejectionReason.UNAVAILABLE, detail)

    def _queue_of(self, message: Message, facts: TopicFacts) -> PartitionQueue:
        partition = self._partition(message.key, facts.partitions)
        queue = self._queues.get((message.topic, partition))
        if queue is None:
            limit = min(facts.largest, LARGEST_BATCH)
            queue = PartitionQueue(self._producers, message.topic, partition, limit)
            self._queues[message.topic, partition] = queue
        return queue

    def _partition(self, key: bytes | None, count: int) -> int:
        """The partition that every Kafka client gives to the key; without a key one after another."""
        if key is None:
            self._turn += 1
            return self._turn % count
        return int(murmur2(key) & 0x7FFFFFFF) % count

    async def close(self) -> None:
        """Stop what is on its way."""
        tasks = {task for queue in self._queues.values() if (task := queue.cancel()) is not None}
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_SECONDS)


def _refusal(message: Message, facts: TopicFacts | None) -> Rejection | None:
    if facts is None:
        return _unroutable(message, "is not there")
    if not facts.groups:
        return _unroutable(message, "has no group")
    if message.only_group is not None and message.only_group not in facts.groups:
        return _unroutable(message, f"has no group '{message.only_group}'")
    if message.size > facts.largest_message:
        detail = f"{message.size} bytes (body, key and headers) are over the limit of {facts.largest_message}"
        return Rejection(message.id, RejectionReason.TOO_LARGE, f"{detail} of topic '{message.topic}'")
    return None


def _unroutable(message: Message, why: str) -> Rejection:
    detail = f"topic '{message.topic}' {why}, so nobody would receive it; declare it first"
    return Rejection(message.id, RejectionReason.UNROUTABLE, detail)


@asynccontextmanager
async def open_publisher(settings: KafkaSettings) -> AsyncIterator[KafkaPublisher]:
    """Connect and close.  Raises BrokerUnavailable."""
    async with open_admin(settings) as admin:
        producers = Producers(settings)
        await producers.start()
        publisher = KafkaPublisher(producers, KnownTopics(admin))
        try:
            yield publisher
        finally:
            await publisher.close()
            await producers.stop()
