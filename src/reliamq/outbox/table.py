"""The outbox's two tables, as SQLAlchemy metadata.

``reliamq_outbox`` holds the messages, ``reliamq_outbox_lease`` who sends which share of the keys.  Times are the
database's clock in seconds since 1970.  Reading and writing them is left to ``add`` and ``sql``.
"""

from __future__ import annotations

import zlib

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
    select,
    text,
)
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from reliamq.database import create_missing_tables, now_seconds
from reliamq.spi import Message

__all__ = ["BUCKETS", "OutboxLease", "OutboxMessage", "bucket_of", "create_tables", "create_tables_async", "metadata"]

BUCKETS = 64
"""Shares of the keys that relays take turns on.  Fixed: rows carry their bucket's number."""


class _Tables(DeclarativeBase):
    metadata = MetaData()


metadata = _Tables.metadata


class OutboxMessage(_Tables):
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
        {"sqlite_autoincrement": True},
    )

    position: Mapped[int] = mapped_column(
        BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True
    )
    message_id: Mapped[str] = mapped_column(String(200), unique=True)
    bucket: Mapped[int] = mapped_column(Integer)
    topic: Mapped[str] = mapped_column(String(255))
    key: Mapped[bytes | None] = mapped_column(LargeBinary)
    type: Mapped[str] = mapped_column(String(255))
    source: Mapped[str] = mapped_column(String(255))
    time: Mapped[str] = mapped_column(String(40))
    content_type: Mapped[str] = mapped_column(String(255))
    only_group: Mapped[str | None] = mapped_column(String(255))
    headers: Mapped[str | None] = mapped_column(Text)
    body: Mapped[bytes] = mapped_column(LargeBinary(2**24))
    attempts: Mapped[int] = mapped_column(Integer, default=0)
    available_at: Mapped[float] = mapped_column(Double, default=0.0)
    parked_at: Mapped[float | None] = mapped_column(Double)
    error: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[float] = mapped_column(Double, default=now_seconds())


class OutboxLease(_Tables):
    """Which relay sends a bucket's rows, until when.  A relay that died loses its buckets by time alone."""

    __tablename__ = "reliamq_outbox_lease"

    bucket: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    owner: Mapped[str | None] = mapped_column(String(100))
    until: Mapped[float] = mapped_column(Double, default=0.0)


def bucket_of(message: Message) -> int:
    """The share that a message belongs to: one for each (topic, key), so that one relay at a time keeps its order."""
    what = message.id.encode() if message.key is None else message.topic.encode() + b"\0" + message.key
    return zlib.crc32(what) % BUCKETS


def create_tables(engine: Engine) -> None:
    """Create the tables where they are missing, and the rows of the leases."""
    with engine.begin() as connection:
        _create(connection)


async def create_tables_async(engine: AsyncEngine) -> None:
    """The same on an async engine."""
    async with engine.begin() as connection:
        await connection.run_sync(_create)


def _create(connection: Connection) -> None:
    create_missing_tables(connection, metadata)
    there = set(connection.scalars(select(OutboxLease.bucket)))
    missing = [{"bucket": bucket, "until": 0.0} for bucket in range(BUCKETS) if bucket not in there]
    if missing:
        connection.execute(insert(OutboxLease), missing)
