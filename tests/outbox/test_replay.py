"""Sent rows are kept for a window, and sent again when they are asked for (O7)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import anyio
import pytest
from sqlalchemy import event, func, inspect, make_url, select, text, update
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from reliamq import outbox
from reliamq.database import now_seconds, open_engine
from reliamq.outbox import OutboxMessage, Relay, SentMessage, SqlOutboxStore
from reliamq.outbox.table import KEPT_TABLES
from reliamq.spi import ConfigurationError, Message, Rejection, RejectionReason

from .conftest import Order, Recorder, add, analyse, drain, every_driver, firsts, orders, relaying, unordered, until

pytestmark = pytest.mark.anyio
LEASE = timedelta(seconds=30)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)


async def waiting(store: SqlOutboxStore) -> int:
    return (await store.status()).waiting


async def sent_hours_ago(engine: AsyncEngine, hours: float, *ids: str) -> None:
    """Let kept rows be so old."""
    async with engine.begin() as connection:
        then = now_seconds() - hours * 3600
        await connection.execute(update(SentMessage).where(SentMessage.message_id.in_(ids)).values(sent_at=then))


# --- keeping ----------------------------------------------------------------------------------------------------------


@every_driver
async def test_a_kept_row_is_counted_and_not_sent_again_by_itself(engine: AsyncEngine, keeping: SqlOutboxStore) -> None:
    await add(engine, *((f"account-{number}", number) for number in range(950)))
    recorder = Recorder()

    await drain(keeping, recorder, batch=500)
    async with relaying(keeping, recorder):
        await anyio.sleep(0.2)  # what is counted is that nothing happens

    assert len(recorder.stored) == 950
    status = await keeping.status()
    assert (status.waiting, status.kept) == (0, 950)
    assert status.kept_since is not None
    assert abs(status.kept_since - datetime.now(UTC)) < timedelta(minutes=1)


async def test_what_was_not_confirmed_is_not_kept(engine: AsyncEngine, keeping: SqlOutboxStore) -> None:
    await add(engine, ("a", 1), ("a", 2), ("a", 3))
    good, bad, _ = await keeping.claim("relay", limit=3, lease=LEASE)

    refused = Rejection(bad.message.id, RejectionReason.UNAVAILABLE, "the test says so")
    await keeping.settle("relay", confirmed=[good], rejected=[(bad, refused)])

    status = await keeping.status()
    assert (status.waiting, status.kept) == (2, 1)


async def test_an_id_may_be_used_again_while_its_row_is_kept(engine: AsyncEngine, keeping: SqlOutboxStore) -> None:
    """Only rows that wait share the ids among them, as it is without keeping."""
    recorder = Recorder()
    for number in (1, 2):
        async with AsyncSession(engine) as session, session.begin():
            outbox.add(session, orders, Order(account="a", number=number), id="mine")
        await drain(keeping, recorder)
    assert (await keeping.status()).kept == 2

    assert await keeping.replay(since=HOUR) == 1  # one message, because the id says what it is
    assert await keeping.replay(since=HOUR) == 0  # and it waits
    await drain(keeping, recorder)

    assert recorder.numbers("a") == [1, 2, 1]


async def test_without_keeping_nothing_of_it_is_made_asked_or_needed(
    engine: AsyncEngine, store: SqlOutboxStore
) -> None:
    asked: list[str] = []

    @event.listens_for(engine.sync_engine, "before_cursor_execute")
    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        asked.append(statement)

    await add(engine, ("a", 1), ("a", 2))
    await drain(store, Recorder())
    async with engine.connect() as connection:
        tables = await connection.run_sync(lambda plain: inspect(plain).get_table_names())

    assert not {table.name for table in KEPT_TABLES} & set(tables)
    assert not [one for one in asked if "reliamq_outbox_sent" in one or "reliamq_outbox_replay" in one]
    assert (await store.status()).kept_since is None
    assert await store.clean(limit=10) == 0
    for refused in (store.replay(since=HOUR), store.kept(since=HOUR)):
        with pytest.raises(ConfigurationError, match=r"sent rows are not kept.*set outbox\.keep"):
            await refused


async def test_an_older_database_is_told_what_it_lacks_and_gets_it(engine: AsyncEngine) -> None:
    await add(engine, ("a", 1))  # an outbox from before, with a row
    keeping = SqlOutboxStore(engine, keep=DAY)
    lacks = r"no table reliamq_outbox_sent and no table reliamq_outbox_replay; start the application once.*migration"

    for refused in (keeping.replay(since=HOUR), keeping.kept(since=HOUR), keeping.status()):
        with pytest.raises(ConfigurationError, match=lacks):
            await refused
    recorder = Recorder()
    with pytest.raises(ConfigurationError, match=lacks):
        await Relay(keeping, recorder).run(anyio.Event())  # it would wait for ever
    assert recorder.stored == []

    await outbox.create_tables_async(engine, keep=True)
    await drain(keeping, recorder)
    assert await keeping.replay(since=HOUR) == 1


async def test_tables_of_a_migration_lack_their_row_until_the_application_starts(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        await connection.run_sync(outbox.metadata.create_all)
    keeping = SqlOutboxStore(engine, keep=DAY)

    with pytest.raises(ConfigurationError, match="no row in table reliamq_outbox_replay; start the application once"):
        await keeping.status()

    for _ in range(2):
        await outbox.create_tables_async(engine, keep=True)
    assert (await keeping.status()).kept == 0


async def test_who_may_make_no_table_is_told_which_and_works_on_without_keeping(postgresql_url: str) -> None:
    """A database administrator runs the migrations; an outbox that keeps nothing needs none."""
    role = f"clerk_{make_url(postgresql_url).database}"
    as_role = postgresql_url.replace("postgres@", f"{role}@")
    async with open_engine(postgresql_url) as owner, open_engine(as_role) as engine:
        await outbox.create_tables_async(owner)
        await execute(owner, f"CREATE ROLE {role} LOGIN", *grants(role))
        try:
            with pytest.raises(ConfigurationError, match=r"no table reliamq_outbox_sent and.*made: permission denied"):
                await outbox.create_tables_async(engine, keep=True)
            await outbox.create_tables_async(engine)
            await add(engine, ("a", 1))
            await drain(SqlOutboxStore(engine), Recorder())

            await outbox.create_tables_async(owner, keep=True)  # the migration
            await execute(owner, *grants(role))
            await outbox.create_tables_async(engine, keep=True)
            assert (await SqlOutboxStore(engine, keep=DAY).status()).kept == 0
        finally:
            await execute(owner, f"DROP OWNED BY {role}", f"DROP ROLE {role}")


def grants(role: str) -> list[str]:
    return [f"GRANT ALL ON ALL {kind} IN SCHEMA public TO {role}" for kind in ("TABLES", "SEQUENCES")]


async def execute(engine: AsyncEngine, *statements: str) -> None:
    async with engine.begin() as connection:
        for statement in statements:
            await connection.execute(text(statement))


# --- replaying --------------------------------------------------------------------------------------------------------


@every_driver
async def test_a_replay_sends_the_same_messages_again(engine: AsyncEngine, keeping: SqlOutboxStore) -> None:
    headers = {"trace": "ü"}
    async with AsyncSession(engine) as session, session.begin():
        for number in range(450):
            outbox.add(session, orders, Order(account="ab"[number % 2], number=number), headers=headers)
            outbox.add(session, unordered, Order(account="c", number=number))
    first, second, third = Recorder(), Recorder(), Recorder()
    await drain(keeping, first, batch=500)

    assert await keeping.replay(since=HOUR) == 900
    assert (await keeping.status()).kept == 0
    await drain(keeping, second, batch=500)
    assert await keeping.replay(since=HOUR) == 900  # what was sent again is kept again
    await drain(keeping, third, batch=500)

    def by_id(recorder: Recorder) -> list[Message]:
        return sorted(recorder.stored, key=lambda message: message.id)

    assert by_id(first) == by_id(second) == by_id(third)  # ids, sequences, times, bodies, headers
    for account in "ab":
        assert first.numbers(account) == second.numbers(account) == third.numbers(account)


async def test_a_replay_sends_exactly_its_window(engine: AsyncEngine, keeping: SqlOutboxStore) -> None:
    ids = await add(engine, *(("a", number) for number in range(5)))
    async with AsyncSession(engine) as session, session.begin():
        other = outbox.add(session, unordered, Order(account="a", number=9))
    await drain(keeping, Recorder())
    for hours, message_id in zip((5, 4, 3, 2, 1), ids, strict=True):
        await sent_hours_ago(engine, hours, message_id)
    await sent_hours_ago(engine, 3, other)
    now = datetime.now(UTC)

    async def replayed(**window: Any) -> list[int]:
        looked_at = await keeping.kept(**window)
        recorder = Recorder()
        assert await keeping.replay(**window) == looked_at.rows
        await drain(keeping, recorder)
        for hours, message_id in zip((5, 4, 3, 2, 1), ids, strict=True):
            await sent_hours_ago(engine, hours, message_id)
        await sent_hours_ago(engine, 3, other)
        return [Order.model_validate_json(one.body).number for one in recorder.stored]

    assert await replayed(since=2.5 * HOUR) == [3, 4]
    assert await replayed(since=now - 2.5 * HOUR) == [3, 4]
    assert await replayed(since=4.5 * HOUR, until=now - 1.5 * HOUR, topic="orders") == [1, 2, 3]
    assert await replayed(since=now - 4.5 * HOUR, topic="unordered") == [9]
    assert await replayed(since=4.5 * HOUR, until=1.5 * HOUR, topic="orders") == [1, 2, 3]
    assert await replayed(since=now + HOUR) == []
    assert await replayed(since=DAY, topic="nowhere") == []


async def test_what_is_kept_of_a_window_is_told_by_topic(engine: AsyncEngine, keeping: SqlOutboxStore) -> None:
    old, middle, _ = await add(engine, ("a", 1), ("a", 2), ("a", 3))
    async with AsyncSession(engine) as session, session.begin():
        outbox.add(session, unordered, Order(account="a", number=1))
    await drain(keeping, Recorder())
    await sent_hours_ago(engine, 20, old)
    await sent_hours_ago(engine, 2, middle)
    now = datetime.now(UTC)
    soon = timedelta(minutes=1)

    window = await keeping.kept(since=3 * HOUR)

    assert [(one.topic, one.rows) for one in window.topics] == [("orders", 2), ("unordered", 1)]
    assert window.rows == 3
    assert abs(window.topics[0].first_sent_at - (now - 2 * HOUR)) < soon
    assert abs(window.topics[0].last_sent_at - now) < soon
    assert abs(window.since - (now - 3 * HOUR)) < soon
    assert window.until is None
    assert abs(window.complete_from - (now - DAY)) < soon
    assert window.oldest_sent_at is not None
    assert abs(window.oldest_sent_at - (now - 20 * HOUR)) < soon
    assert [(one.topic, one.rows) for one in (await keeping.kept(since=DAY, topic="orders")).topics] == [("orders", 3)]


@pytest.mark.parametrize(
    ("window", "said"),
    [
        ({"since": datetime(2026, 11, 25)}, "since must be a datetime with a time zone"),
        ({"since": HOUR, "until": datetime(2026, 11, 25)}, "until must be a datetime with a time zone"),
        ({"since": HOUR, "until": -HOUR}, "until must be longer than nothing"),
        ({"since": -HOUR}, "since must be longer than nothing"),
        ({"since": "2h"}, "since must be a timedelta"),
    ],
)
async def test_a_window_that_is_none_is_refused(keeping: SqlOutboxStore, window: dict[str, Any], said: str) -> None:
    for refused in (keeping.kept(**window), keeping.replay(**window)):
        with pytest.raises(ConfigurationError, match=said):
            await refused


async def test_a_window_goes_by_the_databases_clock(
    engine: AsyncEngine, keeping: SqlOutboxStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """O8"""
    await add(engine, ("a", 1), ("a", 2))
    monkeypatch.setattr(time, "time", lambda: 0.0)  # this process believes in 1970
    claimed = await keeping.claim("relay", limit=2, lease=LEASE)
    await keeping.settle("relay", confirmed=claimed, rejected=[])
    await sent_hours_ago(engine, 3, claimed[0].message.id)

    assert await keeping.clean(limit=10) == 0
    assert await keeping.replay(since=2 * HOUR) == 1


async def test_replayed_rows_of_a_key_go_in_their_order_and_before_those_that_wait(
    engine: AsyncEngine, keeping: SqlOutboxStore
) -> None:
    """O3"""
    await add(engine, *(("a", number) for number in range(4)), *(("b", number) for number in range(4)))
    await drain(keeping, Recorder())
    await add(engine, *(("a", number) for number in range(4, 7)))
    assert await keeping.replay(since=HOUR) == 8

    again = Recorder()
    await drain(keeping, again, batch=3)

    assert again.numbers("a") == list(range(7))
    assert again.numbers("b") == list(range(4))
    sequences = [one.sequence or 0 for one in again.stored if one.key == b"a"]
    assert sequences == sorted(set(sequences))


async def test_a_replayed_row_that_is_rejected_holds_its_key_and_is_parked_as_any_other(
    engine: AsyncEngine, keeping: SqlOutboxStore
) -> None:
    """O5"""
    bad, _ = await add(engine, ("a", 0), ("a", 1))
    await drain(keeping, Recorder())
    await keeping.replay(since=HOUR)
    recorder = Recorder(lambda message: Rejection(bad, RejectionReason.INVALID, "no") if message.id == bad else None)

    async def rejected() -> bool:
        async with engine.connect() as connection:
            return await connection.scalar(select(func.max(OutboxMessage.attempts))) == 1

    async def parked() -> bool:
        return (await keeping.status()).parked == 1

    async with relaying(keeping, recorder):
        await until(rejected)
        assert recorder.stored == []
        async with engine.begin() as connection:
            await connection.execute(update(OutboxMessage).values(available_at=0.0))  # instead of two seconds
        await until(parked)
        await until(lambda: _kept(keeping, 1))

    assert recorder.numbers("a") == [1]
    assert await keeping.replay(since=HOUR) == 1  # what is parked was not sent, so it stays where it is


async def _kept(store: SqlOutboxStore, expected: int) -> bool:
    return (await store.status()).kept == expected


# --- replaying while relays run ---------------------------------------------------------------------------------------


async def test_a_confirm_from_before_a_replay_counts_no_more(engine: AsyncEngine, keeping: SqlOutboxStore) -> None:
    """The broker may have lost what it confirmed, and the row would be gone although it was to be sent again."""
    (message_id,) = await add(engine, ("a", 1))
    late = await keeping.claim("late", limit=1, lease=timedelta(0))
    heirs = await keeping.claim("heir", limit=1, lease=LEASE)
    await keeping.settle("heir", confirmed=heirs, rejected=[])
    assert await keeping.replay(since=HOUR) == 1

    await keeping.settle("late", confirmed=late, rejected=[])

    assert await waiting(keeping) == 1
    (again,) = await keeping.claim("next", limit=1, lease=LEASE)
    assert again.message.id == message_id
    await keeping.settle("next", confirmed=[again], rejected=[])
    assert await waiting(keeping) == 0


async def test_what_is_on_its_way_during_a_replay_is_sent_again(engine: AsyncEngine, keeping: SqlOutboxStore) -> None:
    """Its confirm may be of a broker that has lost it since, and no later window would begin early enough."""
    await add(engine, ("a", 1), ("a", 2))
    claimed = await keeping.claim("relay", limit=2, lease=LEASE)
    assert len(claimed) == 2
    assert await keeping.replay(since=HOUR) == 0

    await keeping.settle("relay", confirmed=claimed, rejected=[])

    assert await waiting(keeping) == 2
    recorder = Recorder()
    await drain(keeping, recorder)
    assert {one.id for one in recorder.stored} == {one.message.id for one in claimed}


@every_driver
async def test_whatever_was_confirmed_before_a_replay_is_sent_after_it_while_everything_goes_on(
    engine: AsyncEngine, keeping: SqlOutboxStore
) -> None:
    stored: list[Message] = []
    marks: list[int] = []
    recorders = [Recorder() for _ in range(3)]
    for recorder in recorders:
        recorder.stored = stored  # one broker
    added: list[str] = []

    async def write() -> None:
        for start in range(0, 120, 3):
            added.extend(await add(engine, *(("abcd"[number % 4], number) for number in range(start, start + 3))))

    async def replay_now_and_then() -> None:
        for share in (20, 60, 100):
            await until(lambda least=share: _reached(stored, least))  # type: ignore[misc]
            marks.append(len(stored))
            await keeping.replay(since=HOUR)

    async with relaying(keeping, *recorders, batch=7, lease=60):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(write)
            tasks.start_soon(replay_now_and_then)
        await until(lambda: _nothing_waits(keeping))

    assert {one.id for one in stored} == set(added)
    for mark in marks:
        assert {one.id for one in stored[:mark]} <= {one.id for one in stored[mark:]}
    whole = Recorder()
    whole.stored = stored
    for offset, account in enumerate("abcd"):
        assert firsts(whole.numbers(account)) == list(range(offset, 120, 4))
    assert (await keeping.status()).kept == 120


async def _reached(stored: Sequence[Message], least: int) -> bool:
    return len(stored) >= least


async def _nothing_waits(store: SqlOutboxStore) -> bool:
    return (await store.status()).waiting == 0


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
@pytest.mark.parametrize("isolation", ["READ COMMITTED", "REPEATABLE READ"])
async def test_a_replay_waits_for_confirms_that_are_being_written_down(
    postgresql_url: str, driver: str, isolation: str
) -> None:
    """A row whose confirm commits a moment after the replay looked would be in no window."""
    url = postgresql_url.replace("postgresql:", f"postgresql+{driver}:")
    async with open_engine(url) as plain, anyio.create_task_group() as tasks:
        engine = plain.execution_options(isolation_level=isolation)
        await outbox.create_tables_async(engine, keep=True)
        keeping = SqlOutboxStore(engine, keep=DAY)
        await add(engine, ("a", 1))
        claimed = await keeping.claim("relay", limit=1, lease=LEASE)
        replayed: list[int] = []

        async def replay() -> None:
            replayed.append(await keeping.replay(since=HOUR))

        assert keeping._sent is not None
        async with engine.begin() as connection:  # the first half of a settlement, not yet committed
            await keeping._sent.take_over(connection, claimed, await keeping._sent.hold(connection))
            tasks.start_soon(replay)
            await until(lambda: _somebody_waits_for_a_lock(plain))
        with anyio.fail_after(10):
            while not replayed:
                await anyio.sleep(0.01)

        assert replayed == [1]


async def _somebody_waits_for_a_lock(engine: AsyncEngine) -> bool:
    async with engine.connect() as connection:
        return bool(await connection.scalar(text("SELECT count(*) FROM pg_locks WHERE NOT granted")))


# --- removing ---------------------------------------------------------------------------------------------------------


async def test_only_what_is_older_than_the_window_is_removed_and_oldest_first(
    engine: AsyncEngine, keeping: SqlOutboxStore
) -> None:
    ids = await add(engine, *((f"account-{number}", number) for number in range(950)))
    await drain(keeping, Recorder(), batch=500)
    await add(engine, ("waits", 1))
    await sent_hours_ago(engine, 25, *ids[:900])
    await sent_hours_ago(engine, 26, *ids[:30])
    await sent_hours_ago(engine, 23, *ids[900:])

    assert await keeping.clean(limit=30) == 30
    async with engine.connect() as connection:
        left = set(await connection.scalars(select(SentMessage.message_id)))
    assert left == set(ids[30:])
    assert await keeping.clean(limit=500) == 500
    assert await keeping.clean(limit=500) == 370
    assert await keeping.clean(limit=500) == 0
    status = await keeping.status()
    assert (status.kept, status.waiting) == (50, 1)


async def test_a_relay_removes_batch_after_batch_what_is_over_also_while_it_sends(
    engine: AsyncEngine, keeping: SqlOutboxStore
) -> None:
    ids = await add(engine, *((f"account-{number}", number) for number in range(100)))
    await drain(keeping, Recorder())
    await sent_hours_ago(engine, 25, *ids)
    limits: list[int] = []

    class Watched(SqlOutboxStore):
        async def clean(self, *, limit: int) -> int:
            limits.append(limit)
            return await super().clean(limit=limit)

    await add(engine, *((f"account-{number}", number) for number in range(400)))  # more claims than removals
    watched = Watched(engine, keep=DAY)
    recorder = Recorder()
    await drain(watched, recorder, batch=10)

    assert len(recorder.stored) == 400
    assert (await keeping.status()).kept == 400  # the new ones
    assert set(limits) == {20}
    assert len(limits) == 6  # five that were full and one that was not; the next look is ten seconds later


async def test_what_cannot_be_removed_keeps_nothing_from_being_sent(
    engine: AsyncEngine, keeping: SqlOutboxStore
) -> None:
    await add(engine, ("a", 1))

    class Broken(SqlOutboxStore):
        async def clean(self, *, limit: int) -> int:
            raise OperationalError("DELETE", {}, Exception("no right to"))

    recorder = Recorder()
    await drain(Broken(engine, keep=DAY), recorder)

    assert recorder.numbers("a") == [1]
    assert (await keeping.status()).kept == 1


async def test_an_idle_relay_takes_no_write_lock_to_see_that_nothing_is_over(
    engine: AsyncEngine, keeping: SqlOutboxStore
) -> None:
    await add(engine, ("a", 1))
    await drain(keeping, Recorder())
    asked: list[str] = []

    @event.listens_for(engine.sync_engine, "before_cursor_execute")
    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        asked.append(statement.split(None, 1)[0] if "IMMEDIATE" not in statement else statement)

    assert await keeping.clean(limit=10) == 0

    assert set(asked) <= {"SELECT", "BEGIN"}


async def test_removing_scans_nothing(engine: AsyncEngine, keeping: SqlOutboxStore) -> None:
    ids = await add(engine, *((f"account-{number}", number) for number in range(3_000)))
    await drain(keeping, Recorder(), batch=500)
    await sent_hours_ago(engine, 25, *ids[:1_000])
    asked: list[tuple[str, Any]] = []

    @event.listens_for(engine.sync_engine, "before_cursor_execute")
    def note(_connection: object, _cursor: object, statement: str, parameters: Any, *_: object) -> None:
        if "FROM reliamq_outbox_sent" in statement and "sent_at" in statement:
            asked.append((statement, parameters))

    await analyse(engine, "reliamq_outbox_sent")  # the planner knows now what is there
    assert await keeping.clean(limit=10) == 10

    explain = "EXPLAIN QUERY PLAN" if engine.dialect.name == "sqlite" else "EXPLAIN"
    async with engine.connect() as connection:
        look, removal = [
            str((await connection.exec_driver_sql(f"{explain} {statement}", parameters)).all())
            for statement, parameters in asked.copy()
        ]
    assert "reliamq_outbox_sent_at" in look, look
    assert "reliamq_outbox_sent_pkey" in removal or "PRIMARY" in removal, removal
