"""A message joins the user's transaction (O1), and positions of a key follow its commits (O3)."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Sequence
from pathlib import Path

import anyio
import psycopg
import pytest
from sqlalchemy import Engine, Integer, String, create_engine, event, func, insert, make_url, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Session, mapped_column

from reliamq import outbox
from reliamq.database import open_engine, open_sync_engine
from reliamq.outbox import OutboxMessage, SqlOutboxStore
from reliamq.outbox.key_locks import lock_number
from reliamq.spi import ConfigurationError, InvalidMessage, TooLarge, TransactionRequired
from reliamq.topics import Topic

from .conftest import Base, Booking, Order, Recorder, add, drain, every_driver, orders, unordered

pytestmark = pytest.mark.anyio


async def ids(engine: AsyncEngine) -> Sequence[str]:
    async with AsyncSession(engine) as session:
        return (await session.scalars(select(OutboxMessage.message_id).order_by(OutboxMessage.position))).all()


async def bookings(engine: AsyncEngine) -> Sequence[int]:
    async with AsyncSession(engine) as session:
        return (await session.scalars(select(Booking.number))).all()


# --- sessions ---------------------------------------------------------------------------------------------------------


@every_driver
async def test_a_message_commits_with_the_business_change(engine: AsyncEngine) -> None:
    async with AsyncSession(engine) as session, session.begin():
        session.add(Booking(number=1))
        message_id = outbox.add(session, orders, Order(account="a", number=1), headers={"trace": "ü\x00"})

    assert await ids(engine) == [message_id]
    assert await bookings(engine) == [1]


async def test_a_message_rolls_back_with_the_business_change(engine: AsyncEngine) -> None:
    async with AsyncSession(engine) as session:
        session.add(Booking(number=1))
        outbox.add(session, orders, Order(account="a", number=1))
        await session.flush()
        await session.rollback()

    assert await ids(engine) == await bookings(engine) == []


@every_driver
async def test_a_message_of_a_savepoint_shares_its_fate(engine: AsyncEngine) -> None:
    async with AsyncSession(engine) as session, session.begin():
        kept = outbox.add(session, orders, Order(account="a", number=1))
        lost = await session.begin_nested()
        outbox.add(session, orders, Order(account="a", number=2))
        await session.flush()
        await lost.rollback()
        async with session.begin_nested():
            also_kept = outbox.add(session, orders, Order(account="a", number=3))

    assert await ids(engine) == [kept, also_kept]


def test_a_plain_session_commits_and_rolls_back_its_messages(sync_engine: Engine) -> None:
    with Session(sync_engine) as session:
        kept = outbox.add(session, orders, Order(account="a", number=1))
        session.commit()
        outbox.add(session, unordered, Order(account="a", number=2))
        session.flush()
        session.rollback()

        assert session.scalars(select(OutboxMessage.message_id)).all() == [kept]


def test_a_session_with_several_databases_finds_the_outbox_in_its_own(sync_engine: Engine, tmp_path: Path) -> None:
    other = create_engine(f"sqlite:///{tmp_path}/other.db")
    with Session(binds={OutboxMessage: sync_engine, Booking: other}) as session:
        message_id = outbox.add(session, orders, Order(account="a", number=1))
        session.commit()
        assert session.scalars(select(OutboxMessage.message_id)).all() == [message_id]
    other.dispose()


@every_driver
async def test_many_messages_of_one_transaction_keep_the_order_in_which_they_were_added(engine: AsyncEngine) -> None:
    added = await add(engine, *(("a", number) for number in range(1_200)))

    assert await ids(engine) == added


async def test_adding_needs_no_connection_until_the_session_flushes(engine: AsyncEngine) -> None:
    async with AsyncSession(engine) as session:
        outbox.add(session, orders, Order(account="a", number=1))

        assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]  # of a pool that queues


async def test_the_same_id_twice_is_refused_by_the_database_and_takes_its_transaction_along(
    engine: AsyncEngine,
) -> None:
    async with AsyncSession(engine) as session, session.begin():
        outbox.add(session, orders, Order(account="a", number=1), id="one")

    with pytest.raises(IntegrityError):
        async with AsyncSession(engine) as session, session.begin():
            session.add(Booking(number=7))
            outbox.add(session, orders, Order(account="a", number=1), id="one")

    assert await bookings(engine) == []


@pytest.mark.parametrize("by", ["engine", "options", "connection", "session"])
def test_a_session_that_commits_by_itself_is_refused(sync_engine: Engine, by: str) -> None:
    engine = sync_engine
    if by == "engine":
        engine = create_engine(sync_engine.url, isolation_level="AUTOCOMMIT")
    elif by == "options":
        engine = sync_engine.execution_options(isolation_level="AUTOCOMMIT")

    with pytest.raises(TransactionRequired, match="AUTOCOMMIT"):
        if by == "connection":
            with sync_engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                outbox.add(Session(connection), orders, Order(account="a", number=1))
        with Session(engine) as session:
            if by == "session":
                session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
            outbox.add(session, orders, Order(account="a", number=1))
            session.flush()  # what a session chose for its connection is known then

    with Session(sync_engine) as session:
        assert session.scalar(select(func.count()).select_from(OutboxMessage)) == 0
    if engine is not sync_engine:
        engine.dispose()


BY_ITSELF: dict[str, dict[str, object]] = {
    "sqlite": {"isolation_level": None},
    "postgresql": {"autocommit": True},
    "mysql": {"autocommit": True},
}


async def test_a_session_whose_driver_commits_by_itself_is_refused(engine: AsyncEngine) -> None:
    """O1"""
    own = create_async_engine(engine.url, connect_args=BY_ITSELF[engine.dialect.name])
    async with AsyncSession(own) as session:
        with pytest.raises(TransactionRequired, match="begin a transaction"):
            await session.run_sync(_add_and_flush)
        await session.rollback()
    await own.dispose()

    assert await ids(engine) == []


def test_a_plain_session_whose_driver_commits_by_itself_is_refused(sync_engine: Engine) -> None:
    """O1"""
    own = create_engine(sync_engine.url, connect_args=BY_ITSELF[sync_engine.dialect.name])
    with Session(own) as session:
        with pytest.raises(TransactionRequired, match="begin a transaction"):
            _add_and_flush(session)
        session.rollback()
    own.dispose()

    with Session(sync_engine) as session:
        assert session.scalar(select(func.count()).select_from(OutboxMessage)) == 0


def _add_and_flush(session: Session) -> None:
    outbox.add(session, orders, Order(account="a", number=1))
    session.flush()


def test_a_driver_that_commits_by_itself_is_accepted_where_sqlalchemy_begins(sqlite_file: str) -> None:
    """O1"""
    engine = create_engine(f"sqlite:///{sqlite_file}", connect_args={"isolation_level": None})
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    with Session(engine) as session:
        _add_and_flush(session)
        session.rollback()
        assert session.scalar(select(func.count()).select_from(OutboxMessage)) == 0
    engine.dispose()


# --- many at once -----------------------------------------------------------------------------------------------------


@every_driver
async def test_many_models_are_added_at_once_in_their_order(engine: AsyncEngine) -> None:
    async with AsyncSession(engine) as session, session.begin():
        added = outbox.add_all(session, orders, (Order(account="a", number=number) for number in range(300)))

    assert await ids(engine) == added


async def test_of_many_models_none_is_added_when_one_is_invalid(engine: AsyncEngine) -> None:
    async with AsyncSession(engine) as session, session.begin():
        with pytest.raises(InvalidMessage, match="Stranger"):
            outbox.add_all(session, orders, [Order(account="a", number=1), Stranger(account="a", number=2)])

    assert await ids(engine) == []


async def test_a_transaction_with_thousands_of_keys_leaves_the_others_their_locks(postgresql_url: str) -> None:
    """PostgreSQL has room for 6,400 locks as it is installed."""
    async with open_engine(postgresql_url) as engine:
        await outbox.create_tables_async(engine)
        async with AsyncSession(engine) as one, AsyncSession(engine) as other:
            for session in (one, other):
                every = "abcdefghij" if session is one else "klmnopqrst"
                outbox.add_all(session, orders, (Order(account=f"{every}{number}", number=1) for number in range(200)))
                await session.flush()
                await session.commit()
                outbox.add_all(session, orders, (Order(account=f"{every}-{n}", number=1) for n in range(8_000)))
                await session.flush()
                locks = await session.scalar(text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"))
                assert locks == 256
                await session.commit()


@pytest.mark.parametrize("bulk_first", [True, False])
async def test_a_bulk_and_a_single_add_of_one_key_wait_for_each_other(postgresql_url: str, bulk_first: bool) -> None:
    """O3: positions follow commits, whichever kind of lock each takes."""
    bulk = [Order(account=f"k{number}", number=1) for number in range(2_000)]
    single = [Order(account="k7", number=2)]
    async with open_engine(postgresql_url) as engine:
        await outbox.create_tables_async(engine)
        first, second = (bulk, single) if bulk_first else (single, bulk)
        async with AsyncSession(engine) as holder, AsyncSession(engine) as waiter:
            outbox.add_all(holder, orders, first)
            await holder.flush()
            outbox.add_all(waiter, orders, second)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(waiter.commit)
                await anyio.sleep(0.3)
                assert await _waiting_for_locks(engine) == 1
                await holder.commit()
        async with AsyncSession(engine) as session:
            of_key = select(OutboxMessage.body).where(OutboxMessage.key == b"k7").order_by(OutboxMessage.position)
            bodies = (await session.scalars(of_key)).all()
        numbers = [Order.model_validate_json(body).number for body in bodies]
        assert numbers == ([1, 2] if bulk_first else [2, 1])


class Shop(DeclarativeBase):
    """Somebody's own tables."""


