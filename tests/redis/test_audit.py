"""The live audit: a healthy topic passes, and each unsafe value is its finding with what to do about it (S2, S3).

Whatever is broken is a pair of servers of this file's own, so that nobody else's test meets an evicting or a full one;
what takes Sentinels or a Cluster is the test-bed's.  What cannot be had in a moment (a replica that is silent for ten
seconds, an old version) is asked of the functions that judge the answers, with answers changed in one place.
"""

from __future__ import annotations

import logging
import re
import shlex
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest
from pydantic import BaseModel
from redis import Redis
from redis.exceptions import RedisError

from reliamq import DurabilityError, Reliamq
from reliamq.settings import Settings
from reliamq.spi import Ack, BrokerUnavailable, Durability, Finding, GroupSpec, Severity, TopicSpec
from reliamq_redis.audit.answers import Server, entry_id
from reliamq_redis.audit.cluster import read_nodes, replicas_of
from reliamq_redis.audit.commands import Commands
from reliamq_redis.audit.copies import Copies, copies_faults, known_replicas
from reliamq_redis.audit.groups import Removed, removed_unread
from reliamq_redis.audit.lanes import GroupOnLane, LaneView
from reliamq_redis.audit.sentinels import Told, sentinel_faults
from reliamq_redis.audit.server import primary_faults, replica_faults
from reliamq_redis.catalog.dead_letters import ORDER
from reliamq_redis.catalog.names import LaneKeys, TopicKeys, stream_of
from reliamq_redis.consuming.subscription import open_subscription
from reliamq_redis.publisher import open_publisher
from reliamq_redis.settings import RedisSettings, read_settings
from reliamq_redis.storage.storage import open_storage
from tests.redis.steps import LEASE, declare, drain, message, soon
from tests.servers.cluster import PASSWORD, free_ports
from tests.servers.process import ServerProcess, wait_until
from tests.servers.redis import RedisServers, ValkeyServers

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

LOSES, RISKS, NOTE, UNSEEN = Severity.LOSES, Severity.RISKS, Severity.NOTE, Severity.UNSEEN
REPLICATED, FSYNCED, DEVELOPMENT = Durability.REPLICATED, Durability.FSYNCED, Durability.DEVELOPMENT
KINDS = {"redis": RedisServers, "valkey": ValkeyServers}
OWN_PORTS = range(14_000, 16_000)
LONG_AGO = "1000-1"
"""The id of an entry of 1970."""

SETTINGS = """\
port {port}
bind 127.0.0.1
protected-mode no
appendonly yes
appendfsync always
save ""
repl-diskless-sync-delay 0
repl-ping-replica-period 1
replica-announce-ip 127.0.0.1
"""
CHANGED = (
    "appendonly",
    "appendfsync",
    "no-appendfsync-on-rewrite",
    "maxmemory",
    "maxmemory-policy",
    "min-replicas-to-write",
    "min-replicas-max-lag",
    "replica-announce-port",
)
"""By these tests."""


class OwnServer:
    """One server; ``redis-server`` and ``valkey-server`` alike."""

    def __init__(self, folder: Path, kind: str, more: str = "") -> None:
        folder.mkdir()
        (self.port,) = free_ports(1, OWN_PORTS)
        (folder / "server.conf").write_text(SETTINGS.format(port=self.port) + more)
        self.process = ServerProcess(f"own {folder.name}", folder, [KINDS[kind].server_program(), "server.conf"])
        self.process.start()
        wait_until(self.answers, 30, [self.process])

    def __call__(self, *command: Any) -> Any:
        with Redis(port=self.port) as client:
            return client.execute_command(*command)

    def answers(self) -> bool:
        try:
            return bool(self("PING"))
        except RedisError:
            return False

    def info(self) -> dict[str, Any]:
        with Redis(port=self.port) as client:
            return dict(client.info())


class OwnPair:
    """A primary and its replica."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.kind = kind
        self.primary = OwnServer(folder / "primary", kind)
        self.replica = OwnServer(folder / "replica", kind, f"replicaof 127.0.0.1 {self.primary.port}\n")
        self.servers = [self.primary, self.replica]
        self.wait_until_whole()
        self.usual = [{name: server("CONFIG GET", name)[name] for name in CHANGED} for server in self.servers]

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.primary.port}"

    @property
    def can_wait_for_disk(self) -> bool:
        return self.kind == "valkey"

    def set(self, name: str, value: str, *, on: OwnServer | None = None) -> None:
        (on or self.primary)("CONFIG SET", name, value)

    def mend(self) -> None:
        for server, usual in zip(self.servers, self.usual, strict=True):
            server.process.start()
            wait_until(server.answers, 30, [server.process])
            for name, value in usual.items():
                if server("CONFIG GET", name)[name] != value:
                    server("CONFIG SET", name, value)
            server("CONFIG RESETSTAT")
        self.wait_until_whole()

    def wait_until_whole(self) -> None:
        wait_until(self._is_whole, 30, [server.process for server in self.servers])

    def _is_whole(self) -> bool:
        infos = [server.info() for server in self.servers]
        seen = infos[0].get("slave0", {})
        return (seen.get("state"), seen.get("port")) == ("online", self.replica.port) and all(
            info["aof_enabled"] and not info["aof_rewrite_in_progress"] and not info["aof_rewrite_scheduled"]
            for info in infos
        )

    def stop(self) -> None:
        for server in self.servers:
            server.process.kill()


@pytest.fixture(scope="module", params=[pytest.param(kind, marks=pytest.mark.xdist_group(kind)) for kind in KINDS])
def own_pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnPair]:
    pair = OwnPair(tmp_path_factory.mktemp(f"own-{request.param}"), request.param)
    yield pair
    pair.stop()


@pytest.fixture
def pair(own_pair: OwnPair) -> Iterator[OwnPair]:
    """Mended afterwards."""
    yield own_pair
    own_pair.mend()


@pytest.fixture
def own(pair: OwnPair) -> RedisSettings:
    """Of that pair, with one lane."""
    return read_settings(pair.url, {"lanes": 1})


@pytest.fixture
async def orders(own: RedisSettings) -> str:
    """A topic of one lane on that pair, with the group ``g``."""
    return await declare(own, "g")


async def audited(
    settings: RedisSettings, topic: str | None, *groups: str, durability: Durability = REPLICATED, **fields: Any
) -> Sequence[Finding]:
    """Everything that the audit says."""
    specs = [TopicSpec(topic, tuple(map(GroupSpec, groups or ("g",))), durability, **fields)] if topic else []
    async with open_storage(settings) as storage:
        return await storage.audit(specs)


async def found_on(settings: RedisSettings, topic: str, *groups: str, **spec: Any) -> list[Finding]:
    """What it says about this topic."""
    return [one for one in await audited(settings, topic, *groups, **spec) if topic in one.subject]


async def the_one(settings: RedisSettings, topic: str, *groups: str, **spec: Any) -> Finding:
    (finding,) = await found_on(settings, topic, *groups, **spec)
    return finding


async def of_setting(settings: RedisSettings, topic: str, setting: str, **spec: Any) -> list[Finding]:
    return [one for one in await audited(settings, topic, **spec) if one.setting == setting]


def severities(findings: Sequence[Finding]) -> set[tuple[Severity, str]]:
    return {(one.severity, one.setting) for one in findings}


def run(fix: str) -> None:
    """The commands of a fix, as somebody would paste them."""
    commands = re.findall(r"redis-cli .*?(?= && |; | \(|, and |\. |$)", fix)
    assert commands, fix
    for command in commands:
        done = subprocess.run(shlex.split(command), capture_output=True, text=True, timeout=20)
        assert done.returncode == 0, done.stderr
        assert "ERR" not in done.stdout, (command, done.stdout)


# --- what is well -----------------------------------------------------------------------------------------------------


def usual(servers: RedisServers) -> set[tuple[Severity, str]]:
    """Of the test-bed: Redis' defaults, and everything on one machine."""
    found = {
        (RISKS, "min-replicas-to-write"),
        (NOTE, "maxmemory"),
        (NOTE, "aof-load-truncated"),
        (NOTE, "copies"),
        (NOTE, "tls"),
    }
    return found | ({(NOTE, "WAITAOF")} if servers.name == "redis" else set())


