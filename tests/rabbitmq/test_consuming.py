"""Safe arrival on RabbitMQ, besides what all brokers are tested with (C2, C4, C6, C7, C8, C11)."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import aio_pika
import anyio
import pytest

from reliamq import Delivery, Reliamq, RetryAfter
from reliamq.spi import Ack, BrokerUnavailable, Retry, Unroutable
from reliamq.testing.harness import bodies
from reliamq_rabbitmq.catalog.names import group_exchange, lane_queue, ledger_queue
from reliamq_rabbitmq.consuming.subscription import open_subscription
from reliamq_rabbitmq.publisher import open_publisher
from reliamq_rabbitmq.settings import RabbitmqSettings
from tests.brokers.application import Broker, Order, eventually, make_app, publish, working
from tests.brokers.conftest import on_rabbitmq
from tests.brokers.test_consuming import count_runs
from tests.rabbitmq.conftest import amqp_url, declare, delete_queue, drain, message
from tests.servers.rabbitmq import RabbitmqCluster

pytestmark = [pytest.mark.anyio, pytest.mark.xdist_group("rabbitmq"), pytest.mark.timeout(180)]

FOREVER = timedelta(minutes=10)


@pytest.fixture
def broker(rabbitmq: RabbitmqCluster) -> Broker:
    return on_rabbitmq(rabbitmq)


@pytest.fixture
def name() -> str:
    return f"consuming-{time.time_ns()}"


def attempts_app(broker: Broker, folder: Path, topic: str, wait: timedelta) -> tuple[Reliamq, list[tuple[int, int]]]:
    """Number 0 gives way twice."""
    app, attempts = make_app(broker, folder, shares=1), list[tuple[int, int]]()
    orders = app.topic(topic, Order, key=lambda order: order.account)

    @app.handler(orders, group="g", effects="repeatable")
    async def handle(order: Order, delivery: Delivery) -> None:
        attempts.append((order.number, delivery.attempt))
        if order.number == 0 and delivery.attempt <= 2:
            raise RetryAfter(wait, reason="not yet", keep_order=False)

    return app, attempts


async def test_what_gives_way_for_long_leaves_its_lane_and_comes_back_with_its_attempts(
    broker: Broker, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C4 C6"""
    monkeypatch.setattr("reliamq_rabbitmq.consuming.subscription.LONG", timedelta(seconds=0.5))
    app, attempts = attempts_app(broker, tmp_path, name, timedelta(seconds=3.5))
    async with app:
        async with working(app):
            began = time.monotonic()
            await publish(app, name, range(3), accounts=1)
            await eventually(lambda: len(attempts) == 3)
        async with working(app):  # nobody worked meanwhile; the broker waited
            await eventually(lambda: len(attempts) == 5)
            assert time.monotonic() - began >= 7.0

    assert attempts == [(0, 1), (1, 1), (2, 1), (0, 2), (0, 3)]


