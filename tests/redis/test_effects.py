"""Leases of effects and locks on real servers: what only Redis can do to them (I1, I3, I4, I5).

What every store must do is in ``tests/idempotency/test_leases.py``, which runs on these servers as well.
"""

from __future__ import annotations

import signal
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from datetime import timedelta
from typing import Any

import anyio
import anyio.from_thread
import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis.stateful import rule, run_state_machine_as_test
from redis.exceptions import RedisError

from reliamq import DurabilityError, StoreUnavailable
from reliamq.backends import open_leases
from reliamq.idempotency import LeaseGuard
from reliamq.spi import (
    BrokerUnavailable,
    Durability,
    EffectBusy,
    FencingToken,
    IdempotencyStore,
    LeaseGrant,
    LeaseLost,
    LeaseState,
    ProcessedId,
)
from reliamq_redis.catalog.names import lease_of, lock_of
from reliamq_redis.leases import steps
from reliamq_redis.leases.store import RedisLeaseStore
from reliamq_redis.scripts import Script, script
from tests.idempotency.test_lease_model import Leases, names, seconds
from tests.idempotency.test_transaction import effect_process, said
from tests.servers.process import ServerProcess
from tests.servers.proxy import Proxy
from tests.servers.redis import RedisServers

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(180)]
LONG, SHORT, NONE = timedelta(seconds=30), timedelta(seconds=1), timedelta(0)
KEEP = timedelta(hours=1)
DEPLOYMENTS = ("url", "sentinel_url", "cluster_url")


def opened(
    url: str, *, patience: float = 20, durability: Durability = Durability.REPLICATED
) -> AbstractAsyncContextManager[IdempotencyStore]:
    """patience: seconds that an answer may take."""
    leases = open_leases(url, {"redis": {"request_timeout_seconds": patience}}, durability=durability)
    return leases.idempotency_store(remember=KEEP)


@pytest.fixture
async def store(servers: RedisServers) -> AsyncIterator[IdempotencyStore]:
    """On the pair."""
    async with opened(servers.url) as store:
        yield store


@pytest.fixture
async def hasty(servers: RedisServers) -> AsyncIterator[IdempotencyStore]:
    """The same, where somebody will not answer."""
    async with opened(servers.url, patience=2) as store:
        yield store


@pytest.fixture
def proxy(servers: RedisServers) -> Iterator[Proxy]:
    """In front of the pair's primary."""
    ports = servers.ports[servers.primary]
    with Proxy(ports.proxied, ports.plain) as proxy:
        yield proxy


def identity() -> ProcessedId:
    return ProcessedId("topic", "g", "handler", str(uuid.uuid4()))


async def granted(store: IdempotencyStore, one: ProcessedId, lease: timedelta = LONG) -> LeaseGrant:
    grant = await store.acquire(one, lease=lease)
    assert isinstance(grant, LeaseGrant), grant
    return grant


def test_no_two_effects_or_locks_share_a_key_and_each_has_one_tag() -> None:
    """I1: identity is the id, whatever characters are in it."""
    odd = ("a", "a/b", 'a","b', "}", "{", "%7B", "\ud800", "ä", "")
    keys = [lease_of(ProcessedId("t", group, "h", message)) for group in odd for message in odd]
    keys += [lock_of(name) for name in odd]

    assert len(set(keys)) == len(odd) ** 2 + len(odd)
    assert all((key.count("{"), key.count("}"), key[-1]) == (1, 1, "}") for key in keys)
    assert all(key.encode() for key in keys)


# --- any order of steps -----------------------------------------------------------------------------------------------


class LeasesOnRedis(Leases):
    """The scripts read the time from a key, which the model sets."""

    def __init__(self, url: str, clock: str) -> None:
        super().__init__()
        self.clock, self.run = clock, str(uuid.uuid4())
        self.portal = anyio.from_thread.start_blocking_portal()
        self.loop = self.portal.__enter__()
        self.opened = self.loop.wrap_async_context_manager(opened(url, durability=Durability.DEVELOPMENT))
        self.store = self.opened.__enter__()

    def identity(self, name: str) -> ProcessedId:
        return ProcessedId("t", "g", "h", f"{name} {self.run}")

    def call(self, function: Any, *arguments: Any, **named: Any) -> Any:
        async def awaited() -> Any:
            assert isinstance(self.store, RedisLeaseStore)
            await self.store._steps._connections._servers.call(self.clock, "SET", self.clock, self.now)
            return await function(*arguments, **named)

        return self.loop.call(awaited)

    @rule(name=names, seconds=seconds)
    def lose_the_answer(self, name: str, seconds: int) -> None:
        said, token = self.call(self.take_and_lose, lease_of(self.identity(name)), timedelta(seconds=seconds))
        if said == steps.GRANTED:
            self.granted(name, LeaseGrant(self.identity(name), token, seconds), seconds)
            self.lost.add(name)

    async def take_and_lose(self, key: str, lease: timedelta) -> tuple[bytes, Any]:
        assert isinstance(self.store, RedisLeaseStore)
        lost = self.store._steps._lost.get(key, ())
        claim = str(uuid.uuid4())
        answer = await self.store._steps._grant(key, lease, claim, *lost)
        self.store._steps._note_lost(key, claim)
        return answer

    def teardown(self) -> None:
        self.opened.__exit__(None, None, None)
        self.portal.__exit__(None, None, None)


