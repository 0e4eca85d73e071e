"""Long delays leave their partition, wait on the cluster, and come back when due, whoever dies (C6)."""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import anyio
import pytest
from aiokafka import AIOKafkaConsumer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import CommitFailedError
from aiokafka.partitioner import murmur2

from reliamq.spi import BrokerUnavailable, Confirmation
from reliamq_kafka.delays.delayed import PARTITIONS as WAITS, attempts_of
from reliamq_kafka.delays.delays import Delays, Postponement, SharedDelays, create_delays, open_delays
from reliamq_kafka.delays.mover import Levels, levels
from reliamq_kafka.settings import KafkaSettings, read_settings
from reliamq_kafka.wire.admin import open_admin
from reliamq_kafka.wire.consumers import open_consumer
from reliamq_kafka.wire.progress import Attempts
from reliamq_kafka.wire.records import headers_of, message_of
from tests.kafka.conftest import PARTITIONS, create_topic, log_of, message

pytestmark = [pytest.mark.anyio, pytest.mark.xdist_group("kafka")]

LATE = 3.0
"""Seconds by which a short delay may be late here: looks, joining, and a busy machine."""


@dataclass
class Stored:
    """What the client's record has."""

    value: bytes | None
    key: bytes | None = b"k"
    headers: Sequence[tuple[str, bytes]] = ()
    offset: int = 7
    timestamp: int = 0


@pytest.fixture
def settings(settings: KafkaSettings) -> KafkaSettings:
    return settings.model_copy(update={"session_timeout_seconds": 6.0, "rebalance_timeout_seconds": 10.0})


@pytest.fixture
async def name(settings: KafkaSettings) -> AsyncIterator[str]:
    """A topic of delays that is this test's alone."""
    name = f"test-delays-{uuid.uuid4()}"
    yield name
    client = AIOKafkaAdminClient(**settings.connection())
    await client.start()
    await client.delete_topics([name])
    await client.close()


def postponement(topic: str, text: str, seconds: float, key: str | None = "k", **fields: Any) -> Postponement:
    one = message(topic, text, key)
    record = Stored(one.body, one.key, headers_of(one))
    values: dict[str, Any] = {"group": "g", "attempts": Attempts(failures=3)}
    return Postponement(topic, record=record, delay=timedelta(seconds=seconds), **(values | fields))


async def postpone(delays: Delays, *batch: Postponement) -> float:
    """When it was done, by the wall clock."""
    outcomes = await delays.postpone(batch, deadline=time.monotonic() + 20)
    assert [type(outcome) for outcome in outcomes] == [Confirmation] * len(batch)
    return time.time()


async def log(settings: KafkaSettings, topic: str) -> list[Any]:
    """All that is in the topic, by time."""
    return sorted((record for part in await log_of(settings, topic) for record in part), key=lambda one: one.timestamp)


async def until(settings: KafkaSettings, topic: str, enough: Callable[[list[Any]], bool], seconds: float) -> list[Any]:
    deadline = time.monotonic() + seconds
    while not enough(found := await log(settings, topic)):
        assert time.monotonic() < deadline, f"{len(found)} records only"
        await anyio.sleep(0.1)
    return found


async def members(settings: KafkaSettings, name: str) -> int:
    client = AIOKafkaAdminClient(**settings.connection())
    await client.start()
    try:
        (answer,) = await client.describe_consumer_groups([name])
        (group,) = answer.groups
        return len(group[5])
    finally:
        await client.close()


async def until_members(settings: KafkaSettings, name: str, count: int, seconds: float) -> None:
    with anyio.fail_after(seconds):
        while await members(settings, name) != count:
            await anyio.sleep(0.2)


async def level(settings: KafkaSettings, name: str) -> Levels:
    async with open_admin(settings) as admin, open_consumer(settings) as looker:
        found = await levels(admin, settings, looker, name)
    assert found is not None
    return found