@pytest.mark.parametrize("url", ["url", "sentinel_url", "cluster_url"])
async def test_a_healthy_topic_gives_nothing_that_loses(whole: RedisServers, url: str) -> None:
    settings = read_settings(getattr(whole, url), {})
    topic = await declare(settings, "g", "h")
    found = await audited(settings, topic, "g", "h")
    assert severities(found) == usual(whole)
    assert [one for one in found if topic in one.subject] == []


async def test_a_topic_that_is_worked_on_and_trimmed_is_healthy(own: RedisSettings) -> None:
    """What every group has finished is removed at once; while that goes on nothing is ever said."""
    often = own.model_copy(update={"trim_interval_seconds": 0.05})
    topic, kept = await declare(often, "g", "h", retention=timedelta(0)), {"retention": timedelta(0)}
    async with (
        open_publisher(often) as publisher,
        open_subscription(often, topic, "g", LEASE) as first,
        open_subscription(often, topic, "h", LEASE) as second,
    ):
        for _ in range(20):
            await publisher.send([message(topic, str(number)) for number in range(300)], deadline=soon())
            for member in (first, second):
                came = await member.receive(300, max_bytes=1 << 30, wait=timedelta(seconds=10))
                assert await found_on(often, topic, "g", "h", **kept) == []
                await member.settle([Ack(one) for one in came])
    assert (await the_stream(often, topic))["length"] < 6000
    assert await found_on(often, topic, "g", "h", **kept) == []


async def the_stream(settings: RedisSettings, topic: str) -> dict[str, Any]:
    with Redis(port=int(settings.servers[0].rpartition(":")[2])) as client:
        return dict(client.xinfo_stream(stream_of(topic, 0)))


async def test_servers_alone_are_judged_without_topics(pair: OwnPair, own: RedisSettings) -> None:
    assert LOSES not in {one.severity for one in await audited(own, None)}
    pair.set("appendonly", "no")
    assert (LOSES, "appendonly") in severities(await audited(own, None))


async def test_an_audit_changes_nothing(pair: OwnPair, own: RedisSettings, orders: str) -> None:
    def state() -> tuple[Any, ...]:
        settings = pair.primary("CONFIG GET", "*")
        return settings, pair.primary.info()["rdb_changes_since_last_save"], sorted(pair.primary("KEYS", "*"))

    before = state()
    for topic in (orders, f"missing-{uuid.uuid4()}"):
        await audited(own, topic, "g", "missing")
    assert state() == before


async def test_a_broker_that_cannot_be_reached_is_unavailable(pair: OwnPair, own: RedisSettings, orders: str) -> None:
    async with open_storage(own) as storage:
        pair.primary.process.kill()
        with pytest.raises(BrokerUnavailable):
            await storage.audit([TopicSpec(orders, (GroupSpec("g"),))])


# --- what keeps an application from starting --------------------------------------------------------------------------


class Order(BaseModel):
    number: int


async def start(pair: OwnPair, topic: str) -> None:
    app = Reliamq(Settings(broker=f"{pair.url}?lanes=1", durability=REPLICATED))
    app.topic(topic, Order)
    async with app:
        pass


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        pytest.param(lambda pair: pair.set("appendonly", "no"), "appendonly is no, required yes", id="AOF-off"),
        pytest.param(lambda pair: pair.set("maxmemory", "100kb"), "of 102400 bytes", id="memory-full"),
        pytest.param(lambda pair: pair.replica.process.kill(), "replicas online is 0", id="replica-gone"),
        pytest.param(
            lambda pair: pair.set("maxmemory-policy", "allkeys-lru"), "maxmemory-policy is allkeys-lru", id="eviction"
        ),
    ],
)
async def test_an_application_does_not_start_where_messages_get_lost_or_are_refused(
    pair: OwnPair, orders: str, break_it: Callable[[OwnPair], None], said: str
) -> None:
    """S3; and it starts when that is mended."""
    await start(pair, orders)
    break_it(pair)
    with pytest.raises(DurabilityError) as refused:
        await start(pair, orders)
    assert said in str(refused.value)

    pair.mend()
    await start(pair, orders)


async def test_a_start_waits_for_the_replica_of_a_primary_that_was_just_restarted(
    pair: OwnPair, orders: str, caplog: pytest.LogCaptureFixture
) -> None:
    """S3; a supervisor would start it again and again otherwise, and each time it would say that messages get lost."""
    pair.replica.process.kill()
    pair.primary.process.kill()
    pair.primary.process.start()
    wait_until(pair.primary.answers, 30, [pair.primary.process])
    caplog.set_level(logging.WARNING, "reliamq.app")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(start, pair, orders)
        with anyio.fail_after(10):
            while "waiting for the broker" not in caplog.text:
                await anyio.sleep(0.05)
        pair.replica.process.start()

    assert "replicas online is 0" in caplog.text


# --- on the disk ------------------------------------------------------------------------------------------------------


async def test_without_an_append_only_file_everything_is_lost_and_the_command_mends_it(
    pair: OwnPair, own: RedisSettings, orders: str
) -> None:
    pair.set("appendonly", "no")
    by_durability = {one: await of_setting(own, orders, "appendonly", durability=one) for one in Durability}
    assert [one.severity for one in by_durability[REPLICATED]] == [LOSES]
    assert [one.severity for one in by_durability[FSYNCED]] == [LOSES]
    assert [one.severity for one in by_durability[DEVELOPMENT]] == [RISKS]

    run(by_durability[REPLICATED][0].fix)
    assert await of_setting(own, orders, "appendonly") == []


