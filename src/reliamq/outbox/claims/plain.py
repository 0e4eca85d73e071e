"""Claims that keep nothing in mind from one to the next: what SQLite and MySQL have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import Integer, Select, bindparam, select, union_all
from sqlalchemy.ext.asyncio import AsyncConnection

from reliamq.outbox.claims.rows import LIMIT, may_go, share_of
from reliamq.outbox.table import OutboxMessage

__all__ = ["PlainClaims", "chosen_positions"]

row = OutboxMessage
_ANYTHING = select(row.bucket).where(*may_go).order_by(row.bucket, row.position).limit(1)


class PlainClaims:
    """See :class:`reliamq.outbox.claims.Claims`; ``free_buckets`` is each database's own.

    first_rows_of: the first rows of so many buckets, by the parameters bucket_0 and so on, share, limit.
    """

    def __init__(self, first_rows_of: Callable[[int], Select[Any]]) -> None:
        self._first_rows_of = first_rows_of

    async def prepare(self, *, idle: bool) -> None:
        """Nothing is needed."""

    def forget(self) -> None:
        """Nothing is known."""

    async def by_index(self, connection: AsyncConnection) -> None:
        """It does."""

    async def anything(self, connection: AsyncConnection) -> bool:
        """See the contract."""
        return await connection.scalar(_ANYTHING) is not None

    async def first_rows(
        self, connection: AsyncConnection, buckets: Sequence[int], limit: int
    ) -> Sequence[Sequence[Any]]:
        """See the contract."""
        chosen = {f"bucket_{number}": bucket for number, bucket in enumerate(buckets)}
        parameters = {**chosen, "share": share_of(buckets, limit), "limit": limit}
        found: Sequence[Any] = (await connection.execute(self._first_rows_of(len(buckets)), parameters)).all()
        return found


def chosen_positions(buckets: int, first: Callable[[Any], Select[Any]]) -> Select[Any]:
    """The first positions of so many buckets, each by the index: one ORDER BY over all would sort the whole backlog.

    first: those of one bucket.
    """
    numbers = [bindparam(f"bucket_{number}", type_=Integer) for number in range(buckets)]
    union = union_all(*[select(first(number).subquery()) for number in numbers]).subquery()
    return select(union.c.position).order_by(union.c.position).limit(LIMIT)
