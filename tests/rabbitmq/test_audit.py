"""The live audit: a healthy topic passes, and each unsafe value is its finding with what to do about it (S2, S3).

What cannot be had on the shared cluster without stopping a node (members offline, other versions, a small cluster) is
asked of the functions that judge the answers, with answers changed in one place.
"""

from __future__ import annotations

import logging
import re
import shlex
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Any

import anyio
import httpx
import pytest
from pydantic import BaseModel

from reliamq import DurabilityError, Reliamq
from reliamq.settings import Settings
from reliamq.spi import Durability, Finding, GroupSpec, Severity, TopicSpec
from reliamq_rabbitmq.audit import cluster, topic as topics
from reliamq_rabbitmq.audit.answers import Alarm, Binding, Exchange, Node, Policy, Queue
from reliamq_rabbitmq.audit.commands import Commands
from reliamq_rabbitmq.audit.management import Management, ManagementError
from reliamq_rabbitmq.audit.own import arguments_of
from reliamq_rabbitmq.audit.policies import Policies
from reliamq_rabbitmq.audit.queues import Scene, queue_faults
from reliamq_rabbitmq.audit.unseen import Thing
from reliamq_rabbitmq.catalog.names import DEAD_LETTERS, DELAYS_OVER, WAITS_FOR, delay_step, quorum_arguments
from reliamq_rabbitmq.settings import RabbitmqSettings, read_settings
from reliamq_rabbitmq.storage.storage import open_storage
from reliamq_rabbitmq.wire.channel import Channel
from reliamq_rabbitmq.wire.connection import open_connection, short_channel
from tests.servers.rabbitmq import PASSWORD, USER, RabbitmqCluster

pytestmark = [pytest.mark.anyio, pytest.mark.xdist_group("rabbitmq")]

LOSES, RISKS, NOTE, UNSEEN = Severity.LOSES, Severity.RISKS, Severity.NOTE, Severity.UNSEEN
REPLICATED, DEVELOPMENT = Durability.REPLICATED, Durability.DEVELOPMENT
LANES = 2
CLOSED = "http://127.0.0.1:1"
"""Nobody listens there."""


@pytest.fixture
def settings(rabbitmq: RabbitmqCluster) -> RabbitmqSettings:
    return settings_of(rabbitmq)


def settings_of(rabbitmq: RabbitmqCluster, **section: Any) -> RabbitmqSettings:
    return read_settings(rabbitmq.url, {"management_url": rabbitmq.management_url, "lanes": LANES, **section})


@pytest.fixture
async def name(settings: RabbitmqSettings) -> AsyncIterator[str]:
    """A topic's, of which nothing is left behind."""
    topic = f"audit-{uuid.uuid4()}"
    yield topic
    queues = [f"{topic}/facts", *(f"g@{topic}/{lane}{end}" for lane in range(4) for end in ("", "/ledger"))]
    async with amqp(settings) as channel:
        for queue in queues:
            await channel.queue_delete(queue)
        for exchange in (topic, f"g@{topic}", f"g@{topic}/members"):
            await channel.exchange_delete(exchange)


@pytest.fixture
async def topic(settings: RabbitmqSettings, name: str) -> str:
    """Declared, with the group g."""
    async with open_storage(settings) as storage:
        assert await storage.declare([TopicSpec(name, (GroupSpec("g"),))]) == []
    return name


@asynccontextmanager
async def amqp(settings: RabbitmqSettings) -> AsyncIterator[Channel]:
    """For what nobody but an operator would do."""
    async with open_connection(settings, "operator") as connection, short_channel(connection, settings) as channel:
        yield channel


async def audited(
    settings: RabbitmqSettings, topic: str, *groups: str, durability: Durability = REPLICATED
) -> Sequence[Finding]:
    """Everything that the audit says."""
    async with open_storage(settings) as storage:
        return await storage.audit([TopicSpec(topic, tuple(map(GroupSpec, groups)), durability)])


async def found_on(settings: RabbitmqSettings, topic: str, *groups: str, **spec: Any) -> list[Finding]:
    """What it says about this topic."""
    return [one for one in await audited(settings, topic, *groups or ("g",), **spec) if topic in one.subject]


async def the_one(settings: RabbitmqSettings, topic: str, *groups: str, **spec: Any) -> Finding:
    (finding,) = await found_on(settings, topic, *groups, **spec)
    return finding


def run(rabbitmq: RabbitmqCluster, fix: str) -> None:
    """The commands of a fix, as somebody would paste them."""
    for command in re.findall(r"(rabbitmq(?:ctl|-queues) .*?)(?:; | && |$)", fix):
        script, *arguments = shlex.split(command)
        rabbitmq.control(rabbitmq.nodes[0], "--script-name", script, *arguments)


# --- a healthy topic --------------------------------------------------------------------------------------------------


async def test_a_healthy_topic_gives_nothing_that_loses(settings: RabbitmqSettings, topic: str) -> None:
    expected = {
        (RISKS, "disk_free_limit"),  # 50 MB, as it is by default
        (NOTE, "version"),
        (NOTE, "tls"),
        (UNSEEN, "consumer_timeout"),
        (UNSEEN, "cluster_partition_handling"),
    }
    with anyio.fail_after(60):  # a node that has just started tells nothing of its limits for some seconds
        while True:
            found = await audited(settings, topic, "g")
            assert [one for one in found if topic in one.subject] == []
            if {(one.severity, one.setting) for one in found} == expected:
                break
            assert not [one for one in found if one.severity is LOSES]
            await anyio.sleep(1)


async def test_the_cluster_alone_is_judged_without_topics(settings: RabbitmqSettings) -> None:
    async with open_storage(settings) as storage:
        found = await storage.audit([])
    assert LOSES not in {one.severity for one in found}
    assert "disk_free_limit" in {one.setting for one in found}