async def test_what_everysec_means_depends_on_whether_a_confirmation_can_wait(
    pair: OwnPair, own: RedisSettings, orders: str
) -> None:
    pair.set("appendfsync", "everysec")
    (finding,) = await of_setting(own, orders, "appendfsync")
    assert finding.severity is (NOTE if pair.can_wait_for_disk else LOSES)
    assert ("come again" if pair.can_wait_for_disk else "no WAITAOF") in finding.why

    pair.set("appendfsync", "no")
    (finding,) = await of_setting(own, orders, "appendfsync")
    assert finding.severity is LOSES
    run(finding.fix)
    assert await of_setting(own, orders, "appendfsync") == []


async def test_writing_that_pauses_while_the_file_is_written_anew_is_named(
    pair: OwnPair, own: RedisSettings, orders: str
) -> None:
    setting = "no-appendfsync-on-rewrite"
    pair.set(setting, "yes")
    (finding,) = await of_setting(own, orders, setting)
    assert finding.severity is (NOTE if pair.can_wait_for_disk else LOSES)
    run(finding.fix)
    assert await of_setting(own, orders, setting) == []


async def test_a_replica_without_an_append_only_file_confirms_nothing_where_disks_are_waited_for(
    pair: OwnPair, own: RedisSettings, orders: str
) -> None:
    pair.set("appendonly", "no", on=pair.replica)
    found = {one.setting: one for one in await audited(own, orders)}
    assert found["appendonly"].severity is RISKS
    assert found["appendonly"].subject == f"replica 127.0.0.1:{pair.replica.port}"
    assert found["appendonly"].why.startswith("After a failover it is the primary.")
    if pair.can_wait_for_disk:
        assert found["replicas online"].severity is LOSES
        assert "without keeping it on its disk" in found["replicas online"].found
    else:
        assert "replicas online" not in found

    run(found["appendonly"].fix)
    assert {"appendonly", "replicas online"}.isdisjoint(one.setting for one in await audited(own, orders))


# --- in memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
async def test_eviction_loses_messages_whatever_the_limit_and_the_command_ends_it(
    pair: OwnPair, own: RedisSettings, orders: str, policy: str
) -> None:
    pair.set("maxmemory-policy", policy)
    (finding,) = await of_setting(own, orders, "maxmemory-policy", durability=DEVELOPMENT)
    assert (finding.severity, finding.found) == (LOSES, policy)
    run(finding.fix)
    assert await of_setting(own, orders, "maxmemory-policy") == []


async def test_keys_that_were_evicted_are_named_until_somebody_has_seen_to_it(
    pair: OwnPair, own: RedisSettings, orders: str
) -> None:
    for number in range(20):
        pair.primary("SET", f"expires-{number}", "x" * 20_000, "EX", 1000)
    pair.set("maxmemory-policy", "volatile-ttl")
    pair.set("maxmemory", str(pair.primary.info()["used_memory"] - 100_000))
    with anyio.fail_after(20):
        while not pair.primary.info()["evicted_keys"]:
            await anyio.sleep(0.05)
    pair.set("maxmemory", "0")
    pair.set("maxmemory-policy", "noeviction")

    (finding,) = await of_setting(own, orders, "evicted_keys")
    assert finding.severity is RISKS
    assert "outbox replay" in finding.fix
    run(finding.fix)
    assert await of_setting(own, orders, "evicted_keys") == []


async def test_memory_that_is_nearly_full_is_a_risk_and_full_memory_refuses(
    pair: OwnPair, own: RedisSettings, orders: str
) -> None:
    assert [one.severity for one in await of_setting(own, orders, "maxmemory")] == [NOTE]
    used = pair.primary.info()["used_memory"]

    pair.set("maxmemory", str(int(used * 1.12)))
    (finding,) = await of_setting(own, orders, "memory used")
    assert finding.severity is RISKS
    assert await of_setting(own, orders, "maxmemory") == []

    pair.set("maxmemory", "100kb")
    (finding,) = await of_setting(own, orders, "memory used")
    assert finding.severity is LOSES
    assert "nothing that was confirmed is lost" in finding.why

    pair.set("maxmemory", str(used * 4))
    assert await of_setting(own, orders, "memory used") == []


async def test_declaring_where_memory_is_full_is_a_finding_and_no_reason_to_wait(
    pair: OwnPair, own: RedisSettings
) -> None:
    pair.set("maxmemory", "100kb")
    async with open_storage(own) as storage:
        (finding,) = await storage.declare([TopicSpec(f"test-{uuid.uuid4()}", (GroupSpec("g"),))])
    assert (finding.severity, finding.setting) == (LOSES, "declaration")
    assert "OOM" in finding.found or "maxmemory" in finding.found


# --- copies -----------------------------------------------------------------------------------------------------------


async def test_without_its_replica_a_primary_confirms_nothing(pair: OwnPair, own: RedisSettings, orders: str) -> None:
    pair.replica.process.kill()
    (finding,) = await of_setting(own, orders, "replicas online")
    assert (finding.severity, finding.found) == (LOSES, "0 (there is none)")
    assert finding.subject == f"server 127.0.0.1:{pair.primary.port}"
    (eased,) = await of_setting(own, orders, "replicas online", durability=FSYNCED)
    assert eased.severity is RISKS  # a single machine is accepted there, loudly


async def test_fewer_replicas_than_are_asked_for_is_named(own: RedisSettings, orders: str) -> None:
    more = own.model_copy(update={"replicas": 2})
    (finding,) = await of_setting(more, orders, "replicas online")
    assert finding.severity is LOSES
    assert finding.found.startswith("1 (127.0.0.1:")
    assert finding.required.startswith("at least 2")


async def test_a_client_that_waits_for_no_replica_promises_more_than_it_keeps(own: RedisSettings, orders: str) -> None:
    alone = own.model_copy(update={"replicas": 0})
    found = {(one.subject, one.setting): one for one in await audited(alone, orders)}
    assert found["this client", "replicas"].severity is LOSES
    eased = await audited(alone, orders, durability=FSYNCED)
    assert ("this client", "replicas") not in {(one.subject, one.setting) for one in eased}


@pytest.mark.parametrize("url", ["sentinel_url", "cluster_url"])
async def test_what_a_failover_may_forget_is_said_with_what_brings_it_back(whole: RedisServers, url: str) -> None:
    settings = read_settings(getattr(whole, url), {"replicas": 0})
    topic = await declare(settings, "g", durability=FSYNCED)
    (finding,) = await of_setting(settings, topic, "failover", durability=FSYNCED)
    assert (finding.severity, finding.found) == (RISKS, "a confirmation waits for 0 of 1 replicas")
    assert "reliamq outbox replay --since" in finding.fix
    assert "'replicas' to 1" in finding.fix


async def test_where_no_failover_comes_by_itself_what_it_would_forget_is_a_note(
    own: RedisSettings, orders: str
) -> None:
    (finding,) = await of_setting(own, orders, "failover", durability=FSYNCED)
    assert finding.severity is NOTE
    assert await of_setting(own, orders, "failover") == []