async def test_what_is_due_comes_back_as_it_was_not_early_and_not_much_late(settings: KafkaSettings, name: str) -> None:
    topic = await create_topic(settings, **{"max.message.bytes": "4000000"})
    own = [("x", b"\xff\x00"), ("x", b"twice"), ("reliamq_header_ce_id", b"mine"), ("empty", b"")]
    records = {
        1: Stored(b"\x00body\xff", b"\xfe key", [*headers_of(message(topic, "")), *own]),
        2: Stored(b"no key", None, headers_of(message(topic, "", None))),
        3: Stored(None, b"", own),  # none of ours, and no value
        4: Stored(b"big" * 600_000, b"k", headers_of(message(topic, "", only_group="g"))),
    }
    async with open_delays(settings, name) as delays:
        batch = [
            Postponement(topic, "g", record, Attempts(failures=seconds, crashes=2), timedelta(seconds=seconds - 0.5))
            for seconds, record in records.items()
        ]
        began = time.time()
        confirmed = await postpone(delays, *batch)
        found = await until(settings, topic, lambda log: len(log) == 4, 20)

    by_failures = {attempts_of(one.headers, "g").failures: one for one in found}
    assert sorted(by_failures) == [1, 2, 3, 4]
    for seconds, record in records.items():
        back = by_failures[seconds]
        assert (back.key, back.value) == (record.key, record.value)
        assert [one for one in back.headers if one in record.headers] == list(record.headers)
        assert attempts_of(back.headers, "g") == Attempts(failures=seconds, crashes=2)
        assert attempts_of(back.headers, "h") == Attempts()
        if record.key is not None:
            assert back.partition == (murmur2(record.key) & 0x7FFFFFFF) % PARTITIONS
        arrived = back.timestamp / 1000
        assert arrived <= confirmed + seconds + LATE, f"{seconds} s: after {arrived - confirmed:.3f}"
        assert arrived >= began + seconds - 0.5
    again = by_failures[2]
    assert message_of(topic, again.key, again.value, again.headers).only_group == "g"


async def test_a_returned_message_can_be_postponed_again_and_says_only_the_newest(
    settings: KafkaSettings, topic: str, name: str
) -> None:
    async with open_delays(settings, name) as delays:
        await postpone(delays, postponement(topic, "again", 1, attempts=Attempts(1)))
        (first,) = await until(settings, topic, lambda log: len(log) == 1, 15)
        await postpone(delays, Postponement(topic, "g", first, Attempts(2), timedelta(seconds=1)))
        _, second = await until(settings, topic, lambda log: len(log) == 2, 15)

    assert attempts_of(second.headers, "g") == Attempts(2)
    assert len(second.headers) == len(first.headers)


async def test_a_long_delay_holds_up_no_short_one_and_stays(settings: KafkaSettings, topic: str, name: str) -> None:
    async with open_delays(settings, name) as delays:
        await postpone(delays, postponement(topic, "in an hour", 3600), postponement(topic, "in days", 30 * 86400))
        await postpone(delays, *(postponement(topic, str(n), 1) for n in range(3)))
        found = await until(settings, topic, lambda log: len(log) == 3, 15)
        await anyio.sleep(2)
        assert await log(settings, topic) == found
    assert [one.value for one in found] == [b"0", b"1", b"2"]
    left = await level(settings, name)
    assert {number: end - left.moved[number] for number, end in left.end.items() if end > left.moved[number]} == {
        11: 1,  # 2048 s of the hour
        19: 1,
    }


async def test_the_order_of_equal_delays_is_kept(settings: KafkaSettings, topic: str, name: str) -> None:
    async with open_delays(settings, name) as delays:
        for start in range(0, 600, 100):
            await postpone(delays, *(postponement(topic, str(n), 3) for n in range(start, start + 100)))
        found = await until(settings, topic, lambda log: len(log) >= 600, 20)
    by_offset = sorted(found, key=lambda one: one.offset)
    assert [int(one.value) for one in by_offset] == list(range(600))


async def test_a_mover_that_is_cancelled_anywhere_repeats_and_loses_nothing(
    settings: KafkaSettings, topic: str, name: str
) -> None:
    seed = random.randrange(10**6)
    lots = random.Random(seed)
    sent = 0
    for _ in range(25):
        async with open_delays(settings, name) as delays:
            await postpone(
                delays,
                *(postponement(topic, str(n), lots.choice([1, 1, 2, 3]), f"{n}") for n in range(sent, sent + 20)),
            )
            sent += 20
            await anyio.sleep(lots.choice([lots.uniform(0.0, 0.3), lots.uniform(0.2, 2.0)]))
    expected = {str(n).encode() for n in range(sent)}
    async with open_delays(settings, name):
        found = await until(settings, topic, lambda log: {one.value for one in log} >= expected, 30)
    assert {one.value for one in found} == expected, f"seed {seed}"
    assert all(attempts_of(one.headers, "g").failures == 3 for one in found)


