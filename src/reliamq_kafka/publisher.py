"""Safe departure on Kafka: acks=all, idempotent, and an outcome for each message by the caller's deadline.

The client has no deadline of its own and retries for ever; so the caller stops waiting and the attempt goes on.  Who
repeats a message that is still on its way waits for that attempt instead of sending it twice (P4), and what was not
handed to the client yet is certainly not stored.  How a partition keeps its order is left to its queue.
"""

from __future__ import annotations

import time
from collections import defaultdict
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
from reliamq_kafka.wire.records import hash_of

__all__ = ["KafkaPublisher", "open_publisher"]

Name = tuple[str, str, str | None]
Attempt = tuple[Sending, PartitionQueue]
REMEMBERED = 10_000  # keys with their partitions; messages in doubt


class KafkaPublisher:
    """A :class:`~reliamq.spi.Publisher`.

    partitions: how many each topic had when it was opened.  Routes go by that, because a message's route must never
    change; a topic that was declared later has one route for all its messages.
    """

    gathering_rounds = 3  # decision 11

    def __init__(self, producers: Wire, topics: KnownTopics, partitions: Mapping[str, int]) -> None:
        self._topics, self._counts = topics, partitions
        self._queues = PartitionQueues(producers)
        self._hashes: dict[bytes, int] = {}
        self._doubtful: dict[Name, Attempt] = {}

    def route(self, message: Message) -> tuple[str, int]:
        """Its partition."""
        count = self._counts.get(message.topic)
        return message.topic, -1 if count is None else self._partition(message, count)

    async def send(self, batch: Sequence[Message], *, deadline: float, chained: bool = False) -> Sequence[Outcome]:
        """Store a batch; see the contract."""
        began = time.monotonic()
        fates: list[Attempt | Outcome] = []
        added = defaultdict[PartitionQueue, list[Sending]](list)
        facts: TopicFacts | Rejection | None = None
        topic = ""
        chains, place = Chains() if chained else None, None
        for message in batch:
            if chains is not None and is_behind(place := chains.join(message)):
                fates.append(held_back(message.id))
                continue
            known = self._on_its_way(message) if self._doubtful else None
            if known is not None:
                known[0].take(place)
                fates.append(known)
                continue
            if not isinstance(facts, TopicFacts) or message.topic != topic or message.only_group is not None:
                facts, topic = await self._facts(message, began, deadline), message.topic
            queue = self._queue(message, facts)
            if isinstance(queue, Rejection):
                fates.append(queue)
                fail(place)
                continue
            sending = Sending(message.id, message.key, message.body, message)
            sending.place = place
            added[queue].append(sending)
            fates.append((sending, queue))
        for queue, sendings in added.items():
            queue.add(sendings)
        await concluded([fate[0] for fate in fates if isinstance(fate, tuple)], deadline)
        return [
            self._outcome(message, fate) if isinstance(fate, tuple) else fate
            for message, fate in zip(batch, fates, strict=True)
        ]

    async def _facts(self, message: Message, began: float, deadline: float) -> TopicFacts | Rejection:
        try:
            facts = await self._topics.of(message.topic, group=message.only_group, since=began, deadline=deadline)
        except KafkaError as error:
            return _unanswered(message, error)
        return facts or _unroutable(message, "is not there")

    def _queue(self, message: Message, facts: TopicFacts | Rejection) -> PartitionQueue | Rejection:
        """Where it goes, or why it does not."""
        if isinstance(facts, Rejection):
            return facts
        if (refusal := _refusal(message, facts)) is not None:
            return refusal
        partition = self._partition(message, facts.partitions)
        return self._queues.to(message.topic, partition, min(facts.largest, LARGEST_BATCH))

    def _on_its_way(self, message: Message) -> Attempt | None:
        """The attempt that is still to end, or has ended for good.  One that must be made again is: what comes with the
        message now would be stored before it.
        """
        known = self._doubtful.get(_name(message))
        if known is None or known[0].outcome is None or is_judged(known[0].outcome):
            return known
        del self._doubtful[_name(message)]
        return None

    def _outcome(self, message: Message, attempt: Attempt) -> Outcome:
        """What became of it.  In doubt it is remembered: who repeats it waits for the attempt that is on its way."""
        sending, queue = attempt
        outcome = queue.outcome(sending)
        if sending.outcome is None and sending.handed:
            self._doubtful[_name(message)] = attempt
            if len(self._doubtful) > REMEMBERED:  # most are known by now, and nobody asked
                self._doubtful = {name: one for name, one in self._doubtful.items() if one[0].outcome is None}
        elif self._doubtful:
            self._doubtful.pop(_name(message), None)
        return outcome

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


def _refusal(message: Message, facts: TopicFacts) -> Rejection | None:
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
