"""Attempts are written beside the lane, and whoever has it next knows them all (C4)."""

from __future__ import annotations

import asyncio
import time
from datetime import timedelta

import aio_pika
import pytest

from reliamq.spi import Ack, GroupSpec, Retry, TopicSpec
from reliamq_rabbitmq.catalog.names import ledger_queue, members_exchange
from reliamq_rabbitmq.consuming.subscription import open_subscription
from reliamq_rabbitmq.publisher import open_publisher
from reliamq_rabbitmq.settings import RabbitmqSettings
from reliamq_rabbitmq.storage.storage import open_storage
from reliamq_rabbitmq.wire.attempts import Attempts
from reliamq_rabbitmq.wire.channel import Fate, Received
from reliamq_rabbitmq.wire.connection import close, open_connection
from reliamq_rabbitmq.wire.frames import header_table
from reliamq_rabbitmq.wire.journal import open_journal
from tests.rabbitmq.conftest import amqp_url, declare, message
from tests.servers.rabbitmq import RabbitmqCluster

pytestmark = [pytest.mark.anyio, pytest.mark.xdist_group("rabbitmq"), pytest.mark.timeout(120)]

FOREVER = timedelta(minutes=10)


@pytest.mark.parametrize("count", [1, 50, 500])
async def test_who_waited_for_a_ledger_reads_also_what_was_written_while_it_waited(
    settings: RabbitmqSettings, topic: str, count: int
) -> None:
    """The one before holds the knock of the one that waits, and what it writes after that is given back behind it."""
    queue = ledger_queue(topic, "g", 0)
    first, second = list[Received](), list[Received]()
    async with (
        open_connection(settings, "first") as one,
        open_connection(settings, "second") as two,
        open_journal(one, settings, queue, first.append) as before,
    ):
        await before.read_all()
        async with open_journal(two, settings, queue, second.append) as waiting:
            reading = asyncio.create_task(waiting.read_all())
            await asyncio.sleep(0.5)
            assert not reading.done()
            records = [(header_table(()), Attempts(failures=number).record("m")) for number in range(count)]
            assert set(await before.write(records, deadline=time.monotonic() + 10)) == {Fate.CONFIRMED}
            while len(first) < count:
                await asyncio.sleep(0.01)
            await close(one)
            await reading
            assert [Attempts.read(record.body)[1].failures for record in second] == list(range(count))


async def test_what_others_write_into_ledger_and_roster_harms_nobody(
    rabbitmq: RabbitmqCluster, settings: RabbitmqSettings
) -> None:
    """Rubbish is said and removed; attempts of a later version, with more in them, are kept."""
    topic = await declare(settings, "g")
    rubbish = [b"3", b"", b'{"id": 7}', b'{"id": "m", "failures": "many"}', b"\xff", b"[]", b'{"id": "x", "new": 1}']
    async with await aio_pika.connect(amqp_url(rabbitmq)) as connection:
        channel = await connection.channel()
        for lane in range(settings.lanes):
            for body in rubbish:
                await channel.default_exchange.publish(aio_pika.Message(body), ledger_queue(topic, "g", lane))
        async with open_publisher(settings) as publisher:
            batch = [
                message(topic, "one", "a", headers={"reliamq-due": "1", "reliamq-failures": "nan"}),
                message(topic, "two", "b"),
            ]
            await publisher.send(batch, deadline=time.monotonic() + 10)
        async with open_subscription(settings, topic, "g", FOREVER) as member:
            taken = list(await member.receive(2, max_bytes=1 << 20, wait=FOREVER))
            members = await channel.get_exchange(members_exchange(topic, "g"), ensure=False)
            for body in rubbish:
                await members.publish(aio_pika.Message(body), "")
            while len(taken) < 2:
                taken += await member.receive(2, max_bytes=1 << 20, wait=FOREVER)
            assert not await member.settle([Retry(taken[0], timedelta()), Ack(taken[1])])
            (again,) = await member.receive(2, max_bytes=1 << 20, wait=FOREVER)
            assert again.failures == 1
            assert not await member.settle([Ack(again)])


async def test_names_that_are_as_long_as_can_be_declared_can_be_consumed(settings: RabbitmqSettings) -> None:
    group, topic = "g" * 60, f"{time.time_ns()}".rjust(57, "t")
    async with open_storage(settings) as storage:
        assert not await storage.declare([TopicSpec(topic, (GroupSpec(group),))])
    async with open_publisher(settings) as publisher:
        await publisher.send([message(topic, "one")], deadline=time.monotonic() + 10)
    async with open_subscription(settings, topic, group, FOREVER) as member:
        (one,) = await member.receive(1, max_bytes=1 << 20, wait=timedelta(seconds=30))
        assert not await member.settle([Ack(one)])
