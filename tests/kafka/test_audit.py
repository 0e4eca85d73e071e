"""The live audit: a sound topic passes, and each unsafe value yields its finding with what to do about it (S2, S3).

What cannot be had on the shared cluster without stopping a broker (racks, replicas out of sync, a small cluster) is
asked of the functions that judge the answers, with answers changed in one place.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import NewTopic
from aiokafka.admin.records_to_delete import RecordsToDelete
from aiokafka.errors import RequestTimedOutError
from aiokafka.protocol.metadata import MetadataRequest

from reliamq.spi import BrokerUnavailable, Durability, Finding, GroupSpec, Severity, TopicSpec
from reliamq_kafka.audit import cluster, topic as topics
from reliamq_kafka.audit.audit import audit
from reliamq_kafka.audit.commands import Commands
from reliamq_kafka.catalog.groups import DeclaredGroup, Groups
from reliamq_kafka.catalog.own_topics import DELAYS_TOPIC, GROUPS_TOPIC, KEPT, LOG, TABLE, copies
from reliamq_kafka.settings import KafkaSettings, read_settings
from reliamq_kafka.wire.admin import Admin, Broker, Partition, group_id, open_admin
from reliamq_kafka.wire.log_reader import open_log_reader

pytestmark = [pytest.mark.anyio, pytest.mark.xdist_group("kafka")]

SOUND = {"retention.ms": "-1", "message.timestamp.type": "LogAppendTime", "max.message.bytes": "1100000"}
LOSES, RISKS, NOTE, UNSEEN = Severity.LOSES, Severity.RISKS, Severity.NOTE, Severity.UNSEEN
DEVELOPMENT = Durability.DEVELOPMENT


@pytest.fixture
async def admin(settings: KafkaSettings) -> AsyncIterator[Admin]:
    async with open_admin(settings) as admin:
        yield admin


@pytest.fixture
def commands(settings: KafkaSettings) -> Commands:
    return Commands(settings)


async def topic_with(admin: Admin, *, partitions: int = 3, replicas: int = 3, **configs: str) -> str:
    topic = f"audit-{uuid.uuid4()}"
    await admin.create(NewTopic(topic, partitions, replicas, topic_configs={**SOUND, **configs}))
    return topic


async def commit(settings: KafkaSettings, topic: str, group: str, offset: int, partitions: Sequence[int]) -> None:
    name = group_id(topic, group)
    consumer = AIOKafkaConsumer(bootstrap_servers=list(settings.servers), group_id=name, enable_auto_commit=False)
    await consumer.start()
    try:
        places = [TopicPartition(topic, number) for number in partitions]
        consumer.assign(places)
        await consumer.commit(dict.fromkeys(places, offset))
    finally:
        await consumer.stop()


async def write(settings: KafkaSettings, topic: str, count: int, *, age: float = 0) -> None:
    """Records in partition 0 whose producer says that they are ``age`` seconds old."""
    producer = AIOKafkaProducer(bootstrap_servers=list(settings.servers), acks="all")
    await producer.start()
    try:
        for _ in range(count):
            stamp = int((time.time() - age) * 1000)
            await producer.send_and_wait(topic, b"x", partition=0, timestamp_ms=stamp)
    finally:
        await producer.stop()


async def findings_on(admin: Admin, settings: KafkaSettings, topic: str, **spec: Any) -> list[Finding]:
    """What the audit says about this topic."""
    found = await audit(admin, settings, [TopicSpec(topic, **spec)])
    return [finding for finding in found if topic in finding.subject]


async def the_one(admin: Admin, settings: KafkaSettings, topic: str, **spec: Any) -> Finding:
    (finding,) = await findings_on(admin, settings, topic, **spec)
    return finding


# --- topics -----------------------------------------------------------------------------------------------------------


async def test_a_sound_topic_on_a_sound_cluster_has_nothing_to_be_said(admin: Admin, settings: KafkaSettings) -> None:
    topic = await topic_with(admin)
    await commit(settings, topic, "g", 0, range(3))
    assert await audit(admin, settings, [TopicSpec(topic, (GroupSpec("g"),))]) == []
    assert await audit(admin, settings, []) == []


@pytest.mark.parametrize(
    ("change", "severity"),
    [
        ({"min.insync.replicas": "1"}, LOSES),
        ({"unclean.leader.election.enable": "true"}, LOSES),
        ({"cleanup.policy": "compact"}, LOSES),
        ({"cleanup.policy": "compact,delete"}, LOSES),
        ({"retention.ms": "604800000"}, RISKS),
        ({"retention.bytes": "1000000"}, RISKS),
        ({"message.timestamp.type": "CreateTime"}, NOTE),
        ({"max.message.bytes": "1048588"}, NOTE),
    ],
)
async def test_an_unsafe_setting_is_its_finding_and_the_command_mends_it(
    admin: Admin, settings: KafkaSettings, change: dict[str, str], severity: Severity
) -> None:
    topic = await topic_with(admin, **change)
    finding = await the_one(admin, settings, topic)
    ((setting, value),) = change.items()
    assert (finding.severity, finding.setting, finding.found) == (severity, setting, value)
    assert "kafka-configs.sh --bootstrap-server 127.0.0.1:" in finding.fix
    assert f"--entity-name {topic} --alter --add-config {setting}=" in finding.fix

    mended = finding.fix.rpartition("--add-config ")[2].rpartition("=")[2]
    again = await topic_with(admin, **{setting: mended})
    assert await findings_on(admin, settings, again) == []


@pytest.mark.parametrize(
    ("policy", "change", "severity"),
    [
        (TABLE, {"min.insync.replicas": "1"}, LOSES),
        (TABLE, {"unclean.leader.election.enable": "true"}, LOSES),
        (TABLE, {"cleanup.policy": "compact,delete"}, LOSES),
        (LOG, {"cleanup.policy": "compact"}, LOSES),
        (LOG, {"retention.ms": "604800000"}, RISKS),
        (LOG, {"retention.bytes": "1000000"}, RISKS),
    ],
)
def test_an_unsafe_setting_of_a_topic_of_reliamqs_own_is_a_finding(
    settings: KafkaSettings, policy: str, change: dict[str, str], severity: Severity
) -> None:
    name = {TABLE: GROUPS_TOPIC, LOG: DELAYS_TOPIC}[policy]
    sound = {**KEPT, **copies(settings, 3), "cleanup.policy": policy}

    def judged(values: dict[str, str]) -> list[Finding]:
        return topics.own_topic_findings(name, [WHOLE], THREE, values, Durability.REPLICATED, settings)

    assert judged(sound) == []
    assert {(one.severity, one.setting) for one in judged({"unknown": "1"})} >= {
        (UNSEEN, setting) for setting in change
    }

    (finding,) = judged({**sound, **change})

    ((setting, value),) = change.items()
    assert (finding.severity, finding.setting, finding.found) == (severity, setting, value)
    assert f"--entity-name {name} --alter --add-config {setting}=" in finding.fix


async def test_by_create_time_and_a_retention_clocks_decide_what_is_removed(
    admin: Admin, settings: KafkaSettings
) -> None:
    topic = await topic_with(admin, **{"retention.ms": "604800000", "message.timestamp.type": "CreateTime"})
    found = {one.setting: one for one in await findings_on(admin, settings, topic)}
    assert found.keys() == {"retention.ms", "message.timestamp.type"}
    assert found["message.timestamp.type"].severity is RISKS


async def test_one_replica_loses_whatever_min_insync_says_and_is_accepted_for_development(
    admin: Admin, settings: KafkaSettings
) -> None:
    topic = await topic_with(admin, replicas=1)  # min.insync.replicas is 2, and Kafka does not keep to it
    finding = await the_one(admin, settings, topic)
    assert (finding.severity, finding.setting) == (LOSES, "replicas")
    assert finding.found == "1 (partitions 0, 1, 2)"
    (plan,) = json.loads(finding.fix[finding.fix.index("{") :])["partitions"]
    assert plan["topic"] == topic
    assert sorted(plan["replicas"]) == [1, 2, 3]
    assert "kafka-reassign-partitions.sh" in finding.fix

    assert (await the_one(admin, settings, topic, durability=DEVELOPMENT)).severity is RISKS


async def test_two_replicas_are_a_risk(admin: Admin, settings: KafkaSettings) -> None:
    topic = await topic_with(admin, replicas=2)
    assert (await the_one(admin, settings, topic)).severity is RISKS


async def test_a_node_alone_is_accepted_for_development_and_said(admin: Admin, settings: KafkaSettings) -> None:
    unsafe = {"min.insync.replicas": "1", "unclean.leader.election.enable": "true"}
    topic = await topic_with(admin, replicas=1, **unsafe)
    strict = await findings_on(admin, settings, topic)
    eased = await findings_on(admin, settings, topic, durability=DEVELOPMENT)
    assert [one.severity for one in strict] == [LOSES] * 3
    assert [one.severity for one in eased] == [RISKS] * 3


async def test_a_missing_topic_is_named_and_not_made_by_asking(admin: Admin, settings: KafkaSettings) -> None:
    topic = f"audit-{uuid.uuid4()}"
    asked: list[MetadataRequest] = []
    send = admin._client._send_request

    async def listen(request: Any, node_id: int | None = None) -> Any:
        asked.append(request) if isinstance(request, MetadataRequest) else None
        return await send(request, node_id)

    admin._client._send_request = listen
    finding = await the_one(admin, settings, topic, groups=(GroupSpec("g"),))
    assert (finding.severity, finding.setting, finding.found) == (LOSES, "topic", "missing")
    assert "declare" in finding.fix
    naming = [one for one in asked if one._topics]
    assert naming
    assert all(one._allow_auto_topic_creation is False for one in naming)  # a broker may have auto-create on


async def test_a_name_that_kafka_cannot_have_is_unseen(admin: Admin, settings: KafkaSettings) -> None:
    finding = await the_one(admin, settings, "größe")
    assert finding.severity is UNSEEN
    assert "InvalidTopic" in finding.fix


# --- groups -----------------------------------------------------------------------------------------------------------


async def test_a_group_that_is_not_declared_is_named(admin: Admin, settings: KafkaSettings) -> None:
    topic = await topic_with(admin)
    finding = await the_one(admin, settings, topic, groups=(GroupSpec("g"),))
    assert (finding.severity, finding.setting, finding.found) == (LOSES, "group g", "missing")

    await commit(settings, topic, "g", 0, [0, 2])
    finding = await the_one(admin, settings, topic, groups=(GroupSpec("g"),))
    assert (finding.severity, finding.found) == (LOSES, "without a position in partition 1")


async def test_a_declared_group_whose_offsets_kafka_forgot_is_named(admin: Admin, settings: KafkaSettings) -> None:
    """S2: nobody asks about it here, and Kafka does not list it any more."""
    topic = await topic_with(admin)
    groups = Groups(admin, settings)
    await groups.create()
    await groups.add([DeclaredGroup(topic, "forgotten", (0, 0, 0), timedelta(days=7))])
    finding = await the_one(admin, settings, topic)
    assert (finding.severity, finding.setting, finding.found) == (LOSES, "group forgotten", "missing")


async def test_a_lag_that_will_expire_unread_is_counted_and_dated(admin: Admin, settings: KafkaSettings) -> None:
    """Also of a group that nobody asked about."""
    topic = await topic_with(admin, **{"retention.ms": "60000", "message.timestamp.type": "CreateTime"})
    await commit(settings, topic, "ahead", 5, [0])
    await commit(settings, topic, "ahead", 0, [1, 2])
    await commit(settings, topic, "behind", 0, range(3))
    await commit(settings, topic, "close", 4, [0])
    await commit(settings, topic, "close", 0, [1, 2])
    await write(settings, topic, 4, age=45)
    await write(settings, topic, 1)

    found = [one for one in await findings_on(admin, settings, topic) if one.setting.startswith("group")]
    (finding,) = found
    assert (finding.severity, finding.setting) == (LOSES, "group behind")
    assert "behind by 5 messages, the oldest of which expires from 20" in finding.found
    assert f"--entity-name {topic} --alter --add-config retention.ms=-1" in finding.fix


async def test_a_lag_that_expires_in_days_is_a_risk(admin: Admin, settings: KafkaSettings) -> None:
    ten_days = str(int(timedelta(days=10).total_seconds() * 1000))
    topic = await topic_with(admin, **{"retention.ms": ten_days, "message.timestamp.type": "CreateTime"})
    await commit(settings, topic, "g", 0, range(3))
    await write(settings, topic, 1, age=timedelta(days=6).total_seconds())
    (finding,) = [one for one in await findings_on(admin, settings, topic) if one.setting == "group g"]
    assert finding.severity is RISKS

    await write(settings, topic, 1, age=timedelta(days=9.5).total_seconds())  # behind the other: it is not the oldest
    (finding,) = [one for one in await findings_on(admin, settings, topic) if one.setting == "group g"]
    assert finding.severity is RISKS


async def test_messages_that_were_removed_unread_are_counted(admin: Admin, settings: KafkaSettings) -> None:
    topic = await topic_with(admin)
    await commit(settings, topic, "g", 1, range(3))
    await write(settings, topic, 5)
    await admin._client.delete_records({TopicPartition(topic, 0): RecordsToDelete(4)})

    found = await findings_on(admin, settings, topic, groups=(GroupSpec("g"),))
    behind = [one for one in found if "behind the start" in one.found]
    (finding,) = behind
    assert finding.severity is LOSES
    assert finding.why.startswith("3 messages were removed unread")
    assert f"--group 'g@{topic}' --topic {topic} --reset-offsets --to-earliest" in finding.fix


async def test_a_group_that_stands_beyond_the_log_is_named(admin: Admin, settings: KafkaSettings) -> None:
    """As after an unclean election: the log is shorter than what the group has finished."""
    topic = await topic_with(admin)
    await commit(settings, topic, "g", 7, range(3))
    finding = await the_one(admin, settings, topic)
    assert finding.severity is LOSES
    assert finding.found == "ahead of the end of the log in partition 0, 1, 2"
    assert finding.why.startswith("21 messages")


async def test_how_long_a_lag_lasts_that_is_kept_by_size_is_unseen(admin: Admin, settings: KafkaSettings) -> None:
    topic = await topic_with(admin, **{"retention.bytes": "1000000"})
    await commit(settings, topic, "g", 0, range(3))
    await write(settings, topic, 2)
    found = {one.setting: one for one in await findings_on(admin, settings, topic)}
    assert found.keys() == {"retention.bytes", "group g"}
    assert found["group g"].severity is UNSEEN


# --- what may not be read ---------------------------------------------------------------------------------------------


class Denied:
    """A real client whose answers have another error code, as from a cluster that does not permit the question."""

    def __init__(self, client: Any, method: str, code: int) -> None:
        self._real, self._method, self._code = client, method, code

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    async def describe_configs(self, resources: Any) -> Any:
        (answer,) = await self._real.describe_configs(resources)
        if self._method == "describe_configs":
            answer.resources = [(self._code, *rest) for _, *rest in answer.resources]
        return [answer]

    async def _send_request(self, request: Any, node_id: int | None = None) -> Any:
        answer = await self._real._send_request(request, node_id)
        if type(request).__name__ == self._method:
            answer.error_code = self._code
        return answer


class Silent:
    """A real client to which one broker gives no answer."""

    def __init__(self, client: Any, broker: str) -> None:
        self._real, self._broker = client, broker

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    async def describe_configs(self, resources: Any) -> Any:
        if resources[0].name == self._broker:
            raise RequestTimedOutError
        return await self._real.describe_configs(resources)


@pytest.mark.parametrize(
    ("method", "code", "permission"),
    [
        ("describe_configs", 29, "--operation DescribeConfigs --topic "),
        ("describe_configs", 31, "--operation DescribeConfigs --cluster"),
        ("OffsetFetchRequest", 30, "--operation Describe --group 'g@"),
    ],
)
async def test_what_may_not_be_read_is_unseen_and_no_pass(
    admin: Admin, settings: KafkaSettings, method: str, code: int, permission: str
) -> None:
    topic = await topic_with(admin)
    await commit(settings, topic, "g", 0, range(3))
    admin._client = Denied(admin._client, method, code)
    found = await audit(admin, settings, [TopicSpec(topic, (GroupSpec("g"),))])
    assert {one.severity for one in found} == {UNSEEN}
    assert any(permission in one.fix and one.found == "not permitted to be read" for one in found)


async def test_a_broker_that_is_silent_is_unseen_and_the_others_are_judged(
    admin: Admin, settings: KafkaSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S2"""
    monkeypatch.setattr("reliamq_kafka.wire.admin.ATTEMPTS_SECONDS", 0.5)
    admin._client = Silent(admin._client, "2")
    (finding,) = await audit(admin, settings, [])
    assert (finding.severity, finding.subject, finding.found) == (UNSEEN, "broker 2", "no answer")


