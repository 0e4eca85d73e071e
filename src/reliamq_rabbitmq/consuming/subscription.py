"""Safe arrival on RabbitMQ: one member of one group on one topic.

It promises what the contract says of receiving, starting, extending and settling.  Nothing is acknowledged by the
client itself: a settlement is told to its message's window, and what the windows then say is with the broker before
settling returns (C1).  Being in the group, and having lanes, is the membership's.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import timedelta

import anyio

from reliamq.spi import Ack, Delivery, Entry, Release, Retry, Room, Settlement
from reliamq_rabbitmq.catalog.names import lane_queue
from reliamq_rabbitmq.consuming.lane import Lane
from reliamq_rabbitmq.consuming.ledger import NotWritten
from reliamq_rabbitmq.consuming.membership import Membership
from reliamq_rabbitmq.consuming.window import Held, LaneWindow
from reliamq_rabbitmq.delays.ladder import Postponement
from reliamq_rabbitmq.settings import RabbitmqSettings
from reliamq_rabbitmq.wire.attempts import Attempts
from reliamq_rabbitmq.wire.connection import FAILURES, unavailable

__all__ = ["RabbitmqSubscription", "open_subscription"]

logger = logging.getLogger("reliamq.rabbitmq")
WATCH_SECONDS = 0.2
LONG = timedelta(seconds=30)
"""A message that gives way for longer leaves its lane meanwhile."""
REMEMBERED = 10_000  # receipts, so that settling twice is not told as too late
Receipt = tuple[int, int, int]
"""Lane, position, number of the hand-out."""


class RabbitmqSubscription:
    """A :class:`~reliamq.spi.Subscription`."""

    def __init__(
        self, settings: RabbitmqSettings, membership: Membership, topic: str, group: str, lease: timedelta
    ) -> None:
        self.lease_seconds = lease.total_seconds()
        self._settings = settings
        self._membership, self._topic, self._group = membership, topic, group
        self._hands = itertools.count(1)
        self._applied: dict[Receipt, Lane] = {}  # told to its window, and not with the broker yet
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
                left = deadline - time.monotonic()
                if taken or left <= 0:
                    return taken
                self._membership.check()
                with suppress(TimeoutError):
                    async with asyncio.timeout(min(left, self._next_due())):
                        await self._membership.changed.wait()  # cancelled here: nothing was taken
        return ()

    def _take(self, limit: int, max_bytes: int) -> Sequence[Delivery]:
        """What may go out now, a lane after the other, each first in its turn."""
        lanes = list(self._membership.open_lanes())
        if lanes:
            self._first = (self._first + 1) % len(lanes)
        now = time.monotonic()
        room = Room[Held](limit, max_bytes, now + self.lease_seconds, self._hands)
        deliveries: list[Delivery] = []
        for lane in lanes[self._first :] + lanes[: self._first]:
            if lane.window is not None:
                lane.window.take(room, now=now)
                deliveries += (self._delivery(lane, entry) for entry in room.taken[len(deliveries) :])
        return deliveries

    def _next_due(self) -> float:
        """Seconds until something that waits may go out."""
        windows = [lane.window for lane in self._membership.open_lanes() if lane.window is not None]
        dues = [due for window in windows if (due := window.next_due()) is not None]
        return max(0.001, min(dues) - time.monotonic()) if dues else WATCH_SECONDS * 5

    def _delivery(self, lane: Lane, entry: Entry[Held]) -> Delivery:
        return Delivery(
            entry.content.message,
            self._group,
            f"lane {lane.number}",
            (lane.number, entry.position, entry.hand),
            entry.failures,
            entry.crashes,
            entry.redelivered,
        )

    # --- keeping ---------------------------------------------------------------------------------------------------

    def _held(self, delivery: Delivery) -> tuple[Lane, LaneWindow, Entry[Held]] | None:
        number, position, hand = _receipt(delivery)
        lane = self._membership.lanes.get(number)
        if lane is None or lane.window is None:
            return None
        entry = lane.window.held(position, hand)
        return None if entry is None else (lane, lane.window, entry)

    def may_start(self, delivery: Delivery) -> bool:
        """Whether it still is this member's, and its lane is not wanted elsewhere."""
        held = self._held(delivery)
        if held is None or held[0].retiring:
            return False
        held[2].started = True
        return True

    async def begin(self, deliveries: Sequence[Delivery]) -> Sequence[Delivery]:
        """Record starts in the lanes' ledgers; see the contract."""
        lanes: set[Lane] = set()
        for lane, window, entry in [held for delivery in deliveries if (held := self._held(delivery))]:
            window.begin(entry)
            lanes.add(lane)
        await self._write(lanes)
        return [delivery for delivery in deliveries if self._held(delivery)]

    async def extend(self, deliveries: Sequence[Delivery]) -> Sequence[Delivery]:
        """Renew leases; nobody else is asked, because whoever has a lane has its messages."""
        until = time.monotonic() + self.lease_seconds
        kept = []
        for delivery in deliveries:
            if held := self._held(delivery):
                held[2].until = until
            if held or _receipt(delivery) in self._applied:  # settled, and the broker does not know yet
                kept.append(delivery)
        return kept

    # --- settling --------------------------------------------------------------------------------------------------

    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[Settlement]:
        """End deliveries, and have the broker know; see the contract."""
        away = await self._postpone(settlements)
        late: list[Settlement] = []
        applied: list[tuple[Settlement, Receipt, Lane]] = []
        for one in settlements:
            receipt, held = _receipt(one.delivery), self._held(one.delivery)
            if held is not None:
                self._apply(Ack(one.delivery) if id(one) in away else one, *held)
                self._applied[receipt] = held[0]
            if receipt in self._applied:
                applied.append((one, receipt, self._applied[receipt]))
            elif receipt not in self._settled and receipt not in self._settled_before:
                late.append(one)
        # Cancelled or refused here: what is applied is settled again, and written then
        lost = await self._write({lane for _, _, lane in applied})
        for one, receipt, lane in applied:
            self._applied.pop(receipt, None)
            if lane in lost:  # before the broker knew
                late.append(one)
            else:
                self._remember(receipt)
        return late

    async def _postpone(self, settlements: Sequence[Settlement]) -> Collection[int]:
        """Send away what gives way for long, so that it holds no room here meanwhile (C6); ids of what has gone.

        Crashed or cancelled here: it comes twice, from there and from here.
        """
        ladder = self._membership.ladder
        leaving = [(one, away) for one in settlements if ladder and (away := self._postponement(one))]
        if ladder is None or not leaving:
            return ()
        try:
            gone = await ladder.postpone([away for _, away in leaving])
        except FAILURES as error:
            logger.warning("group '%s': long retries wait in their lanes: %s", self._group, error)
            return ()
        return {id(one) for (one, _), certain in zip(leaving, gone, strict=True) if certain}

    def _postponement(self, settlement: Settlement) -> Postponement | None:
        if not isinstance(settlement, Retry) or settlement.keep_order or settlement.delay <= LONG:
            return None
        held = self._held(settlement.delivery)
        if held is None or not held[2].content.message.type:  # one that nobody of ours wrote cannot be written again
            return None
        lane, _, entry = held
        attempts = Attempts(entry.failures + settlement.counts, entry.crashes)
        queue = lane_queue(self._topic, self._group, lane.number)
        return Postponement(entry.content.message, queue, attempts, settlement.delay)

    def _apply(self, settlement: Settlement, lane: Lane, window: LaneWindow, entry: Entry[Held]) -> None:
        match settlement:
            case Ack():
                window.finish(entry)
            case Release():
                window.release(entry)
            case Retry(delay=delay, keep_order=keep_order, counts=counts):
                due = time.monotonic() + delay.total_seconds()
                window.retry(entry, due=due, apart=not keep_order, counts=counts)
        lane.settled.set()
        self._membership.changed.set()

    async def _write(self, lanes: Collection[Lane]) -> Collection[Lane]:
        """Bring to the broker what these lanes say; those that were lost over it.  Raises BrokerUnavailable.

        Cancelled here: what is applied is known, and is written with what comes next.
        """
        results = await asyncio.gather(*[lane.write() for lane in lanes], return_exceptions=True)
        lost, refused = list[Lane](), list[NotWritten]()
        for lane, result in zip(lanes, results, strict=True):
            if isinstance(result, NotWritten):
                refused.append(result)
            elif isinstance(result, FAILURES):
                logger.warning("group '%s': lane %d is lost: %s", self._group, lane.number, result)
                lane.lose()
                lost.append(lane)
            elif isinstance(result, BaseException):
                raise result
        if refused:
            raise unavailable(self._settings, f"writing attempts of group '{self._group}'", refused[0])
        return lost

    def _remember(self, receipt: Receipt) -> None:
        if len(self._settled) > REMEMBERED:
            self._settled_before, self._settled = self._settled, set()
        self._settled.add(receipt)

    # --- leases ----------------------------------------------------------------------------------------------------

    async def watch(self) -> None:
        """Take back what was not settled in its lease, until cancelled (C2)."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            for lane in self._membership.lanes.values():
                if lane.window is not None and (lost := lane.window.expire(time.monotonic())):
                    logger.warning("group '%s': %d leases ran out; those come again", self._group, len(lost))
                    lane.settled.set()
                    self._membership.abandon()


def _receipt(delivery: Delivery) -> Receipt:
    receipt = delivery.receipt
    if not isinstance(receipt, tuple):
        raise TypeError(f"delivery of message {delivery.message.id} has a receipt of another broker: {receipt!r}")
    return receipt


@asynccontextmanager
async def open_subscription(
    settings: RabbitmqSettings, topic: str, group: str, lease: timedelta
) -> AsyncIterator[RabbitmqSubscription]:
    """Be a member while somebody receives; leaving gives back what is held.  Raises BrokerUnavailable."""
    membership = Membership(settings, topic, group)
    subscription = RabbitmqSubscription(settings, membership, topic, group, lease)
    tasks = [asyncio.create_task(each, name=f"{group}@{topic}") for each in (subscription.watch(), membership.stay())]
    try:
        yield subscription
    finally:
        membership.stopping = True
        with anyio.CancelScope(shield=True):
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
