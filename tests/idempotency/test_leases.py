"""Effects outside a database: leases, fencing tokens, renewal, take-over; and locks by name (I3, I4)."""

from __future__ import annotations

import signal
import threading
import time
import uuid
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import anyio
import anyio.from_thread
import pytest
from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncEngine

from reliamq.backends import open_leases
from reliamq.idempotency import LeaseGuard, MemoryLeaseStore, RepeatableGuard, SqlLeaseStore, SqlLock
from reliamq.idempotency.tables import lease as lease_table, lock as lock_table
from reliamq.spi import (
    DistributedLock,
    EffectBusy,
    FencingToken,
    IdempotencyStore,
    LeaseGrant,
    LeaseLost,
    LeaseState,
    ProcessedId,
    StoreUnavailable,
)
from reliamq.spi.holding import held
from reliamq_redis.catalog.names import lease_of, lock_of
from reliamq_redis.leases.lock import RedisLock
from reliamq_redis.leases.store import RedisLeaseStore
from tests.databases import DRIVERS, MARIADB, database_url

from .conftest import identity, until
from .test_transaction import effect_process

pytestmark = pytest.mark.anyio
LONG, SHORT, NONE = timedelta(seconds=30), timedelta(seconds=0.6), timedelta(0)
KEEP = timedelta(days=1)


SQL = DRIVERS
REDIS = [pytest.param(kind, marks=pytest.mark.xdist_group(kind)) for kind in ("redis", "valkey")]


@pytest.fixture(params=["memory", *SQL, *REDIS])
def store(request: pytest.FixtureRequest) -> IdempotencyStore:
    if request.param == "memory":
        return MemoryLeaseStore()
    if request.param in ("redis", "valkey"):
        found: RedisLeaseStore = request.getfixturevalue("redis_store")
        return found
    engine: AsyncEngine = request.getfixturevalue("engine")
    return SqlLeaseStore(engine)


@pytest.fixture
async def redis_store(place: str) -> AsyncIterator[RedisLeaseStore]:
    async with open_leases(place).idempotency_store(remember=KEEP) as store:
        assert isinstance(store, RedisLeaseStore)
        yield store


@pytest.fixture
def place(request: pytest.FixtureRequest) -> str:
    """The URL of where the store keeps its leases."""
    chosen = request.node.callspec.params["store"]
    if chosen in ("redis", "valkey"):
        return str(request.getfixturevalue(chosen).url)
    return str(request.getfixturevalue("database"))


@pytest.fixture
def database(request: pytest.FixtureRequest, tmp_path: Any) -> str:
    """The database that the store asked for."""
    return database_url(request, request.node.callspec.params["store"], tmp_path)


@pytest.fixture
def lock(store: IdempotencyStore) -> DistributedLock:
    """Locks, where the store keeps its leases."""
    if isinstance(store, RedisLeaseStore):
        return RedisLock(store._steps)
    assert isinstance(store, SqlLeaseStore)
    return SqlLock(store._engine)


@pytest.fixture
def name() -> str:
    """Of a lock that nobody had."""
    return f"stock {uuid.uuid4()}"


@pytest.fixture
def memory() -> MemoryLeaseStore:
    return MemoryLeaseStore()


async def granted(store: IdempotencyStore, one: ProcessedId, lease: timedelta = LONG) -> LeaseGrant:
    grant = await store.acquire(one, lease=lease)
    assert isinstance(grant, LeaseGrant), grant
    return grant


# --- stores -----------------------------------------------------------------------------------------------------------


async def test_one_holder_at_a_time_and_the_others_hear_for_how_long(store: IdempotencyStore) -> None:
    one = identity()
    first = await granted(store, one)
    assert first.seconds == LONG.total_seconds()

    busy = await store.acquire(one, lease=LONG)

    assert isinstance(busy, LeaseState)
    assert not busy.done
    assert 0 < busy.busy_seconds <= 30
    assert isinstance(await store.acquire(identity(), lease=LONG), LeaseGrant)


