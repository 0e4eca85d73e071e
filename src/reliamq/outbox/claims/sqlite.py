"""Claims on SQLite."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

from sqlalchemy import Select
from sqlalchemy.ext.asyncio import AsyncConnection

from reliamq.outbox.claims.plain import PlainClaims, chosen_rows
from reliamq.outbox.claims.rows import SHARE, first_positions, free_buckets, may_go, resting_parameters
from reliamq.outbox.table import OutboxLease, OutboxMessage

__all__ = ["SqliteClaims"]

row, lease_of = OutboxMessage, OutboxLease


class SqliteClaims(PlainClaims):
    """See :class:`reliamq.outbox.claims.Claims`."""

    def __init__(self) -> None:
        super().__init__(_first_rows_of)

    async def free_buckets(self, connection: AsyncConnection, relay: str, resting: Sequence[str]) -> Sequence[int]:
        """See ``PlainClaims``."""
        parameters = {"relay": relay, **resting_parameters(resting)}
        return (await connection.scalars(_FREE_BUCKETS[bool(resting)], parameters)).all()


def _first(bucket: Any, limit: Any, some_rest: bool) -> Select[Any]:
    """The first rows of one bucket that may go."""
    return first_positions(bucket, *may_go(some_rest)).limit(limit)


_FREE_BUCKETS = {
    some_rest: free_buckets(_first(lease_of.bucket, 1, some_rest).scalar_subquery().is_not(None))
    for some_rest in (False, True)
}


@cache  # one for each number of buckets: making it anew costs more than the database's work
def _first_rows_of(buckets: int, some_rest: bool) -> Select[Any]:
    return chosen_rows(buckets, partial(_first, limit=SHARE, some_rest=some_rest))