async def test_what_reliamq_has_for_all_topics_is_healthy_too(settings: RabbitmqSettings, topic: str) -> None:
    """Dead letters and the ladder of delays, as far as other tests have made them."""
    found = await audited(settings, topic, "g")
    assert [one for one in found if "own" in one.subject] == []


# --- what is missing --------------------------------------------------------------------------------------------------


async def test_a_missing_topic_is_named_and_not_made_by_asking(settings: RabbitmqSettings, name: str) -> None:
    for _ in range(2):
        finding = await the_one(settings, name)
        assert (finding.severity, finding.setting, finding.found) == (LOSES, "topic", "missing")
        assert "declare" in finding.fix


async def test_a_group_that_is_not_declared_is_named(settings: RabbitmqSettings, topic: str) -> None:
    finding = await the_one(settings, topic, "g", "other")
    assert (finding.severity, finding.subject) == (LOSES, f"group other of topic {topic}")
    assert (finding.setting, finding.found) == ("group", "missing")


@pytest.mark.parametrize("queue", ["g@{}/1", "g@{}/0", "g@{}/1/ledger"])
async def test_a_missing_lane_or_ledger_is_named(settings: RabbitmqSettings, topic: str, queue: str) -> None:
    queue = queue.format(topic)
    async with amqp(settings) as channel:
        await channel.queue_delete(queue)
    finding = await the_one(settings, topic)
    assert (finding.severity, finding.setting) == (LOSES, "queues")
    assert finding.found == f"missing ({queue})"


async def test_a_topic_without_its_facts_is_named(settings: RabbitmqSettings, topic: str) -> None:
    async with amqp(settings) as channel:
        await channel.queue_delete(f"{topic}/facts")
    finding = await the_one(settings, topic)
    assert (finding.severity, finding.setting, finding.found) == (LOSES, f"queue {topic}/facts", "missing")


async def test_a_name_that_rabbitmq_cannot_hold_is_a_finding(settings: RabbitmqSettings) -> None:
    finding = await the_one(settings, "ö" * 100, "g" * 100)
    assert (finding.severity, finding.setting) == (LOSES, "name")


# --- bindings ---------------------------------------------------------------------------------------------------------


async def test_a_group_that_is_not_bound_misses_messages(settings: RabbitmqSettings, topic: str) -> None:
    async with amqp(settings) as channel:
        await channel.exchange_unbind(f"g@{topic}", topic)
    found = {one.subject: one for one in await found_on(settings, topic)}
    assert found[f"group g of topic {topic}"].severity is LOSES
    assert found[f"group g of topic {topic}"].setting == "binding"
    of_topic = found[f"topic {topic}"]
    assert (of_topic.severity, of_topic.setting, of_topic.found) == (RISKS, "groups", "none bound")
    assert "rejected as unroutable" in of_topic.why


async def test_a_group_that_nobody_asks_for_and_that_is_not_bound_keeps_nobody_from_starting(
    settings: RabbitmqSettings, topic: str
) -> None:
    """Another process may be declaring it at this moment: it is bound last."""
    async with amqp(settings) as channel:
        await channel.exchange_declare(f"half@{topic}", exchange_type="topic", durable=True)
        finding = await the_one(settings, topic)
        await channel.exchange_delete(f"half@{topic}")
    assert (finding.severity, finding.subject) == (RISKS, f"group half of topic {topic}")


async def test_a_queue_that_makes_messages_routed_without_any_group_loses_them(
    settings: RabbitmqSettings, topic: str
) -> None:
    async with amqp(settings) as channel:
        await channel.queue_declare(f"{topic}-foreign", durable=True)
        await channel.queue_bind(f"{topic}-foreign", topic)
        finding = await the_one(settings, topic)
        assert (finding.severity, finding.found) == (NOTE, f"{topic}-foreign")

        await channel.exchange_unbind(f"g@{topic}", topic)
        found = {(one.severity, one.setting) for one in await found_on(settings, topic)}
        assert found == {(LOSES, "bindings"), (LOSES, "binding")}
        await channel.queue_delete(f"{topic}-foreign")


async def test_a_lane_that_is_not_bound_and_one_that_is_bound_twice_are_named(
    settings: RabbitmqSettings, topic: str
) -> None:
    async with amqp(settings) as channel:
        await channel.queue_unbind(f"g@{topic}/1", f"g@{topic}", "1.#")
        await channel.queue_bind(f"g@{topic}/0", f"g@{topic}", "1.0.#")
    found = [(one.severity, one.setting, one.found) for one in await found_on(settings, topic)]
    assert found == [
        (LOSES, "bindings", f"missing (g@{topic}/1 by 1.#)"),
        (RISKS, "bindings", f"g@{topic}/0 by 1.0.#"),
    ]


async def test_a_lane_to_which_late_retries_do_not_come_back_is_named(settings: RabbitmqSettings, topic: str) -> None:
    lane = f"g@{topic}/0"
    async with amqp(settings) as channel:
        await channel.queue_unbind(lane, DELAYS_OVER, arguments={"x-match": "all", WAITS_FOR: lane})
    finding = await the_one(settings, topic)
    assert (finding.severity, finding.found) == (RISKS, f"none from the delays ({lane})")


async def test_members_that_cannot_hear_of_one_another_are_a_risk(settings: RabbitmqSettings, topic: str) -> None:
    async with amqp(settings) as channel:
        await channel.exchange_delete(f"g@{topic}/members")
    finding = await the_one(settings, topic)
    assert (finding.severity, finding.setting) == (RISKS, f"exchange g@{topic}/members")


