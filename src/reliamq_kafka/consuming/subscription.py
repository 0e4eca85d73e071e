"""Safe arrival on Kafka: one member of one group on one topic.

It promises what the contract says of receiving, starting, extending and settling.  Nothing is acknowledged by the
client itself: a settlement is told to its record's window, and what the windows then say is committed before settling
returns (C1).  Being in the group is the membership's.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from typing import TypeGuard

import anyio

from reliamq.spi import (
    Ack,
    BrokerUnavailable,
    Confirmation,
    Delivery,
    Entry,
    Message,
    Release,
    Retry,
    Room,
    Settlement,
)
from reliamq_kafka.consuming.commits import NoLongerMember
from reliamq_kafka.consuming.membership import Membership
from reliamq_kafka.consuming.window import PartitionWindow
from reliamq_kafka.delays.delays import Delays, Postponement, SharedDelays
from reliamq_kafka.settings import KafkaSettings
from reliamq_kafka.storage.retention import trim_topic
from reliamq_kafka.wire.admin import Admin, open_admin
from reliamq_kafka.wire.progress import Attempts
from reliamq_kafka.wire.records import Record, message_of, readable, time_of

__all__ = ["KafkaSubscription", "open_subscription"]

logger = logging.getLogger("reliamq.kafka")
WATCH_SECONDS = 0.2
LONG = timedelta(seconds=30)
"""A message that gives way for longer leaves its partition meanwhile."""
POSTPONE_SECONDS = 10.0
FIRST_PARTITION = 0
REMEMBERED = 10_000  # receipts, so that settling twice is not told as too late
Receipt = tuple[int, int, int]
"""Partition, offset, number of the hand-out."""


class KafkaSubscription:
    """A :class:`~reliamq.spi.Subscription`."""

    def __init__(self, membership: Membership, delays: Delays, topic: str, group: str, lease: timedelta) -> None:
        self.lease_seconds = lease.total_seconds()
        self._delays = delays
        self._membership, self._topic, self._group = membership, topic, group
        self._hands = itertools.count(1)
        self._applied: dict[
            Receipt, tuple[PartitionWindow, int]
        ] = {}  # told to its window, in which version; not committed yet
        self._settled: set[Receipt] = set()
        self._settled_before: set[Receipt] = set()
        self._first = 0

    # --- receiving -------------------------------------------------------------------------------------------------

    async def receive(self, limit: int, *, max_bytes: int, wait: timedelta) -> Sequence[Delivery]:
        """Take deliveries, waiting for the first; see the contract."""
        deadline = time.monotonic() + wait.total_seconds()
        async with self._membership.asking():
            while limit > 0:
                self._membership.changed.clear()
                taken = self._take(limit, max_bytes)
                ours = [one for one in taken if one.message.only_group in (None, self._group)]
                left = deadline - time.monotonic()
                if ours or left <= 0:
                    return ours
                if taken or await self._raised_limit():  # all that was taken is addressed to other groups
                    continue
                self._membership.check()
                with suppress(TimeoutError):
                    async with asyncio.timeout(min(left, self._next_due())):
                        await self._membership.changed.wait()  # cancelled here: nothing was taken
        return ()

    async def _raised_limit(self) -> bool:
        """Whether a commit lets out what waited for it."""
        if self._membership.recalled or not any(window.needs_limit for window in self._membership.windows.values()):
            return False
        try:
            await self._membership.commits.commit()
        except NoLongerMember:
            return False
        return True

    def _take(self, limit: int, max_bytes: int) -> Sequence[Delivery]:
        """What may go out now, a partition after the other, each first in its turn.

        What is addressed to another group is among it, and finished.
        """
        if self._membership.recalled:
            return ()
        windows = list(self._membership.windows.items())
        if windows:
            self._first = (self._first + 1) % len(windows)
        now = time.monotonic()
        room = Room[Record](limit, max_bytes, now + self.lease_seconds, self._hands)
        places: list[tuple[int, PartitionWindow]] = []
        for partition, window in windows[self._first :] + windows[: self._first]:
            window.take(room, now=now)
            places += [(partition, window)] * (len(room.taken) - len(places))
        deliveries = [
            self._delivery(partition, entry) for (partition, _), entry in zip(places, room.taken, strict=True)
        ]
        for (_, window), entry, delivery in zip(places, room.taken, deliveries, strict=True):
            if delivery.message.only_group not in (None, self._group):
                window.finish(entry)
        return deliveries

    def _next_due(self) -> float:
        """Seconds until something that waits may go out."""
        if self._membership.recalled:
            return WATCH_SECONDS * 5
        dues = [due for window in self._membership.windows.values() if (due := window.next_due()) is not None]
        return max(0.001, min(dues) - time.monotonic()) if dues else WATCH_SECONDS * 5

    def _delivery(self, partition: int, entry: Entry[Record]) -> Delivery:
        return Delivery(
            _message(self._topic, partition, entry.content),
            self._group,
            f"{partition}/{entry.position}",
            (partition, entry.position, entry.hand),
            entry.failures,
            entry.crashes,
            entry.redelivered,
        )

    # --- keeping ---------------------------------------------------------------------------------------------------

    def _held(self, delivery: Delivery) -> tuple[PartitionWindow, Entry[Record]] | None:
        partition, offset, hand = _receipt(delivery)
        window = self._membership.windows.get(partition)
        entry = window.held(offset, hand) if window is not None else None
        return None if window is None or entry is None else (window, entry)

    def may_start(self, delivery: Delivery) -> bool:
        """Whether it still is this member's, and the group does not want its partition back."""
        held = self._held(delivery)
        if held is None or self._membership.recalled:
            return False
        held[1].started = True
        return True

    async def begin(self, deliveries: Sequence[Delivery]) -> Sequence[Delivery]:
        """Record starts in the committed progress; see the contract."""
        for held in [held for delivery in deliveries if (held := self._held(delivery))]:
            held[0].begin(held[1])
        if deliveries:
            try:
                await self._membership.commits.commit()
            except NoLongerMember:
                return ()
        return [delivery for delivery in deliveries if self._held(delivery)]

    async def extend(self, deliveries: Sequence[Delivery]) -> Sequence[Delivery]:
        """Renew leases; nobody else is asked, because whoever is in the group owns its partitions."""
        until = time.monotonic() + self.lease_seconds
        kept = [(delivery, held) for delivery in deliveries if (held := self._held(delivery))]
        for _, (_, entry) in kept:
            entry.until = until
        return [delivery for delivery, _ in kept]

    # --- settling --------------------------------------------------------------------------------------------------

    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[Settlement]:
        """End deliveries and commit; see the contract."""
        away = await self._postpone(settlements)
        receipts = [_receipt(one.delivery) for one in settlements]
        late = [
            one
            for receipt, one in zip(receipts, settlements, strict=True)
            if not self._apply(receipt, one, postponed=one in away)
        ]
        applied = [both for both in zip(receipts, settlements, strict=True) if both[0] in self._applied]
        if applied:
            with suppress(NoLongerMember):
                # Cancelled or refused here: what is applied is known, and committed when it is settled again.
                await self._membership.commits.commit()
        for receipt, one in applied:
            window, version = self._applied.pop(receipt)
            if window.written >= version:
                self._remember(receipt)
            else:  # its partition changed hands before this was written down
                late.append(one)
        return late

    async def _postpone(self, settlements: Sequence[Settlement]) -> Collection[Settlement]:
        """Send away what gives way for long, so that its partition's offset need not wait for it (C6); what has gone.

        Crashed or cancelled here: it comes twice, from there and from here.
        """
        leaving = [one for one in settlements if _is_long(one) and self._held(one.delivery)]
        if not leaving:
            return ()
        try:
            outcomes = await self._delays.postpone(
                [self._postponement(one) for one in leaving], deadline=time.monotonic() + POSTPONE_SECONDS
            )
        except BrokerUnavailable as error:
            logger.warning("group '%s': long retries wait in their partitions: %s", self._group, error)
            return ()
        return [one for one, outcome in zip(leaving, outcomes, strict=True) if isinstance(outcome, Confirmation)]

    def _postponement(self, retry: Retry) -> Postponement:
        held = self._held(retry.delivery)
        if held is None:
            raise AssertionError("looked at a moment ago, in the same turn of the loop")
        _, entry = held
        attempts = Attempts(failures=entry.failures + retry.counts, crashes=entry.crashes)
        return Postponement(self._topic, self._group, entry.content, attempts, retry.delay)

    def _apply(self, receipt: Receipt, settlement: Settlement, *, postponed: bool) -> bool:
        """Tell its window; False when it came too late."""
        partition, offset, hand = receipt
        window = self._membership.windows.get(partition)
        entry = window.held(offset, hand) if window is not None else None
        if window is None or entry is None:
            return receipt in self._applied or receipt in self._settled or receipt in self._settled_before
        match settlement:
            case Ack():
                window.finish(entry)
            case Retry() if postponed:
                window.finish(entry)
            case Release():
                window.release(entry)
            case Retry(delay=delay, keep_order=keep_order, counts=counts):
                due = time.monotonic() + delay.total_seconds()
                window.retry(entry, due=due, apart=not keep_order, counts=counts)
        self._applied[receipt] = window, window.version
        self._membership.settled.set()
        self._membership.changed.set()
        return True

    def _remember(self, receipt: Receipt) -> None:
        if len(self._settled) > REMEMBERED:
            self._settled_before, self._settled = self._settled, set()
        self._settled.add(receipt)

    # --- leases ----------------------------------------------------------------------------------------------------

    async def watch(self) -> None:
        """Take back what was not settled in its lease, until cancelled (C2)."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            for window in self._membership.windows.values():
                if lost := window.expire(time.monotonic()):
                    logger.warning("group '%s': %d leases ran out; those come again", self._group, len(lost))
                    self._membership.abandon()


async def trim_for_ever(membership: Membership, admin: Admin, settings: KafkaSettings, topic: str) -> None:
    """Remove what every group has finished and what is older than the topic keeps, now and then, until cancelled (C9).

    One member does it: who has the first partition.
    """
    while True:
        await asyncio.sleep(settings.trim_interval_seconds)
        if FIRST_PARTITION not in membership.windows:
            continue
        try:
            removed = await trim_topic(admin, settings, topic)
        except Exception as error:  # nothing is lost by what stays
            logger.warning("topic %s cannot be trimmed, trying again later: %r", topic, error)
        else:
            logger.info("topic %s: removed %d finished records", topic, sum(removed.values()))


def _is_long(settlement: Settlement) -> TypeGuard[Retry]:
    return isinstance(settlement, Retry) and not settlement.keep_order and settlement.delay > LONG


def _receipt(delivery: Delivery) -> Receipt:
    receipt = delivery.receipt
    if not isinstance(receipt, tuple):
        raise TypeError(f"delivery of message {delivery.message.id} has a receipt of another broker: {receipt!r}")
    return receipt


def _message(topic: str, partition: int, record: Record) -> Message:
    """The record as a message; one that nobody of ours wrote is handed on as it is (C11)."""
    try:
        return message_of(topic, record.key, record.value, record.headers)
    except (KeyError, ValueError, AttributeError):
        return Message(
            topic=topic,
            body=record.value or b"",
            id=f"{topic}/{partition}/{record.offset}",
            type="",
            source="kafka",
            time=time_of(record.timestamp),
            key=record.key,
            content_type="application/octet-stream",
            headers=readable(record.headers),
        )


@asynccontextmanager
async def open_subscription(
    settings: KafkaSettings, shared: SharedDelays, topic: str, group: str, lease: timedelta
) -> AsyncIterator[KafkaSubscription]:
    """Be a member while somebody receives; leaving gives back what is held.  Raises BrokerUnavailable.

    shared: where long retries of this process wait.
    """
    async with open_admin(settings) as admin, shared.in_use() as delays:
        membership = Membership(admin, settings, topic, group)
        subscription = KafkaSubscription(membership, delays, topic, group, lease)
        work = (
            subscription.watch(),
            trim_for_ever(membership, admin, settings, topic),
            membership.stay(),
            membership.commits.run(),
        )
        tasks = [asyncio.create_task(each, name=f"{group}@{topic}") for each in work]
        try:
            yield subscription
        finally:
            membership.stopping = True
            with anyio.CancelScope(shield=True):
                for task in tasks:  # in this order: the last commit is made while the member leaves
                    task.cancel()
                    await asyncio.wait({task})
