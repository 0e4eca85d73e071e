"""What is on its way to one partition: one client batch after another, so that order holds through every failure (P5).

A batch that was definitely refused because of a message in it is halved until the messages to blame are found; its
neighbours are stored.  What became of a message is noted on it as soon as it is known, also long after its caller
stopped waiting.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

from aiokafka.producer.message_accumulator import BatchBuilder

from reliamq.spi import Confirmation, InDoubt, Message, Outcome, Rejection, RejectionReason
from reliamq.spi.chains import Place, fail, held_back, is_behind
from reliamq.spi.closing import CLOSE_SECONDS
from reliamq_kafka.wire.errors import Fate, fate_of
from reliamq_kafka.wire.records import Headers, headers_of

__all__ = ["PartitionQueue", "PartitionQueues", "Sending", "Wire", "concluded", "is_judged"]

ATTEMPTS, AGAIN_PAUSE_SECONDS = 8, 0.1
"""Of a batch that was not stored through no fault of its own; the pause grows by as much each time."""
ONE_TO_BLAME = frozenset({RejectionReason.TOO_LARGE, RejectionReason.INVALID})
"""Verdicts on a message; any other is one on all that goes there."""


class Sending:
    """One record on its way.  outcome: None until it is known.  handed: the client has it, or had it.

    message_id: by which its outcome names it.  place: in a chain that must not go on behind it if it is not confirmed.
    value: None removes the key from a compacted topic.
    headers: of the record, or the message that they are made of when it is written.  Kept by thousands of messages that
        wait, they have Python's garbage collector go through all that the process knows again and again.
    timestamp: milliseconds, the same each time that it is written, so that what fitted into a batch once fits again.
    waiters: whoever waits for its outcome; hardly ever more than one.
    """

    __slots__ = ("handed", "headers", "key", "message_id", "outcome", "place", "timestamp", "value", "waiters")

    def __init__(self, message_id: str, key: bytes | None, value: bytes | None, headers: Headers | Message) -> None:
        self.message_id, self.key, self.value, self.headers = message_id, key, value, headers
        self.outcome: Outcome | None = None
        self.place: Place | None = None
        self.handed, self.timestamp = False, 0
        self.waiters: tuple[Waiter, ...] = ()

    def conclude(self, outcome: Outcome) -> None:
        """Note what became of it and tell who waits."""
        self.outcome = outcome
        if not isinstance(outcome, Confirmation):
            fail(self.place)
        for waiter in self.waiters:
            waiter.one_less()

    def take(self, place: Place | None) -> None:
        """What is behind it in the chain of whoever sends it, perhaps again, hangs on it."""
        self.place = place
        if self.outcome is not None and not isinstance(self.outcome, Confirmation):
            fail(place)


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
    alone = (waiter := Waiter(len(open_ones)),)
    for sending in open_ones:
        sending.waiters = (*sending.waiters, waiter) if sending.waiters else alone
    try:
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                await waiter.done.wait()
    finally:
        if not waiter.done.is_set():  # whoever repeats them while they are on their way leaves nothing behind
            for sending in open_ones:
                sending.waiters = tuple(one for one in sending.waiters if one is not waiter)


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
        self._closed = False

    def add(self, sendings: Sequence[Sending]) -> None:
        """Have them sent after all that is here.  Does not wait."""
        if self._closed:
            self._give_back(sendings, "not sent: it is closed")
            return
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
        """Stop for good.  What the client has may still be stored."""
        self._closed = True
        self._give_back_waiting()
        if self._task is not None:
            self._task.cancel()
        return self._task

    async def _drain(self) -> None:
        while self._waiting:
            packed: list[Sending] = []
            try:
                batch = self._pack(packed)
                if packed:
                    await self._deliver(batch, packed)
            except Exception as error:  # a producer that cannot be made again, say: nobody may wait for ever
                self._conclude_doubtful([one for one in packed if one.outcome is None], error)

    def _pack(self, packed: list[Sending]) -> BatchBuilder:
        """As many as fit into one client batch are moved to ``packed``; one that fits into none is concluded here."""
        batch, now = self._wire.new_batch(), int(time.time() * 1000)
        room = self._limit - batch.size()
        while self._waiting:
            sending = self._waiting[0]
            if is_behind(sending.place):
                self._waiting.popleft().conclude(held_back(sending.message_id))
                continue
            sending.timestamp = now
            try:
                size = _append(batch, sending)
            except Exception as error:  # whatever it has for a key, a value and headers
                self._waiting.popleft()
                sending.conclude(_unwritable(sending, error))
                return self._packed_again(packed)  # what it has left behind in the batch is unknown
            if not size:
                break
            room -= size
            if room < 0 and packed:
                return self._packed_again(packed)
            packed.append(self._waiting.popleft())
            sending.handed = True
            if room < 0:
                break  # alone; the broker will say what it thinks of it
        return batch

    def _packed_again(self, sendings: Sequence[Sending]) -> BatchBuilder:
        batch = self._wire.new_batch()
        for sending in sendings:
            if not _append(batch, sending):  # confirmed with the others, it would be lost
                raise RuntimeError(f"{sending.message_id} fitted into a batch and does not again")
        return batch

    async def _deliver(self, batch: BatchBuilder, sendings: Sequence[Sending]) -> None:
        """Store one client batch and conclude its messages."""
        for attempt in range(1, ATTEMPTS + 1):
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
                    await self._refuse(sendings, fate, error)
                    return
            else:
                self._confirm(sendings, first)
                return
            if attempt == ATTEMPTS:
                break
            await asyncio.sleep(attempt * AGAIN_PAUSE_SECONDS)
            batch = self._packed_again(sendings)
        self._give_back(sendings, f"not stored in {ATTEMPTS} attempts")
        self._give_back_waiting()

    def _confirm(self, sendings: Sequence[Sending], first: int) -> None:
        """first: the offset of the first one; -1 when Kafka had them already."""
        for place, sending in enumerate(sendings):
            position = f"{self._partition}/{first + place}" if first >= 0 else None
            sending.conclude(Confirmation(sending.message_id, position))

    def _conclude_doubtful(self, sendings: Sequence[Sending], error: Exception) -> None:
        """These may be stored.  What waits behind them goes back: it could be stored before they are again."""
        for sending in sendings:
            sending.conclude(InDoubt(sending.message_id, f"Kafka may have it: {error!r}", error))
        self._give_back_waiting()

    def _give_back_waiting(self) -> None:
        behind = [*self._waiting]
        self._waiting.clear()
        self._give_back(behind, "not sent: what was before it on its partition is not stored, or in doubt")

    def _give_back(self, sendings: Sequence[Sending], why: str) -> None:
        for sending in sendings:
            sending.conclude(Rejection(sending.message_id, RejectionReason.UNAVAILABLE, why))

    async def _refuse(self, sendings: Sequence[Sending], reason: RejectionReason, error: Exception) -> None:
        """Conclude those to blame, and have the others stored."""
        if len(sendings) == 1 or reason not in ONE_TO_BLAME:
            for one in sendings:
                refused = Rejection(one.message_id, reason, f"Kafka refused it: {error}", error)
                one.conclude(held_back(one.message_id) if is_behind(one.place) else refused)
            return
        middle = len(sendings) // 2
        first, second = sendings[:middle], sendings[middle:]
        await self._deliver(self._packed_again(first), first)
        if all(is_judged(one.outcome) or _is_behind(one.outcome) for one in first):
            if second := _not_held_back(second):
                await self._deliver(self._packed_again(second), second)
        else:
            self._waiting.extendleft(reversed(second))
            self._give_back_waiting()


class PartitionQueues:
    """One for each partition that is written to."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._queues: dict[tuple[str, int], PartitionQueue] = {}

    def to(self, topic: str, partition: int, limit: int) -> PartitionQueue:
        """limit: bytes of one client batch."""
        queue = self._queues.get((topic, partition))
        if queue is None:
            queue = self._queues[topic, partition] = PartitionQueue(self._wire, topic, partition, limit)
        return queue

    async def close(self) -> None:
        """Stop what is on its way; it may be stored.  Bounded."""
        tasks = {task for queue in self._queues.values() if (task := queue.cancel()) is not None}
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_SECONDS)


def _append(batch: BatchBuilder, sending: Sending) -> int:
    """The bytes that it takes up; 0 where there is no room for it."""
    headers = headers_of(sending.headers) if isinstance(sending.headers, Message) else sending.headers
    metadata = batch.append(timestamp=sending.timestamp, key=sending.key, value=sending.value, headers=headers)
    return 0 if metadata is None else int(metadata.size)


def _not_held_back(sendings: Sequence[Sending]) -> Sequence[Sending]:
    """The others are concluded: one before them in their chains is refused."""
    for sending in sendings:
        if is_behind(sending.place):
            sending.conclude(held_back(sending.message_id))
    return [sending for sending in sendings if sending.outcome is None]


def is_judged(outcome: Outcome | None) -> bool:
    """Whether it needs no other attempt, so that what comes behind it may be stored."""
    return isinstance(outcome, Confirmation) or (isinstance(outcome, Rejection) and outcome.reason.judges_message)


def _is_behind(outcome: Outcome | None) -> bool:
    return isinstance(outcome, Rejection) and outcome.reason is RejectionReason.BEHIND


def _unwritable(sending: Sending, error: Exception) -> Rejection:
    return Rejection(sending.message_id, RejectionReason.INVALID, f"it cannot be written as a record: {error}", error)