async def test_an_exchange_of_another_kind_is_named(settings: RabbitmqSettings, name: str) -> None:
    async with amqp(settings) as channel:
        await channel.exchange_declare(name, exchange_type="direct", arguments={"alternate-exchange": "amq.fanout"})
    found = {one.setting: one for one in await found_on(settings, name)}
    assert {setting: one.severity for setting, one in found.items()} == {
        "exchange type": LOSES,
        "exchange durable": LOSES,
        "alternate-exchange": RISKS,
        f"queue {name}/facts": LOSES,
        "groups": RISKS,
        "group": LOSES,
    }
    assert found["exchange type"].found == "direct"


# --- queues -----------------------------------------------------------------------------------------------------------


async def replaced(settings: RabbitmqSettings, lane: str, exchange: str, pattern: str, **declaration: Any) -> None:
    """As when somebody made a lane anew by hand, with the bindings that it had."""
    async with amqp(settings) as channel:
        await channel.queue_delete(lane)
        await channel.queue_declare(lane, **declaration)
        await channel.queue_bind(lane, exchange, pattern)
        await channel.queue_bind(lane, DELAYS_OVER, arguments={"x-match": "all", WAITS_FOR: lane})


async def test_a_classic_queue_in_the_place_of_a_lane_loses_messages_and_the_command_makes_room(
    rabbitmq: RabbitmqCluster, name: str
) -> None:
    settings, lane = settings_of(rabbitmq, lanes=4), f"g@{name}/3"
    spec = TopicSpec(name, (GroupSpec("g"),))
    async with open_storage(settings) as storage:
        assert await storage.declare([spec]) == []
        await replaced(settings, lane, f"g@{name}", "1.1.#", durable=True)

        (finding,) = [one for one in await storage.audit([spec]) if one.severity is LOSES]
        assert (finding.setting, finding.found) == ("type", f"classic ({lane})")
        assert f"rabbitmqctl delete_queue -p / {lane} --if-empty" in finding.fix
        assert [one.severity for one in await storage.declare([spec])] == [LOSES]

        run(rabbitmq, finding.fix)
        assert await storage.declare([spec]) == []
        assert LOSES not in {one.severity for one in await storage.audit([spec])}


async def test_without_management_a_classic_queue_is_one_that_was_declared_otherwise(
    rabbitmq: RabbitmqCluster, topic: str
) -> None:
    settings, lane = settings_of(rabbitmq, management_url=CLOSED), f"g@{topic}/1"
    await replaced(settings, lane, f"g@{topic}", "1.#", durable=True)
    finding = await the_one(settings, topic)
    assert (finding.severity, finding.setting) == (LOSES, "queues")
    assert finding.found == f"otherwise: x-overflow is none ({lane})"


@pytest.mark.parametrize("management", [True, False])
async def test_a_transient_queue_loses_messages(rabbitmq: RabbitmqCluster, topic: str, management: bool) -> None:
    settings = settings_of(rabbitmq) if management else settings_of(rabbitmq, management_url=CLOSED)
    lane = f"g@{topic}/0"
    await replaced(settings, lane, f"g@{topic}", "0.#", durable=False, auto_delete=True)
    found = [one for one in await found_on(settings, topic) if one.severity is LOSES]
    if management:
        assert {one.setting: one.found for one in found} == {
            "type": f"classic ({lane})",
            "durable": f"false ({lane})",
            "auto-delete": f"true ({lane})",
        }
    else:
        assert [one.found for one in found] == [f"otherwise: durable is false ({lane})"]


@pytest.mark.parametrize("management", [True, False])
async def test_a_queue_that_is_somebodys_own_loses_messages(
    rabbitmq: RabbitmqCluster, topic: str, management: bool
) -> None:
    settings = settings_of(rabbitmq) if management else settings_of(rabbitmq, management_url=CLOSED)
    facts = f"{topic}/facts"
    async with amqp(settings) as channel:
        await channel.queue_delete(facts)
        await channel.queue_declare(facts, exclusive=True)
        found = {one.setting: one for one in await found_on(settings, topic)}
    assert (found["exclusive"].severity, found["exclusive"].found) == (LOSES, f"true ({facts})")


async def test_a_queue_without_a_single_consumer_or_that_drops_is_named(settings: RabbitmqSettings, topic: str) -> None:
    lane = f"g@{topic}/1"
    arguments = {"x-queue-type": "quorum", "x-delivery-limit": 5, "x-max-length": 10}
    await replaced(settings, lane, f"g@{topic}", "1.#", durable=True, arguments=arguments)
    found = {one.setting: (one.severity, one.found) for one in await found_on(settings, topic)}
    assert found == {
        "x-single-active-consumer": (LOSES, f"not set ({lane})"),
        "delivery-limit": (LOSES, f"5 by its declaration ({lane})"),
        "max-length": (LOSES, f"10 by its declaration ({lane})"),
        "overflow": (RISKS, f"drop-head ({lane})"),
    }


@pytest.mark.parametrize(("members", "severity"), [(1, LOSES), (2, RISKS)])
async def test_queues_with_few_members_are_named_and_the_command_mends_them(
    rabbitmq: RabbitmqCluster, settings: RabbitmqSettings, name: str, members: int, severity: Severity
) -> None:
    fewer = settings.model_copy(update={"replicas": members})
    async with open_storage(fewer) as storage:
        await storage.declare([TopicSpec(name, (GroupSpec("g"),))])
    found = await found_on(settings, name)
    assert [(one.severity, one.setting) for one in found] == [(severity, "members")] * 2
    assert [one.found for one in found] == [
        f"{members} ({name}/facts)",
        f"{members} (g@{name}/0, g@{name}/0/ledger, g@{name}/1, g@{name}/1/ledger)",
    ]
    eased = {one.severity for one in await found_on(settings, name, durability=DEVELOPMENT)}
    assert eased == {RISKS if members == 1 else NOTE}

    for one in found:
        run(rabbitmq, one.fix)
    assert await found_on(settings, name) == []


