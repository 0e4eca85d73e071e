"""Dead letters on a real cluster, besides what the kit asks (C5)."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import UTC, datetime

import anyio
import pytest

from reliamq.spi import Confirmation, DeadLetterRecord
from reliamq_rabbitmq.catalog.dead_letters import open_dead_letters
from reliamq_rabbitmq.catalog.names import DEAD_LETTERS
from reliamq_rabbitmq.publisher import open_publisher
from reliamq_rabbitmq.settings import RabbitmqSettings, read_settings
from tests.rabbitmq.conftest import declare, delete_queue, drain, message
from tests.servers.rabbitmq import RabbitmqCluster

pytestmark = [pytest.mark.anyio, pytest.mark.xdist_group("rabbitmq"), pytest.mark.timeout(120)]


def record_of(topic: str, text: str, reason: str = "no", traceback: str = "") -> DeadLetterRecord:
    died_at = datetime.now(UTC)
    return DeadLetterRecord(message(topic, text), "g", "handler", reason, traceback, 3, died_at, "lane 0")


async def test_a_dead_letter_with_as_many_headers_as_can_be_published_and_a_huge_traceback_is_kept(
    settings: RabbitmqSettings, topic: str
) -> None:
    headers = {f"header {number}": "ä" * 500 for number in range(92)}
    original = message(topic, "body", headers=headers)
    async with open_publisher(settings) as publisher:
        (outcome,) = await publisher.send([original], deadline=time.monotonic() + 10)
        assert isinstance(outcome, Confirmation)
    record = replace(record_of(topic, ""), message=original, reason="ü" * 50_000, traceback="é\n" * 50_000)
    async with open_dead_letters(settings) as dead_letters:
        (outcome,) = await dead_letters.add([record], deadline=time.monotonic() + 10)
        assert isinstance(outcome, Confirmation)
        (found,) = await dead_letters.find(topic=topic)

    assert (found.message.body, dict(found.message.headers)) == (b"body", headers)
    assert found.traceback
    assert record.traceback.endswith(found.traceback)
    assert record.reason.startswith(found.reason)
    (stored,) = await drain(settings, topic, 1)
    assert dict(stored.headers) == headers


async def test_after_its_node_has_died_dead_letters_are_stored_again(
    whole_rabbitmq: RabbitmqCluster, settings: RabbitmqSettings, topic: str
) -> None:
    async with open_dead_letters(settings) as dead_letters:
        for number, node in enumerate(whole_rabbitmq.nodes):
            await anyio.to_thread.run_sync(node.kill)
            await anyio.to_thread.run_sync(whole_rabbitmq.start)
            with anyio.fail_after(60):
                while True:
                    outcomes = await dead_letters.add([record_of(topic, f"{number}")], deadline=time.monotonic() + 10)
                    if isinstance(outcomes[0], Confirmation):
                        break
            await anyio.to_thread.run_sync(whole_rabbitmq.wait_until_whole)
        found = await dead_letters.find(topic=topic)

    assert {one.message.body for one in found} == {b"0", b"1", b"2"}


async def test_who_looks_at_the_same_time_sees_all_of_it_one_after_another(
    settings: RabbitmqSettings, topic: str
) -> None:
    async with open_dead_letters(settings) as dead_letters:
        records = [record_of(topic, f"{number}") for number in range(20)]
        await dead_letters.add(records, deadline=time.monotonic() + 10)
    counts: list[int] = []

    async def look() -> None:
        async with open_dead_letters(settings) as dead_letters:
            counts.append(len(await dead_letters.find(topic=topic)))

    async with anyio.create_task_group() as tasks:
        for _ in range(6):
            tasks.start_soon(look)

    assert counts == [20] * 6


async def test_thousands_of_them_are_found_and_removed(settings: RabbitmqSettings, topic: str) -> None:
    """More than a quorum queue gives to whoever sets no limit."""
    async with open_dead_letters(settings) as dead_letters:
        for start in range(0, 2_100, 700):
            records = [record_of(topic, f"{number}") for number in range(start, start + 700)]
            outcomes = await dead_letters.add(records, deadline=time.monotonic() + 30)
            assert {type(one) for one in outcomes} == {Confirmation}
        first = await dead_letters.find(topic=topic, limit=2)
        everything = await dead_letters.find(topic=topic, limit=10_000)
        assert [one.message.body for one in first] == [b"0", b"1"]
        assert [one.message.body for one in everything] == [b"%d" % number for number in range(2_100)]
        assert await dead_letters.remove(everything) == 2_100
        assert list(await dead_letters.find(topic=topic)) == []


async def test_a_queue_of_dead_letters_that_was_deleted_is_declared_again(rabbitmq: RabbitmqCluster) -> None:
    with rabbitmq.virtual_host() as own:
        settings = read_settings(f"{rabbitmq.url}/{own}", {"management_url": rabbitmq.management_url})
        topic = await declare(settings, "g")
        async with open_dead_letters(settings) as dead_letters:
            (outcome,) = await dead_letters.add([record_of(topic, "before")], deadline=time.monotonic() + 10)
            assert isinstance(outcome, Confirmation)
            await delete_queue(rabbitmq, DEAD_LETTERS, own)
            (outcome,) = await dead_letters.add([record_of(topic, "after")], deadline=time.monotonic() + 10)
            assert isinstance(outcome, Confirmation)
            (found,) = await dead_letters.find(topic=topic)
            assert found.message.body == b"after"