async def test_where_nobody_answers_there_is_no_verdict(admin: Admin) -> None:
    """S2"""
    nobody = read_settings("kafka://127.0.0.1:1", {})
    with pytest.raises(BrokerUnavailable, match="nobody listens there"):
        await audit(admin, nobody, [])


async def test_settings_that_a_broker_keeps_to_itself_are_unseen(admin: Admin, commands: Commands) -> None:
    values = {1: {**await admin.broker_settings(1), "offsets.retention.minutes": None, "controller.quorum.voters": ""}}
    rules = cluster.setting_rules(1_000_000, {})
    found = list(cluster.setting_findings(values, rules, Durability.REPLICATED, commands))
    assert [one.severity for one in found] == [UNSEEN, UNSEEN]
    assert "kafka-metadata-quorum.sh" in found[0].fix
    assert "offsets.retention.minutes" in found[1].found


# --- racks and replicas: answers of a cluster in another state --------------------------------------------------------

THREE = [Broker(1, "a:1", "r1"), Broker(2, "b:1", "r2"), Broker(3, "c:1", "r3")]
WHOLE = Partition(0, 1, (1, 2, 3), (1, 2, 3))


def of_partitions(
    commands: Commands, partitions: Sequence[Partition], brokers: Sequence[Broker] = THREE, least: int = 2
) -> list[tuple[Severity, str, str]]:
    found = topics.partition_findings("t", partitions, brokers, least, Durability.REPLICATED, commands)
    return [(one.severity, one.setting, one.found) for one in found]