async def test_long_waits_do_not_wait_for_one_another(
    settings: RabbitmqSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C6: a queue whose messages expire at different times would hand on the first one first."""
    monkeypatch.setattr("reliamq_rabbitmq.consuming.subscription.LONG", timedelta(seconds=0.5))
    topic = await declare(settings, "g")
    waits = (60.0, 5.0, 3.2, 1.4)
    async with open_publisher(settings) as publisher:
        await publisher.send([message(topic, f"{wait}") for wait in waits], deadline=time.monotonic() + 10)
    came: list[tuple[float, float]] = []
    async with open_subscription(settings, topic, "g", FOREVER) as member:
        held = []
        while len(held) < len(waits):
            held += await member.receive(10, max_bytes=1 << 20, wait=FOREVER)
        began = time.monotonic()
        waiting = [Retry(one, timedelta(seconds=float(one.message.body)), keep_order=False) for one in held]
        assert not await member.settle(waiting)
        while len(came) < 3:
            for one in await member.receive(10, max_bytes=1 << 20, wait=FOREVER):
                came.append((float(one.message.body), time.monotonic() - began))
                assert one.failures == 1
                await member.settle([Ack(one)])

    assert [wait for wait, _ in came] == [1.4, 3.2, 5.0]
    assert all(wait <= waited < wait + 2 for wait, waited in came), came


async def test_a_queue_that_is_deleted_under_a_worker_is_reported_and_declared_again(
    rabbitmq: RabbitmqCluster, broker: Broker, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Never a silent idle."""
    app = make_app(broker, tmp_path, shares=1)
    runs = count_runs(app, name)
    async with app, working(app):
        await publish(app, name, range(10), accounts=3)
        await eventually(lambda: len(runs) == 10)
        with caplog.at_level(logging.ERROR, "reliamq.rabbitmq"):
            await delete_queue(rabbitmq, lane_queue(name, "g", 0))
            await eventually(lambda: any("is gone" in record.getMessage() for record in caplog.records))
        await publish_once_routable(app, name, range(10, 20))
        await eventually(lambda: len(runs) == 20)
        await delete_queue(rabbitmq, ledger_queue(name, "g", 0))
        await publish(app, name, range(20, 30), accounts=3)
        await eventually(lambda: len(runs) == 30)

    queue = await anyio.to_thread.run_sync(rabbitmq.call, f"queues/%2F/{lane_queue(name, 'g', 0).replace('/', '%2F')}")
    assert (queue["type"], queue["durable"], len(queue["members"])) == ("quorum", True, 3)


async def publish_once_routable(app: Reliamq, topic: str, numbers: range) -> None:
    """Until the queue is there again, what would have gone into it is refused."""
    for number in numbers:
        with anyio.fail_after(20):
            while True:
                try:
                    await app.topics[topic].publish(Order(number=number, account="one"))
                    break
                except Unroutable:
                    await anyio.sleep(0.05)


@pytest.fixture
def impatient(rabbitmq: RabbitmqCluster) -> Iterator[RabbitmqCluster]:
    """A cluster that takes back what is not acknowledged in four seconds."""

    def evaluate(seconds: int, tick: int) -> None:
        for node in rabbitmq.nodes:
            rabbitmq.control(node, "eval", f"application:set_env(rabbit, consumer_timeout, {seconds * 1000}).")
            rabbitmq.control(node, "eval", f"application:set_env(rabbit, channel_tick_interval, {tick * 1000}).")

    evaluate(4, 1)
    yield rabbitmq
    evaluate(1800, 60)


async def test_a_handler_that_takes_longer_than_the_brokers_ack_timeout_runs_once(
    impatient: RabbitmqCluster, broker: Broker, tmp_path: Path, name: str
) -> None:
    """C7: the broker would close its channel, and deliver all that is in it again."""
    app = make_app(broker, tmp_path, shares=1, ack_timeout_seconds=4)
    orders = app.topic(name, Order, key=lambda order: order.account)
    starts, done = Counter[int](), list[int]()

    @app.handler(orders, group="g", effects="repeatable", timeout=timedelta(seconds=60))
    async def slow(order: Order) -> None:
        starts[order.number] += 1
        await anyio.sleep(13 if order.number == 0 else 0)
        done.append(order.number)

    async with app, working(app):
        await publish(app, name, range(40), accounts=4)
        await eventually(lambda: len(done) == 30)  # other keys go on
        await eventually(lambda: len(done) == 40)
        await publish(app, name, range(40, 60), accounts=4)
        await eventually(lambda: len(done) == 60)

    assert starts == Counter(range(60))
    first = [number for number in done if number % 4 == 0]
    assert first == sorted(first), "its key waited for it"


async def test_a_retry_that_waits_longer_than_the_brokers_ack_timeout_keeps_its_place(
    impatient: RabbitmqCluster, settings: RabbitmqSettings
) -> None:
    """C6"""
    patient = settings.model_copy(update={"ack_timeout_seconds": 4.0})
    topic = await declare(patient, "g")
    async with open_publisher(patient) as publisher:
        await publisher.send([message(topic, f"{number}") for number in range(3)], deadline=time.monotonic() + 10)
    async with open_subscription(patient, topic, "g", FOREVER) as member:
        held = list(await member.receive(3, max_bytes=1 << 20, wait=FOREVER))
        while len(held) < 3:
            held += await member.receive(3 - len(held), max_bytes=1 << 20, wait=FOREVER)
        began = time.monotonic()
        assert not await member.settle([Retry(held[0], timedelta(seconds=9))])
        came = []
        while len(came) < 3:
            came += await member.receive(3, max_bytes=1 << 20, wait=timedelta(seconds=1))
        assert time.monotonic() - began > 8.9
        assert bodies(came) == [b"0", b"1", b"2"]
        assert not await member.settle([Ack(one) for one in came])

    assert await drain(settings, topic, 0) == []


async def test_what_others_wrote_is_delivered_as_it_is(
    rabbitmq: RabbitmqCluster, settings: RabbitmqSettings, topic: str
) -> None:
    """C11: without reliamq's headers, with headers that are no text, with nothing at all."""
    async with await aio_pika.connect(amqp_url(rabbitmq)) as connection:
        channel = await connection.channel()
        exchange = await channel.get_exchange(group_exchange(topic, "g"), ensure=False)
        foreign = [
            aio_pika.Message(b"plain"),
            aio_pika.Message(b"numbers", headers={"cloudEvents:id": 7, "n": [1, {"deep": True}], "none": None}),
            aio_pika.Message(b"broken", headers={"cloudEvents:id": "x", "cloudEvents:time": "yesterday"}),
            aio_pika.Message(b"", content_type="text/plain"),
        ]
        for one in foreign:
            await exchange.publish(one, "0.0.0.0.0.0")
    stored = await drain(settings, topic, len(foreign))

    assert sorted(one.body for one in stored) == [b"", b"broken", b"numbers", b"plain"]
    assert {one.type for one in stored} == {""}


async def test_an_idle_member_leaves_its_lanes_to_others_and_a_busy_one_keeps_them(
    settings: RabbitmqSettings, topic: str
) -> None:
    """C2"""
    async with open_publisher(settings) as publisher:
        await publisher.send([message(topic, "held")], deadline=time.monotonic() + 10)
        async with (
            open_subscription(settings, topic, "g", FOREVER) as busy,
            open_subscription(settings, topic, "g", FOREVER) as other,
        ):
            (held,) = await busy.receive(1, max_bytes=1 << 20, wait=FOREVER)
            await publisher.send([message(topic, f"{number}") for number in range(3)], deadline=time.monotonic() + 10)
            assert not await other.receive(10, max_bytes=1 << 20, wait=timedelta(seconds=4)), "its key is at work"
            assert not await busy.settle([Ack(held)])
            came = await other.receive(10, max_bytes=1 << 20, wait=timedelta(seconds=20))
            assert bodies(came) == [b"0", b"1", b"2"]


async def test_a_group_that_is_not_declared_is_said_to_whoever_receives(settings: RabbitmqSettings, topic: str) -> None:
    async with open_subscription(settings, topic, "nobody", FOREVER) as member:
        with pytest.raises(BrokerUnavailable, match="not declared"):
            await member.receive(1, max_bytes=1 << 20, wait=timedelta(seconds=10))
