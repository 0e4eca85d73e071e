"""A failover of the database: what was committed to both servers is sent, once the standby is the primary (O1 O3)."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import anyio
import pytest

from reliamq import outbox
from reliamq.audit import audit_database
from reliamq.database import open_engine
from reliamq.outbox import SqlOutboxStore
from tests.servers.cluster import free_ports
from tests.servers.postgresql import PostgresqlServer, run_postgresql, run_standby

from .conftest import Recorder, add, firsts, relaying, until

# A connection that is cut while SQLAlchemy opens it is let go without being closed
LEFT_OPEN = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120), pytest.mark.xdist_group("own databases"), LEFT_OPEN]
PORTS = range(16_000, 17_000)


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """Whatever is left open is so in its own test."""
    yield
    gc.collect()


@pytest.fixture
def pair() -> Iterator[tuple[PostgresqlServer, PostgresqlServer]]:
    """A primary that waits for its standby at each commit, and this."""
    first, second = free_ports(2, PORTS)
    with run_postgresql(port=first) as primary, run_standby(primary, port=second) as standby:
        primary.wait_for_standbys()
        yield primary, standby


async def test_a_failover_to_the_standby_loses_no_message_and_no_order(
    pair: tuple[PostgresqlServer, PostgresqlServer],
) -> None:
    primary, standby = pair
    hosts = "&".join(f"host=127.0.0.1:{server.port}" for server in pair)
    recorder = Recorder()
    async with open_engine(f"postgresql://postgres@/postgres?{hosts}&target_session_attrs=read-write") as engine:
        await outbox.create_tables_async(engine)
        assert await _is_closed(standby)
        added = await add(engine, *(("abc"[number % 3], number) for number in range(300)))
        async with relaying(SqlOutboxStore(engine), recorder, lease=1, batch=20):
            await anyio.sleep(0.1)  # in the middle of it
            primary.process.kill()
            await anyio.sleep(0.5)
            standby.promote()
            await until(lambda: _all_are_there(recorder, added))
            added += await add(engine, *(("abc"[number % 3], number) for number in range(300, 330)))
            await until(lambda: _all_are_there(recorder, added))

    for offset, account in enumerate("abc"):
        assert firsts(recorder.numbers(account)) == list(range(offset, 330, 3))


async def _is_closed(standby: PostgresqlServer) -> bool:
    """Whether the audit says that nothing can be written there."""
    async with open_engine(standby.url("postgres")) as engine:
        return "in recovery" in {finding.setting for finding in await audit_database(engine)}


async def _all_are_there(recorder: Recorder, added: list[str]) -> bool:
    return set(added) <= {one.id for one in recorder.stored}
