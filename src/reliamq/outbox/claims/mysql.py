"""Claims on MySQL and MariaDB.

They read an index from its beginning for a range of an outer row, sort a whole bucket unless it is asked for with
``=``, look for each row of the table in an IN list, make a join with the whole table of EXISTS, and read a large body
for its length.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

from sqlalchemy import Select, literal, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from reliamq.database import now_seconds
from reliamq.outbox.claims.plain import PlainClaims, chosen_rows
from reliamq.outbox.claims.rows import SHARE, awake, due, free_buckets, resting_parameters, waiting, waiting_for_retry
from reliamq.outbox.table import BUCKETS, OutboxLease, OutboxMessage

__all__ = ["MysqlClaims"]

row, lease_of = OutboxMessage, OutboxLease


class MysqlClaims(PlainClaims):
    """See :class:`reliamq.outbox.claims.Claims`.  State of one relay: how many rows a claim looks at."""

    def __init__(self) -> None:
        super().__init__(_first_rows_of)
        self._most = 0  # 0: as many as it may

    async def first_rows(
        self, connection: AsyncConnection, buckets: Sequence[int], limit: int, max_bytes: int, resting: Sequence[str]
    ) -> Sequence[Sequence[Any]]:
        """See the contract.  After a claim that its bytes have ended, the next looks at twice as many rows as that had:
        to look at thousands of large ones and take a few would last longer than a lease.
        """
        most = min(limit, self._most or limit)
        found: Sequence[Any] = await super().first_rows(connection, buckets, most, max_bytes, resting)
        if sum(len(one.body) for one in found) >= max_bytes:
            self._most = 2 * len(found)
        elif len(found) == most:
            self._most = 2 * most
        return found

    async def free_buckets(self, connection: AsyncConnection, relay: str, resting: Sequence[str]) -> Sequence[int]:
        """See ``PlainClaims``.  Buckets with rows that wait for a retry are asked for one by one."""
        somewhere = row.bucket.in_(range(BUCKETS))  # a range of the index for each
        later = select(row.bucket).where(somewhere, waiting, row.available_at > now_seconds()).distinct()
        held = (await connection.scalars(later)).all()
        some_rest, parameters = bool(resting), resting_parameters(resting)
        firsts = {bucket: _first(literal(bucket), limit=1, some_rest=some_rest) for bucket in held}
        ready = [bucket for bucket, one in firsts.items() if await connection.scalar(one, parameters) is not None]
        of_bucket = row.bucket == lease_of.bucket, *due, *awake(some_rest)
        first = select(row.bucket).where(*of_bucket).order_by(row.position).limit(1)
        free_of_holds = lease_of.bucket.not_in(held) & first.scalar_subquery().is_not(None)
        query = free_buckets(or_(lease_of.bucket.in_(ready), free_of_holds))
        return (await connection.scalars(query, {"relay": relay, **parameters})).all()


def _first(bucket: Any, limit: Any, some_rest: bool) -> Select[Any]:
    """The first rows of one bucket that may go."""
    of_bucket = (row.bucket == bucket, *due, *awake(some_rest), ~waiting_for_retry(bucket).exists())
    return select(row.position).where(*of_bucket).order_by(row.position).limit(limit)


@cache  # one for each number of buckets: making it anew costs more than the database's work
def _first_rows_of(buckets: int, some_rest: bool) -> Select[Any]:
    return chosen_rows(buckets, partial(_first, limit=SHARE, some_rest=some_rest))
