"""The outbox's tables, as SQLAlchemy metadata.

``reliamq_outbox`` holds the messages, ``reliamq_outbox_lease`` who sends which share of the keys.  Where sent rows are
kept (O7) there are two more: ``reliamq_outbox_sent`` and ``reliamq_outbox_replay``.  Times are the database's clock in
seconds since 1970.  Reading and writing them is left to ``add``, ``sql`` and ``sent``.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from typing import Any

from sqlalchemy import (
    BigInteger,
    Connection,
    Double,
    Engine,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Text,
    insert,
    inspect,
    select,
    text,
)
from sqlalchemy.dialects.mysql import MEDIUMTEXT
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import DeclarativeBase, InstrumentedAttribute, Mapped, mapped_column

from reliamq.database import BY_BYTES, MYSQL, create_missing_tables, now_seconds
from reliamq.spi import ConfigurationError, Message, rfc3339

__all__ = [
    "BUCKETS",
    "KEPT_TABLES",
    "KEY_LOCKS",
    "OutboxKeyLock",
    "OutboxLease",
    "OutboxMessage",
    "OutboxReplay",
    "SentMessage",
    "bucket_of",
    "columns_of",
    "create_tables",
    "create_tables_async",
    "metadata",
    "what_keeping_lacks",
]

KEY_LOCKS = 1024
"""Rows that transactions lock which add messages, on MySQL and MariaDB; keys that share one wait for each other."""
BUCKETS = 64
"""Shares of the keys that relays take turns on.  Fixed: rows carry their bucket's number."""


class _Tables(DeclarativeBase):
    metadata = MetaData()


metadata = _Tables.metadata


class _MessageColumns:
    """What a message consists of, the same before and after it was sent."""

    bucket: Mapped[int] = mapped_column(Integer)
    topic: Mapped[str] = mapped_column(String(255))
    key: Mapped[bytes | None] = mapped_column(LargeBinary)
    type: Mapped[str] = mapped_column(String(255))
    source: Mapped[str] = mapped_column(String(255))
    time: Mapped[str] = mapped_column(String(40))
    content_type: Mapped[str] = mapped_column(String(255))
    only_group: Mapped[str | None] = mapped_column(String(255))
    headers: Mapped[str | None] = mapped_column(Text().with_variant(MEDIUMTEXT(), *MYSQL))
    body: Mapped[bytes] = mapped_column(LargeBinary(2**24))


class OutboxMessage(_MessageColumns, _Tables):
    """A message on its way.

    position: grows within a key in commit order.  bucket: the share that its topic and key belong to.
    attempts, available_at, error: what the broker said of it.  parked_at: set aside (O5).
    """

    __tablename__ = "reliamq_outbox"
    __table_args__ = (
        # The relay reads a bucket's rows in order; parked rows are out of its way where the database has partial
        # indexes.
        Index(
            "reliamq_outbox_waiting",
            "bucket",
            "position",
            sqlite_where=text("parked_at IS NULL"),
            postgresql_where=text("parked_at IS NULL"),
        ),
        # Keys that wait for a retry are few, so this index stays nearly empty.
        Index(
            "reliamq_outbox_retrying",
            "bucket",
            "available_at",
            sqlite_where=text("available_at > 0"),
            postgresql_where=text("available_at > 0"),
        ),
        {"sqlite_autoincrement": True, **BY_BYTES},
    )

    position: Mapped[int] = mapped_column(
        BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True
    )
    message_id: Mapped[str] = mapped_column(String(200), unique=True)
    attempts: Mapped[int] = mapped_column(Integer, default=0)
    available_at: Mapped[float] = mapped_column(Double, default=0.0)
    parked_at: Mapped[float | None] = mapped_column(Double)
    error: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[float] = mapped_column(Double, default=now_seconds())


class OutboxLease(_Tables):
    """Which relay sends a bucket's rows, until when.  A relay that died loses its buckets by time alone."""

    __tablename__ = "reliamq_outbox_lease"
    __table_args__ = BY_BYTES

    bucket: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    owner: Mapped[str | None] = mapped_column(String(100))
    until: Mapped[float] = mapped_column(Double, default=0.0)


class SentMessage(_MessageColumns, _Tables):
    """A message that a broker has confirmed, kept until its window is over (O7).

    A table of its own, so that nothing that is kept is in the way of what is to be sent.  position: the one that it had
    in ``reliamq_outbox``, and gets back when it is sent again.  message_id: not unique, because an id may be used again
    once its row was sent.  sent_at: when its confirm was written down.
    """

    __tablename__ = "reliamq_outbox_sent"
    __table_args__ = (Index("reliamq_outbox_sent_at", "sent_at"), BY_BYTES)

    position: Mapped[int] = mapped_column(
        BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=False
    )
    message_id: Mapped[str] = mapped_column(String(200))
    sent_at: Mapped[float] = mapped_column(Double)


