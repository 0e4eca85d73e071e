"""Safe arrival: one member of one group.

It promises what the contract says of receiving, starting, extending and settling, waits without work while there is
nothing, and gives back what it holds when it is left (C8).  Which messages it gets is decided in ``claiming``, what
settling does in ``settling``.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar

import anyio

from reliamq.embedded.chains import release_owner
from reliamq.embedded.claiming import Member, Taken, Wanted, claim, look
from reliamq.embedded.database import Database
from reliamq.embedded.errors import StoreFailure
from reliamq.embedded.rows import LARGEST_MESSAGE, message_of
from reliamq.embedded.schema import number_in_topic
from reliamq.embedded.settling import Receipt, begin, extend, settle
from reliamq.spi import BrokerUnavailable, Delivery, Settlement

__all__ = ["EmbeddedSubscription", "join"]

T = TypeVar("T")

JOIN = """
UPDATE group_ SET members = members + 1
WHERE name = :group AND topic_id = (SELECT id FROM topic WHERE name = :topic)
RETURNING id, members"""

PAUSE = 0.005  # seconds between two readings of a log in which every key is somebody else's
REMEMBERED = 10_000  # receipts, so that settling twice is not told as too late


async def join(database: Database, topic: str, group: str) -> Member:
    """Become one more member of a declared group.  Raises BrokerUnavailable when it is not declared."""
    try:
        row = await database.write(
            lambda connection: connection.execute(JOIN, {"topic": topic, "group": group}).fetchone()
        )
    except StoreFailure as failure:
        raise failure.unavailable(database.location.url) from failure
    if row is None:
        raise BrokerUnavailable(
            database.location.url, f"topic '{topic}' has no group '{group}'; declare it before subscribing"
        )
    return Member(*row)


class EmbeddedSubscription:
    """A :class:`~reliamq.spi.Subscription`; :meth:`leave` must be called at its end."""

    def __init__(self, database: Database, topic: str, group: str, member: Member, lease: timedelta) -> None:
        self.lease_seconds = lease.total_seconds()
        self._database, self._topic, self._group, self._member = database, topic, group, member
        self._topics = frozenset({topic})
        self._flowing = False
        self._settled: set[Receipt] = set()
        self._settled_before: set[Receipt] = set()

    # --- receiving -------------------------------------------------------------------------------------------------

    async def receive(self, limit: int, *, max_bytes: int, wait: timedelta) -> Sequence[Delivery]:
        """Take deliveries, waiting for the first; see the contract."""
        deadline = time.monotonic() + wait.total_seconds()
        if limit <= 0:
            return ()
        with self._database.watching(self._topic) as watch:
            while True:
                watch.event.clear()
                idle_for = 0.0 if self._flowing else await self._look()
                if idle_for == 0.0:
                    taken = await self._claim(limit, max_bytes)
                    self._flowing = bool(taken)
                    if taken:
                        return taken
                    idle_for = PAUSE
                left = deadline - time.monotonic()
                if left <= 0:
                    return ()
                with anyio.move_on_after(left if idle_for is None else min(left, idle_for)):
                    await watch.event.wait()  # cancelled here: nothing was taken

    async def _look(self) -> float | None:
        return await self._asked(
            self._database.read(lambda connection: look(connection, self._member, self._database.clock()))
        )

    async def _claim(self, limit: int, max_bytes: int) -> Sequence[Delivery]:
        number = 0

        def job(connection: sqlite3.Connection) -> Taken | None:
            nonlocal number
            now = self._database.clock()
            wanted = Wanted(limit, min(max_bytes, LARGEST_MESSAGE))
            taken = claim(connection, self._member, wanted, now=now, until=now + self.lease_seconds)
            number = 0 if taken is None else taken.claim
            return taken

        try:
            taken = await self._asked(self._database.write(job))
        except (anyio.get_cancelled_exc_class(), BrokerUnavailable):
            # Nobody will see what was, perhaps, taken: give it back right behind the hand-out.  Kept until its lease
            # ends, it would let the next of its keys overtake it, because this member seems to have it (C3).
            self._give_back(lambda: number)
            raise
        if taken is None:
            raise BrokerUnavailable(self._database.location.url, f"group '{self._group}' is gone from the file")
        return [self._delivery(taken.claim, row) for row in taken.rows]

    def _give_back(self, claimed: Callable[[], int]) -> None:
        self._database.write_later(
            lambda connection: release_owner(connection, self._member.group, self._member.owner, claimed()),
            wakes=self._topics,
        )

    def _delivery(self, number: int, row: Sequence[Any]) -> Delivery:
        position, failures, crashes, handed_out, *columns = row
        message = message_of(self._topic, columns)
        if message.only_group is not None and message.only_group != self._group:
            # stored once for another group, and replayed to this one by its id
            message = replace(message, only_group=self._group)
        return Delivery(
            message,
            self._group,
            str(number_in_topic(position)),
            (position, number),
            failures,
            crashes,
            bool(handed_out),
        )

    # --- keeping and ending ----------------------------------------------------------------------------------------

    def may_start(self, delivery: Delivery) -> bool:
        """Always: this broker wants nothing back, and whose lease has ended is told when it is extended or settled."""
        return True

    async def begin(self, deliveries: Sequence[Delivery]) -> Sequence[Delivery]:
        """Record starts; see the contract."""
        if not deliveries:
            return ()
        receipts = [_receipt(delivery) for delivery in deliveries]
        owned = await self._asked(
            self._database.write(lambda connection: begin(connection, self._member.group, receipts))
        )
        return [delivery for delivery in deliveries if _receipt(delivery) in owned]

    async def extend(self, deliveries: Sequence[Delivery]) -> Sequence[Delivery]:
        """Renew leases; see the contract."""
        if not deliveries:
            return ()
        receipts = [_receipt(delivery) for delivery in deliveries]
        owned = await self._asked(
            self._database.write(
                lambda connection: extend(
                    connection, self._member.group, receipts, self._database.clock() + self.lease_seconds
                )
            )
        )
        return [delivery for delivery in deliveries if _receipt(delivery) in owned]

    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[Settlement]:
        """End deliveries in one transaction; see the contract."""
        if not settlements:
            return ()
        pairs = [(_receipt(settlement.delivery), settlement) for settlement in settlements]
        # Cancelled here: all of them are settled, and remembered as such when they are settled again
        owned = await self._asked(
            self._database.write(
                lambda connection: settle(connection, self._member.group, pairs, self._database.clock()),
                wakes=self._topics,
            )
        )
        late = [settlement for receipt, settlement in pairs if receipt not in owned and not self._was_settled(receipt)]
        self._remember(receipt for receipt, _ in pairs if receipt in owned)
        return late

    def _was_settled(self, receipt: Receipt) -> bool:
        return receipt in self._settled or receipt in self._settled_before

    def _remember(self, receipts: Iterable[Receipt]) -> None:
        if len(self._settled) > REMEMBERED:
            self._settled_before, self._settled = self._settled, set()
        self._settled.update(receipts)

    async def leave(self) -> None:
        """Give back all that is held, at once available to others (C8)."""
        await self._asked(
            self._database.write(
                lambda connection: release_owner(connection, self._member.group, self._member.owner),
                wakes=self._topics,
            )
        )

    async def _asked(self, answer: Awaitable[T]) -> T:
        try:
            return await answer
        except StoreFailure as failure:
            raise failure.unavailable(self._database.location.url) from failure


def _receipt(delivery: Delivery) -> Receipt:
    receipt = delivery.receipt
    if not isinstance(receipt, tuple):
        raise TypeError(f"delivery of message {delivery.message.id} has a receipt of another broker: {receipt!r}")
    return receipt
