"""Adding a message to the outbox inside the user's own transaction (O1).

No broker is asked; what could never be sent is refused here, where the user's transaction can still be rolled back.
For keyed messages, positions are handed out in commit order, so that a relay sends them in the order in which they
became true (O3).
"""

from __future__ import annotations

import inspect
import json
import zlib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel
from sqlalchemy import Dialect, Select, event, func, insert as insert_into, select
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.engine import Compiled
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.sql.compiler import SQLCompiler

from reliamq.database import MYSQL
from reliamq.outbox.table import KEY_LOCKS, OutboxKeyLock, OutboxMessage, bucket_of
from reliamq.spi import ConfigurationError, Message, TransactionRequired
from reliamq.spi.messages import NO_HEADERS
from reliamq.topics import Topic

__all__ = ["add", "insert"]

M = TypeVar("M", bound=BaseModel)
KEY_LOCK_SPACE = 0x524C4D51  # "RLMQ": keeps our advisory locks apart from the user's


def add(
    session: Session | AsyncSession,
    topic: Topic[M],
    model: M,
    *,
    id: str | None = None,  # the field's name in CloudEvents
    headers: Mapping[str, str] = NO_HEADERS,
) -> str:
    """Add ``model`` to the session as a message for ``topic``; it commits or rolls back with everything else in it
    (O1).

    No I/O happens here.  Returns the message's id.
    Raises InvalidMessage and TooLarge as :meth:`reliamq.topics.Topic.message` does; TransactionRequired on a session
    that commits each statement by itself.
    """
    plain = session.sync_session if isinstance(session, AsyncSession) else session
    bind = plain.get_bind(OutboxMessage)
    _refuse_autocommit(bind.get_execution_options(), bind.dialect)
    message = topic.message(model, id=id, headers=headers)
    if not event.contains(plain, "before_flush", _before_flush):
        event.listen(plain, "before_flush", _before_flush)
    plain.add(OutboxMessage(**_columns(message)))
    return message.id


def insert(
    connection: Any,
    topic: Topic[M],
    model: M,
    *,
    id: str | None = None,  # the field's name in CloudEvents
    headers: Mapping[str, str] = NO_HEADERS,
) -> str:
    """The same on a plain DB-API connection (sqlite3, psycopg, PyMySQL): executes one INSERT in its transaction.

    Raises TransactionRequired when the connection would commit it by itself, ConfigurationError for an unknown driver.
    """
    dialect = _dialect_of(connection)
    message = topic.message(model, id=id, headers=headers)
    cursor = connection.cursor()
    try:
        if message.key is not None:
            for lock in _locks([_lock_number(message.topic, message.key)], dialect):
                _execute(cursor, lock.compile(dialect=dialect))
                _check_locked(len(cursor.fetchall()))
        statement = insert_into(OutboxMessage).values(**_columns(message)).compile(dialect=dialect)
        # Column defaults are part of the statement: constants as parameters, the database's clock as SQL.
        _execute(cursor, statement, attempts=0, available_at=0.0)
    finally:
        cursor.close()
    return message.id


def _execute(cursor: Any, compiled: Compiled, **values: object) -> None:
    parameters = compiled.construct_params(values) or {}
    if isinstance(compiled, SQLCompiler) and compiled.positional:
        cursor.execute(str(compiled), [parameters[name] for name in compiled.positiontup or ()])
    else:
        cursor.execute(str(compiled), parameters)


def _columns(message: Message) -> dict[str, Any]:
    return {
        "message_id": message.id,
        "bucket": bucket_of(message),
        "topic": message.topic,
        "key": message.key,
        "type": message.type,
        "source": message.source,
        "time": message.time.isoformat(),
        "content_type": message.content_type,
        "only_group": message.only_group,
        "headers": json.dumps(dict(message.headers)) if message.headers else None,
        "body": message.body,
    }


# --- commit order within a key ----------------------------------------------------------------------------------------