class OutboxReplay(_Tables):
    """One row: how many replays there have been.  Locked by a replay against confirms that are just written down."""

    __tablename__ = "reliamq_outbox_replay"
    __table_args__ = BY_BYTES

    only: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    number: Mapped[int] = mapped_column(BigInteger, default=0)


class OutboxKeyLock(_Tables):
    """A row is locked by whoever adds a message with a key, until the end of the transaction, so that positions of one
    key are in commit order.  slot: of the key.  Only MySQL and MariaDB need it.
    """

    __tablename__ = "reliamq_outbox_key_lock"
    __table_args__ = BY_BYTES

    slot: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)


KEPT_TABLES = (metadata.tables[SentMessage.__tablename__], metadata.tables[OutboxReplay.__tablename__])
"""What is needed besides where sent rows are kept; a database without them goes on working where they are not."""

KEY_LOCK_TABLE = metadata.tables[OutboxKeyLock.__tablename__]
_ALWAYS = [table for table in metadata.sorted_tables if table not in (*KEPT_TABLES, KEY_LOCK_TABLE)]


def columns_of(message: Message) -> dict[str, Any]:
    """A new row's values, but for those that have defaults."""
    return {
        "message_id": message.id,
        "bucket": bucket_of(message),
        "topic": message.topic,
        "key": message.key,
        "type": message.type,
        "source": message.source,
        "time": rfc3339(message.time),
        "content_type": message.content_type,
        "only_group": message.only_group,
        "headers": json.dumps(dict(message.headers)) if message.headers else None,
        "body": message.body,
    }


def bucket_of(message: Message) -> int:
    """The share that a message belongs to: one for each (topic, key), so that one relay at a time keeps its order."""
    what = message.id.encode() if message.key is None else message.topic.encode() + b"\0" + message.key
    return zlib.crc32(what) % BUCKETS


def what_keeping_lacks(connection: Connection) -> list[str]:
    """What of the tables for sent rows is not there, in words; nothing: all is.  Their one row is made at the start."""
    there = inspect(connection)
    tables = [f"table {table.name}" for table in KEPT_TABLES if not there.has_table(table.name)]
    if not tables and connection.scalar(select(OutboxReplay.only)) is None:
        return [f"row in table {OutboxReplay.__tablename__}"]
    return tables


def create_tables(engine: Engine, *, keep: bool = False) -> None:
    """Create the tables where they are missing, and the rows of the leases.

    keep: also those of sent rows, which ``outbox.keep`` needs (O7); ConfigurationError when they cannot be made.
    """
    with engine.begin() as connection:
        _create(connection, keep)


async def create_tables_async(engine: AsyncEngine, *, keep: bool = False) -> None:
    """The same on an async engine."""
    async with engine.begin() as connection:
        await connection.run_sync(_create, keep)


def _create(connection: Connection, keep: bool) -> None:
    create_missing_tables(connection, metadata, _ALWAYS)
    if connection.dialect.name in MYSQL:
        create_missing_tables(connection, metadata, [KEY_LOCK_TABLE])
        _add_missing(connection, OutboxKeyLock.slot, KEY_LOCKS)
    _add_missing(connection, OutboxLease.bucket, BUCKETS)
    if keep:
        _create_for_keeping(connection, what_keeping_lacks(connection))


def _add_missing(connection: Connection, column: InstrumentedAttribute[int], count: int) -> None:
    """Rows for these numbers, whose other columns have defaults."""
    there = set(connection.scalars(select(column)))
    if missing := [{column.key: number} for number in range(count) if number not in there]:
        connection.execute(insert(column.class_), missing)


def _create_for_keeping(connection: Connection, lacking: Sequence[str]) -> None:
    try:
        create_missing_tables(connection, metadata, KEPT_TABLES)
    except DBAPIError as error:
        said = str(error.orig).splitlines()[0]
        raise ConfigurationError(
            f"outbox.keep is set, but the database has no {' and no '.join(lacking)}, and it cannot be made: {said}; "
            "let a migration make it from outbox.metadata"
        ) from error
    if connection.scalar(select(OutboxReplay.only)) is None:
        connection.execute(insert(OutboxReplay).values(only=1))
