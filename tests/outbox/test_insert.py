"""Messages join the transactions of asynchronous plain connections and of Django's (O1)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import asyncpg
import django
import psycopg
import pytest
from django.conf import settings
from django.db import connections, transaction
from sqlalchemy import create_engine, make_url

from reliamq import outbox
from reliamq.database import open_engine
from reliamq.outbox import SqlOutboxStore
from reliamq.spi import ConfigurationError, TransactionRequired

from .conftest import Order, Recorder, drain, orders

pytestmark = pytest.mark.anyio


@pytest.fixture
def database(postgresql_url: str) -> str:
    """With the outbox's tables."""
    return with_tables(postgresql_url.replace("postgresql:", "postgresql+psycopg:")) and postgresql_url


def with_tables(url: str) -> str:
    engine = create_engine(url)
    outbox.create_tables(engine)
    engine.dispose()
    return url


async def sent(url: str) -> list[tuple[str, int]]:
    """Ids and numbers of what a relay sends."""
    recorder = Recorder()
    async with open_engine(url) as engine:
        await drain(SqlOutboxStore(engine), recorder)
    return [(one.id, Order.model_validate_json(one.body).number) for one in recorder.stored]


def order(number: int) -> Order:
    return Order(account="a", number=number)


# --- asynchronous connections -----------------------------------------------------------------------------------------


async def test_a_message_joins_the_transaction_of_an_asyncpg_connection(database: str) -> None:
    connection = await asyncpg.connect(database)
    async with connection.transaction():
        kept = await outbox.insert_async(connection, orders, order(1), headers={"h": "ü"})
    lost = connection.transaction()
    await lost.start()
    await outbox.insert_async(connection, orders, order(2))
    await lost.rollback()
    await connection.close()

    assert await sent(database) == [(kept, 1)]


async def test_a_message_joins_the_transaction_of_an_asynchronous_psycopg_connection(database: str) -> None:
    async with await psycopg.AsyncConnection.connect(database) as connection:
        kept = await outbox.insert_async(connection, orders, order(1), headers={"h": "ü"})
        await connection.commit()
        await outbox.insert_async(connection, orders, order(2))
        await connection.rollback()

    assert await sent(database) == [(kept, 1)]


async def test_an_asynchronous_connection_without_a_transaction_is_refused(database: str) -> None:
    """O1"""
    connection = await asyncpg.connect(database)
    with pytest.raises(TransactionRequired, match="begin a transaction"):
        await outbox.insert_async(connection, orders, order(1))
    await connection.close()
    async with await psycopg.AsyncConnection.connect(database, autocommit=True) as other:
        with pytest.raises(TransactionRequired, match="begin a transaction"):
            await outbox.insert_async(other, orders, order(1))

    assert await sent(database) == []


async def test_a_connection_of_the_other_kind_is_refused_with_what_to_do(database: str) -> None:
    connection = await asyncpg.connect(database)
    with pytest.raises(ConfigurationError, match="insert_async"):
        outbox.insert(connection, orders, order(1))
    await connection.close()
    with psycopg.connect(database) as plain, pytest.raises(ConfigurationError, match=r"outbox\.insert"):
        await outbox.insert_async(plain, orders, order(1))


# --- Django -----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["sqlite", "postgresql"])
def django_database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, str]]:
    """Django's alias of a database with the outbox's tables, and its URL."""
    if request.param == "sqlite":
        url = with_tables(f"sqlite:///{tmp_path}/django.db")
        values: dict[str, Any] = {"ENGINE": "django.db.backends.sqlite3", "NAME": f"{tmp_path}/django.db"}
    else:
        url = request.getfixturevalue("database")
        place = make_url(url)
        values = {
            "ENGINE": "django.db.backends.postgresql",
            "NAME": place.database,
            "HOST": place.host or place.query["host"],
        }
        values |= {"PORT": place.port, "USER": place.username, "PASSWORD": place.password}
    if not settings.configured:
        settings.configure(DATABASES={})
        django.setup()
    connections.settings["orders"] = connections.configure_settings({"default": values})["default"]
    yield "orders", url
    connections["orders"].close()
    del connections["orders"]
    del connections.settings["orders"]


def test_a_message_joins_a_transaction_of_django(django_database: tuple[str, str]) -> None:
    alias, url = django_database
    with transaction.atomic(using=alias):
        kept = outbox.insert(connections[alias], orders, order(1), headers={"h": "ü"})
    with pytest.raises(LookupError), transaction.atomic(using=alias):
        outbox.insert(connections[alias], orders, order(2))
        raise LookupError
    with transaction.atomic(using=alias):
        also_kept = outbox.insert(connections[alias], orders, order(3))
        with pytest.raises(LookupError), transaction.atomic(using=alias):  # a savepoint
            outbox.insert(connections[alias], orders, order(4))
            raise LookupError

    assert anyio.run(sent, url) == [(kept, 1), (also_kept, 3)]


def test_django_outside_of_a_transaction_is_refused(django_database: tuple[str, str]) -> None:
    """O1"""
    alias, url = django_database
    with pytest.raises(TransactionRequired, match=r"transaction\.atomic"):
        outbox.insert(connections[alias], orders, order(1))

    assert anyio.run(sent, url) == []
