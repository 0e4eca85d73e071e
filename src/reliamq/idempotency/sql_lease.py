"""Leases for effects outside a database, kept in one; time is the database's.

One row for each effect, taken under a row lock, so that two workers never both start.  A crashed holder's lease ends by
time alone.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from sqlalchemy import and_, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from reliamq.database import now_seconds
from reliamq.idempotency.cleaning import remove_expired
from reliamq.idempotency.tables import lease as table
from reliamq.idempotency.versions import retry_on_conflict
from reliamq.spi import LeaseGrant, LeaseState, ProcessedId

__all__ = ["SqlLeaseStore"]


class SqlLeaseStore:
    """The IdempotencyStore contract on a SQL database.

    remember: how long the row of an effect that was never completed is kept after its lease.  Its token must go on
    growing for as long as the message may come again, so it is at least the window of processed ids (I5).
    """

    def __init__(self, engine: AsyncEngine, *, remember: timedelta = timedelta(days=14)) -> None:
        self._engine, self._remember = engine, remember.total_seconds()

    async def acquire(self, identity: ProcessedId, *, lease: timedelta) -> LeaseGrant | LeaseState:
        """See :meth:`reliamq.spi.IdempotencyStore.acquire`.  One transaction."""
        return await retry_on_conflict(lambda: self._acquire(identity, lease.total_seconds()))

    async def _acquire(self, identity: ProcessedId, seconds: float) -> LeaseGrant | LeaseState:
        try:
            async with self._engine.begin() as connection:
                query = select(
                    table.c.token, table.c.done, table.c.result, (table.c.until - now_seconds()).label("left")
                ).where(_is(identity))
                row = (await connection.execute(query.with_for_update())).one_or_none()
                if row is None:
                    return await self._start(connection, identity, seconds)
                if row.done:
                    return LeaseState(done=True, result=row.result)
                if row.left > 0:
                    return LeaseState(done=False, busy_seconds=float(row.left))
                await connection.execute(
                    update(table).where(_is(identity)).values(token=row.token + 1, **self._running(seconds))
                )
                return LeaseGrant(identity, row.token + 1, seconds)
        except IntegrityError:  # somebody inserted the row in the same moment and holds it now
            return LeaseState(done=False, busy_seconds=seconds)

    async def _start(self, connection: AsyncConnection, identity: ProcessedId, seconds: float) -> LeaseGrant:
        await connection.execute(
            insert(table).values(
                topic=identity.topic,
                group_name=identity.group,
                handler=identity.handler,
                message_id=identity.message_id,
                token=1,
                done=False,
                **self._running(seconds),
            )
        )
        return LeaseGrant(identity, 1, seconds)

    async def extend(self, grant: LeaseGrant, *, lease: timedelta) -> bool:
        """See :meth:`reliamq.spi.IdempotencyStore.extend`."""
        return await self._change(grant, **self._running(lease.total_seconds()))

    async def complete(self, grant: LeaseGrant, *, result: bytes | None, keep: timedelta) -> bool:
        """See :meth:`reliamq.spi.IdempotencyStore.complete`."""
        expires_at = now_seconds() + keep.total_seconds()
        return await self._change(grant, done=True, result=result, expires_at=expires_at)

    async def abandon(self, grant: LeaseGrant) -> None:
        """See :meth:`reliamq.spi.IdempotencyStore.abandon`."""
        await self._change(grant, until=0.0)

    async def _change(self, grant: LeaseGrant, **values: Any) -> bool:
        held = and_(_is(grant.identity), table.c.token == grant.token, table.c.done.is_(False))

        async def change() -> bool:
            async with self._engine.begin() as connection:
                return bool((await connection.execute(update(table).where(held).values(**values))).rowcount)

        return await retry_on_conflict(change)

    def _running(self, seconds: float) -> dict[str, Any]:
        return {"until": now_seconds() + seconds, "expires_at": now_seconds() + seconds + self._remember}

    async def clean(self, *, limit: int) -> int:
        """See :meth:`reliamq.spi.IdempotencyStore.clean`."""
        return await remove_expired(self._engine, table, limit)


def _is(identity: ProcessedId) -> Any:
    return and_(
        table.c.topic == identity.topic,
        table.c.group_name == identity.group,
        table.c.handler == identity.handler,
        table.c.message_id == identity.message_id,
    )
