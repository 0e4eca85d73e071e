"""The network fails between a client and its cluster, or a broker freezes: nothing is lost, nobody hangs (P2 P5)."""

from __future__ import annotations

import asyncio
import gc
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import anyio
import pytest
from aiokafka import ConsumerRecord

from reliamq.spi import Confirmation, InDoubt, Message, Outcome, Publisher, Rejection
from reliamq_kafka.consuming.membership import Membership
from reliamq_kafka.delays.shift import open_shift
from reliamq_kafka.publisher import open_publisher
from reliamq_kafka.settings import KafkaSettings, read_settings
from reliamq_kafka.wire.admin import open_admin
from reliamq_kafka.wire.consumers import open_consumer
from reliamq_kafka.wire.producers import open_producers
from tests.brokers.application import Order, eventually, make_app, publish, working
from tests.brokers.conftest import on_kafka
from tests.kafka.conftest import create_topic, log_of, message
from tests.servers.kafka import KafkaCluster
from tests.servers.proxy import Proxy

pytestmark = [pytest.mark.anyio, pytest.mark.xdist_group("kafka"), pytest.mark.timeout(180)]


@pytest.fixture
def proxies(kafka: KafkaCluster) -> Iterator[Sequence[Proxy]]:
    """One before each broker."""
    with ExitStack() as stack:
        yield [stack.enter_context(Proxy(ports.proxied, ports.behind)) for ports in kafka.ports]


@pytest.fixture
def proxied(kafka: KafkaCluster) -> KafkaSettings:
    return read_settings(kafka.proxied_url, {"request_timeout_seconds": 3})


async def send_until_confirmed(publisher: Publisher, batch: Sequence[Message], seconds: float = 60) -> None:
    """As the core does: what is not confirmed is sent again, with its id."""
    deadline = time.monotonic() + seconds
    while batch:
        assert time.monotonic() < deadline, "not confirmed in time"
        outcomes = await publisher.send(batch, deadline=time.monotonic() + 5)
        assert not any(isinstance(one, Rejection) and one.reason.judges_message for one in outcomes), outcomes
        batch = [one for one, outcome in zip(batch, outcomes, strict=True) if not isinstance(outcome, Confirmation)]


async def check_log(settings: KafkaSettings, topic: str, waves: int) -> None:
    """Each of eight keys has all its waves, in order of their first coming: what was in doubt may be there twice."""
    stored: list[ConsumerRecord] = []
    # A broker that was frozen still takes itself for the leader for a moment, and lacks some
    with anyio.move_on_after(30):
        while len({record.value for record in stored}) < 8 * waves:
            stored = [record for partition in await log_of(settings, topic) for record in partition]
            await anyio.sleep(0.2)
    for each in range(8):
        bodies = [record.value for record in stored if record.key == f"key {each}".encode()]
        assert list(dict.fromkeys(bodies)) == [f"{number:02}-{each}".encode() for number in range(waves)]


