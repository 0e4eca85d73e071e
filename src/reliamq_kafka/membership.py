"""One member of a Kafka group on one topic: joins and leaves, fetches, and commits what the windows say.

It promises that what it commits is finished, that nothing is handed out of a partition which is not this member's, and
that a partition it must hand over is handed over with all that is known of it.  Which records may go out is decided by
the windows; leases and settlements are the subscription's.

One task owns the client's consumer and calls its ``getmany``, which is never cancelled while the consumer is used (a
cancelled one counts as work for ever, and the group's own watch over idle members is off).  Another task commits, one
request at a time.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Collection, Iterable
from contextlib import asynccontextmanager, suppress

import aiokafka
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.coordinator.assignors.roundrobin import RoundRobinPartitionAssignor
from aiokafka.errors import CommitFailedError, IllegalStateError, KafkaError
from aiokafka.structs import OffsetAndMetadata

from reliamq.spi import BrokerUnavailable
from reliamq_kafka.admin import Admin, group_id
from reliamq_kafka.progress import Progress, decode, encode
from reliamq_kafka.settings import KafkaSettings
from reliamq_kafka.window import Times, Window

__all__ = ["Membership", "NoLongerMember", "now"]

logger = logging.getLogger("reliamq.kafka")
POLL_SECONDS = 0.1
IDLE_SECONDS = 2.0
"""Whoever asks for nothing and holds nothing for so long lets others have its partitions."""
HEARTBEATS_PER_SESSION = 20
REJOIN_PAUSE_SECONDS = 0.5
CLOSE_SECONDS = 5.0
HANDOVER_MARGIN = 0.8
"""Of the rebalance timeout; the rest is for the last commit and for joining."""


class NoLongerMember(Exception):  # it is news, not an error
    """The group went on without this member; what it did not commit is others' now."""


def now() -> Times:
    """This moment."""
    return Times(time.monotonic(), time.time())


