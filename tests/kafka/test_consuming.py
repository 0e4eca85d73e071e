"""Safe arrival on Kafka, besides what all brokers are tested with (C2, C4, C6, C7)."""

from __future__ import annotations

import time
import uuid
from datetime import timedelta
from pathlib import Path

import anyio
import pytest

from reliamq import Delivery, RetryAfter
from reliamq_kafka.settings import read_settings
from reliamq_kafka.wire.admin import group_id, open_admin
from tests.brokers.application import Broker, Order, Service, eventually, make_app, publish, wait_until, working
from tests.brokers.conftest import on_kafka
from tests.brokers.test_consuming import handle_slowly
from tests.servers.kafka import KafkaCluster

pytestmark = [pytest.mark.anyio, pytest.mark.xdist_group("kafka"), pytest.mark.timeout(180)]


@pytest.fixture
def broker(kafka: KafkaCluster) -> Broker:
    return on_kafka(kafka)


@pytest.fixture
def topic() -> str:
    return f"consuming-{uuid.uuid4()}"


async def test_a_handler_that_takes_longer_than_session_and_poll_interval_runs_once(
    broker: Broker, tmp_path: Path, topic: str
) -> None:
    """C7"""
    await handle_slowly(broker, tmp_path, topic, seconds=14, poll_interval_seconds=6)


async def test_what_gives_way_for_long_leaves_its_partition_and_comes_back_with_its_attempts(
    broker: Broker, tmp_path: Path, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C4 C6"""
    monkeypatch.setattr("reliamq_kafka.consuming.subscription.LONG", timedelta(seconds=0.5))
    app = make_app(broker, tmp_path, shares=1)
    orders = app.topic(topic, Order, key=lambda order: order.account)
    attempts: list[tuple[int, int]] = []
    waits = 6.0

    @app.handler(orders, group="g", effects="repeatable")
    async def handle(order: Order, delivery: Delivery) -> None:
        attempts.append((order.number, delivery.attempt))
        if order.number == 0 and delivery.attempt <= 2:
            raise RetryAfter(timedelta(seconds=waits), reason="not yet", keep_order=False)

    async with app, working(app), open_admin(read_settings(broker.url, {})) as admin:
        began = time.monotonic()
        await publish(app, topic, range(3), accounts=1)
        await eventually(lambda: len(attempts) == 3)
        while (await admin.committed(group_id(topic, "g"), topic, [0]))[0] < 3:
            assert len(attempts) == 3, "its partition waited for it"
            await anyio.sleep(0.05)
        await eventually(lambda: len(attempts) == 5)
        assert time.monotonic() - began >= 2 * waits

    assert attempts == [(0, 1), (1, 1), (2, 1), (0, 2), (0, 3)]


def test_a_member_with_a_name_that_is_killed_and_started_again_goes_on_at_once(
    broker: Broker, tmp_path: Path, topic: str
) -> None:
    """C2: its group does not wait for the end of its session (KIP-345)."""
    service = Service(broker, tmp_path, topic, "&session_timeout_seconds=45&instance_id=tests-{worker}")
    service.publish({"number": 0, "account": "slow", "seconds": 1_000})
    with service.worker() as worker:
        wait_until(lambda: service.lines("started") == [0])
        worker.kill()
        worker.wait()

    with service.worker(SERVICE_HURRY="yes"):
        wait_until(lambda: service.lines("done") == [0], seconds=20)
