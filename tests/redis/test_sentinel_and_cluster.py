"""Servers that change roles under load, behind Sentinels and in a Cluster (P1, P2, C1, C3, I2)."""

from __future__ import annotations

import itertools
import random
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import pytest
from redis import Redis
from redis.exceptions import RedisError
from sqlalchemy import text

from reliamq import Rejected, Reliamq, Unconfirmed
from reliamq.database import open_engine
from reliamq.spi import Confirmation, Durability
from reliamq_redis.catalog.dead_letters import ORDER, open_dead_letters
from reliamq_redis.catalog.names import stream_of
from reliamq_redis.publisher import open_publisher
from reliamq_redis.settings import RedisSettings, read_settings
from tests.brokers.application import Order, make_app, working
from tests.brokers.conftest import on_redis
from tests.brokers.test_consuming import register
from tests.redis.steps import bodies, declare, drain, message, outcome_of, outcomes_of, publishing, record_of, soon
from tests.servers.process import ServerProcess
from tests.servers.redis import PASSWORD, USER, RedisServers

# Slow: a failover takes seconds that a busy machine stretches
pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.timeout(120)]
CALLERS = 20
QUIET_SECONDS = 1.0


# --- who is what --------------------------------------------------------------------------------------------------


def ask(servers: RedisServers, server: ServerProcess, *command: str | int) -> Any:
    with servers.client(server) as client:
        return client.execute_command(*command)


def is_primary(servers: RedisServers, server: ServerProcess) -> bool:
    try:
        return ask(servers, server, "ROLE")[0] == b"master"
    except RedisError:
        return False


def holder(servers: RedisServers, key: str) -> tuple[ServerProcess, ServerProcess]:
    """The node of the Cluster that has a key, and its replica."""
    slot = ask(servers, servers.cluster_nodes[0], "CLUSTER KEYSLOT", key)
    by_port = {servers.ports[node].plain: node for node in servers.cluster_nodes}
    for first, last, primary, *replicas in cluster_slots(servers):
        if first <= slot <= last:
            return by_port[primary[1]], by_port[replicas[0][1]]
    raise AssertionError("nobody has it")


def cluster_slots(servers: RedisServers) -> list[Any]:
    """As the server says it, without the client's idea of it."""
    with servers.client(servers.cluster_nodes[0]) as client:
        connection = client.connection_pool.get_connection()
        connection.send_command("CLUSTER", "SLOTS")
        answer: list[Any] = connection.read_response()
        client.connection_pool.release(connection)
        return answer


async def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    with anyio.fail_after(seconds):
        while not await anyio.to_thread.run_sync(condition):
            await anyio.sleep(0.1)


# --- an application under load ------------------------------------------------------------------------------------


@dataclass
class Load:
    """Callers that publish one order after another, and a worker whose effects are rows.

    published: all that were tried.  confirmed: those whose caller heard so, and when.
    """

    app: Reliamq
    topic: str
    numbers: itertools.count[int] = field(default_factory=itertools.count)
    confirmed: dict[int, float] = field(default_factory=dict)
    stopped: bool = False

    async def call(self, caller: int) -> None:
        while not self.stopped:
            order = Order(number=next(self.numbers), account=f"account {caller}")
            with suppress(Rejected, Unconfirmed):
                await self.app.topics[self.topic].publish(order)
                self.confirmed[order.number] = time.monotonic()
            await anyio.sleep(0.1)

    async def goes_on(self) -> None:
        """Each caller hears of one more."""
        began = time.monotonic()
        with anyio.fail_after(40):
            while sum(when > began for when in self.confirmed.values()) < 2 * CALLERS:
                await anyio.sleep(0.1)


@asynccontextmanager
async def loaded(servers: RedisServers, url: str, folder: Path) -> AsyncIterator[Load]:
    """Whatever the block does to the servers: all that was confirmed has its effect once, and each key its order."""
    topic = f"test-{uuid.uuid4()}"
    app = make_app(on_redis(servers), folder, url=url, shares=4)
    register(app, topic)
    async with app, open_engine(app.settings.database or "") as engine:
        async with engine.begin() as connection:
            await connection.execute(
                text("CREATE TABLE effects (id INTEGER PRIMARY KEY, number INTEGER, account TEXT)")
            )

        async def effects() -> list[tuple[int, str]]:
            async with engine.connect() as connection:
                found = await connection.execute(text("SELECT number, account FROM effects ORDER BY id"))
                return [(row[0], row[1]) for row in found]

        load = Load(app, topic)
        async with working(app):
            async with anyio.create_task_group() as callers:
                for caller in range(CALLERS):
                    callers.start_soon(load.call, caller)
                await load.goes_on()
                yield load
                await load.goes_on()
                load.stopped = True
            with anyio.fail_after(60):
                while not set(load.confirmed) <= {number for number, _ in await effects()}:
                    await anyio.sleep(0.1)
            await anyio.sleep(QUIET_SECONDS)  # what comes twice would come now
        judge(load, await effects())