class Membership(aiokafka.ConsumerRebalanceListener):  # type: ignore[misc]  # the client has no types
    """windows: by partition, those that are this member's now.

    recalled: the group wants the partitions back; nothing may be handed out or started.
    changed: set whenever something may have become possible: records came, partitions changed hands.
    settled: set whenever a delivery has ended.
    stopping: nobody works on what is handed out any more; set before :meth:`stay` is cancelled.
    """

    def __init__(self, admin: Admin, settings: KafkaSettings, topic: str, group: str) -> None:
        self._admin, self._settings = admin, settings
        self._topic, self._group = topic, group_id(topic, group)
        self.windows: dict[int, Window] = {}
        self.recalled = False
        self.changed = asyncio.Event()
        self.settled = asyncio.Event()
        self._consumer: AIOKafkaConsumer | None = None
        self._assigned: Collection[TopicPartition] = ()
        self._wanted = asyncio.Event()
        self._receivers, self._asked_at = 0, time.monotonic()
        self._failure: BrokerUnavailable | None = None
        self._paused: set[TopicPartition] = set()
        self._unsettled_since: float | None = None
        self._committed: dict[int, tuple[int, str]] = {}
        self._waiting: list[asyncio.Future[None]] = []
        self._commit_asked = asyncio.Event()
        self._handing_over_clean = False
        self.stopping = False

    # --- who asks --------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def asking(self) -> AsyncIterator[None]:
        """Somebody waits for records: be a member meanwhile."""
        self._receivers += 1
        self._wanted.set()
        try:
            yield
        finally:
            self._receivers -= 1
            self._asked_at = time.monotonic()

    def check(self) -> None:
        """Raise what keeps this member out of the group, once."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _is_idle(self) -> bool:
        if self._receivers or any(window.handed for window in self.windows.values()):
            return False
        return time.monotonic() - self._asked_at > IDLE_SECONDS

    # --- in the group ----------------------------------------------------------------------------------------------

    async def stay(self) -> None:
        """Be in the group while somebody asks; until cancelled, which leaves it cleanly."""
        while True:
            await self._wanted.wait()
            try:
                await self._join_and_fetch()
            except (KafkaError, OSError, BrokerUnavailable) as error:
                logger.warning("group %s: out of the group, joining again: %r", self._group, error)
                self._failure = _unavailable(self._settings.url, error)
                self.changed.set()
                await asyncio.sleep(REJOIN_PAUSE_SECONDS)

    async def _join_and_fetch(self) -> None:
        consumer = self._new_consumer()
        consumer.subscribe([self._topic], listener=self)
        try:
            await consumer.start()
            self._consumer, self._unsettled_since = consumer, time.monotonic()
            await self._fetch_until_idle(consumer)
        finally:
            # Cancelled here or before: what is handed out is given back, and others can have it at once (C8).
            await asyncio.shield(asyncio.ensure_future(self._leave(consumer)))

    def _new_consumer(self) -> AIOKafkaConsumer:
        settings = self._settings
        session = int(settings.session_timeout_seconds * 1000)
        return AIOKafkaConsumer(
            **settings.connection(),
            group_id=self._group,
            group_instance_id=settings.instance_id,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            # The client's sticky one keeps its memory in the class: two consumers of one process would mix theirs up.
            partition_assignment_strategy=(RoundRobinPartitionAssignor,),
            session_timeout_ms=session,
            heartbeat_interval_ms=session // HEARTBEATS_PER_SESSION,
            rebalance_timeout_ms=int(settings.rebalance_timeout_seconds * 1000),
            max_poll_interval_ms=int(settings.poll_interval_seconds * 1000),
        )

    async def _fetch_until_idle(self, consumer: AIOKafkaConsumer) -> None:
        while not self._is_idle():
            if self._assigned:
                await self._restore(consumer)
            self._check_progress()
            self._keep_bounds(consumer)
            batches = await consumer.getmany(timeout_ms=int(POLL_SECONDS * 1000))
            for part, records in batches.items():
                window = self.windows.get(part.partition)
                if window is not None:  # else its window is not there yet, and it is fetched again from its start
                    window.fetched(records)
                    self.changed.set()
        self._wanted.clear()

    def _keep_bounds(self, consumer: AIOKafkaConsumer) -> None:
        """Fetch no more of a partition that has enough waiting (C10)."""
        for number, window in self.windows.items():
            part = TopicPartition(self._topic, number)
            if window.wants_more():
                if part in self._paused:
                    consumer.resume(part)
                    self._paused.discard(part)
            elif part not in self._paused:
                consumer.pause(part)
                self._paused.add(part)

    def _check_progress(self) -> None:
        """A rebalance that does not end is a consumer that is stuck: another one takes its place."""
        since = self._unsettled_since
        patience = 2 * self._settings.rebalance_timeout_seconds + self._settings.session_timeout_seconds
        if since is not None and time.monotonic() - since > patience:
            raise BrokerUnavailable(self._settings.url, f"group {self._group} has settled on nothing for {patience} s")

    async def _leave(self, consumer: AIOKafkaConsumer) -> None:
        self._assigned = ()
        with suppress(NoLongerMember, BrokerUnavailable):
            await self._hand_over()
        self._consumer = None
        stopping = asyncio.ensure_future(consumer.stop())
        _, late = await asyncio.wait({stopping}, timeout=CLOSE_SECONDS)
        for task in late:  # a coordinator that does not answer: the session ends by itself
            task.cancel()

    # --- partitions come and go ------------------------------------------------------------------------------------

    async def on_partitions_revoked(self, revoked: Collection[TopicPartition]) -> None:
        """Hand over: nothing more is started, what has started is waited for, as long as the group waits (C3)."""
        self._unsettled_since = time.monotonic()
        self.recalled, self._assigned = True, ()
        self.changed.set()
        deadline = time.monotonic() + self._settings.rebalance_timeout_seconds * HANDOVER_MARGIN
        try:
            while self._handed() and (left := deadline - time.monotonic()) > 0:
                self.settled.clear()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self.settled.wait(), left)
            await self._hand_over()
        except (NoLongerMember, BrokerUnavailable) as error:
            logger.warning("group %s: handed over without a last commit: %s", self._group, error)
        finally:
            self._drop_windows()
            self.recalled = False

    async def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        """Note what is this member's now; the fetching task restores it, because heartbeats wait for this callback."""
        self._assigned = tuple(assigned)
        self._unsettled_since = None
        self._paused.clear()

    async def _restore(self, consumer: AIOKafkaConsumer) -> None:
        """Open a window on each assigned partition, where its group is."""
        assigned = self._assigned
        numbers = [part.partition for part in assigned]
        commits = await self._admin.commits(self._group, self._topic, numbers)
        starts = await consumer.beginning_offsets(assigned)
        if self._assigned is not assigned:  # it changed hands meanwhile
            return
        for part in assigned:
            progress = self._progress_of(part.partition, commits.get(part.partition), starts[part])
            with suppress(IllegalStateError):  # it changes hands just now
                consumer.seek(part, progress.offset)
                self.windows[part.partition] = Window(progress, now())
        self._assigned = ()
        self.changed.set()

    def _progress_of(self, partition: int, commit: tuple[int, str] | None, start: int) -> Progress:
        if commit is None:
            logger.error(
                "group %s has no position on partition %d; it begins with the first record that is kept, and what it "
                "handled before comes again",
                self._group,
                partition,
            )
            return Progress(start, start, start)
        offset, metadata = commit
        if offset < start:
            logger.error(
                "group %s, partition %d: %d records were removed before they were handled (%d to %d)",
                *(self._group, partition, start - offset, offset, start - 1),
            )
            return Progress(start, start, start)
        return decode(offset, metadata) or Progress(offset, offset, offset)

    def _handed(self) -> int:
        return sum(window.handed for window in self.windows.values())

    async def _hand_over(self) -> None:
        """Write down where everything is, and hold nothing any more."""
        # Where a handler still runs, whoever comes next must record its starts, as after a crash.
        self._handing_over_clean = self.stopping or not self._handed()
        try:
            if self.windows:
                await self.commit()
        finally:
            self._handing_over_clean = False
            self._drop_windows()

    def _drop_windows(self) -> None:
        self.windows.clear()
        self._committed.clear()
        self.changed.set()

    # --- commits ---------------------------------------------------------------------------------------------------

    async def commit(self) -> None:
        """Write down where the windows are; when it returns the broker has it.

        Raises NoLongerMember, BrokerUnavailable.  Cancelled: it may be written, and what it says is true.
        """
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(done)
        self._commit_asked.set()
        await done

    async def commit_for_ever(self) -> None:
        """Write what was asked for, one request at a time, until cancelled."""
        while True:
            await self._commit_asked.wait()
            self._commit_asked.clear()
            waiting, self._waiting = self._waiting, []
            try:
                await self._write(clean=self._handing_over_clean)
            except (NoLongerMember, BrokerUnavailable) as error:
                _tell(waiting, error)
            except BaseException:
                _tell(waiting, BrokerUnavailable(self._settings.url, "closed while a commit was on its way"))
                raise
            else:
                _tell(waiting, None)

    async def _write(self, *, clean: bool) -> None:
        consumer, windows = self._consumer, dict(self.windows)
        if consumer is None:
            raise NoLongerMember
        written = {number: window.progress(now(), closing=clean) for number, window in windows.items()}
        texts = {number: (progress.offset, encode(progress)) for number, progress in written.items()}
        news = {
            TopicPartition(self._topic, number): OffsetAndMetadata(*text)
            for number, text in texts.items()
            if self._committed.get(number) != text
        }
        if news:
            await self._send(consumer, news)
        for number, window in windows.items():
            if self.windows.get(number) is window:
                window.limit = max(window.limit, written[number].limit)
                self._committed[number] = texts[number]

    async def _send(self, consumer: AIOKafkaConsumer, news: dict[TopicPartition, OffsetAndMetadata]) -> None:
        """The client repeats without a deadline; when it is stopped, what it may have written is true all the same."""
        sending = asyncio.ensure_future(consumer.commit(news))
        try:
            finished, _ = await asyncio.wait({sending}, timeout=self._settings.request_timeout_seconds)
            if not finished:
                raise BrokerUnavailable(self._settings.url, f"the commit of group {self._group} was not answered")
            sending.result()
        except (CommitFailedError, IllegalStateError) as error:
            self._drop_windows()
            raise NoLongerMember from error
        except KafkaError as error:
            raise BrokerUnavailable(self._settings.url, f"group {self._group} cannot commit: {error!r}") from error
        finally:
            sending.cancel()


def _tell(waiting: Iterable[asyncio.Future[None]], error: Exception | None) -> None:
    for one in waiting:
        if one.done():
            continue
        if error is None:
            one.set_result(None)
        else:
            one.set_exception(error)


def _unavailable(url: str, error: Exception) -> BrokerUnavailable:
    return error if isinstance(error, BrokerUnavailable) else BrokerUnavailable(url, repr(error))
