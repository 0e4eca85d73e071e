"""Sent rows, kept for a window and sent again when a broker is found to have lost data (O7).

A confirmed row moves into a table of its own in the transaction that writes its confirm down; a replay moves it back,
with its id and its position.  So nothing that is kept is in the way of what is to be sent, and nobody pays who keeps
nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Delete,
    Executable,
    Insert,
    Select,
    any_,
    bindparam,
    delete,
    exists,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from reliamq.database import READING, now_seconds
from reliamq.outbox.standstill import end_if_it_stands_still
from reliamq.outbox.table import OutboxMessage, OutboxReplay, SentMessage, what_keeping_lacks
from reliamq.spi import ConfigurationError, KeptTopic, KeptWindow, OutboxRow
from reliamq.spi.arguments import check_time, need

__all__ = ["CHUNK", "SentRows", "these"]

CHUNK = 400  # values in one IN list: below every database's limit

Moment = datetime | timedelta
"""A moment, or how long ago it was."""

row, sent, replays = OutboxMessage, SentMessage, OutboxReplay
MESSAGE = [column.name for column in sent.__table__.columns if column.name != "sent_at"]


class SentRows:
    """The sent rows of one database's outbox.  keep: how long each is kept."""

    def __init__(self, engine: AsyncEngine, keep: timedelta) -> None:
        self._engine, self._keep = engine, keep.total_seconds()
        self._checked = False

    async def check(self) -> None:
        """Once: raises ConfigurationError when the database lacks what keeping rows needs."""
        if self._checked:
            return
        async with self._engine.connect() as connection:
            await connection.execution_options(**{READING: True})
            if missing := await connection.run_sync(what_keeping_lacks):
                raise ConfigurationError(
                    f"outbox.keep is set, but the database has no {' and no '.join(missing)}; start the application "
                    "once, which makes what is missing where it may, or let a migration make it from outbox.metadata"
                )
        self._checked = True

    # --- confirms --------------------------------------------------------------------------------------------------

    async def replays(self, connection: AsyncConnection) -> int:
        """How many replays there have been; what is claimed now carries it."""
        return int(await connection.scalar(select(replays.number)) or 0)

    async def hold(self, connection: AsyncConnection) -> int:
        """How many replays there have been.  Until the connection's transaction ends, which this begins, there is no
        other: it would pass over what is just being written down.
        """
        return await _locked_number(connection, alone=False)

    async def take_over(self, connection: AsyncConnection, confirmed: Sequence[OutboxRow], number: int) -> None:
        """Move confirmed rows here.  Those that were claimed before the last replay stay and are sent again.

        number: of replays, held.
        """
        current = [one.position for one in confirmed if one.replays == number]
        for chosen in these(connection, row, current):
            for statement in _move(connection, chosen):
                await connection.execute(statement)

    # --- replays ---------------------------------------------------------------------------------------------------

    async def window(self, since: Moment, until: Moment | None, topic: str | None) -> KeptWindow:
        """See :meth:`reliamq.spi.OutboxStore.kept`."""
        await self.check()
        async with self._engine.connect() as connection:
            await connection.execution_options(**{READING: True})
            begin, end = await _moments(connection, since, until)
            oldest = await connection.scalar(select(func.min(sent.sent_at)))
            gone = await connection.scalar(select(now_seconds() - self._keep))
            of_topic = (sent.topic, func.count(), func.min(sent.sent_at), func.max(sent.sent_at))
            query = select(*of_topic).where(*_within(begin, end, topic)).group_by(sent.topic).order_by(sent.topic)
            found = (await connection.execute(query)).all()
        topics = [KeptTopic(name, rows, _date(first), _date(last)) for name, rows, first, last in found]
        return KeptWindow(_date(begin), _date_or_none(end), _date(gone or 0.0), _date_or_none(oldest), topics)

    async def replay(self, since: Moment, until: Moment | None, topic: str | None) -> int:
        """See :meth:`reliamq.spi.OutboxStore.replay`.

        One transaction: a relay that saw a part of a key's rows would send the later ones before the earlier.
        """
        await self.check()
        async with self._engine.begin() as connection:
            await _locked_number(connection, alone=True)  # confirms that are being written down come first
            await end_if_it_stands_still(connection)
            await connection.execute(update(replays).values(number=replays.number + 1))
            window = _within(*await _moments(connection, since, until), topic)
            again = select(*_of(sent)).where(*window).order_by(sent.position)
            await connection.execute(_insert_new(connection, row, MESSAGE, again))
            moved = exists().where(row.position == sent.position)
            return int((await connection.execute(delete(sent).where(*window, moved))).rowcount)

    # --- looking after ---------------------------------------------------------------------------------------------

    async def clean(self, limit: int) -> int:
        """See :meth:`reliamq.spi.OutboxStore.clean`.  By the index, and without a write lock where nothing is over."""
        await self.check()
        over = select(sent.position).where(sent.sent_at <= now_seconds() - self._keep).order_by(sent.sent_at)
        async with self._engine.connect() as connection:
            await connection.execution_options(**{READING: True})
            positions = (await connection.scalars(over.limit(limit))).all()
        if not positions:
            return 0
        async with self._engine.begin() as connection:
            await end_if_it_stands_still(connection)
            # Sent again meanwhile, a row is younger.
            removals = [_removal(chosen, self._keep) for chosen in these(connection, sent, positions)]
            removed = [await connection.execute(removal) for removal in removals]
        return sum(one.rowcount for one in removed)

    async def count(self, connection: AsyncConnection) -> tuple[int, datetime | None]:
        """How many there are, and when the oldest was sent."""
        number, oldest = (
            await connection.execute(select(func.count(), func.min(sent.sent_at)).select_from(sent))
        ).one()
        return int(number), _date_or_none(oldest)


