"""Claims on SQLite."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from sqlalchemy import Integer, Select, bindparam, select, union_all
from sqlalchemy.ext.asyncio import AsyncConnection

from reliamq.outbox.claims.rows import LIMIT, ROW_COLUMNS, SHARE, first_positions, free_buckets, may_go, share_of
from reliamq.outbox.table import OutboxLease, OutboxMessage

__all__ = ["SqliteClaims"]

row, lease_of = OutboxMessage, OutboxLease


class SqliteClaims:
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
        """See the contract."""
        return (await connection.scalars(_FREE_BUCKETS, {"relay": relay})).all()

    async def first_rows(
        self, connection: AsyncConnection, buckets: Sequence[int], limit: int
    ) -> Sequence[Sequence[Any]]:
        """See the contract."""
        chosen = {f"bucket_{number}": bucket for number, bucket in enumerate(buckets)}
        parameters = {**chosen, "share": share_of(buckets, limit), "limit": limit}
        found: Sequence[Any] = (await connection.execute(_first_rows_of(len(buckets)), parameters)).all()
        return found


_FREE_BUCKETS = free_buckets(first_positions(lease_of.bucket, *may_go).limit(1).scalar_subquery().is_not(None))


@cache  # one for each number of buckets: making it anew costs more than the database's work
def _first_rows_of(buckets: int) -> Select[Any]:
    """The first rows of so many buckets, each by the index: one ORDER BY over all would sort the whole backlog.

    Parameters: bucket_0 and so on, share, limit.
    """
    numbers = [bindparam(f"bucket_{number}", type_=Integer) for number in range(buckets)]
    union = union_all(
        *[select(first_positions(number, *may_go).limit(SHARE).subquery()) for number in numbers]
    ).subquery()
    chosen = select(union.c.position).order_by(union.c.position).limit(LIMIT)
    return select(*ROW_COLUMNS).where(row.position.in_(chosen)).order_by(row.position)