class Aggregate(Shop):
    """In a flush, classes that have nothing to do with each other come in the order of their modules' names."""

    __module__ = "app.models"
    __tablename__ = "aggregate"
    name = mapped_column(String(20), primary_key=True)
    version = mapped_column(Integer)


class Basket(Shop):
    __module__ = "shop.models"
    __tablename__ = "basket"
    name = mapped_column(String(20), primary_key=True)
    version = mapped_column(Integer)


@pytest.mark.parametrize("kind", [Aggregate, Basket])
async def test_a_row_and_the_message_of_its_key_are_taken_in_one_order_however_many_messages_there_are(
    postgresql_url: str, kind: type[Aggregate | Basket]
) -> None:
    """Else two transactions on one row would end in a deadlock: one that had the row before and one that had not, one
    with a message and one with two.
    """
    async with open_engine(postgresql_url) as engine:
        await outbox.create_tables_async(engine)
        async with engine.begin() as connection:
            await connection.run_sync(Shop.metadata.create_all)
            await connection.execute(insert(kind).values(name="a", version=0))

        async def change(messages: int, locked: bool) -> None:
            async with AsyncSession(engine) as session, session.begin():
                row = await session.get_one(kind, "a", with_for_update=locked)
                row.version += 1
                outbox.add_all(session, orders, [Order(account="a", number=1)] * messages)

        with anyio.fail_after(30):
            for _ in range(20):
                async with anyio.create_task_group() as tasks:
                    for messages in (1, 2, 1, 2):
                        for locked in (False, True):
                            tasks.start_soon(change, messages, locked)