async def test_without_management_a_queue_that_was_made_with_one_member_is_named(
    rabbitmq: RabbitmqCluster, topic: str
) -> None:
    settings = settings_of(rabbitmq, management_url=CLOSED)
    lane = f"g@{topic}/1"
    await replaced(settings, lane, f"g@{topic}", "1.#", durable=True, arguments=dict(quorum_arguments(1)))
    finding = await the_one(settings, topic)
    assert (finding.severity, finding.setting, finding.found) == (LOSES, "members", f"1 ({lane})")


async def test_without_management_a_queue_with_more_members_than_are_asked_for_passes(
    rabbitmq: RabbitmqCluster, topic: str
) -> None:
    settings = settings_of(rabbitmq, management_url=CLOSED, replicas=5)
    assert await found_on(settings, topic) == []


# --- policies ---------------------------------------------------------------------------------------------------------


@contextmanager
def policy(
    rabbitmq: RabbitmqCluster, name: str, definition: dict[str, Any], *, operator: bool = False, to: str = "queues"
) -> Iterator[None]:
    """For this topic's lane 0 alone, or its exchange."""
    pattern = f"^{name}$" if to == "exchanges" else f"^g@{name}/0$"
    url = f"{rabbitmq.management_url}/api/{'operator-' if operator else ''}policies/%2F/{name}"
    with httpx.Client(auth=(USER, PASSWORD), trust_env=False) as client:
        client.put(url, json={"pattern": pattern, "definition": definition, "apply-to": to}).raise_for_status()
        try:
            yield
        finally:
            client.delete(url)


@pytest.mark.parametrize(
    ("definition", "operator", "severity", "found"),
    [
        ({"message-ttl": 60000}, False, LOSES, "60000 by policy"),
        ({"message-ttl": 60000}, True, LOSES, "60000 by operator policy"),
        ({"expires": 600000}, False, LOSES, "600000 by policy"),
        ({"delivery-limit": 5}, False, LOSES, "5 by policy"),
        ({"max-length": 1000}, False, RISKS, "1000 by policy"),
        ({"max-length-bytes": 1000000}, True, RISKS, "1000000 by operator policy"),
        ({"dead-letter-exchange": "amq.fanout"}, False, NOTE, "amq.fanout by policy"),
    ],
)
async def test_a_policy_that_removes_messages_is_named_and_the_command_removes_it(
    rabbitmq: RabbitmqCluster,
    settings: RabbitmqSettings,
    topic: str,
    definition: dict[str, Any],
    operator: bool,
    severity: Severity,
    found: str,
) -> None:
    with policy(rabbitmq, topic, definition, operator=operator):
        finding = await the_one(settings, topic)
        assert (finding.severity, finding.setting) == (severity, next(iter(definition)))
        assert finding.found == f"{found} '{topic}' (g@{topic}/0)"
        run(rabbitmq, finding.fix)
        assert await found_on(settings, topic) == []


async def test_a_policy_that_is_not_in_effect_is_no_finding(
    rabbitmq: RabbitmqCluster, settings: RabbitmqSettings, topic: str
) -> None:
    """One with something that quorum queues do not have is left out whole; what was declared goes before overflow."""
    with policy(rabbitmq, topic, {"ha-mode": "all", "message-ttl": 60000}):
        assert await found_on(settings, topic) == []
    with policy(rabbitmq, topic, {"overflow": "drop-head"}):
        assert await found_on(settings, topic) == []


async def test_an_alternate_exchange_that_hides_what_no_group_gets_is_named(
    rabbitmq: RabbitmqCluster, settings: RabbitmqSettings, topic: str
) -> None:
    with policy(rabbitmq, topic, {"alternate-exchange": "amq.fanout"}, to="exchanges"):
        finding = await the_one(settings, topic)
        assert (finding.severity, finding.setting) == (RISKS, "alternate-exchange")
        assert finding.found == f"amq.fanout by policy '{topic}' on {topic}"
        run(rabbitmq, finding.fix)
        assert await found_on(settings, topic) == []


async def test_an_application_does_not_start_under_a_policy_that_removes_messages(
    rabbitmq: RabbitmqCluster, topic: str
) -> None:
    """S3"""

    class Order(BaseModel):
        number: int

    url = f"{rabbitmq.url}?management_url={rabbitmq.management_url}"
    with policy(rabbitmq, topic, {"message-ttl": 60000}):
        app = Reliamq(Settings(broker=url, durability=REPLICATED))
        app.topic(topic, Order)
        with pytest.raises(DurabilityError) as refused:
            async with app:
                pass
    assert "message-ttl is 60000 by policy" in str(refused.value)
    assert f"rabbitmqctl clear_policy -p / {topic}" in str(refused.value)
    assert PASSWORD not in str(refused.value)


def test_the_operators_policy_with_the_highest_priority_is_in_effect() -> None:
    def operators(pattern: str, priority: int, applies_to: str = "queues") -> Policy:
        return Policy(f"{pattern} {priority}", pattern, {"expires": 1}, applies_to, priority, operator=True)

    given = [
        operators("^a", 1),
        operators("^a", 3, "exchanges"),
        operators("b$", 2, "quorum_queues"),
        operators("b$", 4, "classic_queues"),
        operators("[", 9),
    ]
    policies = Policies(given)
    assert [one.priority for one in policies.on_queue(Queue("ab"))] == [2]
    assert [one.priority for one in policies.on_queue(Queue("ac"))] == [1]
    assert [one.priority for one in policies.on_queue(Queue("ab", kind="classic"))] == [4]
    assert policies.on_queue(Queue("c")) == []
    assert [one.priority for one in policies.unreadable()] == [9]


