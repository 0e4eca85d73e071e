"""What becomes of a delivery, through the application object."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import anyio
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from reliamq import Backoff, DeadLetter, Delivery, FencingToken, Message, Reliamq, RetryAfter
from reliamq.topics import new_message_id
from tests.app.conftest import QUICK, Cancelled, Order, eventually, settings, working

pytestmark = pytest.mark.anyio


async def test_each_group_gets_every_message_also_those_published_before_a_worker_ran(app: Reliamq) -> None:
    """C9"""
    orders = app.topic("orders", Order, key=lambda order: order.account)
    seen: dict[str, list[int]] = {"one": [], "two": []}

    @app.handler(orders, group="one", effects="repeatable")
    async def first(order: Order) -> None:
        seen["one"].append(order.number)

    @app.handler(orders, group="two", effects="repeatable")
    def second(order: Order) -> None:
        seen["two"].append(order.number)

    async with app:
        for number in range(5):
            await orders.publish(Order(number=number))
    async with working(app):
        await orders.publish(Order(number=5))
        await eventually(lambda: len(seen["one"]) + len(seen["two"]) == 12)

    assert seen == {"one": [0, 1, 2, 3, 4, 5], "two": [0, 1, 2, 3, 4, 5]}


async def test_messages_of_one_key_are_handled_in_order_also_when_one_is_retried(app: Reliamq) -> None:
    """C3 C6"""
    orders = app.topic("orders", Order, key=lambda order: order.account)
    done: list[tuple[str, int]] = []
    failures = {("ada", 3): 2, ("bob", 0): 1}

    @app.handler(orders, group="g", effects="repeatable", concurrency=8, retry=QUICK)
    async def handle(order: Order) -> None:
        one = (order.account, order.number)
        if failures.get(one, 0):
            failures[one] -= 1
            raise ValueError("not yet")
        done.append(one)

    async with working(app):
        for number in range(8):
            for account in ("ada", "bob", "eve"):
                await orders.publish(Order(number=number, account=account))
        await eventually(lambda: len(done) >= 24)

    for account in ("ada", "bob", "eve"):
        assert [number for name, number in done if name == account] == list(range(8))


async def test_a_slow_message_holds_up_no_other_key(app: Reliamq) -> None:
    """C3"""
    orders = app.topic("orders", Order, key=lambda order: order.account)
    done, finish = list[str](), anyio.Event()

    @app.handler(orders, group="g", effects="repeatable", concurrency=2)
    async def handle(order: Order) -> None:
        if order.account == "slow":
            await finish.wait()
        done.append(order.account)

    async with working(app):
        for number in range(3):
            await orders.publish(Order(number=number, account="slow"))
        for number in range(40):
            await orders.publish(Order(number=number, account=f"account {number}"))
        await eventually(lambda: len(done) == 40)
        finish.set()
        await eventually(lambda: len(done) == 43)

    assert done[40:] == ["slow"] * 3


async def test_a_key_that_waits_for_its_retry_holds_up_no_other_key(app: Reliamq) -> None:
    """C3"""
    orders = app.topic("orders", Order, key=lambda order: order.account)
    done: list[str] = []
    slow = Backoff(attempts=2, first=timedelta(seconds=20), ceiling=timedelta(seconds=20))

    @app.handler(orders, group="g", effects="repeatable", concurrency=1, retry=slow)
    async def handle(order: Order) -> None:
        if order.account == "stuck":
            raise ValueError("waits")
        done.append(order.account)

    async with working(app):
        for number in range(300):
            await orders.publish(Order(number=number, account="stuck"))
        await orders.publish(Order(number=0, account="free"))
        await eventually(lambda: done == ["free"])


async def test_a_message_that_gives_way_comes_back_behind_its_keys_others(app: Reliamq) -> None:
    """C6"""
    orders = app.topic("orders", Order, key=lambda order: order.account)
    done: list[int] = []
    failed = False

    @app.handler(orders, group="g", effects="repeatable", retry=QUICK)
    async def handle(order: Order) -> None:
        nonlocal failed
        if order.number == 0 and not failed:
            failed = True
            raise RetryAfter(timedelta(milliseconds=100), keep_order=False)
        done.append(order.number)

    async with app:
        for number in range(3):
            await orders.publish(Order(number=number))
    async with working(app):
        await eventually(lambda: len(done) == 3)

    assert done == [1, 2, 0]


async def test_a_message_becomes_a_dead_letter_after_its_attempts_with_the_reason(app: Reliamq) -> None:
    """C5"""
    orders = app.topic("orders", Order, key=lambda order: order.account)
    attempts: list[int] = []

    @app.handler(orders, group="g", effects="repeatable", retry=QUICK)
    async def handle(order: Order, delivery: Delivery) -> None:
        attempts.append(delivery.attempt)
        raise ValueError(f"no stock for {order.number}")

    async with working(app), app.dead_letters() as desk:
        confirmation = await orders.publish(Order(number=7), headers={"trace": "äöü"})
        await _until_dead(desk.list, 1)
        (record,) = await desk.show(confirmation.message_id)

    assert attempts == [1, 2, 3]
    assert record.attempts == 3
    assert record.reason == "ValueError: no stock for 7"
    assert "ValueError: no stock for 7" in record.traceback
    assert record.message.body == b'{"number":7,"account":"ada"}'
    assert dict(record.message.headers) == {"trace": "äöü"}
    assert (record.message.topic, record.group) == ("orders", "g")


async def test_a_handler_can_give_a_message_up_at_once(app: Reliamq) -> None:
    """C5"""
    orders = app.topic("orders", Order)

    @app.handler(orders, group="g", effects="repeatable", retry=QUICK)
    async def handle(order: Order) -> None:
        raise DeadLetter("no such account")

    async with working(app), app.dead_letters() as desk:
        await orders.publish(Order(number=1))
        await _until_dead(desk.list, 1)
        (record,) = await desk.list()

    assert record.attempts == 1
    assert record.reason == "DeadLetter: no such account"


async def test_bytes_that_do_not_validate_are_dead_lettered_at_once_and_untouched(app: Reliamq) -> None:
    """C11"""
    orders = app.topic("orders", Order)
    handled: list[int] = []

    @app.handler(orders, group="g", effects="repeatable", retry=QUICK)
    async def handle(order: Order) -> None:
        handled.append(order.number)

    async with working(app), app.dead_letters() as desk:
        await app.publish(_raw(b'{"number": "many"}'))
        await app.publish(_raw(b"\xff\x00"))
        await orders.publish(Order(number=1))
        await _until_dead(desk.list, 2)
        bodies = {record.message.body for record in await desk.list()}
        await eventually(lambda: handled == [1])

    assert bodies == {b'{"number": "many"}', b"\xff\x00"}


async def test_a_replayed_dead_letter_reaches_only_the_group_that_gave_up(app: Reliamq) -> None:
    """C5"""
    orders = app.topic("orders", Order)
    seen: list[str] = []
    broken = True

    @app.handler(orders, group="fails", effects="repeatable", retry=Backoff(attempts=1))
    async def fails(order: Order) -> None:
        if broken:
            raise ValueError("broken")
        seen.append("fails")

    @app.handler(orders, group="works", effects="repeatable")
    async def works(order: Order) -> None:
        seen.append("works")

    async with working(app), app.dead_letters() as desk:
        await orders.publish(Order(number=1))
        await _until_dead(desk.list, 1)
        broken = False
        assert await desk.replay(await desk.list()) == 1
        await eventually(lambda: "fails" in seen)
        assert await desk.list() == []

    assert sorted(seen) == ["fails", "works"]


async def test_a_handler_that_takes_too_long_is_stopped_and_tried_again(app: Reliamq) -> None:
    """C7"""
    orders = app.topic("orders", Order)
    starts: list[float] = []

    @app.handler(orders, group="g", effects="repeatable", retry=QUICK, timeout=timedelta(milliseconds=200))
    async def handle(order: Order) -> None:
        starts.append(time.monotonic())
        if len(starts) == 1:
            await anyio.sleep(30)

    async with working(app):
        await orders.publish(Order(number=1))
        await eventually(lambda: len(starts) == 2)


async def test_a_handler_slower_than_its_lease_keeps_its_message(app: Reliamq) -> None:
    """C7"""
    orders = app.topic("orders", Order)
    starts: list[int] = []

    @app.handler(orders, group="g", effects="repeatable")
    async def handle(order: Order) -> None:
        starts.append(order.number)
        await anyio.sleep(2.5)  # the lease is 1 s

    async with working(app):
        await orders.publish(Order(number=1))
        await eventually(lambda: starts == [1])
        await anyio.sleep(2.7)

    assert starts == [1]


async def test_several_handlers_share_a_topic_by_type(app: Reliamq) -> None:
    events = app.topic("events", Order, Cancelled)
    seen: list[str] = []

    @app.handler(events, group="g", effects="repeatable")
    async def on_order(order: Order) -> None:
        seen.append(f"order {order.number}")

    @app.handler(events, group="g", effects="repeatable")
    async def on_cancelled(cancelled: Cancelled) -> None:
        seen.append(f"cancelled {cancelled.number}")

    async with working(app):
        await events.publish(Order(number=1))
        await events.publish(Cancelled(number=1))
        await eventually(lambda: len(seen) == 2)

    assert sorted(seen) == ["cancelled 1", "order 1"]


async def test_a_type_without_a_handler_is_never_acknowledged_away(app: Reliamq) -> None:
    """C11"""
    events = app.topic("events", Order, Cancelled)

    @app.handler(events, group="g", effects="repeatable")
    async def on_order(order: Order) -> None: ...

    async with working(app):
        await events.publish(Cancelled(number=1))
        await anyio.sleep(0.3)
    async with app.backend.subscription("events", "g", lease=timedelta(seconds=5)) as subscription:
        (waiting,) = await subscription.receive(10, max_bytes=10_000, wait=timedelta(seconds=5))

    assert waiting.message.type == "Cancelled"
    assert waiting.failures == 1


async def test_a_middleware_that_swallows_a_failure_does_not_acknowledge_it(app: Reliamq) -> None:
    """C1"""
    orders = app.topic("orders", Order)
    attempts: list[int] = []

    @app.middleware
    async def swallow(delivery: Delivery, call_next: Callable[[], Awaitable[None]]) -> None:
        try:
            await call_next()
        except ValueError:
            pass

    @app.handler(orders, group="g", effects="repeatable", retry=QUICK)
    async def handle(order: Order, delivery: Delivery) -> None:
        attempts.append(delivery.attempt)
        if delivery.attempt < 3:
            raise ValueError("try again")

    async with working(app):
        await orders.publish(Order(number=1))
        await eventually(lambda: attempts == [1, 2, 3])


async def test_a_middleware_that_skips_the_handler_does_not_acknowledge(app: Reliamq) -> None:
    """C1"""
    orders = app.topic("orders", Order)

    @app.middleware
    async def skip(delivery: Delivery, call_next: Callable[[], Awaitable[None]]) -> None: ...

    @app.handler(orders, group="g", effects="repeatable", retry=Backoff(attempts=1))
    async def handle(order: Order) -> None: ...

    async with working(app), app.dead_letters() as desk:
        await orders.publish(Order(number=1))
        await _until_dead(desk.list, 1)
        (record,) = await desk.list()

    assert "without awaiting call_next" in record.reason


async def test_an_effect_and_its_processed_id_are_one_commit_and_a_second_delivery_changes_nothing(
    app: Reliamq, tmp_path: Path
) -> None:
    """I1 I2"""
    orders = app.topic("orders", Order)
    runs: list[int] = []

    @app.handler(orders, group="async", effects="transaction", retry=QUICK)
    async def handle(order: Order, session: AsyncSession, delivery: Delivery) -> None:
        await session.execute(text("INSERT INTO effects VALUES (:n)"), {"n": order.number})
        runs.append(order.number)
        if delivery.attempt == 1:
            raise ValueError("after the effect, before the commit")

    @app.handler(orders, group="plain", effects="transaction", retry=QUICK)
    def handle_plainly(order: Order, session: Session) -> None:
        session.execute(text("INSERT INTO effects VALUES (:n)"), {"n": 100 + order.number})

    await _execute(app, "CREATE TABLE effects (n INTEGER)")
    async with working(app):
        confirmation = await orders.publish(Order(number=1))
        await eventually(lambda: len(runs) == 2)
        message = _raw(b'{"number":1}', message_id=confirmation.message_id)
        for group in ("async", "plain"):
            await app.publish(_for(message, group))
        await anyio.sleep(0.5)

    assert await _execute(app, "SELECT n FROM effects ORDER BY n") == [(1,), (101,)]


async def test_a_lease_handler_gets_a_fencing_token(app: Reliamq) -> None:
    """I3"""
    orders = app.topic("orders", Order)
    tokens: list[int] = []

    @app.handler(orders, group="g", effects="lease", retry=QUICK)
    async def handle(order: Order, token: FencingToken) -> None:
        tokens.append(token.value)
        if len(tokens) == 1:
            raise ValueError("once more")

    async with working(app):
        await orders.publish(Order(number=1))
        await eventually(lambda: len(tokens) == 2)

    assert tokens == [1, 2]


async def test_fifty_clean_stops_under_load_repeat_nothing_and_lose_nothing(broker: str, tmp_path: Path) -> None:
    """C8"""
    handled: list[int] = []
    redelivered: list[int] = []

    def make() -> Reliamq:
        app = Reliamq(settings(broker, tmp_path, lease=30, prefetch=50))
        orders = app.topic("orders", Order, key=lambda order: order.account)

        @app.handler(orders, group="g", effects="repeatable", concurrency=8)
        async def handle(order: Order, delivery: Delivery) -> None:
            await anyio.sleep(0.001)
            handled.append(order.number)
            if delivery.redelivered:
                redelivered.append(order.number)

        return app

    total = 1500
    app = make()
    async with app, anyio.create_task_group() as tasks:
        for number in range(total):
            tasks.start_soon(app.topics["orders"].publish, Order(number=number, account=str(number % 17)))
    for _ in range(50):
        before = len(handled)
        async with working(make()):
            await eventually(lambda before=before: len(handled) >= min(before + 10, total))  # type: ignore[misc]
    async with working(make()):
        await eventually(lambda: len(handled) >= total)

    assert sorted(handled) == list(range(total))
    assert redelivered == []


def _raw(body: bytes, *, message_id: str | None = None) -> Message:
    return Message("orders", body, message_id or new_message_id(), "Order", "test", datetime.now(UTC))


def _for(message: Message, group: str) -> Message:
    return Message(
        message.topic, message.body, message.id, message.type, message.source, message.time, only_group=group
    )


async def _until_dead(find: Callable[[], Awaitable[object]], count: int) -> None:
    with anyio.fail_after(15):
        while len(await find()) < count:  # type: ignore[arg-type]
            await anyio.sleep(0.01)


async def _execute(app: Reliamq, statement: str) -> list[tuple[int, ...]]:
    from reliamq.database import open_engine

    async with open_engine(app.settings.database or "") as engine, engine.begin() as connection:
        result = await connection.execute(text(statement))
        return [tuple(row) for row in result] if result.returns_rows else []