def test_any_order_of_holders_late_holders_and_time(servers: RedisServers, monkeypatch: pytest.MonkeyPatch) -> None:
    """I3: one holder, growing tokens, done stays done."""
    clock = f"clock {uuid.uuid4()}"
    for name in ("GRANT", "RENEW"):
        text = script(name.lower()).text
        assert "redis.call('TIME')" in text
        told = text.replace("redis.call('TIME')", f"{{redis.call('GET', '{clock}'), 0}}")
        monkeypatch.setattr(steps, name, Script(name.lower(), told))

    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        lambda: LeasesOnRedis(servers.url, clock),
        settings=hypothesis_settings(max_examples=20, stateful_step_count=25, deadline=None),
    )


# --- every deployment -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deployment", DEPLOYMENTS)
async def test_many_effects_are_started_and_done_once_each(servers: RedisServers, deployment: str) -> None:
    """I1: by two who race for each of them."""
    identities = [identity() for _ in range(60)]
    done = list[ProcessedId]()

    async def work(store: IdempotencyStore) -> None:
        async with LeaseGuard(store, lease=LONG) as guard, anyio.create_task_group() as tasks:
            for one in identities:
                tasks.start_soon(produce, guard, one, done)

    url = getattr(servers, deployment)
    async with opened(url) as one, opened(url) as two:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(work, one)
            tasks.start_soon(work, two)
        states = [await one.acquire(each, lease=LONG) for each in identities]

    assert sorted(done, key=str) == sorted(identities, key=str)
    assert states == [LeaseState(done=True)] * len(identities)


async def produce(guard: LeaseGuard, one: ProcessedId, done: list[ProcessedId]) -> None:
    async def effect(_: FencingToken) -> None:
        done.append(one)
        await anyio.sleep(0.01)

    while True:
        try:
            await guard.apply(one, effect)
        except EffectBusy:  # the other has it; not as long as the lease
            await anyio.sleep(0.3)
        else:
            return


@pytest.mark.parametrize("deployment", DEPLOYMENTS)
async def test_a_lock_is_held_by_one(servers: RedisServers, deployment: str) -> None:
    """I4"""
    name = f"stock {uuid.uuid4()}"
    leases = open_leases(getattr(servers, deployment))
    async with leases.lock() as one, leases.lock() as two:
        async with one.hold(name, lease=LONG, wait=NONE) as first:
            with pytest.raises(TimeoutError, match=name):
                async with two.hold(name, lease=LONG, wait=timedelta(seconds=0.2)):
                    pass
        async with two.hold(name, lease=LONG, wait=NONE) as second:
            assert second.value > first.value


# --- time -------------------------------------------------------------------------------------------------------------


async def test_everything_expires_by_itself_and_cleaning_has_nothing_to_do(
    servers: RedisServers, store: IdempotencyStore
) -> None:
    """I5"""
    one, name = identity(), f"stock {uuid.uuid4()}"
    grant = await granted(store, one)
    with servers.client(servers.primary) as primary:
        assert KEEP < timedelta(milliseconds=primary.pttl(lease_of(one))) <= KEEP + LONG
        await store.complete(grant, result=b"receipt", keep=timedelta(minutes=1))
        assert timedelta(seconds=50) < timedelta(milliseconds=primary.pttl(lease_of(one))) <= timedelta(minutes=1)
        async with (
            open_leases(servers.url).lock() as lock,
            lock.hold(name, lease=LONG, wait=NONE),
        ):
            assert primary.pttl(lock_of(name)) > LONG / timedelta(milliseconds=1)
    assert await store.clean(limit=100) == 0
    assert await store.acquire(one, lease=LONG) == LeaseState(done=True, result=b"receipt")

    short = identity()
    await store.complete(await granted(store, short), result=None, keep=timedelta(seconds=0.1))
    await anyio.sleep(0.2)
    assert isinstance(await store.acquire(short, lease=LONG), LeaseGrant)