# --- without the management API ---------------------------------------------------------------------------------------


async def test_without_management_each_thing_that_it_tells_is_unseen_and_no_pass(
    rabbitmq: RabbitmqCluster, topic: str
) -> None:
    found = await audited(settings_of(rabbitmq, management_url=CLOSED), topic, "g")
    unseen = {one.setting: one for one in found if one.severity is UNSEEN}
    assert unseen.keys() == {thing.words for thing in Thing} | {"consumer_timeout", "cluster_partition_handling"}
    for thing in Thing:
        assert f"nobody answers at {CLOSED}" in unseen[thing.words].found
        assert "'management_url'" in unseen[thing.words].fix
        assert unseen[thing.words].why
        assert unseen[thing.words].required
    assert LOSES not in {one.severity for one in found}
    assert "version" in {one.setting for one in found}


@pytest.mark.parametrize("queue", ["g@{}/1", "g@{}/0", "g@{}/1/ledger"])
async def test_without_management_a_missing_lane_or_ledger_is_named(
    rabbitmq: RabbitmqCluster, topic: str, queue: str
) -> None:
    settings, queue = settings_of(rabbitmq, management_url=CLOSED), queue.format(topic)
    async with amqp(settings) as channel:
        await channel.queue_delete(queue)
    finding = await the_one(settings, topic)
    assert (finding.severity, finding.found) == (LOSES, f"missing ({queue})")


async def test_without_management_amqp_tells_what_is_missing(rabbitmq: RabbitmqCluster, topic: str) -> None:
    settings = settings_of(rabbitmq, management_url=CLOSED)
    async with amqp(settings) as channel:
        await channel.queue_delete(f"g@{topic}/1/ledger")
        await channel.queue_delete(f"{topic}/facts")
        await channel.exchange_delete(f"g@{topic}/members")
    found = {(one.severity, one.subject, one.setting, one.found) for one in await found_on(settings, topic, "g", "h")}
    assert found == {
        (LOSES, f"topic {topic}", "queues", f"missing ({topic}/facts)"),
        (LOSES, f"group g of topic {topic}", "queues", f"missing (g@{topic}/1/ledger)"),
        (LOSES, f"group g of topic {topic}", "exchanges", f"missing (g@{topic}/members)"),
        (LOSES, f"group h of topic {topic}", "group", "missing"),
    }
    assert {one.found for one in await found_on(settings, topic)} == {
        one[3] for one in found if one[1] != f"group h of topic {topic}"
    }, "asking made something"


async def test_without_management_url_every_server_is_asked(rabbitmq: RabbitmqCluster, topic: str) -> None:
    found = await audited(read_settings(rabbitmq.url, {"lanes": LANES}), topic, "g")
    assert "nobody answers at http://127.0.0.1:15672" in " ".join(one.found for one in found)


