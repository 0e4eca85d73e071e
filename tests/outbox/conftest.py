"""Databases with outbox tables, a topic, a publisher that records, and short words."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import anyio
import pytest
from pydantic import BaseModel
from sqlalchemy import Engine, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from reliamq import outbox
from reliamq.database import open_engine, open_sync_engine
from reliamq.outbox import Relay, SqlOutboxStore
from reliamq.spi import Confirmation, Message, Outcome, Publisher
from reliamq.spi.chains import Chains, Place, fail, held_back, is_behind
from reliamq.topics import Topic
from tests.databases import DRIVERS, KINDS, database_url

PATIENCE_SECONDS = 30.0


class Order(BaseModel):
    account: str
    number: int


orders = Topic("orders", Order, key=lambda order: order.account)
unordered = Topic("unordered", Order)


class Base(DeclarativeBase):
    pass


class Booking(Base):
    """The business change that a message belongs to."""

    __tablename__ = "booking"
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


every_driver = pytest.mark.parametrize("database", DRIVERS, indirect=True)


@pytest.fixture(params=KINDS)
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database, once for each kind; with ``every_driver`` once for each driver."""
    return database_url(request, request.param, tmp_path)


@pytest.fixture
async def engine(database: str) -> AsyncIterator[AsyncEngine]:
    """An async engine on a database with the outbox's tables and the business table."""
    async with open_engine(database) as engine:
        await outbox.create_tables_async(engine)
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        yield engine


@pytest.fixture
def sync_engine(database: str) -> Iterator[Engine]:
    """The same for plain functions."""
    with open_sync_engine(database) as engine:
        outbox.create_tables(engine)
        Base.metadata.create_all(engine)
        yield engine


@pytest.fixture
def store(engine: AsyncEngine) -> SqlOutboxStore:
    return SqlOutboxStore(engine, max_attempts=2)


@pytest.fixture
async def keeping(engine: AsyncEngine) -> SqlOutboxStore:
    """The same outbox, whose sent rows are kept for a day."""
    await outbox.create_tables_async(engine, keep=True)
    return SqlOutboxStore(engine, max_attempts=2, keep=timedelta(days=1))


async def add(engine: AsyncEngine, *chosen: tuple[str, int]) -> list[str]:
    """Add messages, each (account, number), in one transaction."""
    async with AsyncSession(engine) as session, session.begin():
        return [outbox.add(session, orders, Order(account=account, number=number)) for account, number in chosen]


async def analyse(engine: AsyncEngine, table: str) -> None:
    """Have the planner know what is in a table."""
    async with engine.connect() as connection:
        await connection.execute(text(f"ANALYZE TABLE {table}" if engine.dialect.name == "mysql" else "ANALYZE"))
        await connection.commit()


class Recorder:
    """A broker's end that keeps what it was sent, in order; ``judge`` says what becomes of a message."""

    def __init__(self, judge: Callable[[Message], Outcome | None] = lambda _: None) -> None:
        self.judge = judge
        self.stored: list[Message] = []
        self.calls = 0

    async def send(self, batch: Sequence[Message], *, deadline: float, chained: bool = False) -> Sequence[Outcome]:
        assert deadline > time.monotonic()
        self.calls += 1
        await anyio.lowlevel.checkpoint()
        chains = Chains()
        return [self._outcome(message, chains.join(message) if chained else None) for message in batch]

    def _outcome(self, message: Message, place: Place | None) -> Outcome:
        if is_behind(place):
            return held_back(message.id)
        outcome = self.judge(message) or Confirmation(message.id)
        if isinstance(outcome, Confirmation):
            self.stored.append(message)
        else:
            fail(place)
        return outcome

    def numbers(self, account: str) -> list[int]:
        """What was stored of one account, in order, repetitions included."""
        found = [Order.model_validate_json(one.body) for one in self.stored]
        return [order.number for order in found if order.account == account]


def firsts(numbers: Sequence[int]) -> list[int]:
    """The first appearance of each, in order."""
    return list(dict.fromkeys(numbers))


async def until(condition: Callable[[], Awaitable[bool]], *, seconds: float = PATIENCE_SECONDS) -> None:
    """Wait for a condition; TimeoutError when it does not come."""
    with anyio.fail_after(seconds):
        while not await condition():
            await anyio.sleep(0.02)


@asynccontextmanager
async def relaying(
    store: SqlOutboxStore, *publishers: Publisher, lease: float = 10.0, batch: int = 50
) -> AsyncIterator[None]:
    """Relays run inside the block, one for each publisher, and finish their batches at its end."""
    stop = anyio.Event()
    async with anyio.create_task_group() as tasks:
        for publisher in publishers:
            relay = Relay(
                store, publisher, batch=batch, poll=timedelta(milliseconds=10), lease=timedelta(seconds=lease)
            )
            tasks.start_soon(relay.run, stop)
        try:
            yield
        finally:
            stop.set()


async def drain(store: SqlOutboxStore, *publishers: Publisher, lease: float = 10.0, batch: int = 50) -> None:
    """Relay until no row waits."""

    async def empty() -> bool:
        return (await store.status()).waiting == 0

    async with relaying(store, *publishers, lease=lease, batch=batch):
        await until(empty)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Replays on MariaDB are long forms: of its differences the other tests see as much."""
    for item in items:
        if item.path == Path(__file__).with_name("test_replay.py") and "mariadb" in item.name:
            item.add_marker(pytest.mark.slow)