async def test_a_primary_that_goes_on_without_its_replicas_is_a_risk_and_the_command_mends_it(
    pair: OwnPair, own: RedisSettings, orders: str
) -> None:
    setting = "min-replicas-to-write"
    (finding,) = await of_setting(own, orders, setting)
    assert (finding.severity, finding.found) == (RISKS, "0")
    run(finding.fix)
    assert await of_setting(own, orders, setting) == []

    pair.set("min-replicas-max-lag", "0")
    (finding,) = await of_setting(own, orders, setting)
    assert (finding.severity, finding.found) == (RISKS, "1, without min-replicas-max-lag")

    pair.set("min-replicas-max-lag", "10")
    pair.set(setting, "2")
    (finding,) = await of_setting(own, orders, setting)
    assert (finding.severity, finding.found) == (LOSES, "2, and 1 are there")


async def test_a_replica_that_cannot_be_asked_is_unseen(pair: OwnPair, own: RedisSettings, orders: str) -> None:
    pair.set("replica-announce-port", "1", on=pair.replica)
    pair.primary("CLIENT", "KILL", "TYPE", "replica")  # it says where it is when it connects
    with anyio.fail_after(30):
        while pair.primary.info().get("slave0", {}).get("port") != 1:
            await anyio.sleep(0.1)
    with anyio.fail_after(30):
        while pair.primary.info()["slave0"]["state"] != "online":
            await anyio.sleep(0.1)
    (finding,) = [one for one in await audited(own, orders) if one.severity is UNSEEN]
    assert finding.subject == "replica 127.0.0.1:1"
    assert "replica-announce" in finding.fix
    pair.set("replica-announce-port", "0", on=pair.replica)
    pair.primary("CLIENT", "KILL", "TYPE", "replica")


async def test_a_url_that_names_a_replica_is_no_primary(pair: OwnPair, orders: str) -> None:
    settings = read_settings(f"redis://127.0.0.1:{pair.replica.port}", {"lanes": 1})
    found = {one.setting: one for one in await audited(settings, orders)}
    assert found["role"].severity is LOSES
    assert f"127.0.0.1:{pair.primary.port}" in found["role"].fix
    assert "replicas online" not in found