async def test_what_is_added_while_the_session_flushes_locks_its_key_too(postgresql_url: str) -> None:
    """As applications do that turn their own events into messages."""
    async with open_engine(postgresql_url) as engine:
        await outbox.create_tables_async(engine)
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)

        class Publishing(Session):
            """Its bookings become messages."""

        @event.listens_for(Publishing, "before_flush")
        def publish(session: Session, _context: object, _instances: object) -> None:
            for booking in [one for one in session.new if isinstance(one, Booking)]:
                outbox.add(session, orders, Order(account="a", number=booking.number))

        async with AsyncSession(engine, sync_session_class=Publishing) as first:
            first.add(Booking(number=1))
            await first.flush()
            async with (
                AsyncSession(engine, sync_session_class=Publishing) as second,
                anyio.create_task_group() as tasks,
            ):
                second.add(Booking(number=2))
                tasks.start_soon(second.commit)
                while not await _waiting_for_locks(engine):
                    await anyio.sleep(0.01)
                await first.commit()

        recorder = Recorder()
        await drain(SqlOutboxStore(engine), recorder)
    assert recorder.numbers("a") == [1, 2]


def test_a_session_that_binds_the_outbox_by_its_table_is_checked_on_that_database(tmp_path: Path) -> None:
    other = create_engine(f"sqlite:///{tmp_path}/a.db")
    by_itself = create_engine(f"sqlite:///{tmp_path}/b.db", isolation_level="AUTOCOMMIT")
    outbox.create_tables(by_itself)
    with Session(other, binds={OutboxMessage.__table__: by_itself}) as session, pytest.raises(TransactionRequired):
        outbox.add(session, orders, Order(account="a", number=1))
    with Session(binds={OutboxMessage.__table__: other}) as session:
        outbox.create_tables(other)
        outbox.add(session, orders, Order(account="a", number=1))
        session.commit()
        assert session.scalar(select(func.count()).select_from(OutboxMessage)) == 1
    for engine in (other, by_itself):
        engine.dispose()


