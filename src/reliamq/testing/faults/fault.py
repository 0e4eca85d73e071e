"""A sound backend with one thing changed, and what passes everything else on."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta

from reliamq.spi import (
    Backend,
    Capabilities,
    DeadLetterRecord,
    DeadLetters,
    Delivery,
    Finding,
    Message,
    Outcome,
    Publisher,
    Settlement,
    Storage,
    Subscription,
    TopicSpec,
)

__all__ = ["Fault", "PassingDeadLetters", "PassingPublisher", "PassingStorage", "PassingSubscription", "breaks"]


class PassingPublisher:
    """Sends as it is."""

    def __init__(self, publisher: Publisher) -> None:
        self.inner = publisher
        self.route, self.gathering_rounds = publisher.route, publisher.gathering_rounds

    async def send(self, batch: Sequence[Message], *, deadline: float, chained: bool = False) -> Sequence[Outcome]:
        """Pass on."""
        return await self.inner.send(batch, deadline=deadline, chained=chained)


class PassingStorage:
    """Declares and audits as it is."""

    def __init__(self, storage: Storage) -> None:
        self.inner = storage

    async def declare(self, topics: Sequence[TopicSpec]) -> Sequence[Finding]:
        """Pass on."""
        return await self.inner.declare(topics)

    async def audit(self, topics: Sequence[TopicSpec]) -> Sequence[Finding]:
        """Pass on."""
        return await self.inner.audit(topics)


class PassingSubscription:
    """Consumes as it is."""

    def __init__(self, subscription: Subscription) -> None:
        self.inner = subscription
        self.lease_seconds = subscription.lease_seconds
        self.may_start = subscription.may_start

    async def receive(self, limit: int, *, max_bytes: int, wait: timedelta) -> Sequence[Delivery]:
        """Pass on."""
        return await self.inner.receive(limit, max_bytes=max_bytes, wait=wait)

    async def begin(self, deliveries: Sequence[Delivery]) -> Sequence[Delivery]:
        """Pass on."""
        return await self.inner.begin(deliveries)

    async def extend(self, deliveries: Sequence[Delivery]) -> Sequence[Delivery]:
        """Pass on."""
        return await self.inner.extend(deliveries)

    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[Settlement]:
        """Pass on."""
        return await self.inner.settle(settlements)


class PassingDeadLetters:
    """Keeps dead letters as it is."""

    def __init__(self, dead_letters: DeadLetters) -> None:
        self.inner = dead_letters

    async def add(self, records: Sequence[DeadLetterRecord], *, deadline: float) -> Sequence[Outcome]:
        """Pass on."""
        return await self.inner.add(records, deadline=deadline)

    async def find(
        self, *, topic: str | None = None, group: str | None = None, message_id: str | None = None, limit: int = 100
    ) -> Sequence[DeadLetterRecord]:
        """Pass on."""
        return await self.inner.find(topic=topic, group=group, message_id=message_id, limit=limit)

    async def remove(self, records: Sequence[DeadLetterRecord]) -> int:
        """Pass on."""
        return await self.inner.remove(records)


def _as_they_are(capabilities: Capabilities) -> Capabilities:
    return capabilities


@dataclass(frozen=True)
class Fault:
    """breaks: promises whose tests must fail.  The rest: which part is replaced, and by what."""

    breaks: frozenset[str]
    publisher: Callable[[Publisher], Publisher] = PassingPublisher
    storage: Callable[[Storage], Storage] = PassingStorage
    subscription: Callable[[Subscription], Subscription] = PassingSubscription
    dead_letters: Callable[[DeadLetters], DeadLetters] = PassingDeadLetters
    lease: timedelta | None = None
    claims: Callable[[Capabilities], Capabilities] = _as_they_are

    def wrap(self, backend: Backend) -> Backend:
        """The backend with this fault."""
        return _Broken(backend, self)


class _Broken:
    def __init__(self, backend: Backend, fault: Fault) -> None:
        self._inner, self._fault = backend, fault
        self.name, self.url, self.capabilities = backend.name, backend.url, fault.claims(backend.capabilities)

    @asynccontextmanager
    async def storage(self) -> AsyncIterator[Storage]:
        async with self._inner.storage() as storage:
            yield self._fault.storage(storage)

    @asynccontextmanager
    async def publisher(self) -> AsyncIterator[Publisher]:
        async with self._inner.publisher() as publisher:
            yield self._fault.publisher(publisher)

    @asynccontextmanager
    async def subscription(self, topic: str, group: str, *, lease: timedelta) -> AsyncIterator[Subscription]:
        async with self._inner.subscription(topic, group, lease=self._fault.lease or lease) as subscription:
            yield self._fault.subscription(subscription)

    @asynccontextmanager
    async def dead_letters(self) -> AsyncIterator[DeadLetters]:
        async with self._inner.dead_letters() as dead_letters:
            yield self._fault.dead_letters(dead_letters)


def breaks(*numbers: str) -> frozenset[str]:
    """Promises by their numbers."""
    return frozenset(numbers)