def test_whole_partitions_on_three_racks_pass(commands: Commands) -> None:
    assert of_partitions(commands, [WHOLE]) == []


def test_replicas_on_one_rack_lose_and_on_two_are_a_risk(commands: Commands) -> None:
    one = [replace(broker, rack="r1") for broker in THREE]
    two = [*one[:2], THREE[2]]
    assert of_partitions(commands, [WHOLE], one) == [(LOSES, "racks of replicas", "all on one (partition 0)")]
    assert of_partitions(commands, [WHOLE], two) == [(RISKS, "racks of replicas", "on two racks (partition 0)")]


def test_replicas_that_must_all_be_in_sync_are_a_risk(commands: Commands) -> None:
    found = of_partitions(commands, [WHOLE], least=3)
    assert found == [(RISKS, "min.insync.replicas", "3 of 3 replicas (partition 0)")]


def test_the_plan_for_other_racks_uses_those_that_there_are(commands: Commands) -> None:
    brokers = [*(replace(broker, rack="r1") for broker in THREE), Broker(4, "d:1", "r2"), Broker(5, "e:1", "r3")]
    (finding,) = topics.partition_findings("t", [WHOLE], brokers, 2, Durability.REPLICATED, commands)
    plan = json.loads(finding.fix[finding.fix.index("{") :])["partitions"][0]
    assert plan["replicas"] == [1, 4, 5]