def test_a_key_whose_lock_has_the_lowest_of_all_numbers_can_be_added(postgresql_url: str) -> None:
    """Written into the statement, as some cursors do, it is a minus sign and a number that is too large."""
    key = "127JS9u"
    assert lock_number("orders", key.encode()) == -(2**31)
    with open_sync_engine(postgresql_url) as engine:
        outbox.create_tables(engine)
    place = make_url(postgresql_url).set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(place, cursor_factory=psycopg.ClientCursor) as connection:
        outbox.insert(connection, orders, Order(account=key, number=1))
        assert connection.execute("SELECT count(*) FROM reliamq_outbox").fetchone() == (1,)


async def _waiting_for_locks(engine: AsyncEngine) -> int:
    async with engine.connect() as connection:
        return int(await connection.scalar(text("SELECT count(*) FROM pg_locks WHERE NOT granted")) or 0)


# --- what could never be sent -----------------------------------------------------------------------------------------


class Stranger(Order):
    """A model that the topic does not know."""


async def test_an_invalid_message_is_refused_when_it_is_added_and_the_transaction_goes_on(engine: AsyncEngine) -> None:
    small = Topic("small", Order, max_message_bytes=20)
    numbered = Topic("numbered", Order, key=lambda order: order.number)  # type: ignore[arg-type,return-value]
    async with AsyncSession(engine) as session, session.begin():
        session.add(Booking(number=1))
        with pytest.raises(TooLarge, match="20"):
            outbox.add(session, small, Order(account="a" * 100, number=1))
        with pytest.raises(InvalidMessage, match="Stranger"):
            outbox.add(session, orders, Stranger(account="a", number=1))
        with pytest.raises(InvalidMessage, match="key"):
            outbox.add(session, numbered, Order(account="a", number=1))
        with pytest.raises(InvalidMessage, match="id"):
            outbox.add(session, orders, Order(account="a", number=1), id="x" * 201)
        with pytest.raises(InvalidMessage, match="id"):
            outbox.add(session, orders, Order(account="a", number=1), id="a\x00b")

    assert await ids(engine) == []
    assert await bookings(engine) == [1]


# --- plain connections ------------------------------------------------------------------------------------------------


@pytest.fixture
def sqlite_file(tmp_path: Path) -> str:
    file = f"{tmp_path}/plain.db"
    engine = create_engine(f"sqlite:///{file}")
    outbox.create_tables(engine)
    Base.metadata.create_all(engine)
    engine.dispose()
    return file


async def test_a_message_joins_the_transaction_of_a_sqlite3_connection(sqlite_file: str) -> None:
    connection = sqlite3.connect(sqlite_file)
    connection.execute("INSERT INTO booking VALUES (1)")
    kept = outbox.insert(connection, orders, Order(account="a", number=1), headers={"h": "ü"})
    connection.commit()
    outbox.insert(connection, orders, Order(account="a", number=2))
    connection.rollback()
    connection.close()

    sent = await _sent(f"sqlite:///{sqlite_file}")
    assert sent == [(kept, "a", 1, {"h": "ü"})]


async def test_a_message_joins_the_transaction_of_a_psycopg_connection(postgresql_url: str) -> None:
    engine = create_engine(postgresql_url.replace("postgresql:", "postgresql+psycopg:"))
    outbox.create_tables(engine)
    engine.dispose()
    with psycopg.connect(postgresql_url) as connection:
        kept = outbox.insert(connection, orders, Order(account="a", number=1), headers={"h": "ü"})
        connection.commit()
        outbox.insert(connection, orders, Order(account="a", number=2))
        connection.rollback()

    assert await _sent(postgresql_url) == [(kept, "a", 1, {"h": "ü"})]