def judge(load: Load, effects: list[tuple[int, str]]) -> None:
    assert set(Counter(number for number, _ in effects).values()) == {1}
    for account in {account for _, account in effects}:
        numbers = [number for number, other in effects if other == account and number in load.confirmed]
        assert numbers == sorted(numbers), account


# --- behind Sentinels ---------------------------------------------------------------------------------------------


def watched(servers: RedisServers) -> tuple[ServerProcess, ServerProcess]:
    """The pair that the Sentinels watch: its primary, its replica."""
    primary = servers.current_primary()
    [replica] = [server for server in servers.sentinel_pair if server is not primary]
    return primary, replica


async def test_a_failover_by_the_sentinels_costs_nothing_that_was_confirmed_and_doubles_no_effect(
    whole: RedisServers, tmp_path: Path
) -> None:
    """P1 C1 C3 I2: with as many replicas asked as there are."""
    async with loaded(whole, whole.sentinel_url, tmp_path):
        old, new = watched(whole)
        await anyio.to_thread.run_sync(old.kill)
        await until(lambda: is_primary(whole, new))
        await anyio.sleep(1)
        await anyio.to_thread.run_sync(whole.start)


@pytest.fixture
def behind_sentinels(whole: RedisServers) -> RedisSettings:
    return read_settings(whole.sentinel_url, {"request_timeout_seconds": 1})


async def test_an_old_primary_that_was_frozen_through_a_failover_confirms_nothing_and_costs_nothing_confirmed(
    whole: RedisServers, behind_sentinels: RedisSettings
) -> None:
    """P1: whoever still has a connection to it is not told that its message is safe."""
    topic = await declare(behind_sentinels, "g")
    old, new = watched(whole)
    stale = read_settings(whole.url.replace(f"{whole.ports[whole.primary].plain}", f"{whole.ports[old].plain}"), {})
    async with publishing(behind_sentinels) as publisher, open_publisher(stale) as to_old:
        before = [message(topic, f"before {number}", f"key {number}") for number in range(50)]
        assert set(await outcomes_of(publisher, before)) == {"confirmed"}
        assert isinstance((await to_old.send([message(topic, "to old")], deadline=soon()))[0], Confirmation)
        old.pause()
        try:
            await until(lambda: is_primary(whole, new))
            lost = [message(topic, f"lost {number}", f"key {number}") for number in range(20)]
            async with anyio.create_task_group() as tasks:
                outcomes: list[object] = []

                async def ask_the_old_one() -> None:
                    outcomes.extend(await to_old.send(lost, deadline=soon(8)))

                tasks.start_soon(ask_the_old_one)
                await anyio.sleep(0.2)
                old.resume()
            assert not any(isinstance(one, Confirmation) for one in outcomes), outcomes
        finally:
            old.resume()
        after = [message(topic, f"after {number}", f"key {number}") for number in range(50)]
        assert set(await outcomes_of(publisher, after)) == {"confirmed"}

    stored = bodies(await drain(behind_sentinels, topic, 101))
    assert {one.body for one in (*before, *after)} | {b"to old"} <= set(stored)


async def test_while_the_old_primary_stays_frozen_whoever_needs_no_replica_goes_on_with_the_new_one(
    whole: RedisServers, behind_sentinels: RedisSettings
) -> None:
    """P2: no connection to the old one is waited for longer than an answer may take."""
    topic = await declare(behind_sentinels, "g", durability=Durability.FSYNCED)
    old, new = watched(whole)
    async with publishing(behind_sentinels) as publisher:
        assert await outcome_of(publisher, message(topic, "before")) == "confirmed"
        old.pause()
        try:
            began = time.monotonic()
            during = [message(topic, f"{number}", f"key {number}") for number in range(20)]
            assert set(await outcomes_of(publisher, during)) == {"confirmed"}
            assert time.monotonic() - began < 15
            assert is_primary(whole, new)
        finally:
            old.resume()


async def test_a_sentinel_that_is_frozen_holds_up_nobody(whole: RedisServers) -> None:
    settings = read_settings(whole.sentinel_url, {"request_timeout_seconds": 3})
    for sentinel in whole.sentinels:
        sentinel.pause()
        try:
            for _ in range(3):  # whichever is asked first
                topic = await declare(settings, "g")
                async with publishing(settings) as publisher:
                    assert await outcome_of(publisher, message(topic, "one")) == "confirmed"
        finally:
            sentinel.resume()