def these(
    connection: AsyncConnection, table: type[OutboxMessage | SentMessage], positions: Iterable[int]
) -> Iterator[ColumnElement[bool]]:
    """What finds these rows of a table, in as many statements as the database needs."""
    wanted = sorted(positions)
    if wanted and connection.dialect.name == "postgresql":  # one parameter: drivers are slow to parse hundreds
        yield table.position == any_(bindparam("positions", wanted, ARRAY(BigInteger)))
        return
    for start in range(0, len(wanted), CHUNK):
        yield table.position.in_(wanted[start : start + CHUNK])


async def _locked_number(connection: AsyncConnection, *, alone: bool) -> int:
    """How many replays there have been.  Until the transaction ends they are as many; alone: and no confirm is written.

    First in its transaction.  On PostgreSQL the table is locked and not the row: tables are given in turn, so that busy
    relays cannot keep a replay waiting, and before a transaction of any isolation sees anything.
    """
    number = select(replays.number)
    if connection.dialect.name == "postgresql":
        mode = "EXCLUSIVE" if alone else "ROW SHARE"
        await connection.exec_driver_sql(f"LOCK TABLE {replays.__tablename__} IN {mode} MODE")
    else:
        number = number.with_for_update(read=not alone)
    return int(await connection.scalar(number) or 0)


def _move(connection: AsyncConnection, chosen: ColumnElement[bool]) -> list[Executable]:
    """From the outbox to the sent rows.  A late relay may write down the same confirm, so each row is locked."""
    names = [*MESSAGE, "sent_at"]
    if connection.dialect.name == "postgresql":  # where one statement costs half of what two do
        gone = delete(row).where(chosen).returning(*_of(row)).cte("gone")
        return [_insert_new(connection, sent, names, select(*gone.c, now_seconds()))]
    there = select(*_of(row), now_seconds()).where(chosen).with_for_update()
    return [_insert_new(connection, sent, names, there), delete(row).where(chosen)]


def _of(table: type[OutboxMessage | SentMessage]) -> list[Any]:
    return [getattr(table, name) for name in MESSAGE]


def _within(begin: float, end: float | None, topic: str | None) -> list[Any]:
    conditions: list[Any] = [sent.sent_at >= begin]
    if end is not None:
        conditions.append(sent.sent_at < end)
    if topic is not None:
        conditions.append(sent.topic == topic)
    return conditions


async def _moments(connection: AsyncConnection, since: Moment, until: Moment | None) -> tuple[float, float | None]:
    """Where a window begins and ends, in seconds since 1970, by the database's clock (O8)."""
    now = float(await connection.scalar(select(now_seconds())) or 0.0)
    return _moment("since", since, now), None if until is None else _moment("until", until, now)


def _moment(what: str, moment: Moment, now: float) -> float:
    if isinstance(moment, datetime):
        need(moment.tzinfo is not None, what, "a datetime with a time zone", moment)
        return moment.timestamp()
    check_time(what, moment)
    return now - moment.total_seconds()


def _date(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _date_or_none(seconds: float | None) -> datetime | None:
    return None if seconds is None else _date(seconds)


def _removal(chosen: ColumnElement[bool], keep: float) -> Delete:
    return delete(sent).where(chosen, sent.sent_at <= now_seconds() - keep)


def _insert_new(
    connection: AsyncConnection, into: type[OutboxMessage | SentMessage], names: list[str], rows: Select[Any]
) -> Insert:
    """INSERT … SELECT that passes over what is there: an id that was added anew, a position that was handed out again.

    A row that cannot be kept twice must not keep its confirm from being written down.
    """
    if connection.dialect.name == "postgresql":
        return postgresql.insert(into).from_select(names, rows).on_conflict_do_nothing()
    if connection.dialect.name == "sqlite":
        return sqlite.insert(into).from_select(names, rows).on_conflict_do_nothing()
    return insert(into).prefix_with("IGNORE").from_select(names, rows)
