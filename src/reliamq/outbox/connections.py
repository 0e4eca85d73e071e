"""Plain connections of drivers: which one it is, and whether it has a transaction that a message can join (O1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Dialect
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.dialects.postgresql.asyncpg import dialect as asyncpg_dialect

from reliamq.spi import ConfigurationError, TransactionRequired

__all__ = ["dialect_of", "drivers_of", "need_transaction", "refuse_autocommit"]

SQLITE = sqlite.dialect(paramstyle="qmark")
POSTGRESQL = postgresql.dialect(paramstyle="pyformat")  # type: ignore[no-untyped-call]  # not annotated there
MYSQL = mysql.dialect(paramstyle="pyformat")
DIALECTS: Mapping[str, Dialect] = {
    "sqlite3": SQLITE,
    "aiosqlite": SQLITE,
    "asyncpg": asyncpg_dialect(),  # type: ignore[no-untyped-call]  # not annotated there
    "psycopg": POSTGRESQL,
    "psycopg2": POSTGRESQL,
    "pymysql": MYSQL,
    "MySQLdb": MYSQL,
}


def refuse_autocommit(options: Mapping[str, Any], dialect: Dialect) -> None:
    """Of SQLAlchemy's connections, by their execution options.  Raises TransactionRequired."""
    # create_engine(isolation_level=…) is kept by the dialect alone, and nowhere in public.
    default = getattr(dialect, "_on_connect_isolation_level", None)
    if options.get("isolation_level", default) == "AUTOCOMMIT":
        raise TransactionRequired(
            "the session commits each statement by itself (isolation level AUTOCOMMIT), so the message would not share "
            "the fate of the business change; use a session with transactions"
        )


def dialect_of(connection: Any) -> Dialect:
    """How statements are written for it, the same for all of its kind.  Raises ConfigurationError for a driver that is
    not known.
    """
    drivers = drivers_of(connection)
    for driver, dialect in DIALECTS.items():
        if driver in drivers:
            return dialect
    raise ConfigurationError(
        f"the outbox does not know connections of '{type(connection).__module__}'; it knows sqlite3, psycopg, PyMySQL "
        "and Django's with outbox.insert, asyncpg and psycopg's AsyncConnection with outbox.insert_async. With "
        "SQLAlchemy use outbox.add(session, …)"
    )


def need_transaction(connection: Any, *, of_sqlalchemy: bool = False) -> None:
    """A driver can be told to commit each statement behind SQLAlchemy's back, and then a rollback undoes nothing.

    of_sqlalchemy: it begins asyncpg's transactions itself, with the first statement.
    Raises TransactionRequired.
    """
    if of_sqlalchemy and "asyncpg" in drivers_of(connection):
        return
    if _commits_by_itself(connection):
        raise TransactionRequired(
            "the connection is in autocommit mode and no transaction is open, so the message would not share the fate "
            "of the business change; begin a transaction first"
        )


def _commits_by_itself(connection: Any) -> bool:
    drivers = drivers_of(connection)
    if drivers & {"sqlite3", "aiosqlite"}:
        by_itself = connection.isolation_level is None or getattr(connection, "autocommit", False) is True  # 3.12
        return by_itself and not connection.in_transaction
    if drivers & {"psycopg", "psycopg2"}:
        return bool(connection.autocommit and connection.info.transaction_status == 0)
    if drivers & {"pymysql", "MySQLdb", "aiomysql"}:
        return bool(connection.get_autocommit())
    if "asyncpg" in drivers:
        return not connection.is_in_transaction()
    return False


def drivers_of(connection: Any) -> set[str]:
    """The packages that its class is from; a subclass is as good."""
    return {kind.__module__.partition(".")[0] for kind in type(connection).__mro__}
