"""The network fails between a client and its cluster, or a node freezes or sounds an alarm: nothing is lost, nobody
hangs (P2 P5 C1).
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from datetime import timedelta
from pathlib import Path

import anyio
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from reliamq import Backoff
from reliamq.database import open_engine
from reliamq.publishing import ConfirmingPublisher
from reliamq.spi import BrokerUnavailable, InDoubt
from reliamq_rabbitmq.publisher import open_publisher
from reliamq_rabbitmq.settings import RabbitmqSettings, read_settings
from tests.brokers.application import Order, eventually, make_app, publish, working
from tests.brokers.conftest import on_rabbitmq
from tests.rabbitmq.conftest import LANES, bodies, drain, message
from tests.rabbitmq.test_publishing import outcome_of, outcomes_of
from tests.servers.proxy import Proxy
from tests.servers.rabbitmq import RabbitmqCluster

pytestmark = [pytest.mark.anyio, pytest.mark.xdist_group("rabbitmq"), pytest.mark.timeout(180)]


@pytest.fixture
def proxies(rabbitmq: RabbitmqCluster) -> Iterator[Sequence[Proxy]]:
    """One before each node."""
    with ExitStack() as stack:
        yield [stack.enter_context(Proxy(ports.proxied, ports.plain)) for ports in rabbitmq.ports]


@pytest.fixture
def proxied(rabbitmq: RabbitmqCluster) -> RabbitmqSettings:
    wanted = {"request_timeout_seconds": 3, "lanes": LANES, "heartbeat_seconds": 1}
    return read_settings(rabbitmq.proxied_url, wanted)


@asynccontextmanager
async def publishing(settings: RabbitmqSettings) -> AsyncIterator[ConfirmingPublisher]:
    async with open_publisher(settings) as sender, anyio.create_task_group() as tasks:
        publisher = ConfirmingPublisher(sender)
        tasks.start_soon(publisher.run)
        yield publisher
        tasks.cancel_scope.cancel()


def break_connections(proxies: Sequence[Proxy], how: str) -> None:
    for proxy in proxies:
        match how:
            case "closed":
                proxy.cut()
            case "half a frame":
                proxy.cut_after(5)
            case "blackholed":
                proxy.blackhole()
            case "answers lost":
                proxy.drop("down")


@pytest.mark.parametrize("how", ["closed", "half a frame", "blackholed", "answers lost"])
async def test_five_hundred_callers_have_outcomes_in_time_when_the_connection_breaks_and_repeating_stores_all(
    settings: RabbitmqSettings, proxied: RabbitmqSettings, proxies: Sequence[Proxy], topic: str, how: str
) -> None:
    """P2 P4"""
    messages = [message(topic, f"{number}", f"key {number % 20}") for number in range(500)]
    async with publishing(proxied) as publisher:
        await outcome_of(publisher, message(topic, "first"))
        calls = asyncio.create_task(outcomes_of(publisher, messages, timedelta(seconds=3)))
        await asyncio.sleep(0.01)
        break_connections(proxies, how)
        began = time.monotonic()
        outcomes = await calls
        assert time.monotonic() - began < 4.5
        assert set(outcomes) <= {"confirmed", "Unconfirmed", "Rejected"}

        for proxy in proxies:
            proxy.heal()
        open_ones = [one for one, outcome in zip(messages, outcomes, strict=True) if outcome != "confirmed"]
        assert set(await outcomes_of(publisher, open_ones, timedelta(seconds=30))) <= {"confirmed"}

    stored = await drain(settings, topic, 501)
    assert set(bodies(stored)) == {b"first", *(f"{number}".encode() for number in range(500))}
    assert len({one.id for one in stored}) == 501


async def test_keys_stay_in_order_while_connections_are_cut_again_and_again(
    settings: RabbitmqSettings, proxied: RabbitmqSettings, proxies: Sequence[Proxy], topic: str
) -> None:
    """P5"""
    async with publishing(proxied) as publisher:
        for wave in range(25):
            if wave % 3 == 1:
                for proxy in proxies:
                    proxy.cut_after(7 * wave % 60)
            batch = [message(topic, f"{wave:02}-{each}", f"key {each}") for each in range(8)]
            assert set(await outcomes_of(publisher, batch, timedelta(seconds=30))) == {"confirmed"}

    stored = await drain(settings, topic, 200)
    for each in range(8):
        came = [one.body for one in stored if one.key == f"key {each}".encode()]
        assert list(dict.fromkeys(came)) == [f"{wave:02}-{each}".encode() for wave in range(25)]


async def test_a_worker_whose_connections_are_cut_or_go_silent_has_each_effect_once(
    rabbitmq: RabbitmqCluster, proxies: Sequence[Proxy], tmp_path: Path, topic: str
) -> None:
    """C1 C2 I2"""
    options = {"heartbeat_seconds": 1, "request_timeout_seconds": 3}
    near = make_app(on_rabbitmq(rabbitmq), tmp_path, shares=LANES)
    distant = make_app(on_rabbitmq(rabbitmq), tmp_path, shares=LANES, url=rabbitmq.proxied_url, **options)
    near.topic(topic, Order, key=lambda order: order.account)
    orders = distant.topic(topic, Order, key=lambda order: order.account)

    @distant.handler(orders, group="g", effects="transaction", concurrency=4)
    async def apply(order: Order, session: AsyncSession) -> None:
        await session.execute(text("INSERT INTO effects (number) VALUES (:number)"), {"number": order.number})

    async with distant, near, open_engine(distant.settings.database or "") as engine:
        async with engine.begin() as connection:
            await connection.execute(text("CREATE TABLE effects (id INTEGER PRIMARY KEY, number INTEGER)"))

        async def numbers() -> list[int]:
            async with engine.connect() as connection:
                return [row[0] for row in await connection.execute(text("SELECT number FROM effects"))]

        async with working(distant):
            for wave, how in enumerate(["closed", "half a frame", "blackholed", "answers lost"]):
                await publish(near, topic, range(wave * 100, wave * 100 + 100), accounts=10)
                while len(await numbers()) < wave * 100 + 20:
                    await anyio.sleep(0.02)
                break_connections(proxies, how)
                await anyio.sleep(5 if how in ("blackholed", "answers lost") else 0.1)
                for proxy in proxies:
                    proxy.heal()
            with anyio.fail_after(60):
                while len(await numbers()) < 400:
                    await anyio.sleep(0.1)
        assert Counter(await numbers()) == Counter(range(400))


async def test_while_nobody_answers_a_publisher_cannot_be_opened_and_says_where(
    proxied: RabbitmqSettings, proxies: Sequence[Proxy]
) -> None:
    for proxy in proxies:
        proxy.refuse()
    with pytest.raises(BrokerUnavailable) as refused:
        async with open_publisher(proxied):
            pass

    assert all(server in str(refused.value) for server in proxied.servers)
    for proxy in proxies:
        proxy.heal()


async def test_a_server_that_accepts_and_never_answers_is_given_up(
    proxied: RabbitmqSettings, proxies: Sequence[Proxy]
) -> None:
    for proxy in proxies:
        proxy.blackhole()
    began = time.monotonic()
    with pytest.raises(BrokerUnavailable):
        async with open_publisher(proxied):
            pass
    assert time.monotonic() - began < 3 * 3 + 2


async def test_cancelling_an_opening_leaves_no_connection(
    rabbitmq: RabbitmqCluster, proxied: RabbitmqSettings, proxies: Sequence[Proxy]
) -> None:
    for proxy in proxies:
        proxy.delay(0.05)
    for milliseconds in range(0, 500, 25):
        with anyio.move_on_after(milliseconds / 1000):
            async with open_publisher(proxied):
                pass
    for proxy in proxies:
        proxy.heal()
    await eventually(lambda: all(proxy.connections == 0 for proxy in proxies), seconds=10)


# --- alarms -----------------------------------------------------------------------------------------------------------

ALARMS = {
    "memory": ("set_vm_memory_high_watermark absolute 1MB", "set_vm_memory_high_watermark absolute 2GB"),
    "disk": ("set_disk_free_limit 100000GB", "set_disk_free_limit 50MB"),
}


@asynccontextmanager
async def alarm(cluster: RabbitmqCluster, kind: str) -> AsyncIterator[None]:
    """On every node, by watermarks that it is beyond."""
    sound, clear = ALARMS[kind]
    try:
        for node in cluster.nodes:
            await anyio.to_thread.run_sync(cluster.control, node, *sound.split())
        yield
    finally:
        with anyio.CancelScope(shield=True):
            for node in cluster.nodes:
                await anyio.to_thread.run_sync(cluster.control, node, *clear.split())


@pytest.mark.parametrize("kind", ALARMS)
async def test_while_an_alarm_is_on_publishers_wait_and_end_unconfirmed_and_after_it_all_flows(
    rabbitmq: RabbitmqCluster, settings: RabbitmqSettings, topic: str, kind: str
) -> None:
    """P2 P6"""
    async with publishing(settings) as publisher:
        assert await outcome_of(publisher, message(topic, "before")) == "confirmed"
        during = [message(topic, f"during {number}", f"k{number}") for number in range(20)]
        async with alarm(rabbitmq, kind):
            for wave in (during[:10], during[10:]):
                began = time.monotonic()
                outcomes = await outcomes_of(publisher, wave, timedelta(seconds=3))
                assert time.monotonic() - began < 4.5
                assert set(outcomes) == {"Unconfirmed"}
        after = [message(topic, "after"), *during]
        assert set(await outcomes_of(publisher, after, timedelta(seconds=30))) == {"confirmed"}

    stored = await drain(settings, topic, 22)
    assert len({one.id for one in stored}) == 22


async def test_while_an_alarm_is_on_workers_work_off_what_is_there_also_those_that_start_in_it(
    rabbitmq: RabbitmqCluster, tmp_path: Path, topic: str
) -> None:
    """C1: who publishes is not read by the broker, who acknowledges must be, or the alarm would never end."""
    app = make_app(on_rabbitmq(rabbitmq), tmp_path, shares=LANES, request_timeout_seconds=3)
    orders = app.topic(topic, Order, key=lambda order: order.account)
    runs, failed = Counter[int](), set[int]()
    hurry = anyio.Event()

    @app.handler(orders, group="g", effects="repeatable", concurrency=4, retry=Backoff(first=timedelta(seconds=0.1)))
    async def handle(order: Order) -> None:
        if order.number % 10 == 3 and order.number not in failed:
            failed.add(order.number)
            raise ValueError("once")
        runs[order.number] += 1
        with anyio.move_on_after(0.2):
            await hurry.wait()

    async with app:
        await publish(app, topic, range(200), accounts=20)
        async with alarm(rabbitmq, "memory"):
            async with working(app):
                await eventually(lambda: len(runs) >= 20)
                hurry.set()
                await eventually(lambda: len(runs) >= 100)
            async with working(app):
                await eventually(lambda: len(runs) == 200)
                await anyio.sleep(1)  # they are acknowledged
        async with working(app):
            await publish(app, topic, range(200, 220), accounts=20)
            await eventually(lambda: len(runs) == 220)

    assert set(runs.values()) == {1}
    assert len(failed) == 22


async def test_a_node_that_freezes_costs_a_heartbeat_and_no_message(
    whole_rabbitmq: RabbitmqCluster, settings: RabbitmqSettings, topic: str
) -> None:
    """P2"""
    quick = settings.model_copy(update={"heartbeat_seconds": 1, "request_timeout_seconds": 3.0})
    async with publishing(quick) as publisher:
        assert await outcome_of(publisher, message(topic, "before")) == "confirmed"
        node = whole_rabbitmq.nodes[1]
        node.pause()
        try:
            outcomes = await outcomes_of(
                publisher, [message(topic, f"{number}", f"k{number}") for number in range(40)], timedelta(seconds=90)
            )
        finally:
            node.resume()
        assert set(outcomes) == {"confirmed"}

    stored = await drain(settings, topic, 41)
    assert len({one.id for one in stored}) == 41


async def test_a_message_in_doubt_is_in_doubt_and_not_rejected(
    proxied: RabbitmqSettings, proxies: Sequence[Proxy], topic: str
) -> None:
    """P2: it may be stored."""
    async with open_publisher(proxied) as publisher:
        await publisher.send([message(topic, "first")], deadline=time.monotonic() + 5)
        for proxy in proxies:
            proxy.drop("down")
        (outcome,) = await publisher.send([message(topic, "second")], deadline=time.monotonic() + 1)
        assert isinstance(outcome, InDoubt)
        for proxy in proxies:
            proxy.heal()
