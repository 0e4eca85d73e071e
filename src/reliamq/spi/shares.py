"""A subscription over shares of a group's messages, each with a window of its own.

For a backend whose member has whole shares (partitions, lanes) and keeps what is in them in a
:class:`~reliamq.spi.Window`.  It promises what the contract says of receiving, starting, extending and settling, as far
as no broker is asked: a settlement is told to its message's window, and the backend then writes down what the windows
say before settling returns (C1).

Not imported by ``reliamq.spi`` itself: only such a backend needs it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Collection, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from typing import Any, Generic, Protocol, TypeVar

import anyio

from reliamq.spi.messages import Delivery, Message
from reliamq.spi.outcomes import Ack, Release, Retry, Settlement
from reliamq.spi.presence import Presence
from reliamq.spi.window import Entry, Room, Window

__all__ = ["Share", "ShareSubscription", "present"]

WATCH_SECONDS = 0.2
REMEMBERED = 10_000  # receipts, so that settling twice is not told as too late
Receipt = tuple[int, int, int]
"""Share, position, number of the hand-out."""
Content = TypeVar("Content")


class Share(Protocol[Content]):
    """One share while it is a member's."""

    number: int
    retiring: bool
    """It is wanted elsewhere; nothing more is handed out or started."""
    settled: asyncio.Event
    """Set whenever a delivery has ended."""

    @property
    def window(self) -> Window[Content] | None: ...  # what is here of it; None while it is somebody else's


S = TypeVar("S", bound=Share[Any])


