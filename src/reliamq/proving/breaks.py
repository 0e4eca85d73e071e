"""The real backend and outbox, watched; and with one rule broken on purpose.

What a rule protects from is best seen by breaking it.  Everything else stays as it is, so what the checker then finds
is due to that one rule.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import datetime, timedelta

import anyio

from reliamq.proving.ledger import Ledger
from reliamq.proving.plan import Rule
from reliamq.spi import (
    CLAIM_BYTES,
    Ack,
    Backend,
    Confirmation,
    DeadLetters,
    Delivery,
    KeptWindow,
    Message,
    OutboxRow,
    OutboxStatus,
    OutboxStore,
    Outcome,
    ParkedRow,
    Publisher,
    Rejection,
    Settlement,
    Storage,
    Subscription,
)

__all__ = ["ForgetfulOutbox", "WatchedBackend"]

LINGER_SECONDS = 0.3


class WatchedBackend:
    """A backend whose confirmations and deliveries go to the ledger.

    broken: *ack-first* acknowledges what was received at once.  *no-idempotency* takes its time to acknowledge, as a
    busy broker may: nothing that reliamq promises rests on its haste.
    """

    def __init__(self, backend: Backend, ledger: Ledger, broken: Rule | None) -> None:
        self._backend, self._ledger = backend, ledger
        self._watched = _WatchedSubscription if broken is None else _SUBSCRIPTIONS.get(broken, _WatchedSubscription)
        self.name, self.url, self.capabilities = backend.name, backend.url, backend.capabilities

    def storage(self) -> AbstractAsyncContextManager[Storage]:
        """As it is."""
        return self._backend.storage()

    def dead_letters(self) -> AbstractAsyncContextManager[DeadLetters]:
        """As it is."""
        return self._backend.dead_letters()

    @asynccontextmanager
    async def publisher(self) -> AsyncIterator[Publisher]:
        """Watched."""
        async with self._backend.publisher() as publisher:
            self._ledger.begin()
            yield _WatchedPublisher(publisher, self._ledger)

    @asynccontextmanager
    async def subscription(self, topic: str, group: str, *, lease: timedelta) -> AsyncIterator[Subscription]:
        """Watched, and perhaps broken."""
        async with self._backend.subscription(topic, group, lease=lease) as subscription:
            self._ledger.begin()
            yield self._watched(subscription, self._ledger)


class _WatchedPublisher:
    def __init__(self, publisher: Publisher, ledger: Ledger) -> None:
        self._publisher, self._ledger = publisher, ledger
        self.route, self.gathering_rounds = publisher.route, publisher.gathering_rounds

    async def send(self, batch: Sequence[Message], *, deadline: float, chained: bool = False) -> Sequence[Outcome]:
        outcomes = await self._publisher.send(batch, deadline=deadline, chained=chained)
        confirmed = [one.message_id for one in outcomes if isinstance(one, Confirmation)]
        if confirmed:
            self._ledger.write("confirmed", confirmed)
        return outcomes


class _WatchedSubscription:
    def __init__(self, subscription: Subscription, ledger: Ledger) -> None:
        self._subscription, self._ledger = subscription, ledger
        self.lease_seconds = subscription.lease_seconds

    async def receive(self, limit: int, *, max_bytes: int, wait: timedelta) -> Sequence[Delivery]:
        deliveries = await self._subscription.receive(limit, max_bytes=max_bytes, wait=wait)
        if deliveries:
            self._ledger.write("delivered", [one.message.id for one in deliveries])
        return deliveries

    def may_start(self, delivery: Delivery) -> bool:
        return self._subscription.may_start(delivery)

    async def begin(self, deliveries: Sequence[Delivery]) -> Sequence[Delivery]:
        return await self._subscription.begin(deliveries)

    async def extend(self, deliveries: Sequence[Delivery]) -> Sequence[Delivery]:
        return await self._subscription.extend(deliveries)

    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[Settlement]:
        return await self._subscription.settle(settlements)


class _AcknowledgedFirst(_WatchedSubscription):
    """The broken rule *ack-first*."""

    async def receive(self, limit: int, *, max_bytes: int, wait: timedelta) -> Sequence[Delivery]:
        deliveries = await super().receive(limit, max_bytes=max_bytes, wait=wait)
        await super().settle([Ack(delivery) for delivery in deliveries])
        return deliveries

    def may_start(self, delivery: Delivery) -> bool:
        return True

    async def begin(self, deliveries: Sequence[Delivery]) -> Sequence[Delivery]:
        return deliveries

    async def extend(self, deliveries: Sequence[Delivery]) -> Sequence[Delivery]:
        return deliveries

    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[Settlement]:
        return []


class _AcknowledgedLate(_WatchedSubscription):
    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[Settlement]:
        await anyio.sleep(LINGER_SECONDS)
        return await super().settle(settlements)


_SUBSCRIPTIONS = {Rule.ACK_FIRST: _AcknowledgedFirst, Rule.NO_IDEMPOTENCY: _AcknowledgedLate}


class ForgetfulOutbox:
    """The broken rule *forget-confirm*: rows leave the table when claimed and gather in memory."""

    def __init__(self, store: OutboxStore) -> None:
        self._store = store
        self._unsent: list[OutboxRow] = []
        self._send_at = 0.0

    async def claim(
        self, relay: str, *, limit: int, lease: timedelta, max_bytes: int = CLAIM_BYTES, resting: Sequence[str] = ()
    ) -> Sequence[OutboxRow]:
        """Claim and delete at once; what is in memory when the process dies is lost."""
        rows = await self._store.claim(relay, limit=limit, lease=lease, max_bytes=max_bytes, resting=resting)
        if rows:
            await self._store.settle(relay, confirmed=rows, rejected=[])
            self._send_at = self._send_at if self._unsent else time.monotonic() + LINGER_SECONDS
            self._unsent += rows
        if time.monotonic() < self._send_at:
            return []
        rows, self._unsent = self._unsent, []
        return rows

    async def settle(
        self, relay: str, *, confirmed: Sequence[OutboxRow], rejected: Sequence[tuple[OutboxRow, Rejection]]
    ) -> None:
        """Nothing is left to settle."""

    async def status(self) -> OutboxStatus:
        """As it is."""
        return await self._store.status()

    async def parked(self, *, limit: int) -> Sequence[ParkedRow]:
        """As it is."""
        return await self._store.parked(limit=limit)

    async def requeue(self, message_ids: Sequence[str] | None) -> int:
        """As it is."""
        return await self._store.requeue(message_ids)

    async def purge(self, message_ids: Sequence[str] | None) -> int:
        """As it is."""
        return await self._store.purge(message_ids)

    async def kept(
        self, *, since: datetime | timedelta, until: datetime | timedelta | None = None, topic: str | None = None
    ) -> KeptWindow:
        """As it is."""
        return await self._store.kept(since=since, until=until, topic=topic)

    async def replay(
        self, *, since: datetime | timedelta, until: datetime | timedelta | None = None, topic: str | None = None
    ) -> int:
        """As it is."""
        return await self._store.replay(since=since, until=until, topic=topic)

    async def clean(self, *, limit: int) -> int:
        """As it is."""
        return await self._store.clean(limit=limit)
