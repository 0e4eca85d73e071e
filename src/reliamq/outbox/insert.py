"""Adding messages to the outbox inside the user's own transaction, with plain connections (O1).

The same as ``add``, for who has no session: DB-API connections, Django's, and the asynchronous ones of asyncpg and
psycopg.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, TypeVar

from pydantic import BaseModel
from sqlalchemy import BigInteger, Dialect, bindparam, insert as insert_into
from sqlalchemy.engine import Compiled
from sqlalchemy.sql.compiler import SQLCompiler

from reliamq.outbox.connections import dialect_of, drivers_of, need_transaction
from reliamq.outbox.key_locks import check_locked, key_locks, lock_number, locked_position
from reliamq.outbox.table import OutboxMessage, columns_of
from reliamq.outbox.waking import wake_relays
from reliamq.spi import ConfigurationError, Message, TransactionRequired
from reliamq.spi.messages import NO_HEADERS
from reliamq.topics import Topic

__all__ = ["insert", "insert_async"]

M = TypeVar("M", bound=BaseModel)
KEY_LOCK = "key_lock"
"""A parameter of the INSERT: the number of the key's lock."""
Statement = tuple[str, Any, bool]
"""Its text, its parameters as the driver takes them, and whether it locks something, one row for each."""


def insert(
    connection: Any,
    topic: Topic[M],
    model: M,
    *,
    id: str | None = None,  # the field's name in CloudEvents
    headers: Mapping[str, str] = NO_HEADERS,
) -> str:
    """Add ``model`` as a message for ``topic`` in the connection's transaction (O1): sqlite3's, psycopg's, PyMySQL's or
    Django's (``django.db.connection``, inside ``atomic()``).

    Executes one INSERT, and on MySQL one statement before it where the topic has keys.  Returns the message's id.
    Raises as :func:`reliamq.outbox.add`; TransactionRequired when the connection would commit it by itself;
    ConfigurationError for an unknown driver.
    """
    driver_connection = _of_django(connection) if "django" in drivers_of(connection) else connection
    dialect = dialect_of(driver_connection)
    if inspect.iscoroutinefunction(getattr(driver_connection, "commit", None)) or dialect.driver == "asyncpg":
        raise ConfigurationError(
            "outbox.insert needs a synchronous connection; await outbox.insert_async(connection, …), or use an "
            "AsyncSession"
        )
    need_transaction(driver_connection)
    message = topic.message(model, id=id, headers=headers)
    cursor = driver_connection.cursor()
    try:
        for text, parameters, locks in _statements(message, dialect):
            cursor.execute(text, parameters)
            if locks:
                check_locked(len(cursor.fetchall()))
    finally:
        cursor.close()
    if driver_connection is not connection:
        connection.on_commit(wake_relays)
    return message.id


async def insert_async(
    connection: Any,
    topic: Topic[M],
    model: M,
    *,
    id: str | None = None,  # the field's name in CloudEvents
    headers: Mapping[str, str] = NO_HEADERS,
) -> str:
    """The same on an asynchronous connection of asyncpg or psycopg.

    Cancelled: the message may be in the transaction; roll it back.
    """
    dialect, drivers = dialect_of(connection), drivers_of(connection)
    if "asyncpg" not in drivers and not inspect.iscoroutinefunction(getattr(connection, "commit", None)):
        raise ConfigurationError("outbox.insert_async needs an asynchronous connection; use outbox.insert")
    if drivers & {"aiosqlite"}:
        raise ConfigurationError("outbox.insert_async does not know aiosqlite; use outbox.add with an AsyncSession")
    need_transaction(connection)
    message = topic.message(model, id=id, headers=headers)
    for text, parameters, locks in _statements(message, dialect):
        if "asyncpg" in drivers:
            rows = await connection.fetch(text, *parameters)
        else:
            cursor = await connection.execute(text, parameters)
            rows = await cursor.fetchall() if locks else []
        if locks:
            check_locked(len(rows))
    return message.id


def _of_django(connection: Any) -> Any:
    """The driver's connection under Django's, which is opened when it is first needed."""
    if not connection.in_atomic_block:
        raise TransactionRequired(
            "Django commits each statement by itself outside of transaction.atomic(), so the message would not share "
            "the fate of the business change; call outbox.insert inside it"
        )
    connection.ensure_connection()
    return connection.connection


def _statements(message: Message, dialect: Dialect) -> Iterator[Statement]:
    values = {**columns_of(message), "attempts": 0, "available_at": 0.0}
    if message.key is not None:
        number = lock_number(message.topic, message.key)
        if dialect.name == "postgresql":
            values[KEY_LOCK] = number
        else:
            for lock in key_locks([number], dialect):
                compiled = lock.compile(dialect=dialect)
                yield str(compiled), _parameters(compiled), True
    insertion = _insertion(dialect, tuple(values))
    yield insertion.string, _parameters(insertion, values), False


@cache  # compiling costs more than the database's work
def _insertion(dialect: Dialect, names: tuple[str, ...]) -> Compiled:
    statement = insert_into(OutboxMessage)
    if KEY_LOCK in names:
        statement = statement.values(position=locked_position(bindparam(KEY_LOCK, type_=BigInteger)))
    return statement.compile(dialect=dialect, column_keys=[name for name in names if name != KEY_LOCK])


def _parameters(
    compiled: Compiled, values: Mapping[str, object] | None = None
) -> Sequence[object] | Mapping[str, object]:
    parameters = compiled.construct_params(values) or {}
    if isinstance(compiled, SQLCompiler) and compiled.positional:
        return [parameters[name] for name in compiled.positiontup or ()]
    return parameters