@pytest.mark.parametrize("answered", [False, True])
async def test_a_mover_that_ends_between_storing_and_committing_repeats_and_loses_nothing(
    settings: KafkaSettings, topic: str, name: str, monkeypatch: pytest.MonkeyPatch, answered: bool
) -> None:
    reached = asyncio.Event()
    commit = AIOKafkaConsumer.commit

    async def stuck(consumer: AIOKafkaConsumer, offsets: Any) -> None:
        if answered:
            reached.set()
            raise CommitFailedError
        reached.set()
        await asyncio.sleep(60)

    async with AsyncExitStack() as stack:
        monkeypatch.setattr(AIOKafkaConsumer, "commit", stuck)
        delays = await stack.enter_async_context(open_delays(settings, name))
        await postpone(delays, *(postponement(topic, str(n), 1) for n in range(5)))
        async with asyncio.timeout(15):
            await reached.wait()
        if answered:  # this mover joins again by itself
            monkeypatch.setattr(AIOKafkaConsumer, "commit", commit)
            await until(settings, topic, lambda log: len(log) >= 10, 15)
    monkeypatch.setattr(AIOKafkaConsumer, "commit", commit)
    async with open_delays(settings, name):
        with anyio.fail_after(20):
            while not (await level(settings, name)).empty:
                await anyio.sleep(0.2)
    found = sorted(await log(settings, topic), key=lambda one: one.offset)
    assert [one.value for one in found] == [b"0", b"1", b"2", b"3", b"4"] * 2


async def test_two_movers_share_the_work(settings: KafkaSettings, topic: str, name: str) -> None:
    async with AsyncExitStack() as stack:
        first, second = [await stack.enter_async_context(open_delays(settings, name)) for _ in range(2)]
        await postpone(first, postponement(topic, "an hour", 3600))
        await until_members(settings, name, 2, 15)
        await anyio.sleep(1)
        for delays in (first, second):
            await postpone(delays, *(postponement(topic, str(n), 1 + n % 4, f"{n}") for n in range(200)))
        found = await until(settings, topic, lambda log: len(log) >= 400, 20)
        assert len(found) == 400  # and nothing twice, while nobody dies

    await until_members(settings, name, 0, 5)


async def test_while_nothing_is_delayed_nobody_is_in_the_group_and_what_was_moved_is_removed(
    settings: KafkaSettings, topic: str, name: str
) -> None:
    async with open_delays(settings, name) as delays:
        await anyio.sleep(1)  # without the topic
        assert await members(settings, name) == 0
        await postpone(delays, postponement(topic, "soon", 1))
        await until(settings, topic, lambda log: len(log) == 1, 15)
        await until_members(settings, name, 0, 20)
        levels = await level(settings, name)
        assert levels.empty
        assert levels.removable == {}
        assert sum(levels.first.values()) == 1

        await postpone(delays, postponement(topic, "once more", 1))
        await until(settings, topic, lambda log: len(log) == 2, 15)


async def test_a_topic_that_does_not_take_its_record_holds_up_no_other(
    settings: KafkaSettings, topic: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    small = await create_topic(settings, **{"max.message.bytes": "1000"})
    async with open_delays(settings, name) as delays:
        await postpone(
            delays,
            postponement("no-such-topic", "lost?", 1),
            postponement(topic, "of no group", 1, group="nobody"),
            postponement(small, "too large" * 1000, 1),
            postponement("no such name!", "x", 1),
            postponement(topic, "fine", 1),
        )
        found = await until(settings, topic, lambda log: len(log) == 1, 15)
        with anyio.fail_after(10):
            while (left := await level(settings, name)).end[6] < 4 or left.moved[0] < 5:
                await anyio.sleep(0.2)
    assert [one.value for one in found] == [b"fine"]
    assert await log(settings, small) == []


async def test_the_topic_is_made_as_safe_as_the_settings_ask(settings: KafkaSettings, name: str) -> None:
    async with open_admin(settings) as admin:
        assert await create_delays(admin, settings, name) == WAITS
        assert await create_delays(admin, settings, name) == WAITS
        live = await admin.topic_settings(name)
        partitions = await admin.led_partitions(name)
    assert {len(part.replicas) for part in partitions} == {3}
    wanted = {
        "min.insync.replicas": "2",
        "unclean.leader.election.enable": "false",
        "retention.ms": "-1",
        "message.timestamp.type": "LogAppendTime",
    }
    assert wanted.items() <= live.items()


async def test_many_users_share_one_mover(settings: KafkaSettings, topic: str, name: str) -> None:
    shared = SharedDelays(settings, name)
    async with shared.in_use() as one, shared.in_use() as other:
        assert one is other
        await postpone(one, postponement(topic, "an hour", 3600))
        await until_members(settings, name, 1, 15)
    assert await members(settings, name) == 0
    async with shared.in_use() as later:
        assert later is not one
        await until_members(settings, name, 1, 15)


async def test_without_a_broker_nothing_is_called_stored(name: str) -> None:
    settings = read_settings("kafka://127.0.0.1:1", {"request_timeout_seconds": 1})
    async with open_delays(settings, f"not-{name}") as delays:
        with pytest.raises(BrokerUnavailable):
            await delays.postpone([postponement("t", "x", 1)], deadline=time.monotonic() + 2)
        assert await delays.postpone([], deadline=0) == ()
