"""One order through the whole pipeline, in processes that kill themselves at a named step.

The steps are planted around the real parts, here in the tests and nowhere in the package.  The processes are
forked (``tests.forked``).
"""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
from pydantic import BaseModel
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from reliamq import DeadLetter, Reliamq, outbox
from reliamq.backends import open_backend
from reliamq.database import open_engine, open_sync_engine
from reliamq.settings import RelaySettings, Settings, WorkerSettings
from reliamq.spi import (
    CLAIM_BYTES,
    Backend,
    DeadLetterRecord,
    DeadLetters,
    Delivery,
    Message,
    OutboxRow,
    OutboxStore,
    Outcome,
    Publisher,
    Rejection,
    Settlement,
    Subscription,
)
from reliamq.testing.faults import PassingDeadLetters, PassingPublisher, PassingSubscription

LEASE = timedelta(seconds=0.5)
PATIENCE_SECONDS = 45


@dataclass(frozen=True, slots=True)
class Surroundings:
    """watch_seconds: how long to see that nothing comes again."""

    folder: Path
    broker: str
    topic: str = "orders"
    watch_seconds: float = 1.25


class Order(BaseModel):
    number: int
    account: str


class Bomb:
    """Kills its process at one step."""

    def __init__(self, step: str) -> None:
        self._step = step

    def at(self, step: str) -> None:
        if step == self._step:
            os.kill(os.getpid(), signal.SIGKILL)


class BombedPublisher(PassingPublisher):
    def __init__(self, publisher: Publisher, bomb: Bomb) -> None:
        super().__init__(publisher)
        self._bomb = bomb

    async def send(self, batch: Sequence[Message], *, deadline: float, chained: bool = False) -> Sequence[Outcome]:
        self._bomb.at("before send")
        outcomes = await super().send(batch, deadline=deadline, chained=chained)
        self._bomb.at("after confirm")
        return outcomes


class BombedSubscription(PassingSubscription):
    def __init__(self, subscription: Subscription, bomb: Bomb) -> None:
        super().__init__(subscription)
        self._bomb = bomb

    async def receive(self, limit: int, *, max_bytes: int, wait: timedelta) -> Sequence[Delivery]:
        deliveries = await super().receive(limit, max_bytes=max_bytes, wait=wait)
        if deliveries:
            self._bomb.at("after receive")
        return deliveries

    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[Settlement]:
        self._bomb.at("before ack")
        late = await super().settle(settlements)
        if settlements:
            self._bomb.at("after ack")
        return late


class BombedDeadLetters(PassingDeadLetters):
    def __init__(self, dead_letters: DeadLetters, bomb: Bomb) -> None:
        super().__init__(dead_letters)
        self._bomb = bomb

    async def add(self, records: Sequence[DeadLetterRecord], *, deadline: float) -> Sequence[Outcome]:
        self._bomb.at("before burial")
        outcomes = await super().add(records, deadline=deadline)
        self._bomb.at("after burial")
        return outcomes


class BombedBackend:
    def __init__(self, backend: Backend, bomb: Bomb) -> None:
        self._inner, self._bomb = backend, bomb
        self.name, self.url, self.capabilities = backend.name, backend.url, backend.capabilities
        self.storage = backend.storage

    @asynccontextmanager
    async def dead_letters(self) -> AsyncIterator[DeadLetters]:
        async with self._inner.dead_letters() as dead_letters:
            yield BombedDeadLetters(dead_letters, self._bomb)

    @asynccontextmanager
    async def publisher(self) -> AsyncIterator[Publisher]:
        async with self._inner.publisher() as publisher:
            yield BombedPublisher(publisher, self._bomb)

    @asynccontextmanager
    async def subscription(self, topic: str, group: str, *, lease: timedelta) -> AsyncIterator[Subscription]:
        async with self._inner.subscription(topic, group, lease=lease) as subscription:
            yield BombedSubscription(subscription, self._bomb)