async def test_tokens_grow_though_everything_was_forgotten(servers: RedisServers, store: IdempotencyStore) -> None:
    """I3: a token is the time."""
    one = identity()
    first = await granted(store, one)
    with servers.client(servers.primary) as primary:
        primary.delete(lease_of(one))
    second = await granted(store, one)
    assert second.token > first.token

    assert await store.extend(first, lease=LONG) is False
    assert await store.complete(first, result=None, keep=KEEP) is False
    assert await store.complete(second, result=None, keep=KEEP) is True


@pytest.mark.parametrize("left", ["nothing", "the lease before"])
async def test_a_lease_that_was_forgotten_is_its_holders_still_if_nobody_was_granted_one_since(
    servers: RedisServers, store: IdempotencyStore, left: str
) -> None:
    """As after a failover to a replica that lacked it."""
    one = identity()
    before = await granted(store, one, NONE)
    grant = await granted(store, one)
    with servers.client(servers.primary) as primary:
        primary.delete(lease_of(one))
        if left != "nothing":
            primary.hset(lease_of(one), mapping={"token": before.token, "until": 0})
    assert await store.extend(grant, lease=LONG) is True
    assert await store.complete(before, result=None, keep=KEEP) is False

    assert isinstance(await store.acquire(one, lease=LONG), LeaseState)
    assert await store.complete(grant, result=b"kept", keep=KEEP) is True
    assert await store.acquire(one, lease=LONG) == LeaseState(done=True, result=b"kept")


# --- replicas ---------------------------------------------------------------------------------------------------------


async def test_a_grant_that_the_replica_does_not_have_is_refused_and_given_back(
    servers: RedisServers, hasty: IdempotencyStore
) -> None:
    """I3"""
    one = identity()
    await granted(hasty, identity())  # the connection is there
    servers.replica.pause()
    try:
        with pytest.raises(StoreUnavailable, match="0 of 1 replicas"):
            await hasty.acquire(one, lease=LONG)
    finally:
        servers.replica.resume()
    async with opened(servers.url) as another:
        assert isinstance(await another.acquire(one, lease=LONG), LeaseGrant)


async def test_a_mark_that_the_replica_does_not_have_is_not_told_and_is_there_when_it_has(
    servers: RedisServers, hasty: IdempotencyStore
) -> None:
    """I3: neither to who wrote it nor to who asks."""
    one = identity()
    grant = await granted(hasty, one)
    async with opened(servers.url, patience=2) as another:
        await granted(another, identity())
        servers.replica.pause()
        try:
            with pytest.raises(StoreUnavailable, match="0 of 1 replicas"):
                await hasty.complete(grant, result=None, keep=KEEP)
            with pytest.raises(StoreUnavailable, match="0 of 1 replicas"):
                await another.acquire(one, lease=LONG)
        finally:
            servers.replica.resume()
        assert await hasty.complete(grant, result=None, keep=KEEP) is True
        assert await hasty.complete(grant, result=None, keep=KEEP) is False
        assert await another.acquire(one, lease=LONG) == LeaseState(done=True)


async def test_renewing_waits_for_no_replica(servers: RedisServers, hasty: IdempotencyStore) -> None:
    grant = await granted(hasty, identity())
    servers.replica.pause()
    try:
        began = anyio.current_time()
        assert await hasty.extend(grant, lease=LONG) is True
        assert anyio.current_time() - began < 1.5
    finally:
        servers.replica.resume()


@pytest.mark.parametrize("durability", [Durability.DEVELOPMENT, Durability.FSYNCED])
async def test_who_asks_for_one_disk_waits_for_no_replica(servers: RedisServers, durability: Durability) -> None:
    leases = open_leases(servers.url, durability=durability)
    servers.replica.pause()
    try:
        async with leases.idempotency_store(remember=KEEP) as store:
            with anyio.fail_after(3):
                grant = await granted(store, identity())
                assert await store.complete(grant, result=None, keep=KEEP) is True
    finally:
        servers.replica.resume()


