"""Brings postponed records back when they are due.

It promises that what it moves is stored in its next place before the topic of delays may forget it, so that a crash or
a cancel at any point repeats a move and loses nothing.  Every process that consumes runs one.  While nothing is delayed
anywhere it only looks now and then; else all of them share the partitions, as members of a group.  What was moved is
removed from the topic.

Time is the broker's timestamp against the local clock: clocks that differ shift a retry.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from dataclasses import dataclass

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from reliamq.spi import BrokerUnavailable
from reliamq_kafka.delays.carrier import Carrier, open_carrier
from reliamq_kafka.delays.shift import open_shift
from reliamq_kafka.settings import KafkaSettings
from reliamq_kafka.wire.admin import Admin, open_admin
from reliamq_kafka.wire.consumers import bounded, open_consumer
from reliamq_kafka.wire.lines import Lines

__all__ = ["Levels", "Mover"]

logger = logging.getLogger("reliamq.kafka")
LOOK_SECONDS = 3.0
STAY_SECONDS = 5.0
"""How long nothing must have been delayed before the group is left."""
TRIM_SECONDS = 60.0
AGAIN_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Levels:
    """How full the topic is.  By partition: the first record that is kept, the first that was not moved, the end."""

    first: dict[int, int]
    moved: dict[int, int]
    end: dict[int, int]

    @property
    def empty(self) -> bool:
        """Whether nothing waits."""
        return all(self.moved[number] >= end for number, end in self.end.items())

    @property
    def removable(self) -> dict[int, int]:
        """Below which offset a partition keeps what was moved."""
        return {number: moved for number, moved in self.moved.items() if moved > self.first[number]}


async def levels(admin: Admin, settings: KafkaSettings, looker: AIOKafkaConsumer, name: str) -> Levels | None:
    """Look; None without the topic.  Raises BrokerUnavailable.

    looker: a consumer that is in no group.
    """
    async with bounded(settings, f"looking at {name}"):
        parts = [TopicPartition(name, part.number) for part in await admin.partitions(name) or ()]
        if not parts:
            return None
        # In this order: what is moved or removed meanwhile counts as there, and is found out by the next look
        moved = await admin.committed(name, name, [part.partition for part in parts])
        first = {part.partition: offset for part, offset in (await looker.beginning_offsets(parts)).items()}
        end = {part.partition: offset for part, offset in (await looker.end_offsets(parts)).items()}
    return Levels(first, {number: max(moved.get(number, 0), first[number]) for number in first}, end)


class Mover:
    """Of one process."""

    def __init__(self, settings: KafkaSettings, lines: Lines, name: str) -> None:
        self._settings, self._lines, self._name = settings, lines, name
        self._woken = asyncio.Event()
        self._trimmed_at = 0.0

    def wake(self) -> None:
        """Something was postponed here: look now."""
        self._woken.set()

    async def move_for_ever(self) -> None:
        """Bring back what is due, whatever the broker does, until cancelled; that leaves the group."""
        while True:
            try:
                await self._move()
            except (KafkaError, OSError, BrokerUnavailable) as error:
                logger.warning("%s: not moving for a moment: %r", self._name, error)
            except Exception:  # a mover that has died would be a retry that never comes
                logger.exception("%s: not moving for a moment", self._name)
            await asyncio.sleep(AGAIN_SECONDS)

    async def _move(self) -> None:
        async with (
            open_admin(self._settings) as admin,
            open_consumer(self._settings) as looker,
            open_carrier(admin, self._settings, self._lines, self._name) as carrier,
        ):
            while True:
                found = await self._look(admin, looker)
                if found is None or found.empty:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(LOOK_SECONDS):  # wait_for may swallow a cancel (Python 3.11)
                            await self._woken.wait()
                    self._woken.clear()
                else:
                    await self._move_until_empty(admin, looker, carrier)

    async def _look(self, admin: Admin, looker: AIOKafkaConsumer) -> Levels | None:
        found = await levels(admin, self._settings, looker, self._name)
        if found is not None and found.removable:
            idle = time.monotonic() - self._trimmed_at
            if found.empty or idle > TRIM_SECONDS:
                async with bounded(self._settings, f"trimming {self._name}"):
                    await admin.delete_before(self._name, found.removable)
                self._trimmed_at = time.monotonic()
        return found

    async def _move_until_empty(self, admin: Admin, looker: AIOKafkaConsumer, carrier: Carrier) -> None:
        """Be in the group until nothing has been delayed for a while."""
        filled_at = looked_at = time.monotonic()
        async with open_shift(admin, self._settings, self._name, carrier) as shift:
            while time.monotonic() - filled_at < STAY_SECONDS:
                await shift.work()
                if time.monotonic() - looked_at < LOOK_SECONDS:
                    continue
                found = await self._look(admin, looker)
                looked_at = time.monotonic()
                if found is None or not found.empty:
                    filled_at = looked_at