async def test_what_is_done_stays_done_with_its_result(store: IdempotencyStore) -> None:
    one = identity()
    grant = await granted(store, one)

    assert await store.complete(grant, result=b"\x00receipt", keep=KEEP) is True

    assert await store.acquire(one, lease=LONG) == LeaseState(done=True, result=b"\x00receipt")
    assert await store.complete(grant, result=b"again", keep=KEEP) is False
    assert await store.extend(grant, lease=LONG) is False
    await store.abandon(grant)
    assert await store.acquire(one, lease=LONG) == LeaseState(done=True, result=b"\x00receipt")


async def test_a_late_holder_is_told_so_and_changes_nothing(store: IdempotencyStore) -> None:
    one = identity()
    late = await granted(store, one, NONE)
    heir = await granted(store, one)
    assert heir.token > late.token

    assert await store.extend(late, lease=LONG) is False
    assert await store.complete(late, result=b"late", keep=KEEP) is False
    await store.abandon(late)

    assert isinstance(await store.acquire(one, lease=LONG), LeaseState)
    assert await store.complete(heir, result=b"heir", keep=KEEP) is True
    assert await store.acquire(one, lease=LONG) == LeaseState(done=True, result=b"heir")


async def test_a_lease_that_ran_out_and_nobody_took_may_still_be_completed(store: IdempotencyStore) -> None:
    grant = await granted(store, identity(), NONE)

    assert await store.extend(grant, lease=NONE) is True
    assert await store.complete(grant, result=None, keep=KEEP) is True


async def test_an_abandoned_effect_starts_again_at_once_with_a_larger_token(store: IdempotencyStore) -> None:
    one, tokens = identity(), []
    for _ in range(4):
        grant = await granted(store, one)
        tokens.append(grant.token)
        await store.abandon(grant)

    assert tokens == sorted(set(tokens))


async def test_of_many_who_ask_at_once_one_is_granted(store: IdempotencyStore) -> None:
    one, answers = identity(), []

    async def ask() -> None:
        answers.append(await store.acquire(one, lease=LONG))

    async with anyio.create_task_group() as tasks:
        for _ in range(6):
            tasks.start_soon(ask)

    assert [isinstance(answer, LeaseGrant) for answer in answers].count(True) == 1
    assert not any(answer.done for answer in answers if isinstance(answer, LeaseState))


@pytest.mark.parametrize("store", ["memory", *SQL], indirect=True)  # the others' servers do it
async def test_cleaning_removes_what_expired_in_chunks(store: IdempotencyStore) -> None:
    kept = identity()
    await store.complete(await granted(store, kept), result=None, keep=KEEP)
    for _ in range(5):
        await store.complete(await granted(store, identity()), result=None, keep=NONE)
    running = identity()
    await granted(store, running)

    assert [await store.clean(limit=3) for _ in range(3)] == [3, 2, 0]

    assert await store.acquire(kept, lease=LONG) == LeaseState(done=True)
    assert isinstance(await store.acquire(running, lease=LONG), LeaseState)