async def test_a_user_who_may_not_ask_is_told_the_command_and_no_password_is_shown(
    rabbitmq: RabbitmqCluster, topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    node, user, password = rabbitmq.nodes[0], f"audit-{uuid.uuid4()}", f"secret-{uuid.uuid4()}"
    rabbitmq.control(node, "add_user", user, password)
    try:
        rabbitmq.control(node, "set_permissions", user, ".*", ".*", ".*")
        section = {"management_url": rabbitmq.management_url, "username": user, "password": password}
        settings = read_settings(f"rabbitmq://{','.join(rabbitmq.addresses)}", section)
        stranger = await _things(settings, topic)
        assert stranger.keys() == {thing.words for thing in Thing}
        command = f"rabbitmqctl set_user_tags {user} monitoring"
        assert all(command in one.fix for one in stranger.values())

        run(rabbitmq, command)
        assert (await _things(settings, topic)).keys() == {Thing.STREAM_QUEUE.words}  # administrators only

        rabbitmq.control(node, "set_user_tags", user, "management")
        of_nodes = await _things(settings, topic)
        assert of_nodes.keys() == {Thing.NODES.words, Thing.WATERMARKS.words, Thing.STREAM_QUEUE.words}
    finally:
        rabbitmq.control(node, "delete_user", user)
    assert password not in "".join(map(str, [*stranger.values(), *of_nodes.values()])) + caplog.text


async def _things(settings: RabbitmqSettings, topic: str) -> dict[str, Finding]:
    words = {thing.words for thing in Thing}
    return {one.setting: one for one in await audited(settings, topic, "g") if one.setting in words}


async def test_a_management_api_of_another_cluster_is_no_pass(
    rabbitmq: RabbitmqCluster, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nothing(self: Management, parts: Sequence[str]) -> list[Any]:
        return []

    monkeypatch.setattr(Management, "exchanges", nothing)
    async with amqp(settings_of(rabbitmq)) as channel:
        await channel.queue_delete(f"g@{topic}/0/ledger")
    found = {(one.severity, one.setting) for one in await found_on(settings_of(rabbitmq), topic)}
    assert found == {(UNSEEN, "management API"), (LOSES, "queues")}


async def test_a_management_api_that_falls_silent_is_asked_no_more(
    rabbitmq: RabbitmqCluster, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    async def silent(self: Management, *parts: Any) -> list[Any]:
        asked.append("")
        raise ManagementError("too slow", "Ask later.", reached=False)

    monkeypatch.setattr(Management, "exchanges", silent)
    monkeypatch.setattr(Management, "queues", silent)
    found = await _things(settings_of(rabbitmq), topic)
    assert len(asked) == 1
    assert found.keys() == {Thing.BINDINGS.words, Thing.MEMBERS.words, Thing.LEADERS.words}


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (httpx.Response(200, text="<html>welcome</html>"), "no JSON"),
        (httpx.Response(200, json={"no": "items"}), "otherwise than reliamq knows it"),
        (httpx.Response(200, json={"items": [{"name": "q"}], "page_count": 1}), "otherwise than reliamq knows it"),
        (httpx.Response(404, json={"reason": "Not Found"}), "answers 404 Not Found"),
        (httpx.Response(500), "answers 500 Internal Server Error"),
        (httpx.Response(401, json={"reason": "Login failed"}), f"answers 401 Login failed to user '{USER}'"),
        (httpx.ReadTimeout("too slow"), "too slow"),
        (httpx.InvalidURL("odd"), "odd"),
    ],
)
async def test_an_answer_that_is_none_is_an_error_with_what_to_do_and_without_the_password(
    settings: RabbitmqSettings, answer: httpx.Response | Exception, said: str
) -> None:
    def answering(request: httpx.Request) -> httpx.Response:
        if isinstance(answer, Exception):
            raise answer
        return answer

    async with httpx.AsyncClient(transport=httpx.MockTransport(answering), auth=settings.credentials) as client:
        with pytest.raises(ManagementError) as refused:
            await Management(client, settings, "http://api").queues(["q"])
    assert said in refused.value.detail
    assert refused.value.fix
    assert PASSWORD not in repr(refused.value) + refused.value.detail + refused.value.fix


async def test_all_pages_are_read(settings: RabbitmqSettings) -> None:
    def answering(request: httpx.Request) -> httpx.Response:
        page = int(request.url.params["page"])
        queue = {"name": f"q{page}", "type": "classic", "durable": True, "auto_delete": False, "arguments": {}}
        assert request.url.raw_path.startswith(b"/api/queues/%2F?")
        return httpx.Response(200, json={"items": [queue], "page_count": 3})

    async with httpx.AsyncClient(transport=httpx.MockTransport(answering)) as client:
        found = await Management(client, settings, "http://api").queues(["q"])
    assert [queue.name for queue in found] == ["q1", "q2", "q3"]


async def test_many_topics_are_asked_for_at_once_and_none_is_left_out(settings: RabbitmqSettings) -> None:
    asked: list[str] = []

    def answering(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.params["name"])
        assert len(request.url.raw_path) < 8000  # RabbitMQ's web server reads no longer line
        return httpx.Response(200, json={"items": [], "page_count": 0})

    names = [f"größe-{number}.{'x' * 60}" for number in range(100)]
    async with httpx.AsyncClient(transport=httpx.MockTransport(answering)) as client:
        await Management(client, settings, "http://api").queues(names)
    assert len(asked) < 4
    assert all(any(re.search(pattern, name) for pattern in asked) for name in names)


# --- alarms -----------------------------------------------------------------------------------------------------------


async def test_an_alarm_that_is_in_effect_is_named(rabbitmq: RabbitmqCluster, settings: RabbitmqSettings) -> None:
    node = rabbitmq.nodes[1]
    async with open_storage(settings) as storage:
        rabbitmq.control(node, "set_vm_memory_high_watermark", "absolute", "1")
        try:
            found = await storage.audit([])
        finally:
            rabbitmq.control(node, "set_vm_memory_high_watermark", "absolute", "2GB")
    (finding,) = [one for one in found if one.setting.endswith("alarm")]
    assert (finding.severity, finding.setting, finding.subject) == (RISKS, "memory alarm", "node rq2@localhost")
    assert "rabbitmq-diagnostics -n rq2@localhost" in finding.fix


def test_a_disk_alarm_is_named() -> None:
    (finding,) = cluster.alarm_findings([Alarm("n", "disk")])
    assert (finding.severity, finding.setting) == (RISKS, "disk alarm")


# --- queues: answers of a cluster in another state --------------------------------------------------------------------

THREE = [Node(f"n{number}", disk_limit=2_000_000_000, memory_limit=1_000) for number in (1, 2, 3)]
NODES = frozenset(node.name for node in THREE)
SOUND = quorum_arguments(3)
WHOLE = Queue("g@t/0", arguments=SOUND, members=NODES, online=NODES, leader="n1")


@pytest.fixture
def scene() -> Scene:
    nowhere = read_settings("rabbitmq://localhost", {})
    return Scene(nowhere, Commands(nowhere), REPLICATED, (4, 2, 1), THREE, Policies([]))


def judged(queue: Queue, scene: Scene, expected: Any = SOUND) -> list[tuple[Severity, str, str]]:
    return [(one.severity, one.setting, one.found) for one in queue_faults(queue, expected, scene)]


def test_a_whole_queue_passes(scene: Scene) -> None:
    assert judged(WHOLE, scene) == []
    assert judged(WHOLE, replace(scene, nodes=None, policies=None, version=None)) == []


def test_members_that_are_away_are_a_risk_and_without_a_majority_nothing_goes_on(scene: Scene) -> None:
    one_away, two_away = replace(WHOLE, online=NODES - {"n3"}), replace(WHOLE, online=frozenset({"n1"}))
    assert judged(one_away, scene) == [(RISKS, "members online", "2 of 3")]
    assert judged(two_away, scene) == [(LOSES, "members online", "1 of 3")]
    (fault,) = queue_faults(two_away, SOUND, scene)
    assert "Start n2, n3;" in fault.fix


def test_members_that_are_not_told_are_unseen(scene: Scene) -> None:
    assert judged(replace(WHOLE, members=None), scene) == [(UNSEEN, "members", "not told")]


def test_a_queue_is_grown_on_nodes_that_run_and_are_not_among_its_members(scene: Scene) -> None:
    few = replace(WHOLE, members=frozenset({"n1"}), online=frozenset({"n1"}))
    larger = [*THREE, Node("n4"), Node("n0", running=False)]
    (fault,) = queue_faults(few, SOUND, replace(scene, nodes=larger))
    assert re.findall("grow (n.) all", fault.fix) == ["n2", "n3"]
    (fault,) = queue_faults(few, SOUND, replace(scene, nodes=THREE[:1]))
    assert fault.fix.startswith("Add or start nodes")
    (fault,) = queue_faults(few, SOUND, replace(scene, nodes=None))
    assert "grow NODE all --vhost-pattern '^/$' --queue-pattern '^g@t/0$'" in fault.fix


def test_the_delivery_limit_of_rabbitmq_4_is_named_where_none_is_set(scene: Scene) -> None:
    unlimited = {name: value for name, value in SOUND.items() if name != "x-delivery-limit"}
    assert judged(replace(WHOLE, arguments=unlimited), scene) == [(LOSES, "delivery-limit", "20 by default")]
    assert judged(replace(WHOLE, arguments=unlimited), replace(scene, version=(3, 13))) == []
    assert judged(replace(WHOLE, arguments={**unlimited, "x-delivery-limit": -1}), scene) == []


def test_a_limit_of_length_loses_messages_where_the_oldest_are_dropped(scene: Scene) -> None:
    limited = Policies([Policy("p", "^g@", {"max-length": 5}, operator=True)])
    dropping = replace(WHOLE, arguments={**SOUND, "x-overflow": "drop-head"})
    assert judged(WHOLE, replace(scene, policies=limited)) == [(RISKS, "max-length", "5 by operator policy 'p'")]
    assert judged(dropping, replace(scene, policies=limited)) == [
        (LOSES, "max-length", "5 by operator policy 'p'"),
        (RISKS, "overflow", "drop-head"),
    ]


def test_a_broker_that_takes_back_earlier_than_reliamq_renews_is_a_risk(scene: Scene) -> None:
    def by(milliseconds: int) -> Policies:
        return Policies([Policy("p", "", {"consumer-timeout": milliseconds}, operator=True)])

    assert judged(WHOLE, replace(scene, policies=by(1_800_000))) == []
    (fault,) = queue_faults(WHOLE, SOUND, replace(scene, policies=by(60_000)))
    assert (fault.severity, fault.setting) == (RISKS, "consumer-timeout")
    assert "'ack_timeout_seconds' to 60" in fault.fix


def test_a_queue_in_which_delays_wait_must_hand_on_in_time_and_with_a_confirm(scene: Scene) -> None:
    expected = arguments_of(delay_step(3), 3)
    assert expected is not None
    assert (expected["x-message-ttl"], expected["x-dead-letter-exchange"]) == (8000, delay_step(2))
    waiting = replace(WHOLE, name=delay_step(3), arguments=expected)
    assert judged(waiting, scene, expected) == []
    for argument, value in {"x-message-ttl": 9000, "x-dead-letter-strategy": "at-most-once"}.items():
        changed = replace(waiting, arguments={**expected, argument: value})
        assert judged(changed, scene, expected) == [(LOSES, argument, str(value))]
    expiring = Policies([Policy("p", "", {"message-ttl": 5, "expires": 5}, operator=True)])
    assert judged(waiting, replace(scene, policies=expiring), expected) == [
        (RISKS, "message-ttl", "5 by operator policy 'p'"),
        (LOSES, "expires", "5 by operator policy 'p'"),
    ]


async def test_the_ladder_of_delays_is_expected_as_it_is_made(rabbitmq: RabbitmqCluster) -> None:
    """Where it has been made: what is expected is written down twice."""
    for queue in rabbitmq.call("queues/%2F?name=reliamq.&page=1&page_size=100&disable_stats=true")["items"]:
        assert queue["arguments"] == arguments_of(queue["name"], 3)
    assert arguments_of(DEAD_LETTERS, 3) == SOUND
    assert arguments_of("reliamq.others", 3) is None


# --- topics: answers of a cluster in another state --------------------------------------------------------------------


def lanes(count: int, **fields: Any) -> dict[str, Queue]:
    names = ["t/facts", *(f"g@t/{lane}{end}" for lane in range(count) for end in ("", "/ledger"))]
    return {name: replace(WHOLE, name=name, **fields) for name in names}


def view_of(count: int, **fields: Any) -> topics.TopicView:
    patterns = {1: ["#"], 2: ["0.#", "1.#"], 4: ["0.0.#", "0.1.#", "1.0.#", "1.1.#"]}[count]
    bindings = {
        "t": [Binding("g@t", to_exchange=True)],
        "g@t": [Binding(f"g@t/{lane}", False, pattern) for lane, pattern in enumerate(patterns)],
    }
    kinds = {"t": "fanout", "g@t": "topic", "g@t/members": "fanout"}
    exchanges = {name: Exchange(name, kind) for name, kind in kinds.items()}
    return topics.TopicView(exchanges, lanes(count, **fields), bindings, frozenset(f"g@t/{n}" for n in range(count)))


def said(view: topics.TopicView, scene: Scene) -> list[tuple[Severity, str, str]]:
    found = topics.topic_findings(TopicSpec("t", (GroupSpec("g"),)), view, scene)
    return [(one.severity, one.setting, one.found) for one in found]


def test_groups_with_any_number_of_lanes_pass(scene: Scene) -> None:
    assert said(view_of(1), scene) == said(view_of(2), scene) == []


def test_leaders_on_one_node_are_a_note_and_the_command_spreads_them(scene: Scene) -> None:
    assert said(view_of(4), scene) == [(NOTE, "leaders", "all on n1")]
    spread = view_of(4)
    mixed = {**spread.queues, "g@t/3": replace(spread.queues["g@t/3"], leader="n2")}
    assert said(replace(spread, queues=mixed), scene) == []
    (finding,) = topics.topic_findings(TopicSpec("t", (GroupSpec("g"),)), view_of(4), scene)
    assert finding.fix == "rabbitmq-queues rebalance quorum --vhost-pattern '^/$' --queue-pattern '^g@t/'"


def test_how_many_lanes_there_were_is_known_from_those_that_are_left(scene: Scene) -> None:
    view = view_of(4)
    left = {name: queue for name, queue in view.queues.items() if not re.match("g@t/[23]", name)}
    bindings = {**view.bindings, "g@t": view.from_("g@t")[:2]}
    assert said(replace(view, queues=left, bindings=bindings), scene) == [
        (LOSES, "queues", "missing (g@t/2, g@t/3, g@t/2/ledger, g@t/3/ledger)")
    ]


# --- the cluster ------------------------------------------------------------------------------------------------------


def of_nodes(nodes: Sequence[Node], durability: Durability = REPLICATED) -> list[tuple[Severity, str, str, str]]:
    commands = Commands(read_settings("rabbitmq://localhost", {}))
    found = cluster.node_findings("c", nodes, durability, commands)
    return [(one.severity, one.subject, one.setting, one.found) for one in found]


def test_three_sound_nodes_pass() -> None:
    assert of_nodes(THREE) == []


def test_a_node_alone_is_refused_for_replicas_and_accepted_for_development() -> None:
    assert of_nodes(THREE[:1]) == [(LOSES, "c", "nodes", "1")]
    assert of_nodes(THREE[:1], DEVELOPMENT) == [(RISKS, "c", "nodes", "1")]
    assert of_nodes(THREE[:1], Durability.FSYNCED) == [(RISKS, "c", "nodes", "1")]


def test_a_node_that_is_away_keeps_nobody_from_starting() -> None:
    assert of_nodes([*THREE[:2], Node("n3", running=False)]) == [(RISKS, "c", "running nodes", "without n3")]


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        ({"partitions": ("n1",)}, (LOSES, "c", "partitions", "n3 from n1")),
        ({"in_memory": True}, (RISKS, "node n3", "type", "ram")),
        ({"disk_limit": 50_000_000}, (RISKS, "node n3", "disk_free_limit", "50000000")),
        ({"disk_limit": None}, (UNSEEN, "c", Thing.WATERMARKS.words, "not told by n3")),
        ({"memory_limit": None}, (UNSEEN, "c", Thing.WATERMARKS.words, "not told by n3")),
        ({"memory_used": 950}, (NOTE, "node n3", "memory used", "950 of 1000")),
        ({"disk_free": 2_100_000_000}, (NOTE, "node n3", "disk free", "2100000000, limit 2000000000")),
    ],
)
def test_a_node_that_is_unsafe_is_named(change: dict[str, Any], finding: tuple[Severity, str, str, str]) -> None:
    assert of_nodes([*THREE[:2], replace(THREE[2], **change)]) == [finding]


