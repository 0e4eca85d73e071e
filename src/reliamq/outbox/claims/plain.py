"""Claims that know nothing of where rows begin: what SQLite and MySQL have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import Integer, Select, bindparam, select, union_all
from sqlalchemy.ext.asyncio import AsyncConnection

from reliamq.outbox.claims.rows import (
    LIMIT,
    MAX_BYTES,
    ROW_COLUMNS,
    bytes_before,
    lease,
    may_go,
    resting_parameters,
    share_of,
)
from reliamq.outbox.table import OutboxLease, OutboxMessage

__all__ = ["PlainClaims", "chosen_rows"]

row = OutboxMessage
_ANYTHING = {
    some_rest: select(row.bucket).where(*may_go(some_rest)).order_by(row.bucket, row.position).limit(1)
    for some_rest in (False, True)
}
_LEASE = lease(OutboxLease.bucket.in_(bindparam("buckets", expanding=True)))


class PlainClaims(ABC):
    """See :class:`reliamq.outbox.claims.Claims`.

    first_rows_of: the first rows of so many buckets, by the parameters bucket_0 and so on, share, limit, max_bytes; and
    resting, where some topics do.
    """

    def __init__(self, first_rows_of: Callable[[int, bool], Select[Any]]) -> None:
        self._first_rows_of = first_rows_of

    async def prepare(self, *, idle: bool) -> None:  # noqa: B027  # the databases with these claims need none of it
        """Nothing is needed."""

    def forget(self) -> None:  # noqa: B027
        """Nothing is known."""

    async def plan_settlement(self, connection: AsyncConnection) -> None:  # noqa: B027
        """It does."""

    async def anything(self, connection: AsyncConnection, resting: Sequence[str]) -> bool:
        """See the contract."""
        return await connection.scalar(_ANYTHING[bool(resting)], resting_parameters(resting)) is not None

    async def lease(
        self, connection: AsyncConnection, relay: str, seconds: float, resting: Sequence[str]
    ) -> Sequence[int]:
        """See the contract."""
        free = await self.free_buckets(connection, relay, resting)
        half = free[: (len(free) + 1) // 2]
        if half:
            await connection.execute(_LEASE, {"buckets": half, "relay": relay, "seconds": seconds})
        return half

    @abstractmethod
    async def free_buckets(self, connection: AsyncConnection, relay: str, resting: Sequence[str]) -> Sequence[int]:
        """Buckets with rows that may go which no other live relay holds, locked; those that waited longest first."""

    async def first_rows(
        self, connection: AsyncConnection, buckets: Sequence[int], limit: int, max_bytes: int, resting: Sequence[str]
    ) -> Sequence[Sequence[Any]]:
        """See the contract."""
        chosen = {f"bucket_{number}": bucket for number, bucket in enumerate(buckets)}
        parameters = {**chosen, "share": share_of(buckets, limit), "limit": limit, "max_bytes": max_bytes}
        question = self._first_rows_of(len(buckets), bool(resting))
        found: Sequence[Any] = (await connection.execute(question, {**parameters, **resting_parameters(resting)})).all()
        return found


def chosen_rows(buckets: int, first: Callable[[Any], Select[Any]]) -> Select[Any]:
    """The first rows of so many buckets, each by the index: one ORDER BY over all would sort the whole backlog.

    Where they end is told from lengths alone: bodies would be copied to a table on the disk for it.
    first: the first positions of one bucket.
    """
    numbers = [bindparam(f"bucket_{number}", type_=Integer) for number in range(buckets)]
    union = union_all(*[select(first(number).subquery()) for number in numbers]).subquery()
    chosen = select(union.c.position).order_by(union.c.position).limit(LIMIT).subquery()
    sized = (
        select(row.position, bytes_before().label("before")).join(chosen, chosen.c.position == row.position).subquery()
    )
    fits = (sized.c.position == row.position) & (sized.c.before < MAX_BYTES)
    return select(*ROW_COLUMNS).join(sized, fits).order_by(row.position)
