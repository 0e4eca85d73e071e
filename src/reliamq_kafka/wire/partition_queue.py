"""What is on its way to one partition: one client batch after another, so that order holds through every failure (P5).

A batch that was definitely refused is halved until the messages to blame are found; its neighbours are stored.  What
became of a message is noted on it as soon as it is known, also long after its caller stopped waiting.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

from aiokafka.producer.message_accumulator import BatchBuilder

from reliamq.spi import Confirmation, InDoubt, Outcome, Rejection, RejectionReason
from reliamq_kafka.wire.errors import Fate, fate_of
from reliamq_kafka.wire.records import Headers

__all__ = ["PartitionQueue", "Sending", "Wire", "concluded"]

AGAIN_PAUSE_SECONDS = 0.1


class Sending:
    """One record on its way.  outcome: None until it is known.  handed: the client has it, or had it.

    message_id: by which its outcome names it.  value: None removes the key from a compacted topic.
    """

    __slots__ = ("handed", "headers", "key", "message_id", "outcome", "value", "waiters")

    def __init__(self, message_id: str, key: bytes | None, value: bytes | None, headers: Headers) -> None:
        self.message_id, self.key, self.value, self.headers = message_id, key, value, headers
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


async def concluded(sendings: Sequence[Sending], deadline: float) -> None:
    """Wait until the outcome of each is known, or the deadline passes.  Cancelled: the attempts go on."""
    open_ones = [sending for sending in sendings if sending.outcome is None]
    if not open_ones:
        return
    waiter = Waiter(len(open_ones))
    for sending in open_ones:
        sending.waiters.append(waiter)
    with suppress(TimeoutError):
        async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
            await waiter.done.wait()


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
    """Sends to one partition of ``topic``.  State of the event loop's one thread; one task drains it.

    limit: bytes of one client batch.
    """

    def __init__(self, wire: Wire, topic: str, partition: int, limit: int) -> None:
        self._wire, self.topic, self._partition, self._limit = wire, topic, partition, limit
        self._waiting: deque[Sending] = deque()
        self._task: asyncio.Task[None] | None = None

    def add(self, sendings: Sequence[Sending]) -> None:
        """Have them sent after all that is here.  Does not wait."""
        self._waiting.extend(sendings)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._drain(), name=f"to {self.topic}/{self._partition}")

    def outcome(self, sending: Sending) -> Outcome:
        """What became of it by now.  What was not handed to the client yet never will be, and is rejected."""
        if sending.outcome is not None:
            return sending.outcome
        if sending.handed:
            return InDoubt(sending.message_id, "Kafka has not confirmed it by the deadline; the attempt goes on")
        self._waiting.remove(sending)
        detail = "not sent: an earlier batch to its partition is not confirmed yet (too few replicas, or no leader)"
        return Rejection(sending.message_id, RejectionReason.UNAVAILABLE, detail)

    def cancel(self) -> asyncio.Task[None] | None:
        """Stop.  What the client has may still be stored."""
        if self._task is not None:
            self._task.cancel()
        return self._task

    async def _drain(self) -> None:
        while self._waiting:
            batch, sendings = self._packed()
            if not sendings:
                continue
            try:
                await self._deliver(batch, sendings)
            except Exception as error:  # a producer that cannot be made again, say: nobody may wait for ever
                self._conclude_doubtful([one for one in sendings if one.outcome is None], error)

    def _packed(self) -> tuple[BatchBuilder, list[Sending]]:
        """As many as fit into one client batch; one that fits into none is concluded here."""
        batch, packed = self._wire.new_batch(), list[Sending]()
        while self._waiting:
            sending = self._waiting[0]
            before = batch.size()
            try:
                room = batch.append(timestamp=None, key=sending.key, value=sending.value, headers=sending.headers)
            except (TypeError, ValueError) as error:
                self._waiting.popleft()
                sending.conclude(_unwritable(sending, error))
                return (self._repacked(packed) if packed else batch), packed  # what it has left behind is unknown
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
            batch.append(timestamp=None, key=sending.key, value=sending.value, headers=sending.headers)
        return batch

    async def _deliver(self, batch: BatchBuilder, sendings: Sequence[Sending]) -> None:
        """Store one client batch and conclude its messages."""
        while True:
            generation = self._wire.generation
            try:
                first = await self._wire.deliver(batch, self.topic, self._partition)
            except Exception as error:
                fate = fate_of(error)
                if fate is Fate.UNKNOWN:
                    self._conclude_doubtful(sendings, error)
                await self._wire.replace(generation)  # its numbering of the partition is broken now
                if fate is Fate.UNKNOWN:
                    return
                if isinstance(fate, RejectionReason):
                    await self._find_the_guilty(sendings, fate, error)
                    return
                await asyncio.sleep(AGAIN_PAUSE_SECONDS)
                batch = self._repacked(sendings)
            else:
                for place, sending in enumerate(sendings):
                    position = f"{self._partition}/{first + place}" if first >= 0 else None
                    sending.conclude(Confirmation(sending.message_id, position))
                return

    def _conclude_doubtful(self, sendings: Sequence[Sending], error: Exception) -> None:
        """These may be stored.  What waits behind them goes back: it could be stored before they are again."""
        for sending in sendings:
            sending.conclude(InDoubt(sending.message_id, f"Kafka may have it: {error!r}", error))
        behind = [*self._waiting]
        self._waiting.clear()
        self._give_back(behind)

    def _give_back(self, sendings: Sequence[Sending]) -> None:
        detail = "not sent: what was before it on its partition is in doubt"
        for sending in sendings:
            sending.conclude(Rejection(sending.message_id, RejectionReason.UNAVAILABLE, detail))

    async def _find_the_guilty(self, sendings: Sequence[Sending], reason: RejectionReason, error: Exception) -> None:
        if len(sendings) == 1:
            (one,) = sendings
            one.conclude(Rejection(one.message_id, reason, f"Kafka refused it: {error}", error))
            return
        middle = len(sendings) // 2
        first, second = sendings[:middle], sendings[middle:]
        await self._deliver(self._repacked(first), first)
        if any(isinstance(one.outcome, InDoubt) for one in first):
            self._give_back(second)
        else:
            await self._deliver(self._repacked(second), second)


def _unwritable(sending: Sending, error: Exception) -> Rejection:
    return Rejection(sending.message_id, RejectionReason.INVALID, f"it cannot be written as a record: {error}", error)