async def _sent(url: str) -> list[tuple[str, str, int, dict[str, str]]]:
    recorder = Recorder()
    async with open_engine(url) as engine:
        await drain(SqlOutboxStore(engine), recorder)
    bodies = [Order.model_validate_json(one.body) for one in recorder.stored]
    return [
        (one.id, body.account, body.number, dict(one.headers))
        for one, body in zip(recorder.stored, bodies, strict=True)
    ]


def test_a_sqlite3_connection_that_commits_by_itself_is_refused_unless_it_has_begun(sqlite_file: str) -> None:
    connection = sqlite3.connect(sqlite_file, isolation_level=None)
    with pytest.raises(TransactionRequired, match="begin a transaction"):
        outbox.insert(connection, orders, Order(account="a", number=1))

    connection.execute("BEGIN")
    outbox.insert(connection, orders, Order(account="a", number=1))
    connection.execute("ROLLBACK")

    assert connection.execute("SELECT count(*) FROM reliamq_outbox").fetchone() == (0,)
    connection.close()


def test_a_psycopg_connection_that_commits_by_itself_is_refused_unless_it_has_begun(postgresql_url: str) -> None:
    engine = create_engine(postgresql_url.replace("postgresql:", "postgresql+psycopg:"))
    outbox.create_tables(engine)
    engine.dispose()
    with psycopg.connect(postgresql_url, autocommit=True) as connection:
        with pytest.raises(TransactionRequired, match="begin a transaction"):
            outbox.insert(connection, orders, Order(account="a", number=1))
        with connection.transaction():
            outbox.insert(connection, orders, Order(account="a", number=1))
        assert connection.execute("SELECT count(*) FROM reliamq_outbox").fetchone() == (1,)


class OwnConnection(sqlite3.Connection):
    """A user's subclass."""


async def test_an_unknown_or_asynchronous_connection_is_refused_with_what_to_do(
    sqlite_file: str, postgresql_url: str
) -> None:
    own = sqlite3.connect(sqlite_file, factory=OwnConnection)
    outbox.insert(own, orders, Order(account="a", number=1))
    own.close()

    async with await psycopg.AsyncConnection.connect(postgresql_url) as connection:
        with pytest.raises(ConfigurationError, match="insert_async"):
            outbox.insert(connection, orders, Order(account="a", number=1))
    with pytest.raises(ConfigurationError, match=r"outbox\.add"):
        outbox.insert(object(), orders, Order(account="a", number=1))


# --- commit order -----------------------------------------------------------------------------------------------------


@every_driver
async def test_concurrent_transactions_of_one_key_are_sent_in_the_order_of_their_commits(
    engine: AsyncEngine, store: SqlOutboxStore
) -> None:
    committed: dict[str, list[int]] = {"a": [], "b": []}
    seed = random.Random(7)
    lock = anyio.Lock()  # makes "commit, then note it" one step of the witness
    recorder = Recorder()

    async def book(account: str, number: int) -> None:
        async with AsyncSession(engine) as session:
            outbox.add(session, orders, Order(account=account, number=number))
            await session.flush()
            await anyio.sleep(seed.uniform(0, 0.01))  # the later it commits, the sooner another one overtakes it
            if number % 7 == 0:
                await session.rollback()
                return
            async with lock:
                await session.commit()
                committed[account].append(number)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_drain_while, store, recorder, tasks.cancel_scope, committed)
        async with anyio.create_task_group() as writers:
            for number in range(60):
                writers.start_soon(book, "ab"[number % 2], number)
        committed["done"] = []
    await drain(store, recorder)

    assert recorder.numbers("a") == committed["a"]
    assert recorder.numbers("b") == committed["b"]
    assert len(committed["a"]) + len(committed["b"]) == 60 - 9


async def _drain_while(
    store: SqlOutboxStore, recorder: Recorder, _scope: anyio.CancelScope, committed: dict[str, list[int]]
) -> None:
    """Relay next to the writers: a message that a lower position could still join would show here."""
    while "done" not in committed:
        await drain(store, recorder)
