"""Safe arrival on real clusters, the same on each: slow handlers, killed workers, members that come and go (C1 to C4,
C7, C8).
"""

from __future__ import annotations

import time
from collections import Counter
from datetime import timedelta
from pathlib import Path

import anyio
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from reliamq import Reliamq
from reliamq.database import open_engine
from tests.brokers.application import Broker, Order, Service, eventually, make_app, publish, wait_until, working
from tests.cli import RELIAMQ

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(180)]

# --- one worker ---------------------------------------------------------------------------------------------------


async def test_a_handler_that_takes_much_longer_than_its_lease_runs_once(
    broker: Broker, tmp_path: Path, topic: str
) -> None:
    """C7"""
    await handle_slowly(broker, tmp_path, topic, seconds=14)


async def handle_slowly(broker: Broker, folder: Path, topic: str, *, seconds: float, **options: object) -> None:
    app = make_app(broker, folder, lease=2, shares=1, **options)
    orders = app.topic(topic, Order, key=lambda order: order.account)
    starts = Counter[int]()
    done: list[int] = []

    @app.handler(orders, group="g", effects="repeatable", timeout=timedelta(seconds=2 * seconds))
    async def slow(order: Order) -> None:
        starts[order.number] += 1
        await anyio.sleep(seconds if order.number == 0 else 0)
        done.append(order.number)

    async with app, working(app):
        await publish(app, topic, range(4), accounts=4)
        await eventually(lambda: len(done) == 4, seconds=seconds + 60)

    assert starts == {0: 1, 1: 1, 2: 1, 3: 1}
    assert done[-1] == 0, "the others were not held up"


async def test_clean_stops_under_load_repeat_nothing_and_leave_nothing_behind(
    broker: Broker, tmp_path: Path, topic: str
) -> None:
    """C8"""
    await stop_cleanly(broker, tmp_path, topic, stops=6)