def test_unknown_racks_are_said_once_for_the_cluster_and_not_guessed(commands: Commands) -> None:
    nowhere = [replace(broker, rack=None) for broker in THREE]
    assert of_partitions(commands, [WHOLE], nowhere) == []
    (finding,) = cluster.cluster_findings("c", nowhere, Durability.REPLICATED)
    assert (finding.severity, finding.setting, finding.found) == (RISKS, "broker.rack", "not configured")
    (finding,) = cluster.cluster_findings("c", [*nowhere[:1], *THREE[1:]], Durability.REPLICATED)
    assert finding.found == "not configured on broker 1"


def test_replicas_that_are_not_in_sync(commands: Commands) -> None:
    lagging, stopped = replace(WHOLE, in_sync=(1, 2)), replace(WHOLE, number=1, in_sync=(1,))
    assert of_partitions(commands, [WHOLE, lagging, stopped]) == [
        (LOSES, "replicas in sync", "1 of 3 (partition 1)"),
        (RISKS, "replicas in sync", "2 of 3 (partition 0)"),
    ]


def test_a_partition_without_a_leader(commands: Commands) -> None:
    headless = Partition(0, -1, (1, 2, 3), (2,))
    assert (LOSES, "leader", "none (partition 0)") in of_partitions(commands, [headless])


