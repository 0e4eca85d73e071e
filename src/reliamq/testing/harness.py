"""What conformance tests are written with: a stage with a topic of its own, and few verbs.

Every stage has a topic named by a UUID, so that tests share a broker and one grep follows a test through its logs.
Nothing here
removes duplicates or repeats a publish: that would hide what a test is for.
"""

from __future__ import annotations

import signal
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import anyio
import pytest

from reliamq.spi import (
    Ack,
    Backend,
    Confirmation,
    Delivery,
    Durability,
    Finding,
    GroupSpec,
    Message,
    Outcome,
    Settlement,
    Subscription,
    TopicSpec,
)

__all__ = ["LEASE", "PATIENCE", "MakeBackend", "Stage", "promise"]

MakeBackend = Callable[[], Backend]
F = TypeVar("F", bound=Callable[..., object])

LEASE = timedelta(seconds=0.6)
"""A short lease, for tests in which one runs out."""
PATIENCE = timedelta(seconds=20)
"""How long a test waits for what must come."""
MOMENT = timedelta(seconds=0.25)
"""How long a test watches that something does not come."""
NO_LIMIT = 1 << 30


def promise(*numbers: str) -> Callable[[F], F]:
    """Mark a test with the promises that it checks; it runs on the event loop."""

    def mark(test: F) -> F:
        for marker in (pytest.mark.promise(*numbers), pytest.mark.anyio):
            test = marker(test)
        return test

    return mark


@dataclass
class Stage:
    """One broker, one topic.

    make_backend: another handle on the same broker.  url: how another process reaches it; empty: as the backend says.
    """

    make_backend: MakeBackend
    topic: str = field(default_factory=lambda: f"conformance-{uuid.uuid4()}")
    url: str = ""

    def __post_init__(self) -> None:
        self.backend = self.make_backend()
        self.url = self.url or self.backend.url

    def require(self, capability: str) -> None:
        """Leave the test out where the backend says that it cannot."""
        if not getattr(self.backend.capabilities, capability):
            pytest.skip(f"{self.backend.name} has no capability '{capability}'")

    # --- departure -------------------------------------------------------------------------------------------------

    def message(self, body: bytes = b"{}", **fields: Any) -> Message:
        """A message for the stage's topic."""
        values: dict[str, Any] = {"topic": self.topic, "id": str(uuid.uuid4()), "type": "Thing"}
        values |= {"source": "conformance", "time": datetime.now(UTC)} | fields
        return Message(body=body, **values)

    def numbered(self, count: int, *, key: bytes | None = None) -> list[Message]:
        """Messages whose bodies are their numbers."""
        return [self.message(str(number).encode(), key=key) for number in range(count)]

    async def declare(self, *groups: str | GroupSpec, **fields: Any) -> Sequence[Finding]:
        """Declare the topic with these groups (``g`` if none is named)."""
        async with self.backend.storage() as storage:
            return await storage.declare([self.spec(*groups, **fields)])

    def spec(self, *groups: str | GroupSpec, **fields: Any) -> TopicSpec:
        """The topic as :meth:`declare` declares it."""
        named = tuple(one if isinstance(one, GroupSpec) else GroupSpec(one) for one in groups or ("g",))
        values: dict[str, Any] = {"durability": min(self.backend.capabilities.durability, Durability.REPLICATED)}
        return TopicSpec(self.topic, named, **(values | fields))

    async def send(
        self, *messages: Message, within: timedelta | None = None, chained: bool = False
    ) -> Sequence[Outcome]:
        """Send one batch.  within: until its deadline; None: the test's patience.  chained: as an outbox sends."""
        deadline = time.monotonic() + (within or PATIENCE).total_seconds()
        async with self.backend.publisher() as publisher:
            return await publisher.send(messages, deadline=deadline, chained=chained)

    async def publish(self, *messages: Message) -> None:
        """Send one batch, all of which must be confirmed."""
        outcomes = await self.send(*messages)
        assert [type(one) for one in outcomes] == [Confirmation] * len(messages), outcomes

    async def publish_by_a_process_that_is_killed(self, count: int) -> None:
        """Send numbered messages of one key in a process of its own, killed the moment that they are confirmed."""
        command = [sys.executable, "-m", "reliamq.testing.process", self.topic, str(count)]
        done = await anyio.run_process(command, input=self.url.encode(), check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()

    # --- arrival ---------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def member(self, group: str = "g", *, lease: timedelta = timedelta(seconds=30)) -> AsyncIterator[Member]:
        """Join the group; leaving closes the subscription."""
        async with self.make_backend().subscription(self.topic, group, lease=lease) as subscription:
            yield Member(subscription)

    @asynccontextmanager
    async def abandoned_member(self, group: str = "g", *, lease: timedelta = LEASE) -> AsyncIterator[Member]:
        """A member that never closes while the block runs, as if its process had died in it."""
        async with self.member(group, lease=lease) as member:
            yield member


@dataclass
class Member:
    """One member of a group."""

    subscription: Subscription

    async def take(self, count: int, *, limit: int | None = None) -> list[Delivery]:
        """Exactly ``count`` deliveries, unsettled; fails when they do not come."""
        taken: list[Delivery] = []
        with anyio.move_on_after(PATIENCE.total_seconds()):
            while len(taken) < count:
                taken += await self.receive(limit or count - len(taken))
        assert len(taken) == count, f"{len(taken)} of {count} deliveries came"
        return taken

    async def receive(self, limit: int = 100, *, wait: timedelta = timedelta(seconds=1)) -> Sequence[Delivery]:
        """One receive."""
        return await self.subscription.receive(limit, max_bytes=NO_LIMIT, wait=wait)

    async def nothing_comes(self, *, during: timedelta = MOMENT) -> None:
        """Fails when something is delivered."""
        came = await self.receive(wait=during)
        assert not came, f"unexpected: {bodies(came)}"

    async def handle(self, count: int) -> list[Delivery]:
        """Take and acknowledge ``count`` deliveries, as they come."""
        handled: list[Delivery] = []
        with anyio.move_on_after(PATIENCE.total_seconds()):
            while len(handled) < count:
                came = await self.receive(count - len(handled))
                await self.settle(*[Ack(delivery) for delivery in came])
                handled += came
        assert len(handled) == count, f"{len(handled)} of {count} deliveries came: {bodies(handled)}"
        return handled

    async def settle(self, *settlements: Settlement) -> Sequence[Settlement]:
        """Settle; what came too late."""
        return await self.subscription.settle(settlements)


def bodies(deliveries: Sequence[Delivery]) -> list[bytes]:
    """The bodies, in the order of delivery."""
    return [delivery.message.body for delivery in deliveries]


def for_group(message: Message, group: str) -> Message:
    """The same message addressed to one group, as a replayed dead letter is."""
    return replace(message, only_group=group)