async def test_connections_that_are_cut_in_the_middle_of_answers_cost_no_message_and_no_order(
    settings: KafkaSettings, proxied: KafkaSettings, proxies: Sequence[Proxy]
) -> None:
    """P1 P5"""
    topic = await create_topic(settings)
    async with open_publisher(proxied) as publisher:
        for number in range(40):
            if number % 4 == 1:
                proxies[number // 4 % 3].cut_after(7 * number % 60)
            await send_until_confirmed(
                publisher, [message(topic, f"{number:02}-{each}", f"key {each}") for each in range(8)]
            )

    await check_log(settings, topic, waves=40)


async def test_while_nothing_comes_back_callers_are_told_by_their_deadline_and_then_it_goes_on(
    settings: KafkaSettings, proxied: KafkaSettings, proxies: Sequence[Proxy]
) -> None:
    """P2"""
    topic = await create_topic(settings)
    async with open_publisher(proxied) as publisher:
        await send_until_confirmed(publisher, [message(topic, "first", f"k{number}") for number in range(6)])
        for proxy in proxies:
            proxy.drop("down")
        batch = [message(topic, "second", f"k{number}") for number in range(6)]
        began = time.monotonic()
        outcomes = await publisher.send(batch, deadline=began + 2)
        assert time.monotonic() - began < 4
        assert {type(one) for one in outcomes} == {InDoubt}

        for proxy in proxies:
            proxy.heal()
        await send_until_confirmed(publisher, batch)

    bodies = Counter(record.value for partition in await log_of(settings, topic) for record in partition)
    assert bodies[b"first"] == 6
    assert bodies[b"second"] >= 6


async def test_a_frozen_broker_holds_up_nobody_for_long_and_loses_nothing(
    whole: KafkaCluster, settings: KafkaSettings
) -> None:
    """P1 P5: it holds its connections and answers nothing; the others elect leaders without it."""
    topic = await create_topic(settings)
    async with open_publisher(settings) as publisher:
        for number in range(20):
            if number == 5:
                whole.brokers[0].pause()
            if number == 15:
                whole.brokers[0].resume()
            await send_until_confirmed(
                publisher, [message(topic, f"{number:02}-{each}", f"key {each}") for each in range(8)]
            )

    await check_log(settings, topic, waves=20)


async def test_a_worker_whose_connections_are_cut_handles_everything_in_order(
    kafka: KafkaCluster, proxies: Sequence[Proxy], tmp_path: Path
) -> None:
    """C1 C3"""
    topic = f"network-{uuid.uuid4()}"
    app = make_app(on_kafka(kafka), tmp_path, shares=3)
    distant = make_app(on_kafka(kafka), tmp_path, shares=3, url=kafka.proxied_url)
    handled: list[tuple[str, int]] = []
    orders = distant.topic(topic, Order, key=lambda order: order.account)
    app.topic(topic, Order, key=lambda order: order.account, groups=["g"])

    @distant.handler(orders, group="g", effects="repeatable", concurrency=8)
    async def handle(order: Order) -> None:
        handled.append((order.account, order.number))
        await anyio.sleep(0.002)

    async with app, distant, working(distant), anyio.create_task_group() as tasks:
        tasks.start_soon(publish, app, topic, range(600), 12)
        for round in range(8):
            await anyio.sleep(0.5)
            proxies[round % 3].cut_after(11 * round)
        await eventually(lambda: len(set(handled)) == 600, seconds=90)

    for account in {account for account, _ in handled}:
        numbers = list(dict.fromkeys(number for other, number in handled if other == account))
        assert numbers == sorted(numbers)


async def test_a_publisher_that_is_closed_while_replicas_are_missing_leaves_nothing_running(
    whole: KafkaCluster, settings: KafkaSettings
) -> None:
    """P7: its client would wait for them for ever, and write when they are back."""
    topic = await create_topic(settings)
    before = asyncio.all_tasks()
    async with open_publisher(settings) as publisher:
        await send_until_confirmed(publisher, [message(topic, "before")])
        for broker in whole.brokers[1:]:
            broker.kill()
        outcomes: Sequence[Outcome] = await publisher.send([message(topic, "in doubt")], deadline=time.monotonic() + 2)
        assert [type(one) for one in outcomes] == [InDoubt]
        began = time.monotonic()
    assert time.monotonic() - began < 25

    await eventually(lambda: asyncio.all_tasks() <= before, seconds=30)


@pytest.mark.parametrize("seconds", [0.0, 0.001, 0.002, 0.004, 0.006, 0.01, 0.02, 0.04])
async def test_connecting_that_is_cancelled_anywhere_leaves_no_connection_behind(
    settings: KafkaSettings, seconds: float
) -> None:
    """A connection that nobody closed is a warning, and an error here."""
    for open_one in (open_admin, open_consumer, open_producers):
        with anyio.move_on_after(seconds):
            async with open_one(settings):
                pass
    await anyio.sleep(0.2)
    gc.collect()


@pytest.mark.parametrize("milliseconds", [0, 1, 2, 4, 6, 8, 10, 15, 20, 30, 50, 100])
async def test_a_member_that_is_cancelled_anywhere_while_it_joins_leaves_no_connection_behind(
    settings: KafkaSettings, milliseconds: int
) -> None:
    topic = await create_topic(settings)
    async with open_admin(settings) as admin:
        membership = Membership(admin, settings, topic, "g")
        joining = asyncio.create_task(membership.join())
        await asyncio.sleep(milliseconds / 1000)
        joining.cancel()
        await asyncio.wait({joining})
        with anyio.move_on_after(milliseconds / 1000):
            async with open_shift(admin, settings, topic, carry):
                pass
    await anyio.sleep(0.2)
    gc.collect()


async def carry(records: object) -> object:
    raise AssertionError("there is nothing to carry")
