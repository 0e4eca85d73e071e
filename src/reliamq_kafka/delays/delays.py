"""Retry later, for long (C6): what gives way to its key's others leaves its partition and comes back to it when due.

A postponed record is stored in the topic of delays before its original is finished, so that a crash between leaves it
twice and never loses it.  From there the mover brings it back.  How a delay is cut into waits, and what its record
says, is told in :mod:`~reliamq_kafka.delays.delayed`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta

import anyio

from reliamq.spi import Confirmation, Outcome
from reliamq_kafka.catalog.own_topics import DELAYS_TOPIC, KEPT, LOG, create_own_topic
from reliamq_kafka.delays.delayed import PARTITIONS, first_wait, original
from reliamq_kafka.delays.mover import Mover
from reliamq_kafka.settings import KafkaSettings
from reliamq_kafka.wire.admin import Admin, open_admin
from reliamq_kafka.wire.consumers import bounded
from reliamq_kafka.wire.lines import Addressed, Lines
from reliamq_kafka.wire.partition_queue import Sending
from reliamq_kafka.wire.progress import Attempts
from reliamq_kafka.wire.records import Record

__all__ = ["Delays", "Postponement", "SharedDelays", "open_delays"]

LARGEST_RECORD = 99 * 1024 * 1024
"""A request to Kafka can have 100 MiB: what fits into a topic fits here too."""
SEGMENT_BYTES, SEGMENT_MILLISECONDS = 128 * 1024 * 1024, 24 * 3600 * 1000
"""The newest file of a partition is never removed, so they are small, and each must hold the largest record."""

STOP_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Postponement:
    """A record that comes back to ``group`` after ``delay``.  attempts: so far, this one counted."""

    topic: str
    group: str
    record: Record
    attempts: Attempts
    delay: timedelta


async def create_delays(admin: Admin, settings: KafkaSettings, name: str) -> int:
    """Have the topic, ready for writing; its partitions.  Raises BrokerUnavailable, KafkaError."""
    configs = {
        "cleanup.policy": LOG,
        **KEPT,
        "max.message.bytes": str(LARGEST_RECORD),
        "segment.bytes": str(SEGMENT_BYTES),
        "segment.ms": str(SEGMENT_MILLISECONDS),
    }
    return len(await create_own_topic(admin, settings, name, PARTITIONS, configs))


class Delays:
    """Where records wait, for all groups of a cluster."""

    def __init__(self, settings: KafkaSettings, name: str, lines: Lines, mover: Mover) -> None:
        self._settings, self._name, self._lines, self._mover = settings, name, lines, mover
        self._partitions = 0

    async def postpone(self, batch: Sequence[Postponement], *, deadline: float) -> Sequence[Outcome]:
        """Store records for later; an outcome for each, in order, with the meaning of a publisher's.

        Confirmation: on every in-sync replica; the original may be finished.  Any other: whoever still has the
        original keeps it, or postpones it again: that may give it twice.
        Raises BrokerUnavailable when none could be tried.  Cancelled: they may be stored.
        deadline: monotonic seconds.
        """
        if not batch:
            return ()
        partitions = self._partitions or await self._created(deadline)
        outcomes = await self._lines.send([self._addressed(one, partitions) for one in batch], deadline=deadline)
        if not all(isinstance(outcome, Confirmation) for outcome in outcomes):
            self._partitions = 0  # the topic may be gone
        self._mover.wake()
        return outcomes

    async def _created(self, deadline: float) -> int:
        limit = bounded(self._settings, f"creating {self._name}", deadline - time.monotonic())
        async with limit, open_admin(self._settings) as admin:
            self._partitions = await create_delays(admin, self._settings, self._name)
        return self._partitions

    def _addressed(self, one: Postponement, partitions: int) -> Addressed:
        number, delayed = first_wait(one.topic, one.group, one.attempts, one.delay).into(partitions)
        headers = [*original(one.record.headers), *delayed.headers()]
        name = f"{one.topic} at {one.record.offset}"
        return Addressed(self._name, number, Sending(name, one.record.key, one.record.value, headers))


@asynccontextmanager
async def open_delays(settings: KafkaSettings, name: str = DELAYS_TOPIC) -> AsyncIterator[Delays]:
    """Postpone, and meanwhile bring back what is due, whoever postponed it.  Connects in the background, as needed.

    name: of the topic, and of the group of those who move.
    """
    lines = Lines(settings)
    mover = Mover(settings, lines, name)
    moving = asyncio.create_task(mover.move_for_ever(), name=f"moving {name}")
    try:
        yield Delays(settings, name, lines, mover)
    finally:
        with anyio.CancelScope(shield=True):
            while not moving.done():  # again, if something in the client has swallowed it
                moving.cancel()
                await asyncio.wait({moving}, timeout=STOP_SECONDS)
            await lines.close()


class SharedDelays:
    """One :class:`Delays` for all who use it at the same time in a process; making one does no I/O."""

    def __init__(self, settings: KafkaSettings, name: str = DELAYS_TOPIC) -> None:
        self._settings, self._name = settings, name
        self._users = 0

    @asynccontextmanager
    async def in_use(self) -> AsyncIterator[Delays]:
        """Share it; the last one closes it."""
        if not self._users:
            self._stack = AsyncExitStack()  # entering does not wait, so nobody comes between
            self._delays = await self._stack.enter_async_context(open_delays(self._settings, self._name))
        self._users += 1
        try:
            yield self._delays
        finally:
            self._users -= 1
            if not self._users:
                await self._stack.aclose()
