"""Claims on PostgreSQL: each question one short statement, planned by the index, beginning where rows begin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ARRAY, Integer, Select, bindparam, func, select, true
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.sql.dml import ReturningUpdate

from reliamq.outbox.claims.floors import Floors, floor_of
from reliamq.outbox.claims.plans import NO_OTHER_PLANS, by_index
from reliamq.outbox.claims.rows import (
    LIMIT,
    MAX_BYTES,
    ROW_COLUMNS,
    SHARE,
    awake,
    bytes_before,
    due,
    earlier,
    first_positions,
    free_buckets,
    lease,
    resting_parameters,
    share_of,
    waiting_for_retry,
)
from reliamq.outbox.standstill import settings_of
from reliamq.outbox.table import BUCKETS, OutboxLease, OutboxMessage

__all__ = ["PostgresqlClaims"]

row, lease_of = OutboxMessage, OutboxLease


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

    async def plan_settlement(self, connection: AsyncConnection) -> None:
        """See the contract.  A plan for all values that was made for a small table is kept when that has grown."""
        await connection.execute(_FOR_A_SETTLEMENT)

    async def anything(self, connection: AsyncConnection, resting: Sequence[str]) -> bool:
        """See the contract."""
        await by_index(connection)
        parameters = {"floors": self._floors.positions, **resting_parameters(resting)}
        return await connection.scalar(_ANYTHING[bool(resting)], parameters) is not None

    async def lease(
        self, connection: AsyncConnection, relay: str, seconds: float, resting: Sequence[str]
    ) -> Sequence[int]:
        """See the contract.  Changes how the rest of the transaction is planned, and how it commits."""
        await connection.execute(_FOR_A_LEASE)
        parameters = {"relay": relay, "seconds": seconds, "floors": self._floors.positions}
        return (await connection.scalars(_LEASE[bool(resting)], {**parameters, **resting_parameters(resting)})).all()

    async def first_rows(
        self, connection: AsyncConnection, buckets: Sequence[int], limit: int, max_bytes: int, resting: Sequence[str]
    ) -> Sequence[Sequence[Any]]:
        """See the contract.  Changes how the rest of the transaction is planned."""
        await by_index(connection)
        parameters = {"buckets": buckets, "floors": self._floors.positions, "share": share_of(buckets, limit)}
        most = {"limit": limit, "max_bytes": max_bytes, **resting_parameters(resting)}
        found: Sequence[Any] = (await connection.execute(_FIRST_ROWS[bool(resting)], {**parameters, **most})).all()
        if found:
            self._floors.claimed(found[-1].position)
        return found


# By the index of those that wait for a retry: the condition is written so that the index of all that wait would not do,
# and OFFSET keeps it from being made a join
_HELD_BACK = waiting_for_retry(not_parked=func.coalesce(earlier.parked_at, 0) == 0).offset(0).exists()


def _first(bucket: Any, some_rest: bool) -> Select[Any]:
    """The first positions of one bucket that may go.  Parameters: floors; and resting, where some topics do."""
    return first_positions(bucket, row.position >= floor_of(bucket), *due, *awake(some_rest), ~_HELD_BACK)


def _anything(some_rest: bool) -> Select[Any]:
    """A row if there is one that may go.  Parameter: floors."""
    bucket = func.generate_series(0, BUCKETS - 1).table_valued("number", name="bucket").render_derived()
    first = _first(bucket.c.number, some_rest).limit(1).lateral("first")
    return select(first.c.position).select_from(bucket.join(first, true())).limit(1)


def _first_rows(some_rest: bool) -> Select[Any]:
    """Parameters: buckets, floors, share, limit, max_bytes."""
    buckets = func.unnest(bindparam("buckets", type_=ARRAY(Integer)))
    bucket = buckets.table_valued("number", name="bucket").render_derived()
    first = _first(bucket.c.number, some_rest).limit(SHARE).lateral("first")
    positions = select(first.c.position).select_from(bucket.join(first, true()))
    chosen = positions.order_by(first.c.position).limit(LIMIT).subquery("chosen")
    # One by one, and OFFSET keeps it so: from statistics of an empty table the planner would read all that was removed
    one = select(*ROW_COLUMNS).where(row.position == chosen.c.position).offset(0).lateral("one")
    # Large bodies are kept elsewhere, and are not read for their length
    before = bytes_before(one.c.body, one.c.position)
    found = select(one, before.label("before")).select_from(chosen.join(one, true())).subquery()
    wanted = [found.c[column.key] for column in ROW_COLUMNS]
    return select(*wanted).where(found.c.before < MAX_BYTES).order_by(found.c.position)


def _lease(some_rest: bool) -> ReturningUpdate[int]:
    """Parameters: relay, seconds, floors."""
    has_rows = _first(lease_of.bucket, some_rest).limit(1).scalar_subquery().is_not(None)
    free = free_buckets(has_rows).add_columns(lease_of.until).cte("free")
    half = select((func.count() + 1) // 2).select_from(free).scalar_subquery()
    chosen = select(free.c.bucket).order_by(free.c.until).limit(half)
    return lease(lease_of.bucket.in_(chosen)).returning(lease_of.bucket)


_ANYTHING, _FIRST_ROWS, _LEASE = (
    {some_rest: question(some_rest) for some_rest in (False, True)} for question in (_anything, _first_rows, _lease)
)


# A claim need not outlive the database's crash: taken back, it is a lease that ended early
_FOR_A_LEASE = settings_of(**NO_OTHER_PLANS, synchronous_commit="off")
_FOR_A_SETTLEMENT = settings_of(jit="off", enable_seqscan="off")
