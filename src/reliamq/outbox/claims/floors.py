"""Where the rows of each bucket begin: below it there is nothing but rows that were sent and removed.

PostgreSQL cannot forget removed rows while a transaction of anybody is open that might see them, and a claim would look
at each of them again: 276 ms beside 100,000 of them, where 20 are enough.  So each relay remembers where rows begin.

Nothing may ever appear below a floor: it would come late, and its key out of order.  Positions are drawn at INSERT and
seen at COMMIT.  So a floor is raised only to a position of which it is known that nobody who drew one before it is
still at work: whoever writes to the table has its lock in mode ROW EXCLUSIVE before he draws, and to the end of his
transaction (PostgreSQL's documentation, "Table-Level Locks").  Rows that are put back below it, by a requeue or a
replay in another process, are found by a look from the beginning every few seconds.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import (
    ARRAY,
    BigInteger,
    ColumnElement,
    Select,
    bindparam,
    cast,
    column,
    func,
    select,
    table,
)
from sqlalchemy.dialects.postgresql import REGCLASS
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.sql.elements import Grouping

from reliamq.outbox.claims.plans import by_index
from reliamq.outbox.claims.rows import waiting
from reliamq.outbox.table import BUCKETS, OutboxMessage

__all__ = ["Floors", "floor_of"]

LOOK_SECONDS, WHOLE_SECONDS = 0.2, 5.0
"""How often floors are raised while rows are sent, and how often they are looked for from the beginning."""

row = OutboxMessage


@dataclass(frozen=True, slots=True)
class Mark:
    """A moment.  last: a position that had been drawn.  writers: the transactions that wrote to the table, also those
    that were prepared.
    """

    last: int
    writers: frozenset[str]


class Floors:
    """positions: by bucket, where its rows begin.  State of one relay."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._looked_at, self._whole_at = float("-inf"), time.monotonic()
        self._server: datetime | None = None
        self._looking = False
        self._last = 0
        self._mark: Mark | None = None
        self.positions = [0] * BUCKETS

    def claimed(self, last: int) -> None:
        """A row with this position was there."""
        self._last = max(self._last, last)

    def forget(self) -> None:
        """Begin anew: rows may have been put back anywhere."""
        self._last, self._mark, self.positions = 0, None, [0] * BUCKETS

    async def look(self, *, idle: bool) -> None:
        """Raise the floors, if it is time to.

        At READ COMMITTED each statement sees what is committed when it begins.  One look at a time: what it learns is
        true of the mark that it began with.
        """
        now = time.monotonic()
        if self._looking or now < self._looked_at + (WHOLE_SECONDS if idle else LOOK_SECONDS):
            return
        self._looked_at, self._looking = now, True
        try:
            async with self._engine.connect() as connection:
                await connection.execution_options(isolation_level="READ COMMITTED")
                async with connection.begin():
                    await by_index(connection)
                    await self._look(connection, now)
        finally:
            self._looking = False

    async def _look(self, connection: AsyncConnection, now: float) -> None:
        if (server := await connection.scalar(select(func.pg_postmaster_start_time()))) != self._server:
            self._server = server  # another one may draw positions again that the one before has lost
            self.forget()
        if now >= self._whole_at + WHOLE_SECONDS:
            self._whole_at = now
            await self._look_below(connection)
        if (mark := self._mark) is not None:
            if mark.writers & await _writers(connection):
                return
            await self._raise(connection, mark.last + 1)
        last = self._last  # before the writers: who is not among them draws a later one
        self._mark = Mark(last, await _writers(connection))

    async def _look_below(self, connection: AsyncConnection) -> None:
        """Rows may have been put back, or positions begun anew."""
        known = self.positions
        found = await connection.execute(_BEGINNINGS, {"floors": [0] * BUCKETS})
        if any(one.position < known[one.number] for one in found):
            self.forget()

    async def _raise(self, connection: AsyncConnection, most: int) -> None:
        """most: all rows below this position are seen by now."""
        known = self.positions
        rows = await connection.execute(_BEGINNINGS, {"floors": known})
        found = {one.number: one.position for one in rows}
        if self.positions is known:  # not forgotten meanwhile
            self.positions = [min(found.get(bucket, most), most) for bucket in range(BUCKETS)]


async def _writers(connection: AsyncConnection) -> frozenset[str]:
    return frozenset(await connection.scalars(_WRITERS))


def _beginnings() -> Select[Any]:
    """Buckets that have rows, and the first position of each that is not below its floor.  Parameter: floors."""
    bucket = func.generate_series(0, BUCKETS - 1).table_valued("number", name="bucket").render_derived()
    of_bucket = row.bucket.between(bucket.c.number, bucket.c.number), row.position >= floor_of(bucket.c.number)
    first = select(row.position).where(*of_bucket, waiting).order_by(row.bucket, row.position).limit(1)
    found = select(bucket.c.number, first.scalar_subquery().label("position")).subquery()
    return select(found).where(found.c.position.is_not(None))


def _holders_of_the_table() -> Select[Any]:
    names = ("virtualtransaction", "database", "relation", "mode")
    lock, database = table("pg_locks", *map(column, names)), table("pg_database", column("oid"), column("datname"))
    here = select(database.c.oid).where(database.c.datname == func.current_database()).scalar_subquery()
    ours = lock.c.database == here, lock.c.relation == cast(OutboxMessage.__tablename__, REGCLASS)
    return select(lock.c.virtualtransaction).where(*ours, lock.c.mode == "RowExclusiveLock")


FLOORS = bindparam("floors", type_=ARRAY(BigInteger))
"""A parameter: ``Floors.positions``."""


def floor_of(bucket: Any) -> ColumnElement[int]:
    """The floor of a bucket, in SQL."""
    floor: ColumnElement[int] = Grouping(FLOORS)[bucket + 1]
    return floor


_WRITERS, _BEGINNINGS = _holders_of_the_table(), _beginnings()