# --- the cluster ------------------------------------------------------------------------------------------------------


async def test_the_brokers_are_seen_with_their_racks(admin: Admin) -> None:
    assert [(one.number, one.rack) for one in await admin.brokers()] == [(1, "rack1"), (2, "rack2"), (3, "rack3")]


def test_asking_a_node_alone_for_replicas_is_refused() -> None:
    (finding,) = cluster.cluster_findings("c", THREE[:1], Durability.REPLICATED)
    assert (finding.severity, finding.setting, finding.found) == (LOSES, "brokers", "1")
    (finding,) = cluster.cluster_findings("c", THREE[:1], DEVELOPMENT)
    assert finding.severity is RISKS


def test_a_broker_that_is_away_keeps_nobody_from_starting() -> None:
    """Its topics say that a copy lacks; the cluster is as large as it was."""
    assert list(cluster.cluster_findings("c", THREE[:2], Durability.REPLICATED, away={3})) == []


@pytest.mark.parametrize(
    ("change", "severity", "fix"),
    [
        ({"unclean.leader.election.enable": "true"}, LOSES, "--entity-type brokers --entity-default --alter"),
        ({"auto.create.topics.enable": "true"}, RISKS, "auto.create.topics.enable=false in each"),
        ({"offsets.retention.minutes": "1440"}, RISKS, "offsets.retention.minutes=10080"),
        ({"offset.metadata.max.bytes": "1024"}, RISKS, "offset.metadata.max.bytes=4096"),
        ({"socket.request.max.bytes": "1000000"}, RISKS, "socket.request.max.bytes=104857600"),
        ({"default.replication.factor": "1"}, NOTE, "default.replication.factor=3"),
        ({"min.insync.replicas": "1"}, NOTE, "min.insync.replicas=2"),
        ({"offsets.topic.replication.factor": "1"}, LOSES, "offsets.topic.replication.factor=3"),
        ({"controller.quorum.voters": "1@a:1"}, LOSES, "three controllers"),
    ],
)
async def test_an_unsafe_broker_is_named(
    admin: Admin, commands: Commands, change: dict[str, str], severity: Severity, fix: str
) -> None:
    real = {number: await admin.broker_settings(number) for number in (1, 2)}
    rules = cluster.setting_rules(1_100_000, {cluster.OFFSETS_TOPIC: False})
    assert list(cluster.setting_findings(real, rules, Durability.REPLICATED, commands)) == []

    changed = {**real, 2: {**real[2], **change}}
    (finding,) = cluster.setting_findings(changed, rules, Durability.REPLICATED, commands)
    assert (finding.severity, finding.setting) == (severity, next(iter(change)))
    assert finding.subject in ("broker 2", "cluster's controllers")
    assert fix in finding.fix


