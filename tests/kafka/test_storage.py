"""Safe shelter on a real cluster: what is declared is there, and what is there is left alone (S1, C9)."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta

import anyio
import pytest
from aiokafka import AIOKafkaConsumer
from aiokafka.admin import NewTopic
from aiokafka.protocol.commit import OffsetFetchResponse_v3

from reliamq.spi import BrokerUnavailable, Confirmation, Durability, Finding, GroupSpec, Rejection, Severity, TopicSpec
from reliamq_kafka.catalog.groups import DeclaredGroup, Groups
from reliamq_kafka.catalog.own_topics import GROUPS_TOPIC
from reliamq_kafka.catalog.topics import OVERHEAD_BYTES
from reliamq_kafka.publisher import open_publisher
from reliamq_kafka.settings import KafkaSettings, read_settings
from reliamq_kafka.storage.storage import open_storage
from reliamq_kafka.wire.admin import Admin, group_id, open_admin
from tests.kafka.conftest import PARTITIONS, log_of, message
from tests.servers.kafka import KafkaCluster

pytestmark = [pytest.mark.anyio, pytest.mark.xdist_group("kafka")]


@pytest.fixture
def settings(kafka: KafkaCluster) -> KafkaSettings:
    return read_settings(kafka.url, {"request_timeout_seconds": 5, "partitions": PARTITIONS})


def spec(*groups: str | GroupSpec, topic: str = "", **fields: object) -> TopicSpec:
    named = tuple(one if isinstance(one, GroupSpec) else GroupSpec(one) for one in groups)
    return TopicSpec(topic or f"test-{uuid.uuid4()}", named, **fields)  # type: ignore[arg-type]


async def declare(settings: KafkaSettings, *topics: TopicSpec) -> list[Finding]:
    async with open_storage(settings) as storage:
        return list(await storage.declare(topics))


async def offsets(settings: KafkaSettings, topic: str, group: str) -> dict[int, int]:
    async with open_admin(settings) as admin:
        return await admin.committed(group_id(topic, group), topic, range(PARTITIONS))


async def publish(settings: KafkaSettings, topic: str, count: int) -> None:
    async with open_publisher(settings) as publisher:
        sent = [message(topic, str(number), None) for number in range(count)]
        outcomes = await publisher.send(sent, deadline=time.monotonic() + 20)
    assert {type(one) for one in outcomes} == {Confirmation}


@asynccontextmanager
async def member(settings: KafkaSettings, topic: str, group: str) -> AsyncIterator[AIOKafkaConsumer]:
    consumer = AIOKafkaConsumer(
        topic,
        bootstrap_servers=list(settings.servers),
        group_id=group_id(topic, group),
        enable_auto_commit=False,
        auto_offset_reset="earliest",
    )
    await consumer.start()
    try:
        yield consumer
    finally:
        await consumer.stop()


async def test_a_declared_topic_is_as_safe_as_asked(settings: KafkaSettings) -> None:
    """S1"""
    asked = spec("g", max_message_bytes=5000)

    assert await declare(settings, asked) == []

    async with open_admin(settings) as admin:
        partitions = await admin.partitions(asked.name) or []
        live = await admin.topic_settings(asked.name)
        table = await admin.topic_settings(GROUPS_TOPIC)
        table_partitions = await admin.partitions(GROUPS_TOPIC) or []
    assert [len(part.replicas) for part in partitions] == [3] * PARTITIONS
    expected = {
        "min.insync.replicas": "2",
        "unclean.leader.election.enable": "false",
        "cleanup.policy": "delete",
        "retention.ms": "-1",
        "retention.bytes": "-1",
        "message.timestamp.type": "LogAppendTime",
        "max.message.bytes": str(5000 + OVERHEAD_BYTES),
    }
    assert {name: live[name] for name in expected} == expected
    assert (table["cleanup.policy"], table["min.insync.replicas"]) == ("compact", "2")
    assert [len(part.replicas) for part in table_partitions] == [3]
    assert await offsets(settings, asked.name, "g") == dict.fromkeys(range(PARTITIONS), 0)


async def test_declaring_five_times_at_once_is_the_same_as_once(settings: KafkaSettings) -> None:
    """S1"""
    asked = spec("one", GroupSpec("two", "latest"))
    findings: list[Finding] = []

    async def one() -> None:
        findings.extend(await declare(settings, asked))

    async with anyio.create_task_group() as tasks:
        for _ in range(5):
            tasks.start_soon(one)

    assert findings == []
    for group in ("one", "two"):
        assert await offsets(settings, asked.name, group) == dict.fromkeys(range(PARTITIONS), 0)


async def test_a_topic_that_is_there_and_loses_messages_is_left_alone_and_said(settings: KafkaSettings) -> None:
    """S1"""
    weak = {
        "cleanup.policy": "compact,delete",
        "retention.ms": "3600000",
        "retention.bytes": "1000000",
        "unclean.leader.election.enable": "true",
        "max.message.bytes": str(1000 + OVERHEAD_BYTES),
    }
    asked = spec("g")
    async with open_admin(settings) as admin:
        await admin.create(NewTopic(asked.name, 1, 1, topic_configs=weak))

        findings = await declare(settings, asked)

        live = await admin.topic_settings(asked.name)
        assert len(await admin.partitions(asked.name) or []) == 1
    assert {name: live[name] for name in weak} == weak
    assert {one.setting for one in findings if one.severity is Severity.LOSES} == {
        "cleanup.policy",
        "unclean.leader.election.enable",
        "replicas",
    }
    assert {one.setting for one in findings if one.severity is Severity.RISKS} == {
        "retention.ms",
        "retention.bytes",
        "message.timestamp.type",
    }
    assert {one.setting for one in findings if one.severity is Severity.NOTE} == {"max.message.bytes", "partitions"}
    assert all(one.subject == f"topic {asked.name}" and one.why and one.fix for one in findings)


async def test_a_cluster_that_is_too_small_is_a_finding_unless_only_development_is_asked(
    settings: KafkaSettings,
) -> None:
    """S1 S3"""
    large = settings.model_copy(update={"replication_factor": 5, "min_insync_replicas": 4})
    real, toy = spec("g"), spec("g", durability=Durability.DEVELOPMENT)

    findings = await declare(large, real, toy)

    assert [(one.severity, one.subject, one.setting) for one in findings] == [
        (Severity.LOSES, f"topic {GROUPS_TOPIC}", "min.insync.replicas"),  # it is there, with fewer
        (Severity.LOSES, f"topic {real.name}", "topic"),
        (Severity.RISKS, f"topic {toy.name}", "min.insync.replicas"),  # three, and all of them
        (Severity.NOTE, f"topic {toy.name}", "min.insync.replicas"),
    ]
    assert not any(one.severity is Severity.LOSES for one in await declare(large, toy))
    async with open_admin(settings) as admin:
        assert await admin.partitions(real.name) is None
        assert [len(part.replicas) for part in await admin.partitions(toy.name) or []] == [3] * PARTITIONS
        assert (await admin.topic_settings(toy.name))["min.insync.replicas"] == "3"


async def test_a_new_group_begins_at_the_first_or_behind_the_last_message(settings: KafkaSettings) -> None:
    """C9"""
    old = spec("old")
    await declare(settings, old)
    await publish(settings, old.name, 3 * PARTITIONS)

    await declare(settings, spec("old", "earliest", GroupSpec("latest", "latest"), topic=old.name))

    assert await offsets(settings, old.name, "earliest") == dict.fromkeys(range(PARTITIONS), 0)
    ends = [len(partition) for partition in await log_of(settings, old.name)]
    assert await offsets(settings, old.name, "latest") == dict(enumerate(ends))


async def test_a_group_that_is_there_is_left_where_it_is(settings: KafkaSettings) -> None:
    """S1 C9: at work or not, and where it has no offsets because it has not finished anything yet."""
    asked = spec("g", GroupSpec("h", "latest"))
    await declare(settings, asked)
    await publish(settings, asked.name, 3 * PARTITIONS)
    async with member(settings, asked.name, "g") as one, member(settings, asked.name, "undeclared"):
        await one.commit(dict.fromkeys(one.assignment(), 2))
        findings = await declare(settings, spec("g", GroupSpec("h", "latest"), "undeclared", topic=asked.name))
        assert findings == []
        assert await offsets(settings, asked.name, "undeclared") == {}
    await declare(settings, asked)

    assert await offsets(settings, asked.name, "g") == dict.fromkeys(range(PARTITIONS), 2)
    assert await offsets(settings, asked.name, "h") == dict.fromkeys(range(PARTITIONS), 0)


async def test_a_group_whose_offsets_kafka_forgot_stays_known_and_begins_where_it_began(
    settings: KafkaSettings,
) -> None:
    """P3 C9: what it has not finished must not be skipped, so not at the end, wherever it was declared to begin."""
    asked = spec()
    await declare(settings, asked)
    async with open_admin(settings) as admin:
        first = (1,) * PARTITIONS
        await Groups(admin, settings).add([DeclaredGroup(asked.name, "g", first, timedelta(days=7))])
    await publish(settings, asked.name, 3 * PARTITIONS)  # so it is routed

    await declare(settings, spec(GroupSpec("g", "latest"), topic=asked.name))

    assert await offsets(settings, asked.name, "g") == dict.fromkeys(range(PARTITIONS), 1)


async def test_retention_is_raised_and_not_lowered(settings: KafkaSettings) -> None:
    """S1"""
    asked = spec("g", retention=timedelta(hours=2))
    await declare(settings, asked)

    longer = await declare(settings, spec("g", topic=asked.name, retention=timedelta(hours=3)))
    shorter = await declare(settings, spec("g", "h", topic=asked.name, retention=timedelta(hours=1)))

    assert longer == []
    assert [(one.setting, one.found, one.severity) for one in shorter] == [("retention", "3:00:00", Severity.NOTE)]


async def test_an_open_publisher_hears_of_a_topic_and_a_group_as_soon_as_they_are_declared(
    settings: KafkaSettings,
) -> None:
    """P3 C9"""
    asked = spec("g")
    async with open_publisher(settings) as publisher:
        seen = []
        for topics in ((), (spec(topic=asked.name),), (asked,)):
            await declare(settings, *topics)
            sent = [message(asked.name, "m"), message(asked.name, "n", only_group="g")]
            seen += [type(one) for one in await publisher.send(sent, deadline=time.monotonic() + 20)]

    assert seen == [Rejection] * 4 + [Confirmation] * 2


async def test_a_cluster_that_cannot_be_reached_is_unavailable() -> None:
    nowhere = read_settings("kafka://127.0.0.1:1", {"request_timeout_seconds": 1})
    with pytest.raises(BrokerUnavailable, match=r"127\.0\.0\.1:1"):
        await declare(nowhere, spec("g"))


async def test_a_group_whose_coordinator_cannot_say_is_not_taken_for_one_without_offsets(
    settings: KafkaSettings,
) -> None:
    """C9: the client's own method would take an error of the whole answer for an empty one."""
    loading, moved = OffsetFetchResponse_v3(0, [], 14), OffsetFetchResponse_v3(0, [("t", [(0, -1, "", 16)])], 0)
    told = OffsetFetchResponse_v3(0, [("t", [(0, 7, "", 0), (1, -1, "", 0)])], 0)
    answers = [loading, moved, told]

    class Client:
        async def find_coordinator(self, group: str) -> int:
            return 1

        async def _send_request(self, request: object, node: int) -> object:
            return answers.pop(0)

    assert await Admin(Client(), settings).committed("g@t", "t", [0, 1]) == {0: 7}
    assert answers == []
