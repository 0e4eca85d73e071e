"""Safe departure on Kafka: acks=all, idempotent, and an outcome for each message by the caller's deadline.

The client has no deadline of its own and retries for ever; so the caller stops waiting and the attempt goes on.  Who
repeats a message that is still on its way waits for that attempt instead of sending it twice (P4), and what was not
handed to the client yet is certainly not stored.  How a partition keeps its order is left to its queue.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from aiokafka.partitioner import murmur2

from reliamq.spi import Message, Outcome, Rejection, RejectionReason
from reliamq_kafka.admin import open_admin
from reliamq_kafka.groups import Groups
from reliamq_kafka.partition_queue import PartitionQueue, Sending, Wire, concluded
from reliamq_kafka.producers import CLOSE_SECONDS, LARGEST_BATCH, open_producers
from reliamq_kafka.records import headers_of
from reliamq_kafka.settings import KafkaSettings
from reliamq_kafka.topics import KnownTopics, TopicFacts

__all__ = ["KafkaPublisher", "open_publisher"]


class KafkaPublisher:
    """A :class:`~reliamq.spi.Publisher`; called by one task."""

    def __init__(self, producers: Wire, topics: KnownTopics) -> None:
        self._producers, self._topics = producers, topics
        self._queues: dict[tuple[str, int], PartitionQueue] = {}
        self._on_the_way: dict[tuple[str, str], tuple[Sending, PartitionQueue]] = {}
        self._turn = 0

    def route(self, message: Message) -> str:
        """One for each topic, for now."""
        return message.topic

    async def send(self, batch: Sequence[Message], *, deadline: float) -> Sequence[Outcome]:
        """Store a batch; see the contract."""
        began = time.monotonic()
        refused: dict[int, Rejection] = {}
        places: list[tuple[int, Sending, PartitionQueue]] = []
        added: dict[PartitionQueue, list[Sending]] = {}
        for index, message in enumerate(batch):
            known = self._on_the_way.get((message.topic, message.id))
            if known is None:
                facts = await self._topics.of(message.topic, group=message.only_group, since=began)
                rejection = _refusal(message, facts)
                if rejection is not None or facts is None:
                    refused[index] = rejection or _unroutable(message, "is not there")
                    continue
                sending = Sending(message.id, message.key, message.body, headers_of(message))
                known = sending, self._queue_of(message, facts)
                added.setdefault(known[1], []).append(known[0])
                self._on_the_way[message.topic, message.id] = known
            places.append((index, *known))
        for queue, sendings in added.items():
            queue.add(sendings)
        await concluded([sending for _, sending, _ in places], deadline)
        outcomes: dict[int, Outcome] = {index: self._outcome(sending, queue) for index, sending, queue in places}
        return [refused.get(index) or outcomes[index] for index in range(len(batch))]

    def _outcome(self, sending: Sending, queue: PartitionQueue) -> Outcome:
        outcome = queue.outcome(sending)
        if sending.outcome is not None or not sending.handed:
            self._on_the_way.pop((queue.topic, sending.message_id), None)
        return outcome

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
    async with open_admin(settings) as admin, open_producers(settings) as producers:
        publisher = KafkaPublisher(producers, KnownTopics(admin, Groups(admin, settings)))
        try:
            yield publisher
        finally:
            await publisher.close()
