"""Databases with the tables of the idempotency stores, a table for effects, and short words."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import anyio
import pytest
from sqlalchemy import Engine, Integer, String, func, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from reliamq import idempotency, outbox
from reliamq.database import open_engine, open_sync_engine
from reliamq.idempotency.tables import processed
from reliamq.spi import ProcessedId
from tests.databases import DRIVERS, KINDS, database_url

_numbers = itertools.count(1)
_run = uuid.uuid4().hex  # some stores outlive a run
every_driver = pytest.mark.parametrize("database", DRIVERS, indirect=True)


class Base(DeclarativeBase):
    pass


class Effect(Base):
    """What a handler does: one row for each time it took effect."""

    __tablename__ = "effect"
    id: Mapped[int] = mapped_column(primary_key=True)
    message_id: Mapped[str] = mapped_column(String(200))
    pid: Mapped[int] = mapped_column(default=0)


class Account(Base):
    """A row with an optimistic lock, and a name that is unique."""

    __tablename__ = "account"
    name: Mapped[str] = mapped_column(String(200), primary_key=True)
    balance: Mapped[int] = mapped_column(default=0)
    version = mapped_column(Integer, nullable=False)
    __mapper_args__ = {"version_id_col": version}  # noqa: RUF012  # SQLAlchemy's own way to say it


@pytest.fixture(params=KINDS)
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database, once for each kind; with ``every_driver`` once for each driver."""
    return database_url(request, request.param, tmp_path)


@pytest.fixture
async def engine(database: str) -> AsyncIterator[AsyncEngine]:
    """An async engine on a database with all tables."""
    async with open_engine(database) as engine:
        await idempotency.create_tables_async(engine)
        await outbox.create_tables_async(engine)
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        yield engine


@pytest.fixture
def sync_engine(engine: AsyncEngine, database: str) -> Iterator[Engine]:
    """A synchronous engine on the same database."""
    del engine  # it has made the tables
    with open_sync_engine(database) as sync_engine:
        yield sync_engine


def identity(message_id: str | None = None, *, handler: str = "handler", group: str = "g") -> ProcessedId:
    return ProcessedId("topic", group, handler, message_id or f"message-{_run}-{next(_numbers)}")


def record(one: ProcessedId) -> Callable[[AsyncSession], Awaitable[None]]:
    """An effect in the database."""

    async def effect(session: AsyncSession) -> None:
        session.add(Effect(message_id=one.message_id))

    return effect


def record_plainly(one: ProcessedId) -> Callable[[Session], None]:
    def effect(session: Session) -> None:
        session.add(Effect(message_id=one.message_id))

    return effect


async def effects(engine: AsyncEngine) -> int:
    async with AsyncSession(engine) as session:
        return await session.scalar(select(func.count()).select_from(Effect)) or 0


async def marks(engine: AsyncEngine) -> int:
    async with engine.connect() as connection:
        return await connection.scalar(select(func.count()).select_from(processed)) or 0


async def until(condition: Callable[[], Awaitable[bool]], *, seconds: float = 30.0) -> None:
    """Wait for a condition; TimeoutError when it does not come."""
    with anyio.fail_after(seconds):
        while not await condition():
            await anyio.sleep(0.02)
