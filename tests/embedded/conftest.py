"""Brokers to test with, and short words for messages."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import uuid_utils

from reliamq.embedded.backend import EmbeddedBackend
from reliamq.spi import Confirmation, Delivery, Durability, GroupSpec, Message, Publisher, Subscription, TopicSpec

LEASE = timedelta(seconds=30)
_names = itertools.count()


class Clock:
    """A clock that stands still until somebody advances it."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


MakeBackend = Callable[..., EmbeddedBackend]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def file_url(tmp_path: Path) -> str:
    return f"embedded:///{tmp_path}/broker.db"


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A broker of its own for each test, once in a file and once in memory."""
    return f"embedded:///{tmp_path}/broker.db" if request.param == "file" else f"memory://test-{next(_names)}"


@pytest.fixture
def backend(url: str, clock: Clock) -> EmbeddedBackend:
    return EmbeddedBackend(url, clock=clock)


def topic(name: str = "orders", *groups: str, **settings: Any) -> TopicSpec:
    """A topic with groups, by default the one that the other words use."""
    durability = settings.pop("durability", Durability.DEVELOPMENT)
    return TopicSpec(name, tuple(GroupSpec(group) for group in groups or ("g",)), durability=durability, **settings)


async def declare(backend: EmbeddedBackend, *topics: TopicSpec) -> None:
    async with backend.storage() as storage:
        assert await storage.declare(topics or (topic(),)) == []


def message(
    text: str = "hello",
    key: str | None = None,
    *,
    topic: str = "orders",
    id: str | None = None,  # the field's name
    only_group: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Message:
    return Message(
        topic=topic,
        body=text.encode(),
        id=id or str(uuid_utils.uuid7()),
        type="OrderPlaced",
        source="tests",
        time=datetime.now(UTC),
        key=None if key is None else key.encode(),
        only_group=only_group,
        headers=headers or {},
    )


def soon() -> float:
    return time.monotonic() + 30


async def publish(publisher: Publisher, *messages: Message) -> None:
    outcomes = await publisher.send(messages, deadline=soon())
    assert all(isinstance(outcome, Confirmation) for outcome in outcomes), outcomes


async def receive(subscription: Subscription, limit: int = 100, *, wait: float = 0.0) -> Sequence[Delivery]:
    return await subscription.receive(limit, max_bytes=1 << 24, wait=timedelta(seconds=wait))


def texts(deliveries: Sequence[Delivery]) -> list[str]:
    return [delivery.message.body.decode() for delivery in deliveries]
