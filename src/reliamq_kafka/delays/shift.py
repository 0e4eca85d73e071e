"""One membership in the group of those who move delayed records.

It promises that what it commits is stored elsewhere, and that of a partition everything is moved in order, from where
the group is.  The head of each partition is kept here until it is due, with what was fetched behind it, and the
partition is paused meanwhile: nothing is fetched twice.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager, suppress
from itertools import takewhile

import aiokafka
from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.coordinator.assignors.roundrobin import RoundRobinPartitionAssignor

from reliamq.spi import BrokerUnavailable
from reliamq.spi.closing import close_in_time
from reliamq_kafka.delays.carrier import Carrier
from reliamq_kafka.delays.delayed import due_at
from reliamq_kafka.settings import KafkaSettings
from reliamq_kafka.wire.admin import Admin
from reliamq_kafka.wire.consumers import ANSWER_SECONDS, SAFE_READING, answered_in_time, bounded, join_group, stop

__all__ = ["Shift", "open_shift"]

logger = logging.getLogger("reliamq.kafka")
POLL_SECONDS = 1.0
SHORTEST_POLL_SECONDS = 0.005
HANDOVER_MARGIN = 0.8
"""Of the rebalance timeout; the rest is for joining."""


class Shift(aiokafka.ConsumerRebalanceListener):  # type: ignore[misc]  # the client has no types
    """Used by one task.  Whatever it raises ends it: another one begins where the group is."""

    def __init__(
        self, consumer: AIOKafkaConsumer, admin: Admin, settings: KafkaSettings, name: str, carrier: Carrier
    ) -> None:
        self._consumer, self._admin, self._settings = consumer, admin, settings
        self._name, self._carrier = name, carrier
        self._assigned: Collection[TopicPartition] = ()  # and not restored yet
        self._held: dict[int, deque[ConsumerRecord]] = {}
        self._moving = asyncio.Lock()

    async def work(self) -> None:
        """Fetch, wait until something is due but no longer than a second, and move it.

        Raises BrokerUnavailable, KafkaError.  Cancelled: what was moved may be moved once more by whoever comes next;
        the shift must be left.
        """
        if self._assigned:
            await self._restore()
        self._pause_and_resume()
        for part, records in (await self._fetch()).items():
            if part.partition in self._held:  # else it is not restored yet, and fetched again from where the group is
                self._held[part.partition].extend(records)
        await self._move()

    async def _fetch(self) -> Mapping[TopicPartition, list[ConsumerRecord]]:
        milliseconds = int(self._until_due() * 1000) + 1
        return await answered_in_time(self._settings, self._name, self._consumer.getmany(timeout_ms=milliseconds))

    def _until_due(self) -> float:
        heads = [due_at(number, held[0].timestamp) for number, held in self._held.items() if held]
        return min(POLL_SECONDS, max(SHORTEST_POLL_SECONDS, min(heads, default=float("inf")) - time.time()))

    def _pause_and_resume(self) -> None:
        paused = self._consumer.paused()
        for number, held in self._held.items():
            part = TopicPartition(self._name, number)
            if held and part not in paused:
                self._consumer.pause(part)
            elif not held and part in paused:
                self._consumer.resume(part)

    # --- moving ----------------------------------------------------------------------------------------------------

    async def _move(self) -> None:
        """Move what is due, then say so to the group."""
        async with self._moving:
            now = time.time()
            due = [record for number, held in self._held.items() for record in _due(number, held, now)]
            if not due:
                return
            stored = await self._carrier.carry(due, now)
            ends: dict[TopicPartition, int] = {}
            stuck: set[int] = set()
            for record, done in zip(due, stored, strict=True):
                if not done:
                    stuck.add(record.partition)
                if record.partition not in stuck:
                    ends[TopicPartition(self._name, record.partition)] = record.offset + 1
            if ends:
                await self._commit(ends)
            if stuck:
                raise BrokerUnavailable(self._settings.url, f"{self._name}: some records could not be moved")
            for part, end in ends.items():
                self._forget(part.partition, end)

    def _forget(self, number: int, end: int) -> None:
        held = self._held.get(number)
        while held and held[0].offset < end:
            held.popleft()

    async def _commit(self, ends: dict[TopicPartition, int]) -> None:
        """The client repeats without a deadline, and what it may have written when it is stopped is true all the
        same.
        """
        async with bounded(self._settings, f"committing {self._name}", self._settings.request_timeout_seconds):
            await self._consumer.commit(ends)

    # --- partitions come and go ------------------------------------------------------------------------------------

    async def on_partitions_revoked(self, revoked: Collection[TopicPartition]) -> None:
        """Let what is being moved be committed, so that nobody moves it once more."""
        self._assigned = ()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._settings.rebalance_timeout_seconds * HANDOVER_MARGIN):
                async with self._moving:
                    pass
        self._held = {}

    async def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        """Note them; the task that fetches restores them, because heartbeats wait for this callback."""
        self._assigned = tuple(assigned)

    async def _restore(self) -> None:
        """Begin where the group is."""
        assigned = self._assigned
        async with bounded(self._settings, f"restoring {self._name}"):
            moved = await self._admin.committed(self._name, self._name, [part.partition for part in assigned])
            first = await self._consumer.beginning_offsets(assigned)
        if self._assigned is not assigned:  # it changed hands meanwhile
            return
        for part in assigned:
            self._consumer.seek(part, max(moved.get(part.partition, 0), first[part]))
            self._held[part.partition] = deque()
        self._assigned = ()


def _due(number: int, held: deque[ConsumerRecord], now: float) -> list[ConsumerRecord]:
    return list(takewhile(lambda record: due_at(number, record.timestamp) <= now, held))


@asynccontextmanager
async def open_shift(admin: Admin, settings: KafkaSettings, name: str, carrier: Carrier) -> AsyncIterator[Shift]:
    """Join and leave.  Raises BrokerUnavailable.  name: of the topic, and of the group."""
    session = int(settings.session_timeout_seconds * 1000)
    consumer = AIOKafkaConsumer(
        **settings.connection(),
        group_id=name,
        **SAFE_READING,
        partition_assignment_strategy=(RoundRobinPartitionAssignor,),  # the sticky one keeps its memory in the class
        session_timeout_ms=session,
        heartbeat_interval_ms=session // 10,
        rebalance_timeout_ms=int(settings.rebalance_timeout_seconds * 1000),
        max_poll_interval_ms=int(settings.poll_interval_seconds * 1000),
    )
    shift = Shift(consumer, admin, settings, name, carrier)
    try:
        async with bounded(settings, f"joining {name}", 2 * ANSWER_SECONDS):
            await join_group(consumer, name, shift)
        yield shift
    finally:
        await close_in_time(stop(consumer), f"the member of group {name}")