@pytest.mark.parametrize(
    ("setting", "unsafe", "safe"), [("maxmemory-policy", "volatile-ttl", "noeviction"), ("appendonly", "no", "yes")]
)
async def test_a_server_that_would_lose_marks_is_refused_when_it_is_opened(
    whole: RedisServers, caplog: pytest.LogCaptureFixture, setting: str, unsafe: str, safe: str
) -> None:
    """S3 I5: where it is not the broker, nobody else looks at it."""
    with whole.client(whole.primary) as primary:
        primary.config_set(setting, unsafe)
        try:
            with pytest.raises(DurabilityError, match=f"leases on server .*: {setting} is {unsafe}, required {safe}"):
                async with opened(whole.url):
                    pytest.fail("it opened")
            async with open_leases(whole.url, durability=Durability.DEVELOPMENT).lock():
                assert f"{setting} is {unsafe}" in caplog.text
        finally:
            primary.config_set(setting, safe)


async def test_where_nobody_is_it_is_told_on_opening(servers: RedisServers) -> None:
    with pytest.raises(BrokerUnavailable):
        async with opened(servers.proxied_url):
            pytest.fail("it opened")


# --- answers that do not come -----------------------------------------------------------------------------------------


async def test_an_answer_that_was_lost_is_had_by_asking_again(proxy: Proxy, servers: RedisServers) -> None:
    """I3: what was done counts, and nothing is done twice."""
    one = identity()
    async with opened(servers.proxied_url, patience=2) as store:
        grant = await granted(store, one)
        proxy.drop("down")
        with pytest.raises(StoreUnavailable):
            await store.complete(grant, result=b"first", keep=KEEP)
        proxy.heal()
        async with opened(servers.url) as another:
            assert await another.acquire(one, lease=LONG) == LeaseState(done=True, result=b"first")
            assert await another.complete(grant, result=b"first", keep=KEEP) is False
        assert await store.complete(grant, result=b"first", keep=KEEP) is True
        assert await store.complete(grant, result=b"first", keep=KEEP) is False


async def test_a_grant_whose_answer_was_lost_is_had_by_asking_again_and_runs_out_for_others(
    proxy: Proxy, servers: RedisServers
) -> None:
    """I3"""
    one, other = identity(), identity()

    async def acquire_in_vain(each: ProcessedId) -> None:
        with pytest.raises(StoreUnavailable):
            await store.acquire(each, lease=timedelta(seconds=10))

    async with opened(servers.proxied_url, patience=2) as store, opened(servers.url) as another:
        async with anyio.create_task_group() as tasks:  # a connection for each
            for _ in range(2):
                tasks.start_soon(granted, store, identity())
        proxy.drop("down")
        async with anyio.create_task_group() as tasks:
            for each in (one, other):
                tasks.start_soon(acquire_in_vain, each)
        proxy.heal()
        assert isinstance(await another.acquire(one, lease=LONG), LeaseState)
        grant = await granted(store, one)
        assert isinstance(await store.acquire(one, lease=LONG), LeaseState), "it is lost no more"
        assert await store.complete(grant, result=None, keep=KEEP) is True

        busy = await another.acquire(other, lease=LONG)
        assert isinstance(busy, LeaseState)
        assert 0 < busy.busy_seconds < 10
        await anyio.sleep(busy.busy_seconds)
        assert isinstance(await another.acquire(other, lease=LONG), LeaseGrant)
        assert isinstance(await store.acquire(other, lease=LONG), LeaseState), "the other's is not taken for it"


async def test_whoever_is_cancelled_leaves_no_answer_to_the_next_and_no_connection(
    proxy: Proxy, servers: RedisServers
) -> None:
    async with opened(servers.proxied_url) as store:
        await granted(store, identity())
        proxy.delay(0.02)
        for milliseconds in range(0, 200, 20):
            one = identity()
            with anyio.move_on_after(milliseconds / 1000):
                await granted(store, one)
                continue
            grant = await granted(store, one)
            assert await store.complete(grant, result=b"its own", keep=KEEP) is True
            assert await store.acquire(one, lease=LONG) == LeaseState(done=True, result=b"its own")
        proxy.delay(0)
    with anyio.fail_after(5):
        while proxy.connections:
            await anyio.sleep(0.05)


async def test_a_store_that_stands_still_is_told_in_time_and_serves_again(
    servers: RedisServers, hasty: IdempotencyStore
) -> None:
    grant = await granted(hasty, identity())
    servers.primary.pause()
    try:
        for _ in range(2):  # on a connection that was there, and on a new one
            began = anyio.current_time()
            with pytest.raises(StoreUnavailable):
                await hasty.acquire(identity(), lease=LONG)
            assert anyio.current_time() - began < 4
    finally:
        servers.primary.resume()
    assert isinstance(await hasty.acquire(identity(), lease=LONG), LeaseGrant)
    assert await hasty.complete(grant, result=None, keep=KEEP) is True