# --- in a Cluster -------------------------------------------------------------------------------------------------


async def test_a_node_of_the_cluster_that_dies_costs_nothing_that_was_confirmed_and_doubles_no_effect(
    whole: RedisServers, tmp_path: Path
) -> None:
    """P1 C1 C3 I2"""
    async with loaded(whole, whole.cluster_url, tmp_path) as load:
        old, new = holder(whole, stream_of(load.topic, 0))
        await anyio.to_thread.run_sync(old.kill)
        await until(lambda: is_primary(whole, new))
        await anyio.sleep(1)
        await anyio.to_thread.run_sync(whole.start)


async def test_whoever_publishes_and_works_follows_a_replica_that_takes_over(
    whole: RedisServers, tmp_path: Path
) -> None:
    """P1 C1 C3 I2: the old one answers MOVED from then on."""
    async with loaded(whole, whole.cluster_url, tmp_path) as load:
        for lane in range(2):
            _, new = holder(whole, stream_of(load.topic, lane))
            await take_over(whole, new)
            await load.goes_on()


async def take_over(servers: RedisServers, new: ServerProcess) -> None:
    ask(servers, new, "CLUSTER FAILOVER")
    await until(lambda: is_primary(servers, new))
    # The others hear of it by and by, and for a moment of a primary without a replica
    await until(lambda: all(replicas for _, _, _, *replicas in cluster_slots(servers)))


async def test_dead_letters_follow_a_replica_that_takes_over(whole: RedisServers) -> None:
    """C5: on the connection that they were written on before."""
    settings = read_settings(whole.cluster_url, {})
    topic = await declare(settings, "g")
    async with open_dead_letters(settings) as dead_letters:
        (outcome,) = await dead_letters.add([record_of(topic, "before")], deadline=soon())
        assert isinstance(outcome, Confirmation)
        await take_over(whole, holder(whole, ORDER)[1])
        with anyio.fail_after(20):
            while True:
                (outcome,) = await dead_letters.add([record_of(topic, "after")], deadline=soon())
                if isinstance(outcome, Confirmation):
                    break
                await anyio.sleep(0.1)
        with anyio.fail_after(20):
            found = await dead_letters.find(topic=topic)
    assert {one.message.body for one in found} == {b"before", b"after"}


async def test_whoever_publishes_and_works_follows_a_slot_that_moves(whole: RedisServers, tmp_path: Path) -> None:
    """P1 C1 C3 I2: while it moves the servers say ASK and TRYAGAIN, afterwards MOVED."""
    async with loaded(whole, whole.cluster_url, tmp_path) as load:
        slot = int(ask(whole, whole.cluster_nodes[0], "CLUSTER KEYSLOT", stream_of(load.topic, 0)))
        source, _ = holder(whole, stream_of(load.topic, 0))
        target = random.choice([node for node in primaries(whole) if node is not source])
        try:
            await move_slot(whole, slot, source, target, pause=1.5)
            await load.goes_on()
        finally:
            await move_slot(whole, slot, target, source, pause=0)


def primaries(servers: RedisServers) -> list[ServerProcess]:
    return [node for node in servers.cluster_nodes if is_primary(servers, node)]


async def move_slot(
    servers: RedisServers, slot: int, source: ServerProcess, target: ServerProcess, *, pause: float
) -> None:
    """As ``redis-cli --cluster reshard`` does it, with a pause when half of the keys have moved."""
    with servers.client(source) as here, servers.client(target) as there:
        names = {node: node.execute_command("CLUSTER MYID") for node in (here, there)}
        there.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", names[here])
        here.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", names[there])
        keys = here.execute_command("CLUSTER GETKEYSINSLOT", slot, 1000)
        migrate(servers, here, target, keys[: len(keys) // 2])
        await anyio.sleep(pause)
        while keys := here.execute_command("CLUSTER GETKEYSINSLOT", slot, 1000):
            migrate(servers, here, target, keys)
        for node in (there, here):
            node.execute_command("CLUSTER", "SETSLOT", slot, "NODE", names[there])


def migrate(servers: RedisServers, here: Redis, target: ServerProcess, keys: list[bytes]) -> None:
    if keys:
        port = servers.ports[target].plain
        here.execute_command("MIGRATE", "127.0.0.1", port, "", 0, 5000, "AUTH2", USER, PASSWORD, "KEYS", *keys)
