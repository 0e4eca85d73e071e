"""One member of a Kafka group on one topic: joins and leaves, fetches, and holds a window on each of its partitions.

It promises that nothing is handed out of a partition which is not this member's, that a partition it must hand over is
handed over with all that is known of it, and that one which comes back to it goes on where it was.  Which records may
go out is decided by the windows; leases and settlements are the subscription's.

One task owns the client's consumer and calls its ``getmany``, which is never cancelled while the consumer is used: a
cancelled one counts as work for ever, and the group's own watch over members that hang is off from then on.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import aiokafka
from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.coordinator.assignors.sticky.sticky_assignor import StickyPartitionAssignor
from aiokafka.errors import IllegalStateError, KafkaError

from reliamq.spi import BrokerUnavailable
from reliamq.spi.closing import close_in_time, to_its_end
from reliamq.spi.presence import Presence
from reliamq_kafka.catalog.groups import Groups
from reliamq_kafka.consuming.commits import Commits, NoLongerMember, generation_of
from reliamq_kafka.consuming.window import PartitionWindow, now
from reliamq_kafka.settings import KafkaSettings
from reliamq_kafka.wire.admin import Admin, group_id
from reliamq_kafka.wire.consumers import (
    SAFE_READING,
    answered_in_time,
    join_group,
    known_positions,
    open_consumer,
    stop,
)
from reliamq_kafka.wire.lenient import next_records
from reliamq_kafka.wire.progress import Progress, decode

__all__ = ["Membership"]

logger = logging.getLogger("reliamq.kafka")
POLL_MILLISECONDS = 100
HEARTBEATS_PER_SESSION = 20
REJOIN_SECONDS = 0.5
SETTLE_SECONDS = 2.0
"""How long a group waits for what a member has and has not started; it gives that back as soon as it comes to it."""
HANDOVER_SHARE = 0.8
"""Of the rebalance timeout, for what has started; the rest is for the last commit and for joining."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a group is on a partition.

    start, end: of the records that are kept.  first: where the group began when it was declared.
    """

    commit: tuple[int, str] | None
    start: int
    end: int
    first: int


class _Listener(aiokafka.ConsumerRebalanceListener):  # type: ignore[misc]  # the client has no types
    """Passes on what a consumer hears of its partitions, while it is the one that is used: one that closes late may
    hear of some after another one took its place.
    """

    def __init__(self, membership: Membership) -> None:
        self._membership, self.deaf = membership, False

    async def on_partitions_revoked(self, revoked: Collection[TopicPartition]) -> None:
        if not self.deaf:
            await self._membership.hand_over(self)

    async def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        if not self.deaf:
            self._membership.note(assigned)


class Membership(Presence):
    """windows: by partition, those that are this member's.

    recalled: the group wants partitions back, or settles who has them; nothing may be handed out or started.
    settled: set whenever a delivery has ended.
    """

    def __init__(self, admin: Admin, settings: KafkaSettings, topic: str, group: str) -> None:
        self._group = group_id(topic, group)
        # Joining disturbs all other members
        super().__init__(f"group {self._group}", logger, (KafkaError, OSError), rejoin_seconds=REJOIN_SECONDS)
        self._admin, self._settings, self._topic, self._name = admin, settings, topic, group
        self.windows: dict[int, PartitionWindow] = {}
        self.commits = Commits(settings, topic, self._group, self.windows)
        self.recalled, self.settled = False, asyncio.Event()
        self._assigned: Collection[TopicPartition] | None = None

    def unavailable(self, what: str, error: BaseException) -> BrokerUnavailable:
        """The error for callers."""
        if isinstance(error, BrokerUnavailable):
            return error
        return BrokerUnavailable(self._settings.url, f"{what}: {error!r}")

    def handed(self) -> int:
        """How many deliveries are handed out and not settled."""
        return sum(window.handed for window in self.windows.values())

    def abandon(self) -> None:
        """Leases ran out: unless somebody asks, nobody is there any more."""
        super().abandon()
        self.settled.set()

    # --- in the group ----------------------------------------------------------------------------------------------

    async def join(self) -> None:
        """Fetch what is this member's until nobody asks any more."""
        consumer, listener = self._new_consumer(), _Listener(self)
        try:
            await answered_in_time(self._settings, self._group, join_group(consumer, self._topic, listener))
            self.commits.consumer = consumer
            await self._fetch_until_idle(consumer)
        finally:
            # Cancelled here or before: what is handed out is given back, and others can have it at once (C8).
            await to_its_end(self._leave(consumer, listener))

    def _new_consumer(self) -> AIOKafkaConsumer:
        class Sticky(StickyPartitionAssignor):  # type: ignore[misc]  # the client has no types
            """It remembers in its class what it had: each consumer needs its own."""

        settings, session = self._settings, int(self._settings.session_timeout_seconds * 1000)
        return AIOKafkaConsumer(
            **settings.connection(),
            group_id=self._group,
            group_instance_id=settings.member_name,
            **SAFE_READING,
            partition_assignment_strategy=(Sticky,),
            session_timeout_ms=session,
            heartbeat_interval_ms=session // HEARTBEATS_PER_SESSION,
            rebalance_timeout_ms=int(settings.rebalance_timeout_seconds * 1000),
            max_poll_interval_ms=int(settings.poll_interval_seconds * 1000),
        )

    async def _fetch_until_idle(self, consumer: AIOKafkaConsumer) -> None:
        while not self.is_idle():
            if self._assigned is not None:
                await self._restore(consumer, self._assigned)
            self._keep_bounds(consumer)
            for part, records in (await self._next_records(consumer)).items():
                self._take_in(part.partition, records)
            await self._pass_over(consumer)

    async def _next_records(self, consumer: AIOKafkaConsumer) -> Mapping[TopicPartition, Sequence[ConsumerRecord]]:
        """What comes next in any partition, also where the client cannot read it (C11)."""
        positions = {TopicPartition(self._topic, number): window.position for number, window in self.windows.items()}
        reading = next_records(consumer, positions, milliseconds=POLL_MILLISECONDS)
        return await answered_in_time(self._settings, self._group, reading)

    async def _pass_over(self, consumer: AIOKafkaConsumer) -> None:
        """What the client got and did not hand on (ends of transactions, what they aborted) is no message.

        It also goes to where the log begins now if what was next has been removed, and logs that itself.
        """
        if self.recalled or self._assigned is not None:  # its positions are not the windows' now
            return
        windows = {TopicPartition(self._topic, number): window for number, window in self.windows.items()}
        for part, position in (await known_positions(consumer, windows)).items():
            windows[part].pass_over(position)

    def _take_in(self, number: int, records: Sequence[ConsumerRecord]) -> None:
        window = self.windows.get(number)
        if window is None or self.recalled:  # it is not there yet, or perhaps no more: they are fetched again
            return
        if records and records[0].offset < window.position:
            logger.error(
                "partition %d of %s begins anew at %d, before the offset %d that was read last: its log was cut off or "
                "replaced; all that it holds comes again",
                *(number, self._topic, records[0].offset, window.position),
            )
            offset = records[0].offset
            window = self.windows[number] = PartitionWindow(self._name, Progress(offset, offset, offset), now())
        window.fetched(records)
        self.changed.set()

    def _keep_bounds(self, consumer: AIOKafkaConsumer) -> None:
        """Fetch no more of a partition that has enough waiting (C10)."""
        paused = consumer.paused()
        for number, window in self.windows.items():
            part, wanted = TopicPartition(self._topic, number), window.wants_more()
            with suppress(IllegalStateError):  # it changes hands just now
                if wanted and part in paused:
                    consumer.resume(part)
                elif not wanted and part not in paused:
                    consumer.pause(part)

    async def _leave(self, consumer: AIOKafkaConsumer, listener: _Listener) -> None:
        self.recalled, self._assigned = True, None
        await self._write_all()
        self._drop(list(self.windows))
        self.commits.consumer, listener.deaf = None, True
        await close_in_time(stop(consumer), f"the member of group {self._group}")

    # --- partitions come and go ------------------------------------------------------------------------------------

    async def hand_over(self, listener: _Listener) -> None:
        """The group wants partitions back: start nothing more, and wait for what has started as long as it waits (C3).

        Which partitions come back is known only later; until then their windows are kept, and nothing happens to them.
        """
        self.recalled, self._assigned = True, None
        self.changed.set()
        await self._wait_for_handlers()
        if not listener.deaf:
            await self._write_all()
        if not listener.deaf:
            self.commits.allowed.clear()

    async def _wait_for_handlers(self) -> None:
        began = time.monotonic()
        while self.handed():
            started = any(window.started for window in self.windows.values())
            patience = self._settings.rebalance_timeout_seconds * HANDOVER_SHARE if started else SETTLE_SECONDS
            left = began + patience - time.monotonic()
            if left <= 0:
                return
            self.settled.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(min(left, SETTLE_SECONDS)):
                    await self.settled.wait()

    async def _write_all(self) -> None:
        """Write down where everything is, for whoever comes next.

        Where a handler still runs, they must record its starts, as after a crash.
        """
        self.commits.clean = self.stopping or not self.handed()
        self.commits.allowed.set()
        try:
            if self.windows:
                await self.commits.commit()
        except (NoLongerMember, BrokerUnavailable) as error:
            logger.warning("group %s: handed over without a last commit; some may come again: %r", self._group, error)
            self._drop(list(self.windows))
        finally:
            self.commits.clean = False

    def note(self, assigned: Collection[TopicPartition]) -> None:
        """What is this member's now; the fetching task restores it, because heartbeats wait for this callback."""
        self._assigned = tuple(assigned)

    async def _restore(self, consumer: AIOKafkaConsumer, assigned: Collection[TopicPartition]) -> None:
        """Open a window on each partition where its group is; one that nobody else had meanwhile stays."""
        generation = generation_of(consumer)
        places = await self._places(consumer, assigned)
        if self._assigned is not assigned or generation != generation_of(consumer):  # it changed hands again
            return
        stay = {number for number, place in places.items() if self.commits.wrote(number, place.commit)}
        self._drop([number for number in self.windows if number not in stay])
        for part in assigned:
            window = self.windows.get(part.partition)
            if window is None:
                window = PartitionWindow(self._name, self._progress_of(part.partition, places[part.partition]), now())
            with suppress(IllegalStateError):  # it changes hands just now
                consumer.seek(part, window.position)
                self.windows[part.partition] = window
        self._assigned, self.recalled = None, False
        self.commits.generation = generation
        self.commits.allowed.set()
        self.changed.set()

    async def _places(self, consumer: AIOKafkaConsumer, assigned: Collection[TopicPartition]) -> dict[int, _Place]:
        numbers = [part.partition for part in assigned]
        if not numbers:
            return {}
        commits = await self._admin.commits(self._group, self._topic, numbers)
        starts = await consumer.beginning_offsets(assigned)
        ends = await consumer.end_offsets(assigned)  # of what may be read: before the first open transaction
        if any(commits[part.partition][0] > ends[part] for part in assigned if part.partition in commits):
            async with open_consumer(self._settings) as whole:
                ends = await whole.end_offsets(assigned)
        first = await self._first_of_group() if len(commits) < len(numbers) else ()
        return {
            part.partition: _Place(
                commits.get(part.partition),
                starts[part],
                ends[part],
                first[part.partition] if part.partition < len(first) else starts[part],
            )
            for part in assigned
        }

    async def _first_of_group(self) -> tuple[int, ...]:
        """Where the group began when it was declared; empty if nobody declared it."""
        declared = await Groups(self._admin, self._settings).of(self._topic)
        return next((group.first for group in declared if group.id == self._group), ())

    def _progress_of(self, partition: int, place: _Place) -> Progress:
        if place.commit is None:
            offset = max(place.start, place.first)
            logger.error(
                "group %s has no position on partition %d and begins at %d; what it handled before comes again",
                *(self._group, partition, offset),
            )
            return Progress(offset, offset, offset)
        offset, metadata = place.commit
        if offset < place.start:
            # Trimming beside a declaration can do that and loses nothing; so could only an administrator
            logger.error(
                "group %s, partition %d: the records from %d to %d were removed before the group came to them",
                *(self._group, partition, offset, place.start - 1),
            )
            return Progress(place.start, place.start, place.start)
        if offset > place.end:
            logger.error(
                "group %s, partition %d: it had come to %d and the log ends at %d, which was cut off or replaced; all "
                "that it holds comes again",
                *(self._group, partition, offset, place.end),
            )
            return Progress(place.start, place.start, place.start)
        return decode(offset, metadata) or Progress(offset, offset, offset)

    def _drop(self, partitions: Collection[int]) -> None:
        for number in partitions:
            self.windows.pop(number, None)
        self.commits.forget(partitions)
        self.changed.set()