async def test_a_password_in_the_clear_is_a_note_and_is_never_shown(
    servers: RedisServers, settings: RedisSettings, topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    found = await audited(settings, topic)
    assert (NOTE, "tls") in severities(found)
    commands = [one.fix for one in found if "redis-cli" in one.fix]
    assert commands
    assert all("--askpass" in one for one in commands)
    assert PASSWORD not in "".join(map(str, found)) + caplog.text
    if servers.speaks_tls:
        options = f"?ca_file={servers.certificate_authority}"
        assert (NOTE, "tls") not in severities(await audited(read_settings(servers.secure_url + options, {}), topic))


# --- what may not be asked --------------------------------------------------------------------------------------------


@pytest.fixture
def user(pair: OwnPair) -> Iterator[Callable[..., RedisSettings]]:
    """Settings of a user who may do all but some commands."""
    name = f"user-{uuid.uuid4()}"

    def made(*refused: str) -> RedisSettings:
        for server in pair.servers:
            rights = ["on", f">{PASSWORD}", "~reliamq:*", "+@all", *(f"-{command}" for command in refused)]
            server("ACL", "SETUSER", name, "reset", *rights)
        return read_settings(pair.url, {"lanes": 1, "username": name, "password": PASSWORD})

    yield made
    for server in pair.servers:
        server("ACL", "DELUSER", name)


async def test_settings_that_may_not_be_read_are_unseen_and_the_command_permits_it(
    pair: OwnPair, orders: str, user: Callable[..., RedisSettings]
) -> None:
    settings = user("config")
    unseen = [one for one in await audited(settings, orders) if one.severity is UNSEEN]
    assert {one.subject for one in unseen} == {
        f"server 127.0.0.1:{pair.primary.port}",
        f"replica 127.0.0.1:{pair.replica.port}",
    }
    for one in unseen:
        assert one.setting == "settings"
        assert "appendfsync, no-appendfsync-on-rewrite" in one.found
        assert "permission" in one.found
        assert "appendonly" not in one.found  # INFO tells that one

    pair.set("appendonly", "no")
    assert (LOSES, "appendonly") in severities(await audited(settings, orders))
    pair.mend()
    for one in unseen:
        words = shlex.split(one.fix.partition(";")[0].replace("--askpass", ""))
        assert words[-4:] == [settings.username, "+info", "+config|get", "+command"]
        (pair.primary if str(pair.primary.port) in words else pair.replica)(*words[words.index("ACL") :])
    assert UNSEEN not in {one.severity for one in await audited(settings, orders)}


async def test_a_server_that_tells_nothing_is_unseen_and_nothing_is_made_up(
    orders: str, user: Callable[..., RedisSettings]
) -> None:
    found = await audited(user("config", "info", "command"), orders)
    assert LOSES not in {one.severity for one in found}
    (primary,) = [one for one in found if one.severity is UNSEEN]
    for name in ("role", "connected_slaves", "appendonly", "maxmemory-policy", "evicted_keys", "WAITAOF"):
        assert name in primary.found


async def test_keys_that_may_not_be_asked_about_are_unseen_and_not_missing(
    orders: str, user: Callable[..., RedisSettings]
) -> None:
    finding = await the_one(user("xinfo", "pttl", "exists"), orders)
    assert (finding.severity, finding.setting) == (UNSEEN, "EXISTS, PTTL, XINFO STREAM")
    assert "ACL SETUSER" in finding.fix
    assert "+exists +pttl" in finding.fix


async def test_a_topic_whose_keys_are_forbidden_is_unseen(pair: OwnPair, orders: str) -> None:
    pair.primary("ACL", "SETUSER", "other", "on", f">{PASSWORD}", "~other:*", "+@all")
    settings = read_settings(pair.url, {"lanes": 1, "username": "other", "password": PASSWORD})
    found = await found_on(settings, orders)
    pair.primary("ACL", "DELUSER", "other")
    assert {one.severity for one in found} == {UNSEEN}


async def test_a_user_with_the_rights_that_the_documents_name_sees_everything(
    pair: OwnPair, orders: str, user: Callable[..., RedisSettings]
) -> None:
    settings = user()
    waiting = "+wait +waitaof" if pair.can_wait_for_disk else "+wait"
    rights = (
        f"+@stream +@hash +@sortedset +@set +@scripting +@connection {waiting} +exists +del +command "
        "+info +config|get +pttl +type +time"
    )
    for server in pair.servers:
        server("ACL", "SETUSER", settings.username, "-@all", *rights.split())
    await published(settings, orders, 3)
    fetch(pair, orders, 2)
    pair.primary("ZADD", LaneKeys(orders, 0, "g").delayed, 1, "1-1")
    pair.primary("HSET", LaneKeys(orders, 0, "g").waiting, "1-1", "message")
    found = await audited(settings, orders)
    assert {LOSES, UNSEEN}.isdisjoint(one.severity for one in found)


# --- topics -----------------------------------------------------------------------------------------------------------


async def test_a_missing_topic_is_named_and_not_made_by_asking(own: RedisSettings) -> None:
    name = f"missing-{uuid.uuid4()}"
    for _ in range(2):
        finding = await the_one(own, name)
        assert (finding.severity, finding.setting, finding.found) == (LOSES, "topic", "missing")
        assert "declare" in finding.fix


async def test_a_topic_that_was_declared_otherwise_is_named(own: RedisSettings) -> None:
    topic = await declare(own, "g", durability=FSYNCED, max_message_bytes=1000, retention=timedelta(days=8))
    other = own.model_copy(update={"lanes": 4})
    found = {one.setting: (one.severity, one.found, one.required) for one in await found_on(other, topic)}
    assert found == {
        "durability": (RISKS, "fsynced", "replicated"),
        "max_message_bytes": (RISKS, "1000", "1048576"),
        "retention": (NOTE, "691200.0", "604800.0"),
        "lanes": (NOTE, "1", "4"),
    }


async def test_a_topic_whose_facts_cannot_be_read_is_named(pair: OwnPair, own: RedisSettings, orders: str) -> None:
    pair.primary("HSET", TopicKeys(orders).facts, "lanes", "3")
    finding = await the_one(own, orders)
    assert (finding.severity, finding.setting) == (LOSES, "topic")
    assert "3 lanes" in finding.found


async def test_a_group_that_is_not_declared_is_named(own: RedisSettings, orders: str) -> None:
    finding = await the_one(own, orders, "g", "other")
    assert (finding.severity, finding.subject) == (LOSES, f"group other of topic {orders}")
    assert (finding.setting, finding.found) == ("group", "missing")


async def test_a_missing_stream_and_a_group_that_is_missing_on_one_are_named(pair: OwnPair) -> None:
    settings = read_settings(pair.url, {"lanes": 2})
    topic = await declare(settings, "g", "h")
    first, second = stream_of(topic, 0), stream_of(topic, 1)
    pair.primary("XGROUP", "DESTROY", second, "g")
    finding = await the_one(settings, topic, "g", "h")
    assert (finding.severity, finding.setting, finding.found) == (LOSES, "group", f"missing ({second})")

    pair.primary("DEL", first)
    found = {(one.severity, one.setting, one.found) for one in await found_on(settings, topic, "h")}
    assert found == {(LOSES, "streams", f"missing ({first})"), (RISKS, "group", f"missing ({second})")}
    # g, that nobody asks for here, may be being declared at this moment; until it is there, nothing is removed


async def test_a_topic_without_any_group_takes_no_message(own: RedisSettings) -> None:
    topic = await declare(own)
    async with open_storage(own) as storage:
        found = [one for one in await storage.audit([TopicSpec(topic)]) if topic in one.subject]
    assert severities(found) == {(RISKS, "groups")}


async def test_a_group_that_is_not_among_the_declared_ones_is_a_risk(
    pair: OwnPair, own: RedisSettings, orders: str
) -> None:
    pair.primary("SREM", TopicKeys(orders).groups, "g")
    finding = await the_one(own, orders)
    assert (finding.severity, finding.setting) == (RISKS, "group")


@pytest.mark.parametrize("of", ["facts", "groups", "members", "stream", "state", "attempts", "delayed", "waiting"])
async def test_a_key_that_expires_loses_what_is_in_it_and_the_command_keeps_it(
    pair: OwnPair, own: RedisSettings, orders: str, of: str
) -> None:
    key = key_of(orders, of)
    make(pair, key, KIND_OF[of])
    pair.primary("EXPIRE", key, 1000)
    found = [one for one in await found_on(own, orders) if one.setting == "expires"]
    assert [one.severity for one in found] == [LOSES]
    assert key in found[0].found
    run(found[0].fix)
    assert "expires" not in {one.setting for one in await found_on(own, orders)}


@pytest.mark.parametrize("of", ["facts", "groups", "members", "stream", "state", "attempts", "delayed", "waiting"])
async def test_a_key_of_another_type_is_named_and_makes_no_other_finding_of_its_own(
    pair: OwnPair, own: RedisSettings, orders: str, of: str
) -> None:
    key = key_of(orders, of)
    pair.primary("SET", key, "somebody's")
    found = [one for one in await found_on(own, orders) if (one.severity, one.setting) == (LOSES, "type")]
    assert [one.found for one in found] == [f"string ({key})"]
    assert UNSEEN not in {one.severity for one in await found_on(own, orders)}
    run(found[0].fix)
    assert "type" not in {one.setting for one in await found_on(own, orders)}


KIND_OF = {
    "facts": "hash",
    "groups": "set",
    "members": "zset",
    "stream": "stream",
    "state": "hash",
    "attempts": "hash",
    "delayed": "zset",
    "waiting": "hash",
}


def key_of(topic: str, of: str) -> str:
    if of == "members":
        return TopicKeys(topic).members("g")
    keys: Any = TopicKeys(topic) if of in ("facts", "groups") else LaneKeys(topic, 0, "g")
    return str(getattr(keys, of))


def make(pair: OwnPair, key: str, kind: str) -> None:
    """Unless it is there."""
    if not pair.primary("EXISTS", key):
        pair.primary(*(("ZADD", key, 1, "a") if kind == "zset" else ("HSET", key, "a", "b")))


async def test_dead_letters_that_expire_are_named(pair: OwnPair, own: RedisSettings, orders: str) -> None:
    pair.primary("ZADD", ORDER, 1, "a")
    pair.primary("EXPIRE", ORDER, 1000)
    found = [one for one in await audited(own, orders) if one.subject == "dead letters"]
    pair.primary("DEL", ORDER)
    assert severities(found) == {(LOSES, "expires")}


# --- what somebody removed --------------------------------------------------------------------------------------------


async def published(settings: RedisSettings, topic: str, count: int) -> list[str]:
    """So many messages; the ids of all entries that are there."""
    async with open_publisher(settings) as publisher:
        await publisher.send([message(topic, str(number)) for number in range(count)], deadline=soon())
    with Redis(port=int(settings.servers[0].rpartition(":")[2])) as client:
        return [name.decode() for name, _ in client.xrange(stream_of(topic, 0))]


def fetch(pair: OwnPair, topic: str, count: int, *, group: str = "g", consumer: str = "lane") -> list[str]:
    """As a worker does; what is fetched is pending."""
    stream = stream_of(topic, 0)
    told = pair.primary("XREADGROUP", "GROUP", group, consumer, "COUNT", count, "STREAMS", stream, ">")
    return [name.decode() for name, _ in told[0][1]]


def finish(pair: OwnPair, topic: str, names: Sequence[str], *, group: str = "g") -> None:
    pair.primary("XACK", stream_of(topic, 0), group, *names)


@pytest.mark.parametrize("how", ["XTRIM", "XTRIM all", "XDEL"])
async def test_entries_that_were_removed_unread_are_named_until_somebody_has_seen_to_it(
    pair: OwnPair, own: RedisSettings, orders: str, how: str
) -> None:
    names, stream = await published(own, orders, 10), stream_of(orders, 0)
    finish(pair, orders, fetch(pair, orders, 4))
    assert await found_on(own, orders) == []
    if how == "XDEL":
        pair.primary("XDEL", stream, names[6])
    else:
        pair.primary("XTRIM", stream, "MAXLEN", 0 if how == "XTRIM all" else 3)

    finding = await the_one(own, orders)
    assert (finding.severity, finding.setting) == (LOSES, "unread entries")
    assert finding.found == f"removed by somebody (XTRIM, XDEL) ({stream})"
    assert "outbox replay" in finding.fix
    run(finding.fix)
    assert await found_on(own, orders) == []

    if how == "XTRIM all":
        await published(own, orders, 1)
    left = len(await drain(own, orders, 1))  # and nothing that is there is passed over
    assert left == {"XTRIM": 3, "XTRIM all": 1, "XDEL": 5}[how]
    assert await found_on(own, orders) == []


@pytest.mark.parametrize("how", ["XTRIM", "XDEL", "XTRIM and XDEL"])
async def test_entries_that_were_removed_before_anything_was_read_may_have_been_older_than_the_group(
    pair: OwnPair, own: RedisSettings, orders: str, how: str
) -> None:
    names = await published(own, orders, 10)
    if "XDEL" in how:
        pair.primary("XDEL", stream_of(orders, 0), names[8])
    if "XTRIM" in how:
        pair.primary("XTRIM", stream_of(orders, 0), "MAXLEN", 3)
    finding = await the_one(own, orders)
    assert (finding.severity, finding.setting) == (RISKS, "unread entries")
    run(finding.fix)
    assert await found_on(own, orders) == []


async def test_a_group_that_is_new_gets_what_is_kept_and_misses_nothing(
    pair: OwnPair, own: RedisSettings, orders: str
) -> None:
    names = await published(own, orders, 10)
    finish(pair, orders, fetch(pair, orders, 10))
    pair.primary("XTRIM", stream_of(orders, 0), "MINID", names[8])
    async with open_storage(own) as storage:
        await storage.declare([TopicSpec(orders, (GroupSpec("g"), GroupSpec("new"), GroupSpec("late", "latest")))])
    assert await found_on(own, orders, "g", "new", "late") == []
    await published(own, orders, 1)
    assert await found_on(own, orders, "g", "new") == []


async def test_where_redis_does_not_count_what_a_group_had_it_is_unseen(
    pair: OwnPair, own: RedisSettings, orders: str
) -> None:
    await published(own, orders, 5)
    finish(pair, orders, fetch(pair, orders, 5))
    async with open_storage(own) as storage:
        await storage.declare([TopicSpec(orders, (GroupSpec("late", "latest"),))])
    pair.primary("XTRIM", stream_of(orders, 0), "MAXLEN", 0)
    await published(own, orders, 1)
    finding = await the_one(own, orders, "late")
    assert (finding.severity, finding.subject) == (UNSEEN, f"group late of topic {orders}")

    finish(pair, orders, fetch(pair, orders, 1, group="late"), group="late")
    assert await found_on(own, orders, "late") == []


@pytest.mark.parametrize("how", ["XTRIM", "XDEL"])
async def test_entries_that_were_removed_unfinished_are_named(
    pair: OwnPair, own: RedisSettings, orders: str, how: str
) -> None:
    names = await published(own, orders, 5)
    fetch(pair, orders, 5)
    finish(pair, orders, [names[1]])
    pair.primary("XDEL", stream_of(orders, 0), names[1])  # finished: nobody misses it
    assert await found_on(own, orders) == []

    if how == "XTRIM":
        pair.primary("XTRIM", stream_of(orders, 0), "MAXLEN", 2)
    else:
        pair.primary("XDEL", stream_of(orders, 0), names[2])
    finding = await the_one(own, orders)
    assert (finding.severity, finding.setting) == (LOSES, "unfinished entries")
    assert f"such as {names[2 if how == 'XDEL' else 0]}" in finding.found

    await drain(own, orders, 2 if how == "XTRIM" else 3)  # a worker passes over what is gone
    assert await found_on(own, orders) == []


async def test_entries_that_a_stranger_fetched_are_named_and_the_command_gives_them_to_the_workers(
    pair: OwnPair, own: RedisSettings, orders: str
) -> None:
    await published(own, orders, 3)
    fetch(pair, orders, 2, consumer="somebody")
    finding = await the_one(own, orders)
    assert (finding.severity, finding.found) == (LOSES, f"2 fetched by somebody ({stream_of(orders, 0)})")
    with pytest.raises(AssertionError):
        async with open_subscription(own, orders, "g", LEASE) as member:
            came = await member.receive(10, max_bytes=1 << 30, wait=timedelta(seconds=3))
            assert len(came) == 3, "a worker does not get them"

    run(finding.fix.replace("60000", "0"))
    assert await found_on(own, orders) == []
    assert len(await drain(own, orders, 3)) == 3


async def test_late_retries_without_their_message_are_named(pair: OwnPair, own: RedisSettings, orders: str) -> None:
    keys = LaneKeys(orders, 0, "g")
    pair.primary("ZADD", keys.delayed, time.time() * 1000 + 1e6, "1-1")
    pair.primary("HSET", keys.waiting, "1-1", "message")
    assert await found_on(own, orders) == []
    for away, found in ((keys.waiting, "1 by time, 0 with"), (keys.delayed, "0 by time, 1 with")):
        kept = pair.primary("DUMP", away)
        pair.primary("DEL", away)
        finding = await the_one(own, orders)
        assert (finding.severity, finding.setting) == (LOSES, "late retries")
        assert finding.found.startswith(found)
        pair.primary("RESTORE", away, 0, kept)


# --- what waits -------------------------------------------------------------------------------------------------------


async def test_a_group_that_nobody_works_for_is_named_and_how_long_its_messages_wait(
    pair: OwnPair, own: RedisSettings, orders: str
) -> None:
    await published(own, orders, 1)
    assert await found_on(own, orders) == []  # a deployment may take a while
    later = await declare(own, "g", "other")
    pair.primary("XADD", stream_of(later, 0), LONG_AGO, "id", "1")
    pair.primary("HSET", LaneKeys(later, 0, "other").state, "until", int(time.time() * 1000) - 7_300_000)
    found = {(one.subject, one.setting): one for one in await found_on(own, later, "g")}
    assert {one.severity for one in found.values()} == {NOTE}
    assert found[f"group g of topic {later}", "members"].found.startswith("none, and one waits for ")
    assert found[f"group other of topic {later}", "members"].found.endswith("; the last one was gone 2 hours ago")
    for group in ("g", "other"):
        # The one that nobody asks for keeps what the other has finished
        assert "days old" in found[f"group {group} of topic {later}", "oldest unfinished entry"].found

    pair.primary("ZADD", TopicKeys(later).members("g"), time.time() * 1000 + 60_000, "somebody")
    found = {(one.subject, one.setting): one for one in await found_on(own, later, "g")}
    assert (f"group g of topic {later}", "members") not in found
    assert found[f"group g of topic {later}", "lanes"].found.startswith("had by nobody")


async def test_late_retries_that_are_overdue_wait_too(pair: OwnPair, own: RedisSettings, orders: str) -> None:
    keys = LaneKeys(orders, 0, "g")
    pair.primary("ZADD", keys.delayed, 1, "1-1")
    pair.primary("HSET", keys.waiting, "1-1", "message")
    finding = await the_one(own, orders)
    assert (finding.severity, finding.setting) == (NOTE, "members")


# --- Sentinels --------------------------------------------------------------------------------------------------------


async def test_a_sentinel_that_is_away_is_a_risk_and_without_a_majority_nothing_takes_over(whole: RedisServers) -> None:
    settings = read_settings(whole.sentinel_url, {"request_timeout_seconds": 2})
    topic = await declare(settings, "g")
    away = f"sentinel 127.0.0.1:{whole.ports[whole.sentinels[2]].plain}"
    whole.sentinels[2].kill()
    by_subject = {(one.subject, one.setting): one for one in await audited(settings, topic)}
    assert by_subject[away, "answer"].severity is RISKS
    assert LOSES not in {one.severity for one in by_subject.values()}

    whole.sentinels[1].kill()
    with anyio.fail_after(20):  # until the last one has noticed
        while (RISKS, "quorum") not in severities(found := await audited(settings, topic)):
            await anyio.sleep(0.5)
    (finding,) = [one for one in found if one.setting == "quorum"]
    assert "NOQUORUM" in finding.found


async def test_a_replica_that_only_the_sentinels_remember_is_away_and_not_forgotten(whole: RedisServers) -> None:
    settings = read_settings(whole.sentinel_url, {"request_timeout_seconds": 2})
    topic = await declare(settings, "g")
    (replica,) = [server for server in whole.sentinel_pair if server is not whole.current_primary()]
    replica.kill()
    (finding,) = await of_setting(settings, topic, "replicas online")
    assert finding.severity is LOSES
    assert finding.found == f"0 (127.0.0.1:{whole.ports[replica].plain} is away)"
    assert "Start 127.0.0.1:" in finding.fix


def told_by_a_sentinel(**changed: str) -> Told:
    usual = {"ip": "a", "port": "1", "flags": "master", "num-other-sentinels": "2"}
    return Told(("s", 1), {**usual, **{name.replace("_", "-"): value for name, value in changed.items()}})


def test_what_is_odd_about_a_sentinel_is_a_risk() -> None:
    def odd(told: Told) -> list[tuple[Severity, str, str]]:
        return [(one.severity, one.setting, one.found) for one in sentinel_faults(told, ("a", 1))]

    assert odd(told_by_a_sentinel()) == []
    assert odd(told_by_a_sentinel(num_other_sentinels="1")) == [(RISKS, "sentinels", "2 that it knows")]
    assert odd(told_by_a_sentinel(flags="s_down,master")) == [(RISKS, "flags of the primary", "s_down,master")]
    assert odd(told_by_a_sentinel(port="2")) == [(RISKS, "primary", "a:2")]
    assert odd(Told(("s", 1), None)) == [(RISKS, "primary", "not known to it")]


# --- Clusters ---------------------------------------------------------------------------------------------------------


async def test_a_primary_of_the_cluster_without_its_replica_is_named_and_the_others_are_not(
    whole: RedisServers,
) -> None:
    settings = read_settings(whole.cluster_url, {"request_timeout_seconds": 2})
    topic = await declare(settings, "g")
    (replica, address) = next(
        (node, whole.ports[node].plain) for node in whole.cluster_nodes if role_of(whole, node) == "slave"
    )
    replica.kill()
    with anyio.fail_after(20):  # until the others have noticed
        while (RISKS, "nodes") not in severities(found := await audited(settings, topic)):
            await anyio.sleep(0.5)
    (finding,) = [one for one in found if one.setting == "replicas online"]
    assert (finding.severity, finding.found) == (LOSES, f"0 (127.0.0.1:{address} is away)")
    assert finding.subject.startswith("server 127.0.0.1:")
    (nodes,) = [one for one in found if one.setting == "nodes"]
    assert nodes.found == f"without 127.0.0.1:{address}"


def role_of(servers: RedisServers, node: ServerProcess) -> str:
    with servers.client(node) as client:
        return str(client.info("replication")["role"])


async def test_a_cluster_that_lacks_a_part_of_the_data_is_named_and_its_topics_are_unseen(
    own_pair: OwnPair, tmp_path: Path
) -> None:
    more = "cluster-enabled yes\ncluster-port 0\ncluster-require-full-coverage yes\n"
    node = OwnServer(tmp_path / "node", own_pair.kind, more)
    try:
        node("CLUSTER ADDSLOTSRANGE", 0, 16_000)
        settings = read_settings(f"redis+cluster://127.0.0.1:{node.port}", {"lanes": 1})
        found = await audited(settings, "orders")
        assert {(LOSES, "cluster_state"), (LOSES, "slots"), (RISKS, "primaries")} <= severities(found)
        assert UNSEEN in {one.severity for one in found if one.subject == "topic orders"}

        node("CLUSTER ADDSLOTSRANGE", 16_001, 16_383)
        with anyio.fail_after(20):
            while (LOSES, "cluster_state") in severities(found := await audited(settings, "orders")):
                await anyio.sleep(0.5)
        assert (LOSES, "topic") in severities(found)

        node("CONFIG SET", "cluster-require-full-coverage", "no")
        assert (NOTE, "cluster-require-full-coverage") in severities(await audited(settings, "orders"))
    finally:
        node.process.kill()


def test_nodes_are_read_with_who_replicates_whom() -> None:
    answer = (
        b"a1 10.0.0.1:1@2 myself,master - 0 0 1 connected 0-16383\n"
        b"b2 10.0.0.2:1@2,host slave a1 0 0 1 connected\n"
        b"c3 10.0.0.3:1@2 slave,fail a1 0 0 1 disconnected\n"
    )
    nodes = read_nodes(answer)
    assert replicas_of(("10.0.0.1", 1), nodes) == {("10.0.0.2", 1), ("10.0.0.3", 1)}
    assert [node.is_well for node in nodes] == [True, True, False]


# --- answers of servers in another state ------------------------------------------------------------------------------

NOWHERE = read_settings("redis://localhost", {})
INFO: dict[str, Any] = {
    "redis_version": "7.4.1",
    "role": "master",
    "connected_slaves": 2,
    "slave0": {"ip": "b", "port": 1, "state": "online", "offset": 5, "lag": 0},
    "slave1": {"ip": "c", "port": 1, "state": "online", "offset": 5, "lag": 1},
    "aof_enabled": 1,
    "aof_last_write_status": "ok",
    "aof_last_bgrewrite_status": "ok",
    "rdb_last_bgsave_status": "ok",
    "maxmemory": 1000,
    "used_memory": 100,
    "maxmemory_policy": "noeviction",
    "evicted_keys": 0,
}
CONFIG = {
    "appendonly": "yes",
    "appendfsync": "always",
    "no-appendfsync-on-rewrite": "no",
    "aof-load-truncated": "no",
    "min-replicas-to-write": "1",
    "min-replicas-max-lag": "10",
}
SERVER = Server(("a", 1), INFO, CONFIG, knows_waitaof=True, refused={})


def judged(server: Server, durability: Durability = REPLICATED) -> list[tuple[Severity, str]]:
    return [(one.severity, one.setting) for one in primary_faults(server, durability, Commands(NOWHERE))]


def told_otherwise(**changed: Any) -> Server:
    return replace(SERVER, info={**INFO, **changed})


def test_a_server_in_order_passes() -> None:
    assert judged(SERVER) == []
    assert list(replica_faults(SERVER, REPLICATED, Commands(NOWHERE))) == []


def test_an_append_only_file_that_cannot_be_written_is_named() -> None:
    assert judged(told_otherwise(aof_last_write_status="err")) == [(LOSES, "aof_last_write_status")]
    assert judged(told_otherwise(aof_last_bgrewrite_status="err")) == [(RISKS, "aof_last_bgrewrite_status")]
    assert judged(told_otherwise(rdb_last_bgsave_status="err")) == [(RISKS, "rdb_last_bgsave_status")]


def test_old_versions_are_named() -> None:
    assert judged(replace(told_otherwise(redis_version="6.0.9"), knows_waitaof=False)) == [(RISKS, "version")]
    assert judged(replace(told_otherwise(redis_version="6.2.1"), knows_waitaof=False)) == [(NOTE, "WAITAOF")]


def test_whether_a_server_knows_waitaof_is_told_by_its_version_where_it_does_not_say() -> None:
    assert replace(SERVER, knows_waitaof=None).waits_for_disk
    assert not replace(told_otherwise(redis_version="7.0.15"), knows_waitaof=None).waits_for_disk
    assert judged(replace(SERVER, knows_waitaof=None)) == [(UNSEEN, "settings")]


def test_a_replica_is_one_step_milder_and_says_no_notes() -> None:
    def of_replica(server: Server) -> list[tuple[Severity, str]]:
        return [(one.severity, one.setting) for one in replica_faults(server, REPLICATED, Commands(NOWHERE))]

    assert of_replica(told_otherwise(maxmemory_policy="allkeys-lru")) == [(RISKS, "maxmemory-policy")]
    assert of_replica(told_otherwise(evicted_keys=1)) == [(NOTE, "evicted_keys")]
    assert of_replica(told_otherwise(maxmemory=0)) == []
    assert of_replica(told_otherwise(role="slave")) == []


def copies_judged(copies: Copies, **settings: Any) -> list[tuple[Severity, str, str]]:
    asked = read_settings("redis+sentinel://s1,s2,s3/orders", {"replicas": 2, **settings})
    faults = copies_faults(copies, asked, REPLICATED, Commands(asked))
    return [(one.severity, one.setting, one.found) for one in faults if one.setting != "min-replicas-to-write"]


def test_a_replica_that_is_silent_or_not_online_does_not_count() -> None:
    known = frozenset({("b", 1), ("c", 1)})
    assert copies_judged(Copies(SERVER, known, {})) == []
    silent = told_otherwise(slave1={**INFO["slave1"], "lag": 11})
    found = "1 (b:1 is online, c:1 is silent for 11 s)"
    assert copies_judged(Copies(silent, known, {})) == [(LOSES, "replicas online", found)]
    coming = told_otherwise(slave1={**INFO["slave1"], "state": "wait_bgsave"})
    found = "1 (b:1 is online, c:1 is wait_bgsave)"
    assert copies_judged(Copies(coming, known, {})) == [(LOSES, "replicas online", found)]
    assert copies_judged(Copies(coming, known, {}), replicas=1) == [
        (RISKS, "replicas online", found),
        (RISKS, "failover", "a confirmation waits for 1 of 2 replicas"),
    ]


def test_a_primary_without_its_replicas_is_waited_for_while_they_may_be_coming() -> None:
    """There were replicas, or it was just started: then it does not know yet."""

    def are_coming(server: Server, known: set[tuple[str, int]]) -> list[bool]:
        faults = copies_faults(Copies(server, frozenset(known), {}), NOWHERE, REPLICATED, Commands(NOWHERE))
        return [one.passing for one in faults if one.setting == "replicas online"]

    alone = replace(SERVER, info={name: value for name, value in INFO.items() if not name.startswith("slave")})
    started = replace(alone, info={**alone.info, "uptime_in_seconds": 3})
    assert are_coming(replace(alone, info={**alone.info, "uptime_in_seconds": 3600}), set()) == [False]
    assert are_coming(replace(alone, info={**alone.info, "uptime_in_seconds": 3600}), {("b", 1)}) == [True]
    assert are_coming(started, set()) == [True]


def test_a_replica_that_keeps_nothing_counts_where_no_disk_is_waited_for() -> None:
    known, without = frozenset({("b", 1), ("c", 1)}), replace(SERVER, config={**CONFIG, "appendfsync": "no"})
    (fault,) = copies_judged(Copies(SERVER, known, {("c", 1): without}))
    assert fault[:2] == (LOSES, "replicas online")
    assert copies_judged(Copies(replace(SERVER, knows_waitaof=False), known, {("c", 1): without})) == []


def test_a_replica_that_has_several_addresses_is_one() -> None:
    inside, outside, away = ("10.0.0.2", 1), ("orders.example", 1), ("10.0.0.3", 1)
    assert known_replicas(frozenset({inside}), frozenset({outside})) == {inside}
    assert known_replicas(frozenset({inside}), frozenset({inside, away})) == {inside, away}
    assert known_replicas(frozenset({inside}), frozenset()) == {inside}


def lane(first: str | None, generated: str, *, added: int | None, length: int, **groups: GroupOnLane) -> LaneView:
    return LaneView(
        "stream",
        exists=True,
        length=length,
        first=entry_id(first) if first else None,
        generated=entry_id(generated),
        added=added,
        groups=groups,
    )


def test_before_redis_7_nothing_is_known_of_what_a_group_has_not_had() -> None:
    behind, done = GroupOnLane((5, 0)), GroupOnLane((9, 0))
    old = lane("6-0", "9-0", added=None, length=4, behind=behind, done=done)
    assert removed_unread(old, "behind") is Removed.UNKNOWN
    assert removed_unread(old, "done") is Removed.NONE


def test_an_entry_that_was_never_there_is_not_missed() -> None:
    """Ids have gaps: what counts is how many there were."""
    one = GroupOnLane((5, 0), read=3)
    assert removed_unread(lane("8-0", "9-0", added=5, length=2, g=one), "g") is Removed.NONE
    assert removed_unread(lane("9-0", "9-0", added=5, length=1, g=one), "g") is Removed.SOME
    assert removed_unread(lane(None, "9-0", added=5, length=0, g=one), "g") is Removed.SOME
