"""Safe shelter on a real cluster: what is declared, what is left alone, and what is said of it (S1 C9)."""

from __future__ import annotations

import time
import uuid
from typing import Any
from urllib.parse import quote

import aio_pika
import anyio
import pytest

from reliamq.spi import BrokerUnavailable, Confirmation, GroupSpec, Rejection, Severity, TopicSpec
from reliamq_rabbitmq.catalog.names import lane_queue, ledger_queue
from reliamq_rabbitmq.catalog.topology import count_lanes, open_topology
from reliamq_rabbitmq.publisher import open_publisher
from reliamq_rabbitmq.settings import RabbitmqSettings
from reliamq_rabbitmq.storage.storage import open_storage
from reliamq_rabbitmq.wire.connection import open_connection
from tests.rabbitmq.conftest import LANES, amqp_url, declare, delete_queue, drain, message
from tests.servers.rabbitmq import RabbitmqCluster

pytestmark = [pytest.mark.anyio, pytest.mark.xdist_group("rabbitmq")]


def spec(topic: str, *groups: str, **fields: Any) -> TopicSpec:
    return TopicSpec(topic, tuple(GroupSpec(group) for group in groups), **fields)


def queue_of(cluster: RabbitmqCluster, name: str) -> dict[str, Any]:
    found = cluster.call(f"queues/%2F/{quote(name, safe='')}")
    assert isinstance(found, dict)
    return found


async def test_a_lane_is_a_durable_quorum_queue_of_three_members_that_drops_nothing(
    rabbitmq: RabbitmqCluster, topic: str
) -> None:
    """S1"""
    for name in (lane_queue(topic, "g", 0), lane_queue(topic, "g", LANES - 1), ledger_queue(topic, "g", 0)):
        queue = queue_of(rabbitmq, name)
        assert (queue["type"], queue["durable"], queue["auto_delete"]) == ("quorum", True, False)
        assert len(queue["members"]) == 3
        assert queue["arguments"]["x-overflow"] == "reject-publish"
        assert queue["arguments"]["x-single-active-consumer"] is True
        assert queue["arguments"]["x-delivery-limit"] > 1_000_000
        assert not queue["arguments"].keys() & {"x-max-length", "x-message-ttl", "x-expires"}


async def test_declaring_at_once_from_many_sides_makes_one_topic_and_what_is_published_is_there_once(
    settings: RabbitmqSettings,
) -> None:
    """S1"""
    topic = f"test-{uuid.uuid4()}"
    sizes: list[str] = []

    async def declare_one(limit: int) -> None:
        """As an application's start does it: RabbitMQ 3.10 now and then answers one of many with INTERNAL_ERROR."""
        while True:
            try:
                async with open_storage(settings) as storage:
                    findings = await storage.declare([spec(topic, "g", max_message_bytes=limit)])
            except BrokerUnavailable as error:
                if "INTERNAL_ERROR" not in str(error):
                    raise
                await anyio.sleep(0.2)
            else:
                sizes.extend(one.found for one in findings if one.setting == "max_message_bytes")
                return

    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            for number in range(6):
                tasks.start_soon(declare_one, 1000 + number)
    async with open_publisher(settings) as publisher:
        (outcome,) = await publisher.send([message(topic, "one")], deadline=time.monotonic() + 10)

    assert isinstance(outcome, Confirmation)
    assert len(set(sizes)) == 1, "all were told of the same size"
    assert len(sizes) == 5
    assert len(await drain(settings, topic, 1)) == 1


async def test_a_declaration_that_broke_off_halfway_is_finished_by_the_next(
    settings: RabbitmqSettings,
) -> None:
    """S1: until then the group gets nothing, so nobody takes it for whole."""
    topic = f"test-{uuid.uuid4()}"
    async with open_connection(settings, "half") as connection, open_topology(connection, settings) as topology:
        await topology.topic(topic)
        await topology.mark(topic, "g", LANES)
        await topology.queue(lane_queue(topic, "g", 1))
    async with open_publisher(settings) as publisher:
        (outcome,) = await publisher.send([message(topic, "early")], deadline=time.monotonic() + 10)
        assert isinstance(outcome, Rejection)
    async with open_storage(settings) as storage:
        assert not await storage.declare([spec(topic, "g")])
    async with open_publisher(settings) as publisher:
        outcomes = await publisher.send(
            [message(topic, f"{number}", f"k{number}") for number in range(20)], deadline=time.monotonic() + 10
        )

    assert {type(one) for one in outcomes} == {Confirmation}
    assert len(await drain(settings, topic, 20)) == 20