@pytest.mark.parametrize(
    ("version", "severity"),
    [
        ((3, 9, 29), RISKS),
        ((3, 10, 8), NOTE),
        ((3, 13, 7), NOTE),
        ((4, 0, 6), RISKS),
        ((4, 0, 7), NOTE),
        ((4, 1, 8), NOTE),
        ((4, 2), None),
        ((4, 2, 1), None),
        ((5, 0), None),
    ],
)
def test_what_is_known_of_a_version_is_said(version: tuple[int, ...], severity: Severity | None) -> None:
    found = [one.severity for one in cluster.version_findings("c", [version])]
    assert found == ([] if severity is None else [severity])


def test_nodes_of_several_versions_are_a_note() -> None:
    (finding,) = cluster.version_findings("c", [(4, 2, 1), (4, 2, 1), (4, 3, 0)])
    assert (finding.severity, finding.setting, finding.found) == (NOTE, "versions", "4.2.1, 4.3.0")


def test_messages_that_are_larger_than_the_broker_takes_are_a_note() -> None:
    large = [TopicSpec("small"), TopicSpec("t", max_message_bytes=20_000_000)]
    (finding,) = cluster.size_findings(large, 16 * 1024 * 1024)
    assert (finding.severity, finding.subject) == (NOTE, "topic t")
    assert "max_message_size = 20000000" in finding.fix


