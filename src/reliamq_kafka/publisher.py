"""Safe departure on Kafka: acks=all, idempotent, and an outcome for each message by the caller's deadline.

The client has no deadline of its own and retries for ever; so the caller stops waiting and the attempt goes on.  Who
repeats a message that is still on its way waits for that attempt instead of sending it twice (P4), and what was not
handed to the client yet is certainly not stored.  How a partition keeps its order is left to its queue.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

from aiokafka.errors import KafkaError

from reliamq.spi import Message, Outcome, Rejection, RejectionReason
from reliamq.spi.chains import Chains, fail, held_back, is_behind
from reliamq_kafka.catalog.groups import Groups
from reliamq_kafka.catalog.topics import KnownTopics, TopicFacts
from reliamq_kafka.settings import KafkaSettings
from reliamq_kafka.wire.admin import open_admin
from reliamq_kafka.wire.errors import fate_of
from reliamq_kafka.wire.partition_queue import PartitionQueue, PartitionQueues, Sending, Wire, concluded, is_judged
from reliamq_kafka.wire.producers import LARGEST_BATCH, open_producers
from reliamq_kafka.wire.records import Headers, hash_of, headers_of

__all__ = ["KafkaPublisher", "open_publisher"]

Name = tuple[str, str, str | None]
_NONE: Headers = []
REMEMBERED = 10_000  # keys with their partitions; messages in doubt


class MessageSending(Sending):
    """A message on its way.

    Its headers are made when they are written.  Kept by thousands of messages that wait, they have Python's garbage
    collector go through all that the process knows again and again, at a third of its time.
    """

    __slots__ = ("_message",)

    def __init__(self, message: Message) -> None:
        super().__init__(message.id, message.key, message.body, _NONE)
        self._message = message

    def headers(self) -> Headers:
        """Of the record."""
        return headers_of(self._message)


class KafkaPublisher:
    """A :class:`~reliamq.spi.Publisher`.

    partitions: how many each topic had when it was opened.  Routes go by that, because a message's route must never
    change; a topic that was declared later has one route for all its messages.
    """

    gathering_rounds = 16  # decision 11

    def __init__(self, producers: Wire, topics: KnownTopics, partitions: Mapping[str, int]) -> None:
        self._topics, self._counts = topics, partitions
        self._queues = PartitionQueues(producers)
        self._hashes: dict[bytes, int] = {}
        self._doubtful: dict[Name, tuple[Sending, PartitionQueue]] = {}

    def route(self, message: Message) -> tuple[str, int]:
        """Its partition."""
        count = self._counts.get(message.topic)
        return message.topic, -1 if count is None else self._partition(message, count)

    async def send(self, batch: Sequence[Message], *, deadline: float, chained: bool = False) -> Sequence[Outcome]:
        """Store a batch; see the contract."""
        began = time.monotonic()
        outcomes: list[Outcome | None] = [None] * len(batch)
        sent, queues, indexes = list[Sending](), list[PartitionQueue](), list[int]()
        added: dict[PartitionQueue, list[Sending]] = {}
        facts, topic = None, ""
        chains, place = Chains() if chained else None, None
        for index, message in enumerate(batch):
            if chains is not None and is_behind(place := chains.join(message)):
                outcomes[index] = held_back(message.id)
                continue
            known = self._on_its_way(message) if self._doubtful else None
            if known is None:
                if facts is None or message.topic != topic or message.only_group is not None:
                    topic = message.topic
                    try:
                        facts = await self._topics.of(topic, group=message.only_group, since=began, deadline=deadline)
                    except KafkaError as error:
                        facts, outcomes[index] = None, _unanswered(message, error)
                        fail(place)
                        continue
                rejection = _refusal(message, facts)
                if rejection is not None or facts is None:
                    outcomes[index] = rejection or _unroutable(message, "is not there")
                    fail(place)
                    continue
                known = MessageSending(message), self._queue(message, facts)
                added.setdefault(known[1], []).append(known[0])
            known[0].take(place)
            sent.append(known[0])
            queues.append(known[1])
            indexes.append(index)
        for queue, sendings in added.items():
            queue.add(sendings)
        await concluded(sent, deadline)
        for index, sending, queue in zip(indexes, sent, queues, strict=True):
            outcomes[index] = self._outcome(batch[index], sending, queue)
        return [outcome for outcome in outcomes if outcome is not None]

    def _on_its_way(self, message: Message) -> tuple[Sending, PartitionQueue] | None:
        """The attempt that is still to end, or has ended for good.  One that must be made again is: what comes with the
        message now would be stored before it.
        """
        known = self._doubtful.get(_name(message))
        if known is None or known[0].outcome is None or is_judged(known[0].outcome):
            return known
        del self._doubtful[_name(message)]
        return None

    def _outcome(self, message: Message, sending: Sending, queue: PartitionQueue) -> Outcome:
        """What became of it.  In doubt it is remembered: who repeats it waits for the attempt that is on its way."""
        outcome = queue.outcome(sending)
        if sending.outcome is None and sending.handed:
            self._doubtful[_name(message)] = sending, queue
            if len(self._doubtful) > REMEMBERED:  # most are known by now, and nobody asked
                self._doubtful = {name: one for name, one in self._doubtful.items() if one[0].outcome is None}
        elif self._doubtful:
            self._doubtful.pop(_name(message), None)
        return outcome

    def _queue(self, message: Message, facts: TopicFacts) -> PartitionQueue:
        partition = self._partition(message, facts.partitions)
        return self._queues.to(message.topic, partition, min(facts.largest, LARGEST_BATCH))

    def _partition(self, message: Message, count: int) -> int:
        """The partition that every Kafka client gives to the key; without a key one by the message's id."""
        if message.key is None:
            return hash(message.id) % count
        hashed = self._hashes.get(message.key)
        if hashed is None:
            if len(self._hashes) > REMEMBERED:
                self._hashes.clear()
            hashed = self._hashes[message.key] = hash_of(message.key)
        return hashed % count

    async def close(self) -> None:
        """Stop what is on its way.  Bounded."""
        await self._queues.close()
        await self._topics.close()


def _name(message: Message) -> Name:
    """A replay to one group is another message than the same replayed to another."""
    return message.topic, message.id, message.only_group


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


def _unanswered(message: Message, error: KafkaError) -> Rejection:
    fate = fate_of(error)
    reason = fate if isinstance(fate, RejectionReason) else RejectionReason.UNAVAILABLE
    return Rejection(message.id, reason, f"topic '{message.topic}' cannot be looked up: {error!r}", error)


def _unroutable(message: Message, why: str) -> Rejection:
    detail = f"topic '{message.topic}' {why}, so nobody would receive it; declare it first"
    return Rejection(message.id, RejectionReason.UNROUTABLE, detail)


@asynccontextmanager
async def open_publisher(settings: KafkaSettings) -> AsyncIterator[KafkaPublisher]:
    """Connect and close.  Raises BrokerUnavailable."""
    async with open_admin(settings) as admin, open_producers(settings) as producers:
        topics = KnownTopics(admin, Groups(admin, settings))
        publisher = KafkaPublisher(producers, topics, await topics.preload())
        try:
            yield publisher
        finally:
            await publisher.close()
