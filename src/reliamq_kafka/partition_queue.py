"""What is on its way to one partition: one client batch after another, so that order holds through every failure (P5).

A batch that was definitely refused is halved until the messages to blame are found; its neighbours are stored.  What
became of a message is noted on it as soon as it is known, also long after its caller stopped waiting.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from aiokafka.producer.message_accumulator import BatchBuilder

from reliamq.spi import Confirmation, InDoubt, Message, Outcome, Rejection, RejectionReason
from reliamq_kafka.errors import Fate, fate_of
from reliamq_kafka.records import Headers

__all__ = ["PartitionQueue", "Sending", "Wire"]

AGAIN_PAUSE_SECONDS = 0.1


class Sending:
    """One message on its way.  outcome: None until it is known.  handed: the client has it, or had it."""

    __slots__ = ("handed", "headers", "message", "outcome", "waiters")

    def __init__(self, message: Message, headers: Headers) -> None:
        self.message, self.headers = message, headers
        self.outcome: Outcome | None = None
        self.handed = False
        self.waiters: list[Waiter] = []

    def conclude(self, outcome: Outcome) -> None:
        """Note what became of it and tell who waits."""
        self.outcome = outcome
        for waiter in self.waiters:
            waiter.one_less()


class Waiter:
    """Counts down the messages of one call."""

    __slots__ = ("_count", "done")

    def __init__(self, count: int) -> None:
        self._count, self.done = count, asyncio.Event()

    def one_less(self) -> None:
        """One more outcome is known."""
        self._count -= 1
        if not self._count:
            self.done.set()


class Wire(Protocol):
    """The producer of the moment.

    generation: grows when it is replaced.
    """

    generation: int

    def new_batch(self) -> BatchBuilder:
        """An empty client batch."""
        ...

    async def deliver(self, batch: BatchBuilder, topic: str, partition: int) -> int:
        """Store a batch; the offset of its first record.  Raises the client's exceptions."""
        ...

    async def replace(self, generation: int) -> None:
        """Have a new producer, if the one of ``generation`` is still in use."""
        ...


class PartitionQueue:
    """limit: bytes of one client batch.  State of the event loop's one thread; one task drains it."""

    def __init__(self, wire: Wire, topic: str, partition: int, limit: int) -> None:
        self._wire, self._topic, self._partition, self._limit = wire, topic, partition, limit
        self._waiting: deque[Sending] = deque()
        self._task: asyncio.Task[None] | None = None

    def add(self, sendings: Sequence[Sending]) -> None:
        """Have them sent after all that is here.  Does not wait."""
        self._waiting.extend(sendings)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._drain(), name=f"to {self._topic}/{self._partition}")

    def withdraw(self, sending: Sending) -> None:
        """It has not been handed to the client: it never will be."""
        self._waiting.remove(sending)

    def cancel(self) -> asyncio.Task[None] | None:
        """Stop.  What the client has may still be stored."""
        if self._task is not None:
            self._task.cancel()
        return self._task

    async def _drain(self) -> None:
        while self._waiting:
            await self._deliver(*self._packed())

    def _packed(self) -> tuple[BatchBuilder, list[Sending]]:
        """As many as fit into one client batch; one that fits into none is concluded here."""
        batch, packed = self._wire.new_batch(), list[Sending]()
        while self._waiting:
            sending = self._waiting[0]
            before = batch.size()
            room = batch.append(
                timestamp=None, key=sending.message.key, value=sending.message.body, headers=sending.headers
            )
            if room is None:
                break
            if batch.size() > self._limit and packed:
                return self._repacked(packed), packed
            packed.append(self._waiting.popleft())
            sending.handed = True
            if batch.size() - before > self._limit:
                break  # alone; the broker will say what it thinks of it
        return batch, packed

    def _repacked(self, sendings: Sequence[Sending]) -> BatchBuilder:
        batch = self._wire.new_batch()
        for sending in sendings:
            batch.append(timestamp=None, key=sending.message.key, value=sending.message.body, headers=sending.headers)
        return batch

    async def _deliver(self, batch: BatchBuilder, sendings: Sequence[Sending]) -> None:
        """Store one client batch and conclude its messages."""
        while True:
            generation = self._wire.generation
            try:
                first = await self._wire.deliver(batch, self._topic, self._partition)
            except Exception as error:
                fate = fate_of(error)
                if fate is Fate.UNKNOWN:
                    self._conclude_doubtful(sendings, error)
                    return
                await self._wire.replace(generation)  # its numbering of the partition is broken now
                if isinstance(fate, RejectionReason):
                    await self._find_the_guilty(sendings, fate, error)
                    return
                await asyncio.sleep(AGAIN_PAUSE_SECONDS)
                batch = self._repacked(sendings)
            else:
                for place, sending in enumerate(sendings):
                    position = f"{self._partition}/{first + place}" if first >= 0 else None
                    sending.conclude(Confirmation(sending.message.id, position))
                return

    def _conclude_doubtful(self, sendings: Sequence[Sending], error: Exception) -> None:
        for sending in sendings:
            sending.conclude(InDoubt(sending.message.id, f"Kafka may have it: {error!r}", error))

    async def _find_the_guilty(self, sendings: Sequence[Sending], reason: RejectionReason, error: Exception) -> None:
        if len(sendings) == 1:
            (one,) = sendings
            one.conclude(Rejection(one.message.id, reason, f"Kafka refused it: {error}", error))
            return
        middle = len(sendings) // 2
        for half in (sendings[:middle], sendings[middle:]):
            await self._deliver(self._repacked(half), half)