def test_a_setting_by_which_a_topic_was_made_long_ago_is_a_note(commands: Commands) -> None:
    rules = cluster.setting_rules(0, {cluster.OFFSETS_TOPIC: True})[-1:]
    values = {1: {"offsets.topic.replication.factor": "1", "controller.quorum.voters": "1,2,3"}}
    (finding,) = cluster.setting_findings(values, rules, Durability.REPLICATED, commands)
    assert finding.severity is NOTE


def test_this_client_is_judged_by_what_it_uses(settings: KafkaSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(cluster.client_findings(settings)) == []
    monkeypatch.setattr(cluster, "SAFE_SENDING", {"acks": 1, "enable_idempotence": True})
    monkeypatch.setattr(
        cluster,
        "SAFE_READING",
        {"enable_auto_commit": True, "auto_offset_reset": "latest", "isolation_level": "read_uncommitted"},
    )
    assert [(one.severity, one.setting, one.found) for one in cluster.client_findings(settings)] == [
        (LOSES, "acks", "1"),
        (LOSES, "enable_auto_commit", "True"),
        (LOSES, "auto_offset_reset", "latest"),
        (LOSES, "isolation_level", "read_uncommitted"),
    ]


async def test_the_log_is_seen_as_it_is(admin: Admin, settings: KafkaSettings) -> None:
    topic = await topic_with(admin, **{"message.timestamp.type": "CreateTime"})
    await write(settings, topic, 3, age=3600)
    async with open_log_reader(settings) as reader:
        bounds = await reader.bounds(topic, [0, 1])
        written = await reader.written_at(topic, {0: 1})
    assert [(one.start, one.end) for one in bounds.values()] == [(0, 3), (0, 0)]
    assert abs(time.time() - 3600 - written[0].timestamp()) < 60
