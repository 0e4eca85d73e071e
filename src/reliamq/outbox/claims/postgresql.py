"""Claims on PostgreSQL: each question one short statement, planned by the index, beginning where rows begin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ARRAY, BigInteger, BindParameter, ColumnElement, Integer, Select, bindparam, func, select, true
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from reliamq.outbox.claims.floors import FLOORS, Floors, floor_of
from reliamq.outbox.claims.rows import LIMIT, ROW_COLUMNS, SHARE, first_positions, share_of
from reliamq.outbox.table import BUCKETS, OutboxLease, OutboxMessage

__all__ = ["PostgresqlClaims"]

row, lease_of = OutboxMessage, OutboxLease
OTHER_PLANS = ("bitmapscan", "seqscan", "mergejoin", "hashjoin")
"""What must not be used instead of the index.  For a bucket that is not known when the plan is made PostgreSQL guesses
one row in two hundred, and would rather read and sort all of it: the whole backlog, where one bucket has it.
"""


class PostgresqlClaims:
    """See :class:`reliamq.outbox.claims.Claims`."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._floors = Floors(engine)

    async def prepare(self, *, idle: bool) -> None:
        """See the contract."""
        await self._floors.look(idle=idle)

    def forget(self) -> None:
        """See the contract."""
        self._floors.forget()

    async def anything(self, connection: AsyncConnection) -> bool:
        """See the contract."""
        return await connection.scalar(_ANYTHING, {"floors": self._floors.positions}) is not None

    async def has_rows(self, connection: AsyncConnection) -> ColumnElement[bool]:
        """See the contract.  Changes how the rest of the transaction is planned, and how it commits."""
        await connection.execute(_FOR_THIS_TRANSACTION)
        floors = bindparam("floors", self._floors.positions, ARRAY(BigInteger))
        return _first(lease_of.bucket, floors).limit(1).scalar_subquery().is_not(None)

    async def first_rows(
        self, connection: AsyncConnection, buckets: Sequence[int], limit: int
    ) -> Sequence[Sequence[Any]]:
        """See the contract."""
        parameters = {"buckets": buckets, "floors": self._floors.positions, "share": share_of(buckets, limit)}
        found: Sequence[Any] = (await connection.execute(_FIRST_ROWS, {**parameters, "limit": limit})).all()
        if found:
            self._floors.claimed(found[-1].position)
        return found


def _first(bucket: Any, floors: BindParameter[Any] = FLOORS) -> Select[Any]:
    """The first positions of one bucket that may go."""
    return first_positions(bucket, row.position >= floor_of(bucket, floors))


def _anything() -> Select[Any]:
    """A row if there is one that may go.  Parameter: floors."""
    bucket = func.generate_series(0, BUCKETS - 1).table_valued("number", name="bucket").render_derived()
    first = _first(bucket.c.number).limit(1).lateral("first")
    return select(first.c.position).select_from(bucket.join(first, true())).limit(1)


def _first_rows() -> Select[Any]:
    """Parameters: buckets, floors, share, limit."""
    buckets = func.unnest(bindparam("buckets", type_=ARRAY(Integer)))
    bucket = buckets.table_valued("number", name="bucket").render_derived()
    first = _first(bucket.c.number).limit(SHARE).lateral("first")
    chosen = select(first.c.position).select_from(bucket.join(first, true())).order_by(first.c.position).limit(LIMIT)
    return select(*ROW_COLUMNS).where(row.position.in_(chosen)).order_by(row.position)


_ANYTHING, _FIRST_ROWS = _anything(), _first_rows()
_FOR_THIS_TRANSACTION = select(
    *[func.set_config(f"enable_{scan}", "off", True) for scan in OTHER_PLANS],
    # A claim need not outlive the database's crash: taken back, it is a lease that ended early
    func.set_config("synchronous_commit", "off", True),
)
