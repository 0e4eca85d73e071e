"""Which rows a relay may send now, and in which order: the questions that a claim asks, in each database's own way.

Each is written so that a planner that guesses wrong how many rows there are cannot choose to read the whole table (O6):
the statistics of a table that is mostly empty say nothing about a backlog.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from reliamq.database import MYSQL
from reliamq.outbox.claims.mysql import MysqlClaims
from reliamq.outbox.claims.postgresql import PostgresqlClaims
from reliamq.outbox.claims.sqlite import SqliteClaims

__all__ = ["Claims", "claims_on"]


class Claims(Protocol):
    """What a claim asks a database; and how a settlement finds its rows."""

    async def prepare(self, *, idle: bool) -> None:
        """Before each claim: learn what makes its questions cheap.  idle: the last one found nothing."""
        ...

    def forget(self) -> None:
        """Rows may have been put back."""
        ...

    async def plan_settlement(self, connection: AsyncConnection) -> None:
        """Have the rest of a transaction find the rows it settles by their index, whatever the planner believes."""
        ...

    async def anything(self, connection: AsyncConnection, resting: Sequence[str]) -> bool:
        """Whether any row may go, of other topics than those ``resting``."""
        ...

    async def lease(
        self, connection: AsyncConnection, relay: str, seconds: float, resting: Sequence[str]
    ) -> Sequence[int]:
        """Lease buckets with rows that may go which no other live relay holds: half of them, those that waited longest.

        Half, so that others find some too; until the transaction ends, though, all of them are locked.
        """
        ...

    async def first_rows(
        self, connection: AsyncConnection, buckets: Sequence[int], limit: int, max_bytes: int, resting: Sequence[str]
    ) -> Sequence[Sequence[Any]]:
        """``ROW_COLUMNS`` of the first rows of these buckets that may go, in the order of their positions.

        max_bytes: of bodies; the row that reaches it is the last.
        """
        ...


def claims_on(engine: AsyncEngine) -> Claims:
    """Those of the engine's database."""
    if engine.dialect.name == "postgresql":
        return PostgresqlClaims(engine)
    return MysqlClaims() if engine.dialect.name in MYSQL else SqliteClaims()