@pytest.mark.parametrize("store", [*SQL, *REDIS], indirect=True)
async def test_leases_go_by_the_stores_clock(store: IdempotencyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    one = identity()
    await granted(store, one)
    monkeypatch.setattr(time, "time", lambda: 4e9)  # this process believes in 2096

    busy = await store.acquire(one, lease=LONG)

    assert isinstance(busy, LeaseState)
    assert 0 < busy.busy_seconds <= 30


async def test_memory_forgets_what_was_never_completed_when_it_need_not_remember_it_any_longer() -> None:
    now = 0.0
    store, one = MemoryLeaseStore(clock=lambda: now, remember=timedelta(days=1)), identity()
    grant = await granted(store, one)
    now = 20.0
    assert await store.extend(grant, lease=LONG) is True

    now += 86_400 + 29
    assert await store.clean(limit=10) == 0
    now += 1
    assert await store.clean(limit=10) == 1
    assert store._entries == {}
    assert store._expiring == []


# --- the guard --------------------------------------------------------------------------------------------------------


async def test_an_effect_under_a_lease_happens_once_and_gets_its_fencing_token(store: IdempotencyStore) -> None:
    one, other, tokens = identity(), identity(), list[FencingToken]()

    async def effect(token: FencingToken) -> None:
        tokens.append(token)

    async with LeaseGuard(store, lease=LONG) as guard:
        assert await guard.apply(one, effect) is True
        assert await guard.apply(one, effect) is False
        assert await guard.apply_in_thread(one, tokens.append) is False
        assert await guard.apply_in_thread(other, tokens.append) is True

    assert [token.name for token in tokens] == [f"topic/g/handler/{each.message_id}" for each in (one, other)]


async def test_an_effect_that_is_in_progress_elsewhere_is_busy(memory: MemoryLeaseStore) -> None:
    one = identity()
    await granted(memory, one)
    async with LeaseGuard(memory, lease=LONG) as guard:
        with pytest.raises(EffectBusy) as busy:
            await guard.apply(one, anyio.sleep)
    assert timedelta(0) < busy.value.retry_after <= LONG


async def test_a_failed_effect_may_start_again_at_once(store: IdempotencyStore) -> None:
    one, tokens = identity(), []

    async def fail_once(token: FencingToken) -> None:
        tokens.append(token.value)
        if len(tokens) == 1:
            raise ValueError("no")

    async with LeaseGuard(store, lease=LONG) as guard:
        with pytest.raises(ValueError, match="no"):
            await guard.apply(one, fail_once)
        assert await guard.apply(one, fail_once) is True

    assert len(tokens) == 2
    assert tokens[1] > tokens[0] > 0


async def test_a_cancelled_effect_gives_its_lease_back(store: IdempotencyStore) -> None:
    one = identity()

    async def hang(_: Any) -> None:
        scope.cancel()
        await anyio.sleep_forever()

    async with LeaseGuard(store, lease=LONG) as guard:
        with anyio.CancelScope() as scope:
            await guard.apply(one, hang)
        assert isinstance(await store.acquire(one, lease=LONG), LeaseGrant)


async def test_a_cancelled_thread_keeps_its_lease_because_it_runs_on(memory: MemoryLeaseStore) -> None:
    one, release = identity(), threading.Event()
    started = anyio.Event()

    def work(_: Any) -> None:
        anyio.from_thread.run_sync(started.set)
        release.wait(30)

    async with LeaseGuard(memory, lease=LONG) as guard:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(guard.apply_in_thread, one, work)
            await started.wait()
            tasks.cancel_scope.cancel()
        state = await memory.acquire(one, lease=LONG)
        release.set()

    assert isinstance(state, LeaseState)


async def test_a_slow_effect_keeps_its_lease(store: IdempotencyStore) -> None:
    one = identity()

    async def slow(_: Any) -> None:
        for _ in range(5):
            await anyio.sleep(SHORT.total_seconds() / 2)
            assert isinstance(await store.acquire(one, lease=SHORT), LeaseState)

    async with LeaseGuard(store, lease=SHORT) as guard:
        assert await guard.apply(one, slow) is True


async def test_a_holder_whose_lease_was_taken_is_cancelled_and_told(store: IdempotencyStore) -> None:
    one = identity()
    finished = False

    async def hang(_: Any) -> None:
        nonlocal finished
        await _take_over(store, one)
        await anyio.sleep(20)
        finished = True

    async with LeaseGuard(store, lease=SHORT) as guard:
        with pytest.raises(LeaseLost):
            await guard.apply(one, hang)

    assert not finished


async def test_a_holder_that_noticed_nothing_is_told_when_it_completes(store: IdempotencyStore) -> None:
    one = identity()

    async def quick(_: Any) -> None:
        await _take_over(store, one)

    async with LeaseGuard(store, lease=LONG) as guard:
        with pytest.raises(LeaseLost):
            await guard.apply(one, quick)


async def _take_over(store: IdempotencyStore, one: ProcessedId) -> None:
    """End the lease as a long pause of its holder would, and take the next."""
    if isinstance(store, SqlLeaseStore):
        async with store._engine.begin() as connection:
            await connection.execute(update(lease_table).values(until=0.0))
    elif isinstance(store, RedisLeaseStore):
        await change(store, lease_of(one), "until", 0)
    else:
        assert isinstance(store, MemoryLeaseStore)
        store._entries[one].until = 0.0
    await granted(store, one)


async def change(store: RedisLeaseStore, key: str, *fields: str | int) -> None:
    await store._steps._connections._servers.call(key, "HSET", key, *fields)


class StoreThatGoesAway(MemoryLeaseStore):
    """Its other methods work; these two meet a database that is gone."""

    async def abandon(self, grant: LeaseGrant) -> None:
        raise OSError("away")

    async def extend(self, grant: LeaseGrant, *, lease: timedelta) -> bool:
        raise StoreUnavailable("redis://there", "away")


async def test_what_an_effect_raised_is_not_hidden_by_a_store_that_is_away() -> None:
    async def fail(_: Any) -> None:
        await anyio.sleep(SHORT.total_seconds())  # over several renewals that fail
        raise ValueError("the effect's own")

    async with LeaseGuard(StoreThatGoesAway(), lease=SHORT) as guard:
        with pytest.raises(ValueError, match="the effect's own"):
            await guard.apply(identity(), fail)
        with anyio.move_on_after(0.05) as scope:
            await guard.apply(identity(), lambda _: anyio.sleep_forever())
        assert scope.cancelled_caught


@pytest.mark.parametrize("store", ["sqlite", "psycopg", MARIADB, *REDIS], indirect=True)
async def test_a_crashed_holders_effect_is_taken_over_after_its_lease(store: IdempotencyStore, place: str) -> None:
    one, tokens = identity(), list[int]()

    async def effect(token: FencingToken) -> None:
        tokens.append(token.value)

    async with effect_process(place, one.message_id, "inside", "lease") as process:
        process.send_signal(signal.SIGKILL)
        assert await process.wait() == -signal.SIGKILL
    async with LeaseGuard(store, lease=SHORT) as guard:

        async def taken_over() -> bool:
            try:
                return await guard.apply(one, effect)
            except EffectBusy:
                return False

        await until(taken_over)

    assert len(tokens) == 1


@pytest.mark.parametrize("error", [OSError("away"), StoreUnavailable("redis://there", "away")])
async def test_a_store_that_is_away_is_no_failure_of_the_effect(error: Exception) -> None:
    class Away(MemoryLeaseStore):
        async def acquire(self, identity: ProcessedId, *, lease: timedelta) -> LeaseGrant | LeaseState:
            raise error

    async with LeaseGuard(Away(), lease=LONG) as guard:
        with pytest.raises(EffectBusy, match="the lease store cannot be"):
            await guard.apply(identity(), anyio.sleep)


async def test_a_repeatable_effect_runs_every_time() -> None:
    one, guard, runs = identity(), RepeatableGuard(), []

    async def effect(argument: Any) -> None:
        runs.append(argument)

    assert [await guard.apply(one, effect), await guard.apply(one, effect)] == [True, True]
    assert await guard.apply_in_thread(one, runs.append) is True
    assert runs == [None, None, None]


# --- locks ------------------------------------------------------------------------------------------------------------


shared_stores = pytest.mark.parametrize("store", [*SQL, *REDIS], indirect=True)


@shared_stores
async def test_a_lock_excludes_others_and_its_tokens_grow(lock: DistributedLock, name: str) -> None:
    inside, tokens = 0, list[int]()

    async def work() -> None:
        nonlocal inside
        for _ in range(3):
            async with lock.hold(name, lease=LONG, wait=LONG) as token:
                inside += 1
                assert inside == 1
                tokens.append(token.value)
                await anyio.sleep(0.005)
                inside -= 1

    async with anyio.create_task_group() as tasks:
        for _ in range(4):
            tasks.start_soon(work)

    assert tokens == sorted(set(tokens))
    assert len(tokens) == 12


@shared_stores
async def test_who_waits_too_long_for_a_lock_gets_a_timeout_and_other_names_are_free(
    lock: DistributedLock, name: str
) -> None:
    async with lock.hold(name, lease=LONG, wait=NONE):
        with pytest.raises(TimeoutError, match=name):
            async with lock.hold(name, lease=LONG, wait=timedelta(seconds=0.1)):
                pass
        async with lock.hold(f"other {name}", lease=LONG, wait=NONE) as token:
            assert token.name == f"other {name}"


@shared_stores
async def test_a_block_that_fails_raises_its_own_exception_and_frees_the_lock(lock: DistributedLock, name: str) -> None:
    with pytest.raises(ValueError, match="mine"):
        async with lock.hold(name, lease=LONG, wait=NONE):
            raise ValueError("mine")

    with anyio.CancelScope() as scope:
        async with lock.hold(name, lease=LONG, wait=NONE):
            scope.cancel()
            await anyio.sleep_forever()

    async with lock.hold(name, lease=LONG, wait=NONE):
        pass


@shared_stores
async def test_a_long_block_keeps_its_lock(lock: DistributedLock, name: str) -> None:
    lease = timedelta(seconds=1.5)  # a busy machine may keep its renewals waiting
    async with lock.hold(name, lease=lease, wait=NONE):
        with pytest.raises(TimeoutError):
            async with lock.hold(name, lease=lease, wait=lease * 1.5):
                pass


@shared_stores
async def test_a_block_whose_lock_was_taken_is_cancelled_and_told(
    lock: DistributedLock, store: IdempotencyStore, name: str
) -> None:
    finished = False
    with pytest.raises(LeaseLost, match=name):
        async with lock.hold(name, lease=SHORT, wait=NONE) as token:
            await take_over(store, token)
            await anyio.sleep(20)
            finished = True

    assert not finished
    with pytest.raises(TimeoutError):  # it is the other's still
        async with lock.hold(name, lease=SHORT, wait=NONE):
            pass


async def take_over(store: IdempotencyStore, token: FencingToken) -> None:
    """As if the holder had been paused and another one came."""
    if isinstance(store, RedisLeaseStore):
        await change(store, lock_of(token.name), "token", token.value + 1, "until", 4_000_000_000_000)
        return
    assert isinstance(store, SqlLeaseStore)
    async with store._engine.begin() as connection:
        await connection.execute(update(lock_table).values(owner="another", token=token.value + 1, until=4e9))


class AwayLock:
    """Grants once, and is away from then on."""

    async def take(self, name: str, lease: float) -> int | None:
        del name, lease
        return 7

    async def renew(self, token: FencingToken, lease: float) -> bool:
        raise StoreUnavailable("redis://there", "away")

    async def give_back(self, token: FencingToken) -> None:
        raise StoreUnavailable("redis://there", "away")


async def test_a_block_is_cancelled_when_its_lease_may_have_ended_though_nobody_can_be_asked() -> None:
    """I4"""
    began = anyio.current_time()
    with pytest.raises(LeaseLost, match="stock"):
        async with held(AwayLock(), "stock", lease=0.6, wait=0) as token:
            assert token == FencingToken("stock", 7)
            await anyio.sleep(20)
    assert 0.5 < anyio.current_time() - began < 5


async def test_a_block_that_ends_in_time_is_well_though_its_lock_cannot_be_given_back() -> None:
    async with held(AwayLock(), "stock", lease=0.6, wait=0):
        await anyio.sleep(0.3)