async def test_more_lanes_than_there_are_is_a_note_and_changes_nothing(settings: RabbitmqSettings, topic: str) -> None:
    """S1"""
    wider = settings.model_copy(update={"lanes": 8})
    async with open_storage(wider) as storage:
        (finding,) = await storage.declare([spec(topic, "g")])

    assert (finding.severity, finding.setting, finding.found, finding.required) == (Severity.NOTE, "lanes", "2", "8")
    async with open_connection(settings, "count") as connection:
        assert await count_lanes(connection, settings, topic, "g") == LANES


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(None, id="classic"),
        pytest.param({"x-queue-type": "quorum"}, id="without a single consumer"),
        pytest.param({"x-queue-type": "quorum", "x-max-length": 10}, id="bounded"),
    ],
)
async def test_a_queue_in_the_place_of_a_lane_that_is_otherwise_is_said_and_left_alone(
    rabbitmq: RabbitmqCluster, settings: RabbitmqSettings, arguments: dict[str, Any] | None
) -> None:
    """S1 S3"""
    topic = f"test-{uuid.uuid4()}"
    name = lane_queue(topic, "g", 0)
    async with await aio_pika.connect(amqp_url(rabbitmq)) as connection:
        await (await connection.channel()).declare_queue(name, durable=True, arguments=arguments)
    async with open_storage(settings) as storage:
        findings = await storage.declare([spec(topic, "g")])

    assert [(one.severity, topic in one.subject) for one in findings] == [(Severity.LOSES, True)]
    assert name.partition("@")[2] in str(findings[0]) or "queues" in findings[0].setting
    assert (queue_of(rabbitmq, name)["arguments"] or {}) == (arguments or {})


async def test_a_group_that_is_declared_later_gets_what_is_published_from_then_on(settings: RabbitmqSettings) -> None:
    """C9"""
    topic = await declare(settings, "first")
    async with open_publisher(settings) as publisher:
        await publisher.send([message(topic, "before")], deadline=time.monotonic() + 10)
        async with open_storage(settings) as storage:
            await storage.declare([spec(topic, "first", "g")])
        await publisher.send([message(topic, "after")], deadline=time.monotonic() + 10)

    assert [one.body for one in await drain(settings, topic, 1)] == [b"after"]


async def test_a_lane_that_was_deleted_is_declared_again_and_the_others_stay_what_they_are(
    rabbitmq: RabbitmqCluster, settings: RabbitmqSettings
) -> None:
    """S1: whichever is missing, nobody may take the group for one with fewer lanes."""
    wide = settings.model_copy(update={"lanes": 4})
    for number in range(4):
        topic = await declare(wide, "g")
        await delete_queue(rabbitmq, lane_queue(topic, "g", number))
        await delete_queue(rabbitmq, ledger_queue(topic, "g", number))
        async with open_storage(wide) as storage:
            assert not await storage.declare([spec(topic, "g")])
        async with open_publisher(settings) as publisher:
            batch = [message(topic, f"{each}", f"k{each}") for each in range(40)]
            assert {type(one) for one in await publisher.send(batch, deadline=time.monotonic() + 10)} == {Confirmation}
        assert len(await drain(wide, topic, 40)) == 40


async def test_queues_that_have_another_number_of_members_by_now_are_the_audits_business(
    settings: RabbitmqSettings, topic: str
) -> None:
    """S1"""
    async with open_storage(settings.model_copy(update={"replicas": 5})) as storage:
        assert not await storage.declare([spec(topic, "g")])
