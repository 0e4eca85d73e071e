"""Relays elsewhere are told by PostgreSQL, and poll all the same."""

from __future__ import annotations

from collections.abc import AsyncIterator

import anyio
import psycopg
import pytest
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import AsyncEngine

from reliamq import Reliamq, outbox
from reliamq.database import open_engine
from reliamq.outbox.listening import listening
from reliamq.settings import RelaySettings, Settings
from reliamq.spi import ConfigurationError

from .conftest import Order, Recorder, orders
from .test_waking import is_sent, sleepy

pytestmark = pytest.mark.anyio


@pytest.fixture
async def told(postgresql_url: str) -> AsyncIterator[AsyncEngine]:
    """A database with the trigger, and somebody who listens."""
    async with open_engine(postgresql_url) as engine:
        await outbox.create_tables_async(engine)
        await outbox.create_notify_trigger_async(engine)
        async with listening(postgresql_url):
            await anyio.sleep(0.3)  # until it does
            yield engine


def commit_elsewhere(url: str, number: int) -> None:
    """As another process would: nobody here is woken by it."""
    with psycopg.connect(url) as connection:
        outbox.insert(connection, orders, Order(account="a", number=number))


async def test_a_relay_is_told_of_what_commits_elsewhere(told: AsyncEngine, postgresql_url: str) -> None:
    recorder = Recorder()
    async with sleepy(outbox.SqlOutboxStore(told), recorder):
        commit_elsewhere(postgresql_url, 1)
        await is_sent(recorder, 1)
        commit_elsewhere(postgresql_url, 2)
        await is_sent(recorder, 1, 2)


async def test_whoever_listens_comes_back_when_the_connection_was_ended(told: AsyncEngine, postgresql_url: str) -> None:
    recorder = Recorder()
    async with sleepy(outbox.SqlOutboxStore(told), recorder):
        with psycopg.connect(postgresql_url, autocommit=True) as connection:
            ended = connection.execute(
                "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE query LIKE 'LISTEN%'"
            ).fetchone()
        assert ended == (1,)
        commit_elsewhere(postgresql_url, 1)  # while nobody listens: it is looked for when somebody does
        await is_sent(recorder, 1)
        commit_elsewhere(postgresql_url, 2)
        await is_sent(recorder, 1, 2)


async def test_the_trigger_can_be_taken_away_and_made_again(postgresql_url: str) -> None:
    engine = create_engine(postgresql_url.replace("postgresql:", "postgresql+psycopg:"))
    outbox.create_tables(engine)
    for _ in range(2):
        outbox.create_notify_trigger(engine)
        outbox.create_notify_trigger(engine)
        outbox.drop_notify_trigger(engine)
        outbox.drop_notify_trigger(engine)
    with psycopg.connect(postgresql_url) as connection:
        assert connection.execute("SELECT count(*) FROM pg_trigger WHERE NOT tgisinternal").fetchone() == (0,)
    engine.dispose()


async def test_a_relay_that_is_to_listen_to_another_database_says_so(tmp_path: object) -> None:
    settings = Settings(broker="memory://", database=f"sqlite:///{tmp_path}/o.db", relay=RelaySettings(listen=True))
    app = Reliamq(settings)
    async with app:
        with pytest.raises(ConfigurationError, match=r"relay\.listen needs PostgreSQL"):
            await app.run_relay(anyio.Event())
