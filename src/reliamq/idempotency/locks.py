"""Distributed locks by name, on a SQL database (I4).

A lease, because a holder can die; a fencing token, because a lease can end under a holder that does not know.  The
guarded side must refuse smaller tokens; without that, no lock of any kind is safe against a paused process.
"""

from __future__ import annotations

import uuid
from contextlib import AbstractAsyncContextManager
from datetime import timedelta
from typing import Any

from sqlalchemy import and_, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine

from reliamq.database import now_seconds
from reliamq.idempotency.tables import lock as table
from reliamq.idempotency.versions import retry_on_conflict
from reliamq.spi import FencingToken
from reliamq.spi.holding import held

__all__ = ["SqlLock"]


class SqlLock:
    """The DistributedLock contract on a SQL database.  Time is the database's."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    def hold(self, name: str, *, lease: timedelta, wait: timedelta) -> AbstractAsyncContextManager[FencingToken]:
        """See :meth:`reliamq.spi.DistributedLock.hold`."""
        return held(self, name, lease=lease.total_seconds(), wait=wait.total_seconds())

    async def take(self, name: str, lease: float) -> int | None:
        """See :class:`reliamq.spi.holding.LockSteps`.  One transaction."""
        return await retry_on_conflict(lambda: self._take(name, lease))

    async def _take(self, name: str, lease: float) -> int | None:
        values = {"owner": uuid.uuid4().hex, "until": now_seconds() + lease}
        try:
            async with self._engine.begin() as connection:
                query = select(table.c.token, (table.c.until - now_seconds()).label("left")).where(table.c.name == name)
                row = (await connection.execute(query.with_for_update())).one_or_none()
                if row is None:
                    await connection.execute(insert(table).values(name=name, token=1, **values))
                    return 1
                if row.left > 0:
                    return None
                await connection.execute(
                    update(table).where(table.c.name == name).values(token=row.token + 1, **values)
                )
                return int(row.token) + 1
        except IntegrityError:  # somebody else was the first ever to take it, in the same moment
            return None

    async def renew(self, token: FencingToken, lease: float) -> bool:
        """See :class:`reliamq.spi.holding.LockSteps`."""
        return await self._change(token, until=now_seconds() + lease)

    async def give_back(self, token: FencingToken) -> None:
        """See :class:`reliamq.spi.holding.LockSteps`."""
        await self._change(token, owner=None, until=0.0)

    async def _change(self, token: FencingToken, **values: Any) -> bool:
        held_by_it = and_(table.c.name == token.name, table.c.token == token.value)
        async with self._engine.begin() as connection:
            return bool((await connection.execute(update(table).where(held_by_it).values(**values))).rowcount)
