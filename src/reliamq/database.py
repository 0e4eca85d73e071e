"""SQL databases, opened the way that reliamq needs them, and the few things in which they differ.

A SQLite file is opened so that writers wait for one another instead of failing, and commits reach the disk.  Time is
always the database's (O8), as seconds since 1970.  What is stored is left to the outbox and the idempotency stores.
"""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from sqlalchemy import (
    URL,
    Connection,
    Double,
    Engine,
    Inspector,
    MetaData,
    Table,
    UniqueConstraint,
    create_engine,
    event,
    inspect,
    make_url,
)
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.expression import FunctionElement

from reliamq.spi import ConfigurationError, MissingExtra

__all__ = [
    "BY_BYTES",
    "MYSQL",
    "READING",
    "create_missing_tables",
    "is_retriable",
    "now_seconds",
    "open_engine",
    "open_sync_engine",
    "wait_for_writers",
]

BUSY_SECONDS = 60.0
READING = "reliamq_reading"
"""Execution option of a connection that only reads: on SQLite it takes no write lock."""
RETRIABLE_STATES = {"40001", "40P01"}  # serialization failure, deadlock (PostgreSQL, appendix A)
RETRIABLE_MYSQL = {1020, 1205, 1213}  # changed since it was read (MariaDB 11.6), lock wait timeout, deadlock
MYSQL = {"mysql", "mariadb"}
"""Names of SQLAlchemy's dialects for MySQL and MariaDB."""
BY_BYTES: dict[str, Any] = {
    f"{dialect}_{option}": value
    for dialect in MYSQL
    for option, value in {"engine": "InnoDB", "charset": "utf8mb4", "collate": "utf8mb4_bin"}.items()
}
"""Options of a table: what is compared in it is compared byte by byte, as elsewhere.  MySQL and MariaDB would take ids
and keys that differ in upper and lower case for the same.
"""

_ASYNC_DRIVERS = {"sqlite": "aiosqlite", "postgresql": "psycopg", "mysql": "aiomysql", "mariadb": "aiomysql"}
_SYNC_DRIVERS = {"sqlite": "pysqlite", "postgresql": "psycopg", "mysql": "pymysql", "mariadb": "pymysql"}
_ASYNC_ONLY = {"aiosqlite", "asyncpg", "aiomysql", "asyncmy"}
_SYNC_ONLY = {"pysqlite", "psycopg2", "pg8000", "pymysql", "mysqldb"}
_EXTRAS = {"postgresql": "postgres", "mysql": "mysql", "mariadb": "mysql"}


class now_seconds(FunctionElement[float]):  # noqa: N801  # reads as an SQL function in statements
    """The database's own clock, seconds since 1970, as an SQL expression (O8).

    It stands still within one statement, so that a claim judges all rows by one moment.
    """

    type = Double()
    inherit_cache = True
    name = "now_seconds"


@compiles(now_seconds)
def _unknown_clock(element: Any, compiler: Any, **_: Any) -> str:
    raise ConfigurationError(f"reliamq does not know how to read the clock of {compiler.dialect.name}")


