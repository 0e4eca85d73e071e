"""The database dies, or the way to it, at every step of an application and of a relay: nothing is lost, every key keeps
its order, and a message is sent if and only if its transaction committed (O1 O3 O4).
"""

from __future__ import annotations

import gc
import random
import threading
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import anyio
import pytest
from sqlalchemy import create_engine, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from reliamq import outbox
from reliamq.backends import open_backend
from reliamq.database import open_engine, open_sync_engine
from reliamq.outbox import SqlOutboxStore
from reliamq.spi import Backend, Durability, GroupSpec, TopicSpec
from tests.servers.cluster import free_ports
from tests.servers.mariadb import MariadbServer, run_mariadb
from tests.servers.postgresql import PostgresqlServer, run_postgresql
from tests.servers.proxy import Proxy

from .conftest import Base, Booking, Order, Recorder, add, drain, firsts, orders
from .test_crashes import arrived, relay_process

# A connection that is cut while SQLAlchemy opens it is let go without being closed
LEFT_OPEN = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120), pytest.mark.xdist_group("own databases"), LEFT_OPEN]
PORTS = range(16_000, 17_000)
ROWS = 30
KINDS = ["own_postgresql", "own_mariadb"]


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """Whatever is left open is so in its own test."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def own_postgresql() -> Iterator[PostgresqlServer]:
    """One that may be killed: nobody else's tests are on it."""
    with run_postgresql(port=free_ports(1, PORTS)[0]) as server:
        yield server


@pytest.fixture(scope="module")
def own_mariadb() -> Iterator[MariadbServer]:
    """The same."""
    with run_mariadb() as server:
        yield server


@pytest.fixture
def database(own_postgresql: PostgresqlServer) -> Iterator[str]:
    """The URL of an empty database there."""
    with own_postgresql.fresh_database() as url:
        yield url


@pytest.fixture
async def backend(tmp_path: Path) -> Backend:
    backend = open_backend(f"embedded:///{tmp_path}/broker.db")
    async with backend.storage() as storage:
        await storage.declare([TopicSpec("orders", (GroupSpec("g"),), durability=Durability.DEVELOPMENT)])
    return backend


# --- the relay's steps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", ["claimed", "sent", "settled"])
async def test_a_relay_goes_on_when_its_database_was_killed_and_is_back(
    request: pytest.FixtureRequest, backend: Backend, kind: str, stage: str
) -> None:
    server: PostgresqlServer | MariadbServer = request.getfixturevalue(kind)
    with server.fresh_database() as url:
        async with open_engine(url) as engine:
            await outbox.create_tables_async(engine)
            added = await add(engine, *(("abc"[number % 3], number) for number in range(ROWS)))
        async with relay_process(url, backend, stage) as process:
            server.process.kill()
            await process.stdin.send(b"\n" * 1_000)  # type: ignore[union-attr]  # it is open; and go on at every stage
            await anyio.sleep(0.5)  # while there is none
            server.process.start()
            await _is_empty(url)

    found = await arrived(backend)
    assert {message_id for message_id, _, _ in found} == set(added)
    for offset, account in enumerate("abc"):
        assert firsts([number for _, of, number in found if of == account]) == list(range(offset, ROWS, 3))


async def _is_empty(database: str) -> None:
    with anyio.fail_after(60):
        async with open_engine(database) as engine:
            while (await SqlOutboxStore(engine).status()).waiting:
                await anyio.sleep(0.1)


# --- the application's commit -----------------------------------------------------------------------------------------


@pytest.fixture
def proxied(own_postgresql: PostgresqlServer, database: str) -> Iterator[tuple[Proxy, str]]:
    """A proxy before the server, and the URL of the database through it."""
    with open_sync_engine(database) as engine:
        outbox.create_tables(engine)
        Base.metadata.create_all(engine)
    (port,) = free_ports(1, PORTS)
    with Proxy(port, own_postgresql.port or 0) as proxy:
        yield proxy, own_postgresql.url(database.rpartition("/")[2], port).replace("postgresql:", "postgresql+psycopg:")


def book(session: Session, number: int) -> None:
    session.add(Booking(number=number))
    outbox.add(session, orders, Order(account="a", number=number))


async def outcome_of(database: str) -> tuple[Sequence[int], list[int]]:
    """Numbers of the bookings that are there, and of the messages that a relay sends."""
    recorder = Recorder()
    async with open_engine(database) as engine:
        await drain(SqlOutboxStore(engine), recorder)
    with open_sync_engine(database) as plain, Session(plain) as session:
        return session.scalars(select(Booking.number).order_by(Booking.number)).all(), recorder.numbers("a")


@pytest.mark.parametrize("direction", ["up", "down"])
async def test_a_message_is_sent_if_and_only_if_the_commit_whose_answer_never_came_has_committed(
    proxied: tuple[Proxy, str], database: str, direction: str
) -> None:
    """O1; up: the COMMIT does not reach the database, down: its answer does not reach the application."""
    proxy, url = proxied
    engine = create_engine(url, poolclass=NullPool)
    with pytest.raises(DBAPIError), Session(engine) as session:
        book(session, 1)
        session.flush()
        proxy.drop(direction)  # type: ignore[arg-type]  # one of the two
        threading.Timer(0.5, proxy.cut).start()
        session.commit()
    proxy.heal()

    bookings, sent = await outcome_of(database)
    assert bookings == sent == ([1] if direction == "down" else [])


async def test_of_many_transactions_that_are_cut_somewhere_those_that_committed_are_sent_and_no_other(
    proxied: tuple[Proxy, str], database: str
) -> None:
    """O1; also in the middle of an answer."""
    proxy, url = proxied
    engine, dice, told = create_engine(url, poolclass=NullPool), random.Random(7), set[int]()
    for number in range(60):
        proxy.cut_after(dice.randrange(400, 1_600))
        try:
            with Session(engine) as session:
                book(session, number)
                session.commit()
            told.add(number)
        except DBAPIError:
            continue
    proxy.heal()

    bookings, sent = await outcome_of(database)
    assert bookings == sent
    assert told <= set(bookings)
    assert 5 < len(bookings) < 55  # both happened


# --- a relay on a way that is cut -------------------------------------------------------------------------------------


async def test_a_relay_whose_connections_are_cut_again_and_again_sends_all_in_order(
    proxied: tuple[Proxy, str], database: str
) -> None:
    """O3 O4"""
    proxy, url = proxied
    async with open_engine(database) as engine:
        added = await add(engine, *(("abc"[number % 3], number) for number in range(600)))
    recorder = Recorder()
    async with anyio.create_task_group() as tasks, open_engine(url) as engine:
        store, stop = SqlOutboxStore(engine), anyio.Event()
        relay = outbox.Relay(store, recorder, batch=20, lease=timedelta(seconds=1), poll=timedelta(milliseconds=10))
        tasks.start_soon(relay.run, stop)
        for _ in range(10):
            await anyio.sleep(0.2)
            await anyio.to_thread.run_sync(proxy.cut)
        await _is_empty(database)
        stop.set()

    assert {one.id for one in recorder.stored} == set(added)
    for offset, account in enumerate("abc"):
        assert firsts(recorder.numbers(account)) == list(range(offset, 600, 3))
