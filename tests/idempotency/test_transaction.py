"""Effect and mark are one commit: once for each handler, whoever delivers again, collides or dies (I1, I2, I4)."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from pathlib import Path

import anyio
import anyio.abc
import pytest
from pydantic import BaseModel
from sqlalchemy import Engine, insert, select, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.orm.exc import StaleDataError

from reliamq import idempotency, outbox
from reliamq.database import is_retriable, open_engine, open_sync_engine
from reliamq.idempotency import LeaseGuard, SqlLeaseStore, TransactionGuard, is_conflict, retry_on_conflict
from reliamq.idempotency.tables import processed
from reliamq.outbox import OutboxMessage
from reliamq.spi import ConfigurationError, EffectBusy, TransactionRequired
from reliamq.topics import Topic

from .conftest import Account, Base, Effect, effects, every_driver, identity, marks, record, record_plainly

pytestmark = pytest.mark.anyio


class Shipped(BaseModel):
    number: int


shipped = Topic("shipped", Shipped, key=lambda model: str(model.number))


# --- one commit -------------------------------------------------------------------------------------------------------


@every_driver
async def test_a_message_takes_effect_once(engine: AsyncEngine) -> None:
    guard, one = TransactionGuard(engine), identity()

    assert await guard.apply(one, record(one)) is True
    assert await guard.apply(one, record(one)) is False

    assert (await effects(engine), await marks(engine)) == (1, 1)


async def test_a_plain_function_takes_effect_once(engine: AsyncEngine, sync_engine: Engine) -> None:
    guard, one = TransactionGuard(engine, sync_engine), identity()

    assert await guard.apply_in_thread(one, record_plainly(one)) is True
    assert await guard.apply_in_thread(one, record_plainly(one)) is False
    assert await guard.apply(one, record(one)) is False  # the mark is the same

    assert (await effects(engine), await marks(engine)) == (1, 1)


async def test_an_effect_that_fails_leaves_no_mark_and_runs_again(engine: AsyncEngine, sync_engine: Engine) -> None:
    guard, one = TransactionGuard(engine, sync_engine), identity()

    async def fail(session: AsyncSession) -> None:
        await record(one)(session)
        await session.flush()
        raise ValueError("no")

    def fail_plainly(session: Session) -> None:
        record_plainly(one)(session)
        session.flush()
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await guard.apply(one, fail)
    with pytest.raises(ValueError, match="no"):
        await guard.apply_in_thread(one, fail_plainly)

    assert (await effects(engine), await marks(engine)) == (0, 0)
    assert await guard.apply(one, record(one)) is True


async def test_a_cancelled_effect_leaves_no_mark(engine: AsyncEngine) -> None:
    guard, one = TransactionGuard(engine), identity()

    async def hang(session: AsyncSession) -> None:
        await record(one)(session)
        await session.flush()
        scope.cancel()
        await anyio.sleep_forever()

    with anyio.CancelScope() as scope:
        await guard.apply(one, hang)

    assert (await effects(engine), await marks(engine)) == (0, 0)


async def test_what_a_handler_adds_to_the_outbox_joins_its_effect(engine: AsyncEngine) -> None:
    guard, one = TransactionGuard(engine), identity()
    fails = True

    async def consume_and_produce(session: AsyncSession) -> None:
        outbox.add(session, shipped, Shipped(number=1))
        await record(one)(session)
        await session.flush()
        if fails:
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await guard.apply(one, consume_and_produce)
    fails = False
    assert await guard.apply(one, consume_and_produce)

    async with AsyncSession(engine) as session:
        assert len((await session.scalars(select(OutboxMessage))).all()) == 1


async def test_each_handler_and_each_group_has_its_own_effect(engine: AsyncEngine) -> None:
    guard = TransactionGuard(engine)
    for one in (identity("m"), identity("m", handler="other"), identity("m", group="other")):
        assert await guard.apply(one, record(one)) is True
        assert await guard.apply(one, record(one)) is False

    assert await effects(engine) == 3


# --- the handler's own business ---------------------------------------------------------------------------------------


async def test_the_handlers_own_integrity_error_is_not_taken_for_a_mark(
    engine: AsyncEngine, sync_engine: Engine
) -> None:
    guard, one = TransactionGuard(engine, sync_engine), identity()

    async def twice_the_same(session: AsyncSession) -> None:
        await session.execute(insert(Account).values(name="a", version=1))
        await session.execute(insert(Account).values(name="a", version=1))

    def twice_the_same_plainly(session: Session) -> None:
        session.execute(insert(Account).values(name="a", version=1))
        session.execute(insert(Account).values(name="a", version=1))

    with pytest.raises(IntegrityError):
        await guard.apply(one, twice_the_same)
    with pytest.raises(IntegrityError):
        await guard.apply_in_thread(one, twice_the_same_plainly)

    assert await marks(engine) == 0


@every_driver
async def test_an_error_that_the_handler_caught_never_ends_as_a_mark_or_a_success_without_the_effect(
    engine: AsyncEngine,
) -> None:
    guard, one = TransactionGuard(engine), identity()

    async def catch(session: AsyncSession) -> None:
        await session.execute(insert(Effect).values(message_id=one.message_id, pid=0))
        await session.execute(insert(Account).values(name="a", version=1))
        try:
            await session.execute(insert(Account).values(name="a", version=1))
        except IntegrityError:
            pass  # PostgreSQL has given the transaction up here, and would answer COMMIT with a rollback

    if engine.dialect.name in ("sqlite", "mysql"):  # which undo the one statement
        assert await guard.apply(one, catch)
        assert (await effects(engine), await marks(engine)) == (1, 1)
        return
    with pytest.raises((TransactionRequired, DBAPIError)):
        await guard.apply(one, catch)
    assert (await effects(engine), await marks(engine)) == (0, 0)


@pytest.mark.xdist_group("mariadb")
async def test_a_deadlock_that_the_handler_caught_never_ends_as_a_part_of_the_effect(mariadb_url: str) -> None:
    """I2: MariaDB and MySQL undo the whole transaction, and take what comes after it for a new one."""
    async with open_engine(mariadb_url) as engine:
        await idempotency.create_tables_async(engine)
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
            await connection.execute(insert(Account), [{"name": name, "version": 1} for name in "ab"])
        one, met = identity(), anyio.Event()

        async def catch(session: AsyncSession) -> None:
            await session.execute(update(Account).values(balance=1).where(Account.name == "a"))
            met.set()
            await anyio.sleep(0.5)
            with suppress(DBAPIError):
                await session.execute(update(Account).values(balance=1).where(Account.name == "b"))
            session.add(Effect(message_id=one.message_id))

        async def other() -> None:
            await met.wait()
            async with engine.begin() as connection:
                for _ in range(50):  # the one with more to undo is not the one that is ended
                    await connection.execute(insert(Effect).values(message_id="other", pid=0))
                await connection.execute(update(Account).values(balance=2).where(Account.name == "b"))
                await connection.execute(update(Account).values(balance=2).where(Account.name == "a"))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(other)
            with pytest.raises(TransactionRequired, match="the transaction is gone"):
                await TransactionGuard(engine).apply(one, catch)

        assert await marks(engine) == 0
        assert await effects(engine) == 50


async def test_a_plain_handler_that_caught_an_error_is_told_so_too(engine: AsyncEngine, sync_engine: Engine) -> None:
    guard, one = TransactionGuard(engine, sync_engine), identity()

    def end_it(session: Session) -> None:
        record_plainly(one)(session)
        session.flush()
        session.execute(text("ROLLBACK"))  # as SQLite does by itself when a disk is full

    with pytest.raises(TransactionRequired, match="begin_nested"):
        await guard.apply_in_thread(one, end_it)

    assert (await effects(engine), await marks(engine)) == (0, 0)


async def test_savepoints_are_the_handlers_own(engine: AsyncEngine) -> None:
    guard, one = TransactionGuard(engine), identity()

    async def try_a_part(session: AsyncSession) -> None:
        session.add(Account(name="a"))
        await session.flush()
        try:
            async with session.begin_nested():
                await session.execute(insert(Account).values(name="a", version=1))
        except IntegrityError:
            pass
        async with session.begin_nested():
            await record(one)(session)

    assert await guard.apply(one, try_a_part) is True
    assert (await effects(engine), await marks(engine)) == (1, 1)


@pytest.mark.parametrize("how", ["commit", "commit in a savepoint", "rollback", "close"])
async def test_a_handler_that_ends_the_transaction_itself_is_refused(engine: AsyncEngine, how: str) -> None:
    guard, one = TransactionGuard(engine), identity()

    async def end_it(session: AsyncSession) -> None:
        await record(one)(session)
        if how == "commit in a savepoint":
            await session.begin_nested()
        await {"rollback": session.rollback, "close": session.close}.get(how, session.commit)()

    with pytest.raises(TransactionRequired):
        await guard.apply(one, end_it)

    assert (await effects(engine), await marks(engine)) == (0, 0)


async def test_a_plain_handler_that_commits_or_rolls_back_is_refused(engine: AsyncEngine, sync_engine: Engine) -> None:
    guard, one = TransactionGuard(engine, sync_engine), identity()

    def commit(session: Session) -> None:
        record_plainly(one)(session)
        session.commit()

    def roll_back(session: Session) -> None:
        record_plainly(one)(session)
        session.rollback()

    for end_it in (commit, roll_back):
        with pytest.raises(TransactionRequired):
            await guard.apply_in_thread(one, end_it)

    assert (await effects(engine), await marks(engine)) == (0, 0)


async def test_a_guard_without_the_engine_that_a_handler_needs_says_so(engine: AsyncEngine) -> None:
    one = identity()
    with pytest.raises(ConfigurationError, match="synchronous"):
        await TransactionGuard(engine).apply_in_thread(one, record_plainly(one))
    with pytest.raises(ConfigurationError, match="async engine"):
        await TransactionGuard(None).apply(one, record(one))


# --- collisions -------------------------------------------------------------------------------------------------------


@every_driver
async def test_two_workers_with_one_message_at_one_moment_make_one_effect(engine: AsyncEngine) -> None:
    guard = TransactionGuard(engine)
    for _ in range(5):
        one, applied = identity(), []

        async def deliver(one=one, applied=applied) -> None:  # type: ignore[no-untyped-def]
            applied.append(await guard.apply(one, record(one)))

        async with anyio.create_task_group() as tasks:
            for _ in range(4):
                tasks.start_soon(deliver)
        assert sorted(applied) == [False, False, False, True]

    assert await effects(engine) == 5


async def test_the_second_delivery_runs_when_the_first_that_it_waited_for_fails(engine: AsyncEngine) -> None:
    guard, one = TransactionGuard(engine), identity()
    started, applied = anyio.Event(), []

    async def fail(session: AsyncSession) -> None:
        started.set()
        await anyio.sleep(0.1)  # meanwhile the second one waits for our mark
        raise ValueError("no")

    async def first() -> None:
        with pytest.raises(ValueError, match="no"):
            await guard.apply(one, fail)

    async def second() -> None:
        await started.wait()
        applied.append(await guard.apply(one, record(one)))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(first)
        tasks.start_soon(second)

    assert applied == [True]
    assert await effects(engine) == 1


async def test_a_version_conflict_runs_the_whole_effect_again_at_once(engine: AsyncEngine, sync_engine: Engine) -> None:
    guard, runs = TransactionGuard(engine, sync_engine), 0
    async with AsyncSession(engine) as session, session.begin():
        session.add(Account(name="a"))

    async def book(session: AsyncSession) -> None:
        nonlocal runs
        runs += 1
        account = await session.get_one(Account, "a")
        if runs == 1:  # somebody else is faster; on the same connection, because SQLite has one writer
            await session.execute(update(Account.__table__).values(version=99))  # type: ignore[arg-type]
        account.balance += 1

    def book_plainly(session: Session) -> None:
        nonlocal runs
        runs += 1
        account = session.get_one(Account, "a")
        if runs == 3:
            session.execute(update(Account.__table__).values(version=99))  # type: ignore[arg-type]
        account.balance += 1

    assert await guard.apply(identity(), book) is True
    assert runs == 2
    assert await guard.apply_in_thread(identity(), book_plainly) is True
    assert runs == 4

    async with AsyncSession(engine) as session:
        assert (await session.get_one(Account, "a")).balance == 2
    assert await marks(engine) == 2


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
async def test_a_deadlock_of_two_effects_ends_with_both_applied(postgresql_url: str, driver: str) -> None:
    from reliamq import idempotency
    from reliamq.database import open_engine

    from .conftest import Base

    async with open_engine(postgresql_url.replace("postgresql:", f"postgresql+{driver}:")) as engine:
        await idempotency.create_tables_async(engine)
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        async with AsyncSession(engine) as session, session.begin():
            session.add_all([Account(name="a"), Account(name="b")])
        guard, met = TransactionGuard(engine), {"a": anyio.Event(), "b": anyio.Event()}

        async def move(source: str, target: str) -> None:
            async def effect(session: AsyncSession) -> None:
                await session.execute(select(Account).where(Account.name == source).with_for_update())
                met[source].set()
                await met[target].wait()
                await session.execute(select(Account).where(Account.name == target).with_for_update())

            assert await guard.apply(identity(), effect) is True

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(move, "a", "b")
            tasks.start_soon(move, "b", "a")

        assert await marks(engine) == 2


async def test_a_conflict_that_does_not_end_is_raised_after_its_attempts() -> None:
    calls = 0

    async def collide() -> None:
        nonlocal calls
        calls += 1
        raise StaleDataError("again")

    with pytest.raises(StaleDataError):
        await retry_on_conflict(collide, attempts=3)

    assert calls == 3
    assert is_conflict(StaleDataError()) is True
    assert is_conflict(ValueError()) is is_retriable(ValueError()) is False


# --- crashes ----------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def effect_process(
    database: str, message_id: str, stage: str, guard: str = "transaction"
) -> AsyncIterator[anyio.abc.Process]:
    """A process that has come to ``stage`` and waits there; killed at the end."""
    command = [sys.executable, "-m", "tests.idempotency.effect_process", database, message_id, stage, guard]
    async with await anyio.open_process(
        command, stdin=subprocess.PIPE, stderr=None, cwd=Path(__file__).parents[2]
    ) as process:
        try:
            assert await said(process) == stage
            yield process
        finally:
            if process.returncode is None:
                process.kill()


async def said(process: anyio.abc.Process) -> str:
    assert process.stdout is not None
    with anyio.fail_after(60):
        return (await process.stdout.receive()).decode().split()[0]


@pytest.mark.parametrize(("stage", "left"), [("inside", 0), ("after", 1)])
async def test_a_worker_killed_before_its_commit_leaves_nothing_and_after_it_everything(
    engine: AsyncEngine, database: str, stage: str, left: int
) -> None:
    one = identity()
    async with effect_process(database, one.message_id, stage) as process:
        process.send_signal(signal.SIGKILL)
        assert await process.wait() == -signal.SIGKILL

    assert await TransactionGuard(engine).apply(one, record(one)) is (left == 0)
    assert (await effects(engine), await marks(engine)) == (1, 1)


async def test_two_processes_with_one_message_make_one_effect(engine: AsyncEngine, database: str) -> None:
    one = identity()
    async with (
        effect_process(database, one.message_id, "race") as first,
        effect_process(database, one.message_id, "race") as second,
    ):
        for process in (first, second):
            assert process.stdin is not None
            await process.stdin.send(b"\n")
        answers = {await said(first), await said(second)}
        await first.wait()
        await second.wait()

    assert answers == {"True", "False"}
    assert (await effects(engine), await marks(engine)) == (1, 1)


# --- cleaning ---------------------------------------------------------------------------------------------------------


async def test_cleaning_removes_expired_marks_in_chunks_and_no_other(engine: AsyncEngine) -> None:
    short, long = TransactionGuard(engine, keep=timedelta(0)), TransactionGuard(engine)
    for guard, count in ((short, 5), (long, 2)):
        for _ in range(count):
            one = identity()
            await guard.apply(one, record(one))

    assert [await long.clean(limit=3) for _ in range(3)] == [3, 2, 0]
    assert await marks(engine) == 2


async def test_cleaning_reads_by_the_index_of_what_expires(engine: AsyncEngine) -> None:
    explain = "EXPLAIN QUERY PLAN" if engine.dialect.name == "sqlite" else "EXPLAIN"
    async with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            await connection.execute(text("SET LOCAL enable_seqscan = off"))  # an empty table is always scanned
        query = select(processed.c.message_id).where(processed.c.expires_at <= 1).order_by(processed.c.expires_at)
        compiled = query.limit(5).compile(engine.sync_engine, compile_kwargs={"literal_binds": True})
        plan = (await connection.execute(text(f"{explain} {compiled}"))).all()

    assert "reliamq_processed_expiry" in str(plan)
    assert "Sort" not in str(plan)
    assert "TEMP B-TREE" not in str(plan)


@pytest.mark.parametrize("way", ["connection", "COMMIT", "commit;", "  END", "ROLLBACK", "BEGIN"])
async def test_a_handler_that_ends_the_transaction_below_the_session_is_refused(engine: AsyncEngine, way: str) -> None:
    guard, one = TransactionGuard(engine), identity()

    async def end_it(session: AsyncSession) -> None:
        await record(one)(session)
        await session.flush()
        if way == "connection":
            await (await session.connection()).commit()
        else:
            await session.execute(text(way))

    for _ in range(2):
        with pytest.raises(TransactionRequired):
            await guard.apply(one, end_it)

    assert (await effects(engine), await marks(engine)) == (0, 0)


async def test_a_database_that_is_away_is_no_attempt() -> None:
    """I2: the message is tried again later, uncounted, for the handler never began"""
    away = "postgresql://nobody@127.0.0.1:1/nowhere"
    began: list[object] = []

    async def effect(session: object) -> None:
        began.append(session)

    async with open_engine(away) as engine:
        with open_sync_engine(away) as sync_engine:
            guard = TransactionGuard(engine, sync_engine)
            with pytest.raises(EffectBusy, match="cannot be reached"):
                await guard.apply(identity(), effect)
            with pytest.raises(EffectBusy, match="cannot be reached"):
                await guard.apply_in_thread(identity(), began.append)
        leases = LeaseGuard(SqlLeaseStore(engine), lease=timedelta(seconds=1))
        async with leases:
            with pytest.raises(EffectBusy, match="cannot be reached"):
                await leases.apply(identity(), effect)

    assert began == []
