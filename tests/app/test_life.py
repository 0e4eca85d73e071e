"""Opening and closing an application."""

from __future__ import annotations

import sqlite3
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest

from reliamq import BrokerUnavailable, ConfigurationError, DurabilityError, Reliamq, ReliamqError, Unconfirmed
from reliamq.settings import PublisherSettings, Settings
from reliamq.spi import Durability, Unroutable
from tests.app.conftest import Order

pytestmark = pytest.mark.anyio


async def test_an_exception_in_the_block_leaves_it_unchanged(app: Reliamq) -> None:
    with pytest.raises(ValueError, match="mine"):
        async with app:
            raise ValueError("mine")


async def test_publishing_outside_the_block_says_what_to_do(app: Reliamq) -> None:
    orders = app.topic("orders", Order, groups=["g"])

    with pytest.raises(ConfigurationError, match="async with app"):
        await orders.publish(Order(number=1))


@pytest.mark.parametrize(
    ("deadline", "said"),
    [
        (5, r"deadline must be a timedelta, not int 5; write timedelta\(seconds=5\)"),
        (timedelta(-1), "deadline must be longer than nothing"),
    ],
)
async def test_a_deadline_that_is_none_is_refused(app: Reliamq, deadline: Any, said: str) -> None:
    orders = app.topic("orders", Order, groups=["g"])

    async with app:
        with pytest.raises(ConfigurationError, match=f"topic 'orders': {said}"):
            await orders.publish(Order(number=1), deadline=deadline)


async def test_a_topic_without_a_group_is_unroutable(app: Reliamq) -> None:
    """P3"""
    orders = app.topic("orders", Order)

    async with app:
        with pytest.raises(Unroutable, match="orders"):
            await orders.publish(Order(number=1))


async def test_a_thousand_callers_each_get_their_own_outcome(app: Reliamq) -> None:
    """P2"""
    orders = app.topic("orders", Order, groups=["g"])
    nowhere = app.topic("nowhere", Order)
    outcomes: dict[int, str] = {}

    async def publish(number: int) -> None:
        topic = nowhere if number % 3 == 0 else orders
        try:
            await topic.publish(Order(number=number))
            outcomes[number] = "confirmed"
        except Unroutable:
            outcomes[number] = "unroutable"

    async with app, anyio.create_task_group() as tasks:
        for number in range(1000):
            tasks.start_soon(publish, number)

    assert outcomes == {number: "unroutable" if number % 3 == 0 else "confirmed" for number in range(1000)}


async def test_a_broker_too_weak_for_the_required_durability_is_refused_by_name(tmp_path: Path) -> None:
    """S3"""
    app = Reliamq(Settings(broker=f"embedded:///{tmp_path}/b.db", durability=Durability.REPLICATED))
    app.topic("orders", Order, groups=["g"])

    with pytest.raises(DurabilityError, match="durability"):
        async with app:
            pass


async def test_a_foreign_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("dear diary, " * 100)
    app = Reliamq(Settings(broker=f"embedded:///{path}"))
    app.topic("orders", Order, groups=["g"])

    with pytest.raises((ConfigurationError, BrokerUnavailable), match=r"notes\.txt"):
        async with app:
            pass

    assert path.read_text().startswith("dear diary")


async def test_a_cancelled_publish_leaves_the_others_alone(app: Reliamq) -> None:
    orders = app.topic("orders", Order, groups=["g"])
    async with app:
        with anyio.move_on_after(0):
            await orders.publish(Order(number=1))
        confirmation = await orders.publish(Order(number=2))

    assert confirmation.position is not None


async def test_a_deadline_that_passes_leaves_the_message_unconfirmed(tmp_path: Path) -> None:
    """P6"""
    app = Reliamq(Settings(broker=f"embedded:///{tmp_path}/b.db"))
    orders = app.topic("orders", Order, groups=["g"])
    async with app:
        await orders.publish(Order(number=0))
        foreign = sqlite3.connect(tmp_path / "b.db", isolation_level=None)
        foreign.execute("BEGIN IMMEDIATE")
        try:
            with anyio.fail_after(5):
                with pytest.raises((Unconfirmed, ReliamqError)):
                    await orders.publish(Order(number=1), deadline=timedelta(seconds=0.5))
        finally:
            foreign.execute("ROLLBACK")
            foreign.close()
        await orders.publish(Order(number=2))


async def test_closing_says_by_id_what_stayed_unconfirmed_and_nobody_hangs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """P7"""
    quick = PublisherSettings(close_deadline=timedelta(seconds=0.3))
    app = Reliamq(Settings(broker=f"embedded:///{tmp_path}/b.db", publisher=quick))
    orders = app.topic("orders", Order, groups=["g"])
    errors: list[Unconfirmed] = []
    foreign = sqlite3.connect(tmp_path / "b.db", isolation_level=None)

    async def publish() -> None:
        try:
            await orders.publish(Order(number=1), id="the-one")
        except Unconfirmed as error:
            errors.append(error)
            foreign.execute("ROLLBACK")

    with anyio.fail_after(30):
        async with anyio.create_task_group() as tasks, app:
            await orders.publish(Order(number=0))
            foreign.execute("BEGIN IMMEDIATE")
            tasks.start_soon(publish)
            await anyio.sleep(0.2)
    foreign.close()

    assert [error.message_id for error in errors] == ["the-one"]
    assert "closed with 1 unconfirmed: the-one" in caplog.text