async def stop_cleanly(broker: Broker, folder: Path, topic: str, stops: int) -> None:
    app = make_app(broker, folder, shares=4)
    orders = app.topic(topic, Order, key=lambda order: order.account)
    runs = Counter[int]()
    per_stop = 150

    @app.handler(orders, group="g", effects="repeatable", concurrency=8)
    async def handle(order: Order) -> None:
        runs[order.number] += 1
        await anyio.sleep(0.001)

    async with app:
        for stop in range(stops):
            await publish(app, topic, range(stop * per_stop, (stop + 1) * per_stop), accounts=20)
            before = runs.total()
            async with working(app):
                await eventually(lambda before=before: runs.total() >= before + per_stop // 2)
        async with working(app):
            await eventually(lambda: len(runs) == stops * per_stop)

    assert set(runs.values()) == {1}


# --- several members ----------------------------------------------------------------------------------------------


async def test_members_that_come_and_go_lose_nothing_keep_keys_in_order_and_double_no_effect(
    broker: Broker, tmp_path: Path, topic: str
) -> None:
    """C1 C2 C3 I2"""
    await storm(broker, tmp_path, topic, seconds=16, messages=800)


async def storm(broker: Broker, folder: Path, topic: str, *, seconds: float, messages: int) -> None:
    apps = [make_app(broker, folder, shares=16) for _ in range(3)]
    for app in apps:
        register(app, topic)
    async with apps[0] as first, open_engine(first.settings.database or "") as engine:
        async with engine.begin() as connection:
            await connection.execute(
                text("CREATE TABLE effects (id INTEGER PRIMARY KEY, number INTEGER, account TEXT)")
            )
        ends = time.monotonic() + seconds
        async with working(first), anyio.create_task_group() as tasks:
            tasks.start_soon(publish_for, first, topic, messages, seconds)
            for app in apps[1:]:
                tasks.start_soon(come_and_go, app, ends)

            async def rows() -> list[tuple[int, str]]:
                async with engine.connect() as connection:
                    found = await connection.execute(text("SELECT number, account FROM effects ORDER BY id"))
                    return [(row[0], row[1]) for row in found]

            with anyio.fail_after(seconds + 60):
                while len(await rows()) < messages or time.monotonic() < ends:
                    await anyio.sleep(0.2)
        effects = await rows()
    assert sorted(number for number, _ in effects) == list(range(messages))
    for account in {account for _, account in effects}:
        numbers = [number for number, other in effects if other == account]
        assert numbers == sorted(numbers), account


def register(app: Reliamq, topic: str) -> None:
    orders = app.topic(topic, Order, key=lambda order: order.account)

    @app.handler(orders, group="g", effects="transaction", concurrency=4)
    async def apply(order: Order, session: AsyncSession) -> None:
        await session.execute(
            text("INSERT INTO effects (number, account) VALUES (:number, :account)"), order.model_dump()
        )


async def publish_for(app: Reliamq, topic: str, messages: int, seconds: float) -> None:
    for start in range(0, messages, 40):
        await publish(app, topic, range(start, start + 40), accounts=40)
        await anyio.sleep(seconds * 40 / messages * 0.8)


async def come_and_go(app: Reliamq, ends: float) -> None:
    """Join or leave every two seconds."""
    async with app:
        while time.monotonic() < ends:
            async with working(app):
                await anyio.sleep(2)
            await anyio.sleep(2)


async def test_a_second_member_takes_its_share_and_a_lone_one_gets_it_back(
    broker: Broker, tmp_path: Path, topic: str
) -> None:
    """C2"""
    apps = [make_app(broker, tmp_path, shares=8) for _ in range(2)]
    one, two = (count_runs(app, topic) for app in apps)
    async with apps[0], apps[1], working(apps[0]):
        await publish(apps[0], topic, range(100), accounts=50)
        await eventually(lambda: len(one) == 100)
        numbers = 100
        async with working(apps[1]):
            while not two:
                await publish(apps[0], topic, range(numbers, numbers + 50), accounts=50)
                numbers += 50
                await anyio.sleep(0.3)
        await publish(apps[0], topic, range(numbers, numbers + 50), accounts=50)
        await eventually(lambda: len(one + two) == numbers + 50)

    assert set((one + two).values()) == {1}


def count_runs(app: Reliamq, topic: str) -> Counter[int]:
    runs = Counter[int]()
    orders = app.topic(topic, Order, key=lambda order: order.account)

    @app.handler(orders, group="g", effects="repeatable")
    async def handle(order: Order) -> None:
        runs[order.number] += 1

    return runs


# --- worker processes ---------------------------------------------------------------------------------------------


def test_the_slow_head_of_a_killed_worker_comes_again_and_its_fast_tail_does_not(
    broker: Broker, tmp_path: Path, topic: str
) -> None:
    """C1 C2: which of the later messages are finished is written down beside the offset."""
    service = Service(broker, tmp_path, topic)
    head = {"number": 0, "account": "slow", "seconds": 1_000}
    service.publish(head, *[{"number": number, "account": f"account {number}"} for number in range(1, 400)])
    with service.worker() as worker:
        wait_until(lambda: len(service.lines("done")) == 399)
        time.sleep(1)  # they are settled
        worker.kill()

    with service.worker(SERVICE_HURRY="yes"):
        wait_until(lambda: 0 in service.lines("done"))
        time.sleep(1)

    assert Counter(service.lines("done")) == Counter(range(400))


def test_a_message_that_kills_its_process_ends_as_a_dead_letter_and_its_neighbours_are_handled(
    broker: Broker, tmp_path: Path, topic: str
) -> None:
    """C4"""
    service = Service(broker, tmp_path, topic)
    jobs: list[dict[str, object]] = [{"number": number, "account": f"account {number}"} for number in range(50)]
    jobs.insert(20, {"number": 1_000, "account": "killer", "deadly": True})
    service.publish(*jobs)
    with service.worker(command=(*RELIAMQ[1:], "run")):
        wait_until(lambda: service.lines("started").count(1_000) >= 3, seconds=120)  # its attempts
        wait_until(lambda: set(service.lines("done")) == set(range(50)))
        wait_until(lambda: bool(service.dead_letters()))

    (dead,) = service.dead_letters()
    assert "died" in dead["reason"]
    assert 1_000 not in service.lines("done")
