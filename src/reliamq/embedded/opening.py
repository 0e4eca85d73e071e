"""Opening the broker's file: pragmas, schema, and everything that can be wrong with a file.

It promises a connection whose commits are on the disk (WAL, ``synchronous=FULL``, both read back), or an error that
names the file, the fault and the remedy, with the file untouched.  Who may write when is the worker's business.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources

from reliamq.embedded.errors import opening_error
from reliamq.embedded.settings import Location
from reliamq.spi import BrokerUnavailable, ConfigurationError

__all__ = ["APPLICATION_ID", "OLDEST_SQLITE", "SCHEMA_VERSION", "connect", "publishing_limit"]

APPLICATION_ID = 0x524D5131  # "RMQ1", where SQLite files say whose they are
SCHEMA_VERSION = 1
OLDEST_SQLITE = (3, 35, 0)  # UPDATE … RETURNING

_PAGE_BYTES = 8192  # measured: a third faster than 4096 for rows of a few hundred bytes
_CACHE_KIBIBYTES = 32_768
_CHECKPOINT_PAGES = 4_000  # 32 MB of WAL: fewer, longer checkpoints
_RESERVE_BYTES = 4 << 20  # what a full broker needs to hand out and settle what it has
_STATEMENTS = 256
_SCRATCH_TABLES = (  # the connection's own, in memory: sets that one statement hands to the next
    "touched (chain BLOB PRIMARY KEY, first INTEGER) WITHOUT ROWID",
    "returned (position INTEGER PRIMARY KEY, place INTEGER, due_at REAL, counts INTEGER, reason TEXT)",
)


def connect(location: Location) -> sqlite3.Connection:
    """Open and check, creating the schema in a new file.  Call it with the write lock held, in the owning thread.

    Raises ConfigurationError (not ours, newer schema, old SQLite) or BrokerUnavailable (cannot be opened or written).
    """
    path = location.path or ":memory:"
    _check_library(location.url)
    try:
        connection = sqlite3.connect(
            path,
            isolation_level=None,
            timeout=location.settings.patience_seconds,
            cached_statements=_STATEMENTS,
        )
    except (sqlite3.Error, OSError) as error:
        raise opening_error(error, location.url, path) from error
    try:
        _prepare(connection, location, path)
    except (sqlite3.Error, OSError) as error:
        connection.close()
        raise opening_error(error, location.url, path) from error
    except BaseException:
        connection.close()
        raise
    return connection


def _check_library(url: str) -> None:
    if sqlite3.sqlite_version_info < OLDEST_SQLITE:
        raise ConfigurationError(
            f"{url}: Python's SQLite is {sqlite3.sqlite_version}, the embedded broker needs "
            f"{'.'.join(map(str, OLDEST_SQLITE))} or newer; use a newer Python build, or another broker"
        )


def _prepare(connection: sqlite3.Connection, location: Location, path: str) -> None:
    new = _check_owner(connection, location.url, path)
    connection.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
    if location.path is not None:
        _make_durable(connection, location.url, path)
    connection.execute(f"PRAGMA cache_size = -{_CACHE_KIBIBYTES}")
    connection.execute("PRAGMA temp_store = MEMORY")
    if new:
        _create(connection)
        if location.path is not None:
            _sync_folder(os.path.dirname(location.path))
    for table in _SCRATCH_TABLES:
        connection.execute(f"CREATE TEMP TABLE {table}")
    if location.settings.max_bytes is not None:
        _limit_pages(connection, location.settings.max_bytes + _RESERVE_BYTES)


def _check_owner(connection: sqlite3.Connection, url: str, path: str) -> bool:
    """Whether the file is new; ConfigurationError if it is somebody else's or from a newer reliamq."""
    (application_id,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if application_id == APPLICATION_ID:
        if version != SCHEMA_VERSION:
            raise ConfigurationError(
                f"{url}: {path} has schema version {version}, this reliamq knows {SCHEMA_VERSION}; "
                "it was written by a newer reliamq: update this one. The file was not touched."
            )
        return False
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if application_id or version or tables:
        raise ConfigurationError(
            f"{url}: {path} is a SQLite database of another application ({tables} tables and indexes); "
            "give the broker a file of its own. The file was not touched."
        )
    return True


def _make_durable(connection: sqlite3.Connection, url: str, path: str) -> None:
    """Switch on what makes a COMMIT survive a power cut (P1), and read it back."""
    (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA fullfsync = ON")  # macOS: fsync alone stops at the drive's cache
    connection.execute("PRAGMA checkpoint_fullfsync = ON")
    connection.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")
    (synchronous,) = connection.execute("PRAGMA synchronous").fetchone()
    if mode != "wal" or synchronous != 2:
        raise BrokerUnavailable(
            url,
            f"{path}: SQLite keeps journal_mode={mode}, synchronous={synchronous} instead of wal, 2; "
            "the file system does not support it, put the file on a local disk",
        )


def _sync_folder(folder: str) -> None:
    """Put the new file's name on the disk too: fsync of a file alone does not promise that."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows has no such thing, and writes names through
        return
    descriptor = os.open(folder, os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _limit_pages(connection: sqlite3.Connection, limit: int) -> None:
    (page_bytes,) = connection.execute("PRAGMA page_size").fetchone()
    connection.execute(f"PRAGMA max_page_count = {limit // page_bytes}")


@contextmanager
def publishing_limit(connection: sqlite3.Connection, max_bytes: int | None) -> Iterator[None]:
    """Let the file grow to ``max_bytes`` and no further inside the block.

    Outside it may grow a little more: handing out and settling need some room too, and they are what makes room again.
    """
    if max_bytes is None:
        yield
        return
    _limit_pages(connection, max_bytes)
    try:
        yield
    finally:
        _limit_pages(connection, max_bytes + _RESERVE_BYTES)


def _create(connection: sqlite3.Connection) -> None:
    schema = resources.files(__package__).joinpath("schema.sql").read_text(encoding="utf-8")
    try:
        connection.executescript(
            f"BEGIN IMMEDIATE;\n{schema}\n"
            f"PRAGMA application_id = {APPLICATION_ID};\nPRAGMA user_version = {SCHEMA_VERSION};\nCOMMIT;"
        )
    except sqlite3.Error:
        if connection.in_transaction:
            connection.rollback()
        raise