async def test_a_block_whose_lock_cannot_be_renewed_is_cancelled_when_the_lease_ends(servers: RedisServers) -> None:
    """I4"""
    leases = open_leases(servers.url, {"redis": {"request_timeout_seconds": 1}})
    async with leases.lock() as lock:
        try:
            with pytest.raises(LeaseLost):
                async with lock.hold(f"stock {uuid.uuid4()}", lease=timedelta(seconds=2), wait=NONE):
                    servers.primary.pause()
                    began = anyio.current_time()
                    try:
                        await anyio.sleep(20)
                    finally:
                        assert anyio.current_time() - began < 3
            with pytest.raises(StoreUnavailable):
                async with lock.hold("stock", lease=LONG, wait=LONG):
                    pytest.fail("nobody could have granted it")
        finally:
            servers.primary.resume()


# --- servers that die -------------------------------------------------------------------------------------------------


async def test_grants_and_marks_are_there_after_all_servers_were_killed(whole: RedisServers) -> None:
    """I3"""
    one, running = identity(), identity()
    async with opened(whole.url, patience=5) as store:
        await store.complete(await granted(store, one), result=b"receipt", keep=KEEP)
        grant = await granted(store, running)
        for server in (whole.primary, whole.replica):
            server.kill()
        with pytest.raises(StoreUnavailable):
            await store.acquire(identity(), lease=LONG)
        whole.start()
        whole.wait_until_whole()

        assert await eventually(store, one) == LeaseState(done=True, result=b"receipt")
        busy = await store.acquire(running, lease=LONG)
        assert isinstance(busy, LeaseState)
        assert not busy.done
        assert await store.complete(grant, result=None, keep=KEEP) is True


@pytest.mark.parametrize("deployment", DEPLOYMENTS[1:])
async def test_grants_and_marks_outlive_the_primary(whole: RedisServers, deployment: str) -> None:
    """I3: the one that is promoted has them."""
    done, running = [identity() for _ in range(20)], [identity() for _ in range(20)]
    async with opened(getattr(whole, deployment), patience=5) as store:
        for one in done:
            await store.complete(await granted(store, one), result=b"receipt", keep=KEEP)
        grants = [await granted(store, one, timedelta(minutes=2)) for one in running]
        with anyio.fail_after(60):
            await fail_over(whole, deployment)

        assert [await eventually(store, one) for one in done] == [LeaseState(done=True, result=b"receipt")] * 20
        states = [await eventually(store, one) for one in running]
        assert all(isinstance(state, LeaseState) and not state.done for state in states)
        assert [await store.complete(grant, result=None, keep=KEEP) for grant in grants] == [True] * 20


async def fail_over(servers: RedisServers, deployment: str) -> None:
    """Have another server promoted in the place of one primary, which comes back as its replica."""
    several = servers.sentinel_pair if deployment == "sentinel_url" else servers.cluster_nodes
    old = primaries(servers, several)
    old[0].kill()
    while len(primaries(servers, several)) < len(old):
        await anyio.sleep(0.2)
    assert old[0] not in primaries(servers, several)
    old[0].start()


def primaries(servers: RedisServers, several: Sequence[ServerProcess]) -> list[ServerProcess]:
    """Those of them that live and say so."""
    found = list[ServerProcess]()
    for server in several:
        with suppress(RedisError), servers.client(server) as client:
            if client.info("replication")["role"] == "master":
                found.append(server)
    return found


async def eventually(store: IdempotencyStore, one: ProcessedId) -> LeaseGrant | LeaseState:
    """What the store says once it can."""
    with anyio.fail_after(60):
        while True:
            try:
                return await store.acquire(one, lease=timedelta(minutes=2))
            except StoreUnavailable:
                await anyio.sleep(0.2)


# --- a holder that was away -------------------------------------------------------------------------------------------


async def test_a_holder_that_was_stopped_past_its_lease_is_refused_when_it_completes(servers: RedisServers) -> None:
    """I3"""
    one, tokens = identity(), list[int]()

    async def effect(token: FencingToken) -> None:
        tokens.append(token.value)

    async with opened(servers.url) as store, effect_process(servers.url, one.message_id, "inside", "lease") as late:
        late.send_signal(signal.SIGSTOP)
        assert isinstance(await store.acquire(one, lease=LONG), LeaseState)
        await anyio.sleep(1.2)
        async with LeaseGuard(store, lease=LONG) as guard:
            assert await guard.apply(one, effect) is True
        late.send_signal(signal.SIGCONT)
        assert late.stdin is not None
        await late.stdin.send(b"\n")

        assert await said(late) == "lost"
        assert await store.acquire(one, lease=LONG) == LeaseState(done=True)
    assert len(tokens) == 1