class BombedOutbox:
    def __init__(self, store: OutboxStore, bomb: Bomb) -> None:
        self._store, self._bomb = store, bomb

    async def claim(
        self, relay: str, *, limit: int, lease: timedelta, max_bytes: int = CLAIM_BYTES, resting: Sequence[str] = ()
    ) -> Sequence[OutboxRow]:
        self._bomb.at("before claim")
        rows = await self._store.claim(relay, limit=limit, lease=lease, max_bytes=max_bytes, resting=resting)
        if rows:
            self._bomb.at("after claim")
        return rows

    async def settle(
        self, relay: str, *, confirmed: Sequence[OutboxRow], rejected: Sequence[tuple[OutboxRow, Rejection]]
    ) -> None:
        self._bomb.at("before delete")
        await self._store.settle(relay, confirmed=confirmed, rejected=rejected)
        self._bomb.at("after delete")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def make(around: Surroundings, bomb: Bomb) -> tuple[Reliamq, Any]:
    settings = Settings(
        broker=around.broker,
        database=f"sqlite:///{around.folder}/database.db",
        worker=WorkerSettings(lease=LEASE),
        relay=RelaySettings(lease=LEASE, poll=timedelta(milliseconds=10)),
    )
    app = Reliamq(settings, backend=BombedBackend(open_backend(settings.broker), bomb))
    return app, app.topic(around.topic, Order, key=lambda order: order.account, groups=["g"])


def place(around: Surroundings, step: str) -> None:
    """Write the order and its message in one transaction, unless it is there."""
    bomb = Bomb(step)
    app, orders = make(around, bomb)

    async def prepare() -> None:
        async with app, open_engine(app.settings.database or "") as engine, engine.begin() as connection:
            await connection.execute(text("CREATE TABLE IF NOT EXISTS orders (number INTEGER PRIMARY KEY)"))
            await connection.execute(text("CREATE TABLE IF NOT EXISTS effects (number INTEGER)"))

    anyio.run(prepare)
    with open_sync_engine(app.settings.database or "") as engine, Session(engine) as session:
        if session.execute(text("SELECT 1 FROM orders")).first():
            return
        bomb.at("before insert")
        session.execute(text("INSERT INTO orders VALUES (1)"))
        outbox.add(session, orders, Order(number=1, account="ada"))
        session.flush()
        bomb.at("after insert")
        session.commit()
        bomb.at("after commit")


def relay(around: Surroundings, step: str) -> None:
    """Relay until the outbox is empty."""
    app, _ = make(around, Bomb(step))

    async def run() -> None:
        stop = anyio.Event()
        async with app.outbox_store() as store, anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: app.run_relay(stop, store=BombedOutbox(store, Bomb(step))))
            while (await store.status()).waiting:
                await anyio.sleep(0.02)
            await anyio.sleep(0.1)  # the relay comes to the end of what it does after the delete
            stop.set()

    anyio.run(run)


def work(around: Surroundings, step: str) -> None:
    """Consume until the effect is there, and then watch whether anything comes again."""
    bomb = Bomb(step)
    app, orders = make(around, bomb)

    @app.handler(orders, group="g", effects="transaction")
    async def apply(order: Order, session: AsyncSession) -> None:
        bomb.at("before start")
        event.listen(session.sync_session, "after_commit", lambda _: bomb.at("after effect commit"))
        await session.execute(text("INSERT INTO effects VALUES (:number)"), {"number": order.number})
        bomb.at("before effect commit")

    async def is_done() -> bool:
        async with open_engine(app.settings.database or "") as engine, engine.connect() as connection:
            return (await connection.execute(text("SELECT 1 FROM effects"))).first() is not None

    anyio.run(consume, app, is_done, around.watch_seconds)


def bury(around: Surroundings, step: str) -> None:
    """Consume with a handler that gives up, until the dead letter is there, and then watch."""
    app, orders = make(around, Bomb(step))

    @app.handler(orders, group="g", effects="repeatable")
    async def give_up(order: Order) -> None:
        raise DeadLetter("nobody wants it")

    async def is_done() -> bool:
        async with app.dead_letters() as desk:
            return bool(await desk.list(topic=around.topic))

    anyio.run(consume, app, is_done, around.watch_seconds)


async def consume(app: Reliamq, is_done: Callable[[], Awaitable[bool]], watch_seconds: float) -> None:
    stop = anyio.Event()
    async with app, anyio.create_task_group() as tasks:
        tasks.start_soon(app.run_worker, stop)
        with anyio.fail_after(PATIENCE_SECONDS):
            while not await is_done():
                await anyio.sleep(0.05)
        await anyio.sleep(watch_seconds)
        stop.set()


ROLES = {"place": place, "relay": relay, "work": work, "bury": bury}


def run_role(role: str, around: Surroundings, step: str, log: Path) -> None:
    """The entry point of a process.  log: the file for what it has to say."""
    with log.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    ROLES[role](around, step)