@compiles(now_seconds, "sqlite")
def _sqlite_clock(*_: Any, **__: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"  # to the millisecond; unixepoch('subsec') needs 3.42


@compiles(now_seconds, "postgresql")
def _postgresql_clock(*_: Any, **__: Any) -> str:
    # Twice in a statement it is the same, which clock_timestamp() is not.  A subquery, because a planner that knows its
    # value takes nearly every row for due, and reads the whole table.
    return "(SELECT CAST(extract(epoch FROM statement_timestamp()) AS double precision))"


@compiles(now_seconds, "mysql")
@compiles(now_seconds, "mariadb")
def _mysql_clock(*_: Any, **__: Any) -> str:
    return "CAST(unix_timestamp(now(6)) AS double)"


@asynccontextmanager
async def open_engine(url: str) -> AsyncIterator[AsyncEngine]:
    """An async engine for the URL, disposed of at the end.  The driver is chosen where the URL names a synchronous one.

    Raises ConfigurationError for a URL that is none, MissingExtra when its driver is not installed.
    """
    chosen = _with_driver(url, _ASYNC_DRIVERS, _SYNC_ONLY)
    engine = _create(create_async_engine, chosen)
    if chosen.get_backend_name() == "sqlite":
        wait_for_writers(engine.sync_engine)
    try:
        yield engine
    finally:
        await engine.dispose()


@contextmanager
def open_sync_engine(url: str) -> Iterator[Engine]:
    """The same for plain functions."""
    chosen = _with_driver(url, _SYNC_DRIVERS, _ASYNC_ONLY)
    engine = _create(create_engine, chosen)
    if chosen.get_backend_name() == "sqlite":
        wait_for_writers(engine)
    try:
        yield engine
    finally:
        engine.dispose()


def wait_for_writers(engine: Engine) -> None:
    """Make a SQLite engine wait its turn instead of failing with "database is locked", and commit to the disk.

    Give it your own engine too (``async_engine.sync_engine``) when several processes write to one file.  Transactions
    begin
    with ``BEGIN IMMEDIATE``: one that reads first and writes later could otherwise not be upgraded and would fail at
    once.
    """

    @event.listens_for(engine, "connect")
    def connect(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # the driver must not begin transactions by itself
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {int(BUSY_SECONDS * 1000)}")
        cursor.execute("PRAGMA journal_mode = WAL")
        cursor.execute("PRAGMA synchronous = FULL")
        cursor.close()

    @event.listens_for(engine, "begin")
    def begin(connection: Any) -> None:
        reading = connection.get_execution_options().get(READING, False)
        connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")


def create_missing_tables(connection: Connection, metadata: MetaData, tables: Sequence[Table] | None = None) -> None:
    """Create the tables of ``metadata`` that are not there, in the connection's transaction.  tables: only these.

    Raises ConfigurationError naming columns, indexes and unique constraints that those that are there lack.
    """
    if connection.dialect.name == "postgresql":
        # Several processes start at once; without it their CREATE TABLE IF NOT EXISTS can collide.
        connection.exec_driver_sql("SELECT pg_advisory_xact_lock(7236832001)")
    metadata.create_all(connection, tables)
    there, needed = inspect(connection), metadata.sorted_tables if tables is None else tables
    if lacking := [words for table in needed for words in _lacking(there, table)]:
        raise ConfigurationError(
            f"the database lacks {' and '.join(lacking)}, which this version of reliamq needs; let a migration add "
            "what is missing (Alembic finds it by outbox.metadata and idempotency.metadata)"
        )


def _lacking(there: Inspector, table: Table) -> Iterator[str]:
    """What a table that somebody else has made, or an older version, does not have, in words."""
    columns = {column["name"] for column in there.get_columns(table.name)}
    for column in table.columns:
        if column.name not in columns:
            yield f"column {table.name}.{column.name}"
    indexes = there.get_indexes(table.name)
    indexed = {tuple(index["column_names"]) for index in indexes}
    for needed in table.indexes:
        if (names := tuple(column.name for column in needed.columns)) not in indexed:
            yield f"an index of {table.name} on ({', '.join(names)})"
    unique = {tuple(index["column_names"]) for index in indexes if index["unique"]}
    unique |= {tuple(one["column_names"]) for one in there.get_unique_constraints(table.name)}
    for constraint in table.constraints:
        if not isinstance(constraint, UniqueConstraint):
            continue
        if (names := tuple(column.name for column in constraint.columns)) not in unique:
            yield f"a unique constraint of {table.name} on ({', '.join(names)})"


def is_retriable(error: BaseException) -> bool:
    """Whether the database refused a transaction only because of others, so that running it again is the answer."""
    if not isinstance(error, DBAPIError):
        return False
    original: Any = error.orig
    if getattr(original, "sqlstate", None) in RETRIABLE_STATES or getattr(original, "pgcode", None) in RETRIABLE_STATES:
        return True
    if isinstance(original, sqlite3.OperationalError):
        return (getattr(original, "sqlite_errorname", None) or "").startswith(("SQLITE_BUSY", "SQLITE_LOCKED"))
    arguments: Any = getattr(original, "args", ())
    return bool(arguments) and arguments[0] in RETRIABLE_MYSQL


def _with_driver(url: str, drivers: dict[str, str], unfit: set[str]) -> URL:
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise ConfigurationError("database is no SQLAlchemy URL; write something like sqlite:///app.db") from error
    backend, _, driver = parsed.drivername.partition("+")
    if (not driver or driver in unfit) and backend in drivers:
        return parsed.set(drivername=f"{backend}+{drivers[backend]}")
    return parsed


def _create(make: Any, url: URL) -> Any:
    try:
        if url.get_backend_name() != "sqlite":
            return make(url, pool_pre_ping=True)
        if url.database in (None, "", ":memory:"):
            return make(url)
        # One connection: SQLite lets one transaction write at a time anyway, and who waits in a pool is woken at
        # once, while who waits in SQLite sleeps for up to a tenth of a second at a time.
        return make(url, pool_size=1, max_overflow=0, pool_timeout=BUSY_SECONDS)
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get(url.get_backend_name(), "all")
        raise MissingExtra(url.get_backend_name(), error.name or "", f"pip install 'reliamq[{extra}]'") from error
    except NoSuchModuleError as error:
        raise ConfigurationError(f"database {url.render_as_string(hide_password=True)}: {error}") from error
