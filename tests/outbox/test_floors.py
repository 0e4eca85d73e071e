"""Where rows begin, on PostgreSQL: removed rows that somebody might still see cost nothing, and no row is passed over
(O3 O6).
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from datetime import timedelta

import anyio
import pytest
from sqlalchemy import text, update
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession

from reliamq import outbox
from reliamq.database import open_engine
from reliamq.outbox import OutboxMessage, SqlOutboxStore
from reliamq.outbox.claims import floors
from reliamq.spi import OutboxRow
from tests.servers.postgresql import run_postgresql

from .conftest import Order, Recorder, add, analyse, orders, relaying, until
from .test_backlog import rows_read

pytestmark = pytest.mark.anyio
both_drivers = pytest.mark.parametrize("database", ["psycopg", "asyncpg"], indirect=True)
on_postgresql = pytest.mark.parametrize("database", ["psycopg"], indirect=True)
LEASE, ACCOUNTS = timedelta(seconds=30), 300
"""More accounts than buckets, so that all buckets have rows."""


@pytest.fixture(autouse=True)
def _eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each claim looks where rows begin, and none from the beginning."""
    monkeypatch.setattr(floors, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(floors, "WHOLE_SECONDS", 1e9)


async def send_all(store: SqlOutboxStore, name: str = "one") -> list[OutboxRow]:
    """What claims give until there is nothing, each confirmed."""
    sent: list[OutboxRow] = []
    while rows := await store.claim(name, limit=100, lease=LEASE):
        await store.settle(name, confirmed=rows, rejected=[])
        sent.extend(rows)
    return sent


def numbers_of(account: str, rows: Sequence[OutboxRow]) -> list[int]:
    found = [Order.model_validate_json(one.message.body) for one in rows]
    return [order.number for order in found if order.account == account]


async def park_below_the_floors(engine: AsyncEngine, store: SqlOutboxStore) -> None:
    """The message ("a", 1)."""
    await add(engine, ("a", 1))
    async with engine.begin() as connection:
        await connection.execute(update(OutboxMessage).values(parked_at=1.0))
    for number in range(3):
        await add_everywhere(engine, number)
        await send_all(store)


async def add_everywhere(engine: AsyncEngine, number: int) -> None:
    await add(engine, *((f"a-{account}", number) for account in range(ACCOUNTS)))


@both_drivers
async def test_a_message_whose_transaction_ends_late_is_not_passed_over(
    engine: AsyncEngine, store: SqlOutboxStore
) -> None:
    async with AsyncSession(engine) as late, late.begin():
        outbox.add(late, orders, Order(account="late", number=1))
        await late.flush()
        for number in range(4):
            await add_everywhere(engine, number)
            assert len(await send_all(store)) == ACCOUNTS
    await add(engine, ("late", 2))

    assert numbers_of("late", await send_all(store)) == [1, 2]


@on_postgresql
async def test_a_slow_look_learns_nothing_from_another_one_of_the_same_relay(
    engine: AsyncEngine, store: SqlOutboxStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relay claims twice at a time."""
    await add_everywhere(engine, 0)
    await store.claim("first", limit=10, lease=timedelta(0))
    await store.claim("first", limit=10, lease=timedelta(0))  # now a position is noted, and who was at work
    answered, may_go_on, sent = anyio.Event(), anyio.Event(), list[OutboxRow]()
    writers = floors._writers

    async def send_slowly() -> None:
        sent.extend(await send_all(store, "slow"))

    async def slowly(connection: AsyncConnection) -> frozenset[str]:
        found = await writers(connection)
        if not answered.is_set():
            answered.set()
            await may_go_on.wait()
        return found

    monkeypatch.setattr(floors, "_writers", slowly)
    async with AsyncSession(engine) as late, late.begin(), anyio.create_task_group() as tasks:
        tasks.start_soon(send_slowly)
        with anyio.fail_after(10):
            await answered.wait()
        monkeypatch.setattr(floors, "LOOK_SECONDS", 1e9)
        outbox.add(late, orders, Order(account="late", number=1))
        await late.flush()
        await add_everywhere(engine, 1)
        assert await store.claim("one", limit=1_000, lease=LEASE)
        monkeypatch.setattr(floors, "LOOK_SECONDS", 0.0)
        await send_all(store)  # would note a position behind the late one, and who is at work
        may_go_on.set()
    await add(engine, ("late", 2))
    sent += await send_all(store)

    assert numbers_of("late", sent) == [1, 2]


@on_postgresql
async def test_floors_may_be_forgotten_in_the_middle_of_a_look(
    engine: AsyncEngine, store: SqlOutboxStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    writers = floors._writers

    async def and_requeue(connection: AsyncConnection) -> frozenset[str]:
        await store.requeue(None)
        return await writers(connection)

    monkeypatch.setattr(floors, "_writers", and_requeue)
    for number in range(3):
        await add_everywhere(engine, number)
        assert len(await send_all(store)) == ACCOUNTS


@on_postgresql
async def test_what_is_rolled_back_keeps_nothing_back(engine: AsyncEngine, store: SqlOutboxStore) -> None:
    async with AsyncSession(engine) as session:
        outbox.add(session, orders, Order(account="a", number=1))
        await session.flush()
        await session.rollback()
    for number in range(3):
        await add_everywhere(engine, number)
        assert len(await send_all(store)) == ACCOUNTS

    assert min(store._claims._floors.positions) > 2 * ACCOUNTS  # type: ignore[attr-defined]


@pytest.mark.parametrize("analysed", [False, True])
@both_drivers
async def test_a_claim_does_not_look_at_removed_rows_that_an_open_transaction_might_see(
    engine: AsyncEngine, store: SqlOutboxStore, analysed: bool
) -> None:
    """Also where the planner was told, of an empty table, that it is empty."""
    async with engine.connect() as other:
        await other.execution_options(isolation_level="REPEATABLE READ")
        await other.execute(text("SELECT pg_current_xact_id()"))
        for number in range(20):
            await add_everywhere(engine, number)
            await send_all(store)
        if analysed:
            await analyse(engine, "reliamq_outbox")
        await add_everywhere(engine, 20)
        before, where = await rows_read(engine), await reads_by_index(engine)
        assert len(await store.claim("one", limit=ACCOUNTS, lease=LEASE)) > ACCOUNTS // 4
        read, where = await rows_read(engine) - before, await reads_by_index(engine) - where

    assert read < 10 * ACCOUNTS, (where, store._claims._floors.positions)  # type: ignore[attr-defined]


async def reads_by_index(engine: AsyncEngine) -> Counter[str]:
    """For who wonders where they are."""
    async with engine.connect() as connection:
        found = await connection.execute(text("SELECT indexrelname, idx_tup_read FROM pg_stat_user_indexes"))
        return Counter({one.indexrelname: one.idx_tup_read for one in found})


@on_postgresql
async def test_rows_that_are_put_back_by_somebody_else_are_found_again(
    engine: AsyncEngine, store: SqlOutboxStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await park_below_the_floors(engine, store)
    assert await SqlOutboxStore(engine).requeue(None) == 1
    assert await send_all(store) == []

    monkeypatch.setattr(floors, "WHOLE_SECONDS", 0.0)
    assert numbers_of("a", await send_all(store)) == [1]


async def test_a_prepared_transaction_is_still_at_work_also_after_a_restart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its locks have another name then."""
    with run_postgresql(max_prepared_transactions="2") as server, server.fresh_database() as url:
        async with open_engine(url) as engine:
            await outbox.create_tables_async(engine)
            store = SqlOutboxStore(engine)
            await add_everywhere(engine, 0)
            await send_all(store)
            async with engine.connect() as connection:
                session = AsyncSession(connection)
                outbox.add(session, orders, Order(account="late", number=1))
                await session.flush()
                await add_everywhere(engine, 1)
                with monkeypatch.context() as seldom:
                    seldom.setattr(floors, "LOOK_SECONDS", 1e9)
                    await send_all(store)
                await add_everywhere(engine, 2)  # it looks, and knows of a later position by now
                await send_all(store)
                await connection.execute(text("PREPARE TRANSACTION 'late'"))
                await connection.invalidate()
            server.process.kill()
            server.process.start()
            await engine.dispose()
            for number in range(3, 6):
                await add_everywhere(engine, number)
                await send_all(store)
            async with engine.connect() as connection:
                await connection.execution_options(isolation_level="AUTOCOMMIT")
                await connection.execute(text("COMMIT PREPARED 'late'"))
            await add(engine, ("late", 2))

            assert numbers_of("late", await send_all(store)) == [1, 2]


@on_postgresql
async def test_rows_that_are_put_back_are_found_also_while_a_writer_stays(
    engine: AsyncEngine, store: SqlOutboxStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await park_below_the_floors(engine, store)
    async with AsyncSession(engine) as late, late.begin():
        outbox.add(late, orders, Order(account="late", number=1))
        await late.flush()
        assert await SqlOutboxStore(engine).requeue(None) == 1
        monkeypatch.setattr(floors, "WHOLE_SECONDS", 0.0)
        assert numbers_of("a", await send_all(store)) == [1]


@on_postgresql
async def test_positions_that_begin_anew_are_found(
    engine: AsyncEngine, store: SqlOutboxStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        await add_everywhere(engine, number)
        await send_all(store)
    async with engine.begin() as connection:
        await connection.execute(text("TRUNCATE reliamq_outbox RESTART IDENTITY"))
    monkeypatch.setattr(floors, "WHOLE_SECONDS", 0.0)
    await add(engine, ("a", 1))
    assert numbers_of("a", await send_all(store)) == [1]
    monkeypatch.setattr(floors, "WHOLE_SECONDS", 1e9)
    for number in range(3):
        await add_everywhere(engine, number)
        assert len(await send_all(store)) == ACCOUNTS


@on_postgresql
@pytest.mark.parametrize("seed", range(2))
async def test_whoever_commits_when_each_key_is_sent_in_the_order_of_its_commits(
    engine: AsyncEngine, seed: int
) -> None:
    """Two relays, each with floors of its own."""
    dice, recorder, turns = random.Random(seed), Recorder(), iter(range(600))
    committed = defaultdict[str, list[int]](list)

    async def book() -> None:
        for number in turns:
            account = f"a-{dice.randrange(40)}"
            async with AsyncSession(engine) as session:
                outbox.add(session, orders, Order(account=account, number=number))
                await session.flush()
                await anyio.sleep(dice.choice([0, 0, 0.005, 0.1]))
                if dice.random() < 0.2:
                    await session.rollback()
                    continue
                committed[account].append(number)  # the key is locked until the commit
                await session.commit()

    async def empty() -> bool:
        return (await SqlOutboxStore(engine).status()).waiting == 0

    async with relaying(SqlOutboxStore(engine), recorder), relaying(SqlOutboxStore(engine), recorder):
        async with anyio.create_task_group() as tasks:
            for _ in range(20):
                tasks.start_soon(book)
        await until(empty)

    assert {account: recorder.numbers(account) for account in committed} == committed