class ShareSubscription(ABC, Generic[S, Content]):
    """A :class:`~reliamq.spi.Subscription`.  shares: by number, those that this member has or waits for."""

    def __init__(
        self, presence: Presence, shares: dict[int, S], group: str, lease: timedelta, logger: logging.Logger
    ) -> None:
        self.lease_seconds = lease.total_seconds()
        self._presence, self._shares, self._group, self._logger = presence, shares, group, logger
        self._hands = itertools.count(1)
        self._applied: dict[Receipt, S] = {}  # told to its window, and not written down yet
        self._settled: set[Receipt] = set()
        self._settled_before: set[Receipt] = set()
        self._first = 0

    # --- what the backend does -------------------------------------------------------------------------------------

    @abstractmethod
    def message(self, share: S, entry: Entry[Content]) -> tuple[Message, str]:
        """What is delivered, and where it is, for people."""

    @abstractmethod
    async def write(self, shares: Collection[S]) -> Collection[S]:
        """Bring to the broker what the windows of these shares say; those that were lost over it.

        Raises BrokerUnavailable.  Cancelled: what is applied is known, and is written with what comes next.
        """

    def apply(self, settlement: Settlement, window: Window[Content], entry: Entry[Content]) -> None:
        """Tell the window."""
        match settlement:
            case Ack():
                window.finish(entry)
            case Release():
                window.release(entry)
            case Retry(delay=delay, keep_order=keep_order, counts=counts):
                due = time.monotonic() + delay.total_seconds()
                window.retry(entry, due=due, apart=not keep_order, counts=counts)

    # --- receiving -------------------------------------------------------------------------------------------------

    async def receive(self, limit: int, *, max_bytes: int, wait: timedelta) -> Sequence[Delivery]:
        """Take deliveries, waiting for the first; see the contract."""
        deadline = time.monotonic() + wait.total_seconds()
        async with self._presence.asking():
            while limit > 0:
                self._presence.changed.clear()
                taken = self._take(limit, max_bytes)
                left = deadline - time.monotonic()
                if taken or left <= 0:
                    return taken
                self._presence.check()
                with suppress(TimeoutError):
                    async with asyncio.timeout(min(left, self._next_due())):
                        await self._presence.changed.wait()  # cancelled here: nothing was taken
        return ()

    def _open(self) -> Iterable[tuple[S, Window[Content]]]:
        """Those that messages may be handed out of."""
        for share in self._shares.values():
            if share.window is not None and not share.retiring:
                yield share, share.window

    def _take(self, limit: int, max_bytes: int) -> Sequence[Delivery]:
        """What may go out now, a share after the other, each first in its turn."""
        shares = list(self._open())
        if shares:
            self._first = (self._first + 1) % len(shares)
        now = time.monotonic()
        room = Room[Content](limit, max_bytes, now + self.lease_seconds, self._hands)
        deliveries: list[Delivery] = []
        for share, window in shares[self._first :] + shares[: self._first]:
            window.take(room, now=now)
            deliveries += (self._delivery(share, entry) for entry in room.taken[len(deliveries) :])
        return deliveries

    def _next_due(self) -> float:
        """Seconds until something that waits may go out."""
        dues = [due for _, window in self._open() if (due := window.next_due()) is not None]
        return max(0.001, min(dues) - time.monotonic()) if dues else WATCH_SECONDS * 5

    def _delivery(self, share: S, entry: Entry[Content]) -> Delivery:
        message, position = self.message(share, entry)
        receipt = (share.number, entry.position, entry.hand)
        return Delivery(message, self._group, position, receipt, entry.failures, entry.crashes, entry.redelivered)

    # --- keeping ---------------------------------------------------------------------------------------------------

    def _held(self, delivery: Delivery) -> tuple[S, Window[Content], Entry[Content]] | None:
        number, position, hand = _receipt(delivery)
        share = self._shares.get(number)
        if share is None or share.window is None:
            return None
        entry = share.window.held(position, hand)
        return None if entry is None else (share, share.window, entry)

    def may_start(self, delivery: Delivery) -> bool:
        """Whether it still is this member's, and its share is not wanted elsewhere."""
        held = self._held(delivery)
        if held is None or held[0].retiring:
            return False
        held[2].started = True
        return True

    async def begin(self, deliveries: Sequence[Delivery]) -> Sequence[Delivery]:
        """Record starts; see the contract."""
        shares: set[S] = set()
        for share, window, entry in [held for delivery in deliveries if (held := self._held(delivery))]:
            window.begin(entry)
            shares.add(share)
        lost = await self.write(shares)
        return [delivery for delivery in deliveries if (held := self._held(delivery)) and held[0] not in lost]

    async def extend(self, deliveries: Sequence[Delivery]) -> Sequence[Delivery]:
        """Renew leases; nobody else is asked, because whoever has a share has its messages."""
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
        late: list[Settlement] = []
        applied: list[tuple[Settlement, Receipt, S]] = []
        for one in settlements:
            receipt, held = _receipt(one.delivery), self._held(one.delivery)
            if held is not None:
                self.apply(one, held[1], held[2])
                held[0].settled.set()
                self._presence.changed.set()
                self._applied[receipt] = held[0]
            if receipt in self._applied:
                applied.append((one, receipt, self._applied[receipt]))
            elif receipt not in self._settled and receipt not in self._settled_before:
                late.append(one)
        # Cancelled or refused here: what is applied is settled again, and written then
        lost = await self.write({share for _, _, share in applied})
        for one, receipt, share in applied:
            self._applied.pop(receipt, None)
            if share in lost:  # before the broker knew
                late.append(one)
            else:
                self._remember(receipt)
        return late

    def _remember(self, receipt: Receipt) -> None:
        if len(self._settled) > REMEMBERED:
            self._settled_before, self._settled = self._settled, set()
        self._settled.add(receipt)

    # --- leases ----------------------------------------------------------------------------------------------------

    async def watch(self) -> None:
        """Take back what was not settled in its lease, until cancelled (C2)."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            for share in self._shares.values():
                if share.window is not None and (lost := share.window.expire(time.monotonic())):
                    self._logger.warning("group '%s': %d leases ran out; those come again", self._group, len(lost))
                    share.settled.set()
                    self._presence.abandon()


def _receipt(delivery: Delivery) -> Receipt:
    receipt = delivery.receipt
    if not isinstance(receipt, tuple):
        raise TypeError(f"delivery of message {delivery.message.id} has a receipt of another broker: {receipt!r}")
    return receipt


@asynccontextmanager
async def present(presence: Presence, *work: Coroutine[Any, Any, None], name: str) -> AsyncIterator[None]:
    """Be a member while the block runs; leaving it gives back what is held.  work: what must go on meanwhile."""
    tasks = [asyncio.create_task(each, name=name) for each in (*work, presence.stay())]
    try:
        yield
    finally:
        presence.stopping = True
        with anyio.CancelScope(shield=True):
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
