"""The tables of the idempotency stores, as SQLAlchemy metadata; for Alembic, list ``idempotency.metadata``.

Times are the database's clock in seconds since 1970.  Every table that grows has an index on what expires, so that
cleaning never scans (I5).
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    Double,
    Engine,
    Index,
    LargeBinary,
    MetaData,
    String,
    Table,
)
from sqlalchemy.ext.asyncio import AsyncEngine

from reliamq.database import BY_BYTES, create_missing_tables

__all__ = ["create_tables", "create_tables_async", "lease", "lock", "metadata", "processed"]

metadata = MetaData()


def _identity() -> list[Column[str]]:
    return [
        Column("topic", String(150), primary_key=True),
        Column("group_name", String(150), primary_key=True),
        Column("handler", String(200), primary_key=True),
        Column("message_id", String(200), primary_key=True),
    ]


processed = Table(
    "reliamq_processed",
    metadata,
    *_identity(),
    Column("expires_at", Double, nullable=False),
    Index("reliamq_processed_expiry", "expires_at"),
    **BY_BYTES,
)
"""A group's handler has applied a message; written in the effect's own transaction (I2)."""

lease = Table(
    "reliamq_lease",
    metadata,
    *_identity(),
    Column("token", BigInteger, nullable=False),
    Column("until", Double, nullable=False),
    Column("done", Boolean, nullable=False),
    Column("result", LargeBinary(2**24)),
    Column("expires_at", Double, nullable=False),
    Index("reliamq_lease_expiry", "expires_at"),
    **BY_BYTES,
)
"""Who produces an effect outside the database, until when, and whether it is done (I3)."""

lock = Table(
    "reliamq_lock",
    metadata,
    Column("name", String(255), primary_key=True),
    Column("token", BigInteger, nullable=False),
    Column("owner", String(100)),
    Column("until", Double, nullable=False),
    **BY_BYTES,
)
"""Distributed locks by name (I4).  A row stays after release: its token must go on growing."""


def create_tables(engine: Engine) -> None:
    """Create the tables where they are missing."""
    with engine.begin() as connection:
        _create(connection)


async def create_tables_async(engine: AsyncEngine) -> None:
    """The same on an async engine."""
    async with engine.begin() as connection:
        await connection.run_sync(_create)


def _create(connection: Connection) -> None:
    create_missing_tables(connection, metadata)
