"""Claims on SQLite."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from sqlalchemy import Select
from sqlalchemy.ext.asyncio import AsyncConnection

from reliamq.outbox.claims.plain import PlainClaims, chosen_rows
from reliamq.outbox.claims.rows import SHARE, first_positions, free_buckets, may_go
from reliamq.outbox.table import OutboxLease, OutboxMessage

__all__ = ["SqliteClaims"]

row, lease_of = OutboxMessage, OutboxLease


class SqliteClaims(PlainClaims):
    """See :class:`reliamq.outbox.claims.Claims`."""

    def __init__(self) -> None:
        super().__init__(_first_rows_of)

    async def free_buckets(self, connection: AsyncConnection, relay: str) -> Sequence[int]:
        """See ``PlainClaims``."""
        return (await connection.scalars(_FREE_BUCKETS, {"relay": relay})).all()


_FREE_BUCKETS = free_buckets(first_positions(lease_of.bucket, *may_go).limit(1).scalar_subquery().is_not(None))


@cache  # one for each number of buckets: making it anew costs more than the database's work
def _first_rows_of(buckets: int) -> Select[Any]:
    return chosen_rows(buckets, lambda bucket: first_positions(bucket, *may_go).limit(SHARE))