def _before_flush(session: Session, _context: object, _instances: object) -> None:
    """Before positions are drawn, take a lock for each key until the end of the transaction.

    PostgreSQL and MySQL draw a position at INSERT and show the row at COMMIT; without the lock two transactions of one
    key could commit in the other order.  A database with one writer needs none.

    Sorted, so that two flushes cannot block each other.  Two transactions that flush several times and take the same
    keys in another order can: the database ends one of them with a deadlock error, to be run again.
    """
    added = [one for one in session.new if isinstance(one, OutboxMessage)]
    if not added:
        return
    ours = {"mapper": OutboxMessage}  # a session may have several databases
    connection = session.connection(bind_arguments=ours)
    _refuse_autocommit(connection.get_execution_options(), connection.dialect)
    _need_transaction(connection.connection.driver_connection)
    for lock in _locks(_lock_numbers(added), connection.dialect):
        _check_locked(len(connection.execute(lock).all()))


def _locks(numbers: Iterable[int], dialect: Dialect) -> list[Select[Any]]:
    """What locks these keys, each with one row as its result.

    MySQL's own named locks (GET_LOCK) do not end with a transaction; row locks do.  One row after the other, because a
    statement over several takes them in the order of its plan.
    """
    if dialect.name == "postgresql":
        return [select(func.pg_advisory_xact_lock(KEY_LOCK_SPACE, number)) for number in numbers]
    if dialect.name not in MYSQL:
        return []
    slots = sorted({number % KEY_LOCKS for number in numbers})
    return [select(OutboxKeyLock.slot).where(OutboxKeyLock.slot == slot).with_for_update() for slot in slots]


def _check_locked(rows: int) -> None:
    if not rows:
        raise ConfigurationError(
            f"table {OutboxKeyLock.__tablename__} lacks rows, so nothing would keep the order of a key; let "
            "outbox.create_tables(engine) add them"
        )


def _lock_numbers(added: Iterable[OutboxMessage]) -> list[int]:
    return sorted({_lock_number(one.topic, one.key) for one in added if one.key is not None})


def _lock_number(topic: str, key: bytes) -> int:
    return zlib.crc32(topic.encode() + b"\0" + key) - 2**31  # a signed 32-bit integer, as the function takes it


# --- transactions -----------------------------------------------------------------------------------------------------


def _refuse_autocommit(options: Mapping[str, Any], dialect: Dialect) -> None:
    # create_engine(isolation_level=…) is kept by the dialect alone, and nowhere in public.
    default = getattr(dialect, "_on_connect_isolation_level", None)
    if options.get("isolation_level", default) == "AUTOCOMMIT":
        raise TransactionRequired(
            "the session commits each statement by itself (isolation level AUTOCOMMIT), so the message would not share "
            "the fate of the business change; use a session with transactions"
        )


def _dialect_of(connection: Any) -> Dialect:
    drivers = _drivers_of(connection)
    if inspect.iscoroutinefunction(getattr(connection, "commit", None)):
        raise ConfigurationError("outbox.insert needs a synchronous connection; with async code use an AsyncSession")
    _need_transaction(connection)
    if "sqlite3" in drivers:
        return sqlite.dialect(paramstyle="qmark")
    if drivers & {"psycopg", "psycopg2"}:
        return postgresql.dialect(paramstyle="pyformat")  # type: ignore[no-untyped-call]  # not annotated there
    if drivers & {"pymysql", "MySQLdb"}:
        return mysql.dialect(paramstyle="pyformat")
    raise ConfigurationError(
        f"outbox.insert does not know connections of '{type(connection).__module__}'; it knows sqlite3, psycopg and "
        "PyMySQL. With SQLAlchemy use outbox.add(session, …)"
    )


def _need_transaction(connection: Any) -> None:
    """A driver can be told to commit each statement behind SQLAlchemy's back, and then a rollback undoes nothing."""
    if _commits_by_itself(connection):
        raise TransactionRequired(
            "the connection is in autocommit mode and no transaction is open, so the message would not share the fate "
            "of the business change; begin a transaction first"
        )


def _commits_by_itself(connection: Any) -> bool:
    drivers = _drivers_of(connection)
    if drivers & {"sqlite3", "aiosqlite"}:
        by_itself = connection.isolation_level is None or getattr(connection, "autocommit", False) is True  # 3.12
        return by_itself and not connection.in_transaction
    if drivers & {"psycopg", "psycopg2"}:
        return bool(connection.autocommit and connection.info.transaction_status == 0)
    if drivers & {"pymysql", "MySQLdb", "aiomysql"}:
        return bool(connection.get_autocommit())
    return False  # asyncpg has no such mode


def _drivers_of(connection: Any) -> set[str]:
    return {kind.__module__.partition(".")[0] for kind in type(connection).__mro__}  # a subclass is as good
