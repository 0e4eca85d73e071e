"""Claims on MySQL and MariaDB.

They read an index from its beginning for a range of an outer row, sort a whole bucket unless it is asked for with
``=``, look for each row of the table in an IN list, and make a join with the whole table of EXISTS.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from sqlalchemy import Integer, Select, bindparam, literal, or_, select, union_all
from sqlalchemy.ext.asyncio import AsyncConnection

from reliamq.database import now_seconds
from reliamq.outbox.claims.rows import (
    LIMIT,
    ROW_COLUMNS,
    SHARE,
    due,
    free_buckets,
    may_go,
    share_of,
    waiting,
    waiting_for_retry,
)
from reliamq.outbox.table import BUCKETS, OutboxLease, OutboxMessage

__all__ = ["MysqlClaims"]

row, lease_of = OutboxMessage, OutboxLease


class MysqlClaims:
    """See :class:`reliamq.outbox.claims.Claims`."""

    async def prepare(self, *, idle: bool) -> None:
        """Nothing is needed."""

    def forget(self) -> None:
        """Nothing is known."""

    async def by_index(self, connection: AsyncConnection) -> None:
        """It does."""

    async def anything(self, connection: AsyncConnection) -> bool:
        """See the contract."""
        first = select(row.bucket).where(*may_go).order_by(row.bucket, row.position).limit(1)
        return await connection.scalar(first) is not None

    async def free_buckets(self, connection: AsyncConnection, relay: str) -> Sequence[int]:
        """See the contract.  Buckets with rows that wait for a retry are asked for one by one."""
        somewhere = row.bucket.in_(range(BUCKETS))  # a range of the index for each
        later = select(row.bucket).where(somewhere, waiting, row.available_at > now_seconds()).distinct()
        held = (await connection.scalars(later)).all()
        ready = [bucket for bucket in held if await connection.scalar(_first(literal(bucket), 1)) is not None]
        first = select(row.bucket).where(row.bucket == lease_of.bucket, *due).order_by(row.position).limit(1)
        free_of_holds = lease_of.bucket.not_in(held) & first.scalar_subquery().is_not(None)
        query = free_buckets(or_(lease_of.bucket.in_(ready), free_of_holds))
        return (await connection.scalars(query, {"relay": relay})).all()

    async def first_rows(
        self, connection: AsyncConnection, buckets: Sequence[int], limit: int
    ) -> Sequence[Sequence[Any]]:
        """See the contract."""
        chosen = {f"bucket_{number}": bucket for number, bucket in enumerate(buckets)}
        parameters = {**chosen, "share": share_of(buckets, limit), "limit": limit}
        found: Sequence[Any] = (await connection.execute(_first_rows_of(len(buckets)), parameters)).all()
        return found


def _first(bucket: Any, limit: Any) -> Select[Any]:
    """The first rows of one bucket that may go."""
    of_bucket = (row.bucket == bucket, *due, ~waiting_for_retry(bucket).exists())
    return select(row.position).where(*of_bucket).order_by(row.position).limit(limit)


@cache  # one for each number of buckets: making it anew costs more than the database's work
def _first_rows_of(buckets: int) -> Select[Any]:
    """The first rows of so many buckets.  Parameters: bucket_0 and so on, share, limit."""
    numbers = [bindparam(f"bucket_{number}", type_=Integer) for number in range(buckets)]
    union = union_all(*[select(_first(number, SHARE).subquery()) for number in numbers]).subquery()
    chosen = select(union.c.position).order_by(union.c.position).limit(LIMIT).subquery()
    return select(*ROW_COLUMNS).join(chosen, chosen.c.position == row.position).order_by(row.position)
