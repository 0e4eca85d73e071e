"""What must not go wrong when handlers, clocks and neighbours misbehave, through the application object."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncSession

from reliamq import Backoff, Confirmation, DeadLetter, Message, Reliamq
from reliamq.consuming import DeadLetterDesk
from reliamq.idempotency import MemoryLeaseStore
from reliamq.spi import DeadLetterRecord
from tests.app.conftest import QUICK, Order, eventually, settings, working

pytestmark = pytest.mark.anyio


async def dead_letters_of(app: Reliamq) -> Sequence[DeadLetterRecord]:
    """Those that there are, once there are any."""
    async with app.dead_letters() as desk:
        while not (given_up := await desk.list()):
            await anyio.sleep(0.01)
    return given_up


async def test_a_handler_that_exits_ends_its_attempt_and_not_the_process(app: Reliamq) -> None:
    """C4"""
    orders = app.topic("orders", Order)
    done: list[int] = []

    @app.handler(orders, group="g", effects="repeatable", retry=QUICK)
    async def leave(order: Order) -> None:
        if order.number == 0:
            sys.exit(1)
        done.append(order.number)

    async with working(app):
        for number in range(4):
            await orders.publish(Order(number=number))
        await eventually(lambda: len(done) == 3)
        given_up = await dead_letters_of(app)

    assert [(one.attempts, "SystemExit" in one.reason) for one in given_up] == [(3, True)]


async def test_a_plain_handler_that_hands_back_a_coroutine_has_not_handled_anything(app: Reliamq) -> None:
    orders = app.topic("orders", Order)

    async def work(order: Order) -> None:
        raise AssertionError("never awaited")

    @app.handler(orders, group="g", effects="repeatable", retry=Backoff(attempts=1))
    def handle(order: Order) -> Any:
        return work(order)

    async with working(app):
        await orders.publish(Order(number=0))
        given_up = await dead_letters_of(app)

    assert "async def" in given_up[0].reason


async def test_a_reason_with_half_a_character_is_kept_as_a_dead_letter(app: Reliamq) -> None:
    """C5"""
    orders = app.topic("orders", Order)

    @app.handler(orders, group="g", effects="repeatable")
    async def fail(order: Order) -> None:
        name = os.fsdecode(b"caf\xe9.txt")
        raise DeadLetter(f"cannot read {name}\0")

    async with working(app):
        await orders.publish(Order(number=0))
        given_up = await dead_letters_of(app)

    assert "caf\\udce9.txt\\x00" in given_up[0].reason


async def test_one_id_on_two_topics_is_two_effects_also_for_handlers_of_one_name(app: Reliamq) -> None:
    """I1"""
    done: list[tuple[str, int]] = []
    for name in ("orders", "refunds"):
        topic = app.topic(name, Order)

        def of(name: str) -> Callable[[Order], None]:
            def handle(order: Order) -> None:
                done.append((name, order.number))

            return handle

        app.handler(topic, group="g", effects="lease")(of(name))

    async with working(app):
        for topic in app.topics.values():
            await topic.publish(Order(number=1), id="customer-42")
        await eventually(lambda: len(done) == 2)

    assert sorted(done) == [("orders", 1), ("refunds", 1)]


async def test_waiting_for_the_database_is_not_the_handlers_time(app: Reliamq) -> None:
    """C7"""
    orders = app.topic("orders", Order)
    done: list[int] = []

    @app.handler(
        orders,
        group="g",
        effects="transaction",
        concurrency=16,
        timeout=timedelta(seconds=0.5),
        retry=Backoff(attempts=1),
    )
    async def handle(order: Order, session: AsyncSession) -> None:
        await anyio.sleep(0.1)  # one after another, because SQLite has one writer
        done.append(order.number)

    async with app:
        await app.create_tables()
    async with working(app):
        for number in range(16):
            await orders.publish(Order(number=number))
        await eventually(lambda: len(done) == 16)

    assert sorted(done) == list(range(16))


async def test_a_stuck_key_with_a_backlog_leaves_room_for_others(broker: str, tmp_path: Path) -> None:
    """C3"""
    app = Reliamq(settings(broker, tmp_path, lease=5, prefetch=50))
    orders = app.topic("orders", Order, key=lambda order: order.account)
    done: list[str] = []
    release = anyio.Event()

    @app.handler(orders, group="g", effects="repeatable", concurrency=16)
    async def handle(order: Order) -> None:
        if order.account == "stuck":
            await release.wait()
        done.append(order.account)

    async with app:
        for number in range(100):
            await orders.publish(Order(number=number, account="stuck"))
    async with working(app):
        for number in range(30):
            await orders.publish(Order(number=number, account=f"free {number}"))
        await eventually(lambda: sum(one != "stuck" for one in done) >= 20)  # a few share the stuck one's lane
        release.set()
        await eventually(lambda: len(done) == 130)


async def test_a_message_that_dies_again_while_it_is_replayed_stays_a_dead_letter(app: Reliamq) -> None:
    """C5"""
    orders = app.topic("orders", Order)
    starts = 0

    @app.handler(orders, group="g", effects="repeatable")
    async def fail(order: Order) -> None:
        nonlocal starts
        starts += 1
        raise DeadLetter("still broken")

    async def publish_slowly(message: Message) -> Confirmation:
        confirmation = await app.publish(message)
        await eventually(lambda: starts == 2)
        while (await dead_letters.find())[0].died_at == records[0].died_at:
            await anyio.sleep(0.01)
        return confirmation

    async with working(app):
        await orders.publish(Order(number=0))
        async with app.backend.dead_letters() as dead_letters:
            while not (records := await dead_letters.find()):
                await anyio.sleep(0.01)
            await DeadLetterDesk(dead_letters, publish_slowly).replay(records)
            (left,) = await dead_letters.find()

    assert left.died_at > records[0].died_at


class ForgetfulStore(MemoryLeaseStore):
    """Cannot write its first mark; writes the others slowly."""

    failures = 1

    async def complete(self, *arguments: Any, **named: Any) -> bool:
        if self.failures:
            self.failures -= 1
            raise OperationalError("UPDATE", {}, Exception("connection reset"))
        await anyio.sleep(0.3)
        return await super().complete(*arguments, **named)


async def test_an_effect_that_is_done_is_not_produced_again_because_its_mark_was_slow(
    broker: str, tmp_path: Path
) -> None:
    """I3"""
    app = Reliamq(settings(broker, tmp_path), lease_store=ForgetfulStore())
    orders = app.topic("orders", Order)
    effects: list[int] = []

    @app.handler(orders, group="g", effects="lease", timeout=timedelta(seconds=0.2), retry=QUICK)
    async def handle(order: Order) -> None:
        effects.append(order.number)

    async with working(app):
        await orders.publish(Order(number=0))
        await eventually(lambda: effects == [0])
        await anyio.sleep(1.5)

    assert effects == [0]


async def test_a_worker_thread_that_overruns_is_not_counted_twice(app: Reliamq) -> None:
    """C7: the thread cannot be stopped; what it does late changes nothing for the attempts that follow."""
    orders = app.topic("orders", Order)
    late, starts = threading.Event(), 0

    @app.handler(orders, group="g", effects="repeatable", timeout=timedelta(seconds=0.2), retry=QUICK)
    def handle(order: Order) -> None:
        nonlocal starts
        starts += 1
        if starts == 1:
            late.wait(1)

    async with working(app):
        await orders.publish(Order(number=0))
        await eventually(lambda: starts == 2)
        late.set()
        await anyio.sleep(0.3)
        async with app.dead_letters() as desk:
            assert await desk.list() == []

    assert starts == 2