def test_what_waits_is_handed_on_without_a_confirm_where_the_flag_is_off() -> None:
    assert list(cluster.flag_findings("c", enabled=True)) == []
    (finding,) = cluster.flag_findings("c", enabled=False)
    assert (finding.severity, finding.fix) == (LOSES, "rabbitmqctl enable_feature_flag stream_queue")


def test_what_nobody_tells_is_unseen() -> None:
    nowhere = read_settings("rabbitmq://localhost", {"ack_timeout_seconds": 60})
    of_3, of_4 = (list(cluster.untold_findings("c", version, nowhere)) for version in ((3, 10), (4, 3)))
    assert [one.setting for one in of_3] == ["consumer_timeout", "cluster_partition_handling"]
    assert [one.setting for one in of_4] == ["consumer_timeout"]
    assert "60000" in of_4[0].required


@pytest.mark.parametrize(
    ("url", "section", "found"),
    [
        ("rabbitmq://h", {}, []),
        ("rabbitmq://h", {"replicas": 1}, [(RISKS, "replicas", "1")]),
        ("rabbitmq://u:p@h", {}, [(NOTE, "tls", "off")]),
        ("rabbitmqs://u:p@h", {}, []),
        ("rabbitmqs://u:p@h", {"management_url": "http://h:15672"}, [(NOTE, "management_url", "http")]),
    ],
)
def test_this_client_is_judged(url: str, section: dict[str, Any], found: list[tuple[Severity, str, str]]) -> None:
    findings = cluster.client_findings(read_settings(url, section), REPLICATED)
    assert [(one.severity, one.setting, one.found) for one in findings] == found
