"""Distributed locks by name, on a SQL database (I4).

A lease, because a holder can die; a fencing token, because a lease can end under a holder that does not know.  The
guarded side must refuse smaller tokens; without that, no lock of any kind is safe against a paused process.
"""

from __future__ import annotations

import logging
import random
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta

import anyio
from sqlalchemy import insert, select, update
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from reliamq.database import now_seconds
from reliamq.idempotency.tables import lock as table
from reliamq.idempotency.versions import retry_on_conflict
from reliamq.spi import FencingToken, LeaseLost

__all__ = ["SqlLock"]

logger = logging.getLogger("reliamq.idempotency")


class SqlLock:
    """The DistributedLock contract on a SQL database.  Time is the database's."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    @asynccontextmanager
    async def hold(self, name: str, *, lease: timedelta, wait: timedelta) -> AsyncIterator[FencingToken]:
        """See :meth:`reliamq.spi.DistributedLock.hold`."""
        owner = uuid.uuid4().hex
        token = await self._wait_for(name, owner, lease.total_seconds(), wait.total_seconds())
        failure: Exception | None = None
        lost = anyio.Event()
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._renew, name, owner, lease.total_seconds(), lost, tasks.cancel_scope)
                try:
                    yield FencingToken(name, token)
                except Exception as error:  # raised below as it is, not as a group of one
                    failure = error
                tasks.cancel_scope.cancel()
        finally:
            with anyio.CancelScope(shield=True):  # cancelled or not, others need not wait for the lease to end
                await self._release(name, owner)
        if lost.is_set():
            raise LeaseLost("", name, "the lock's lease ran out and somebody else may hold it") from failure
        if failure is not None:
            raise failure

    async def _renew(self, name: str, owner: str, lease: float, lost: anyio.Event, block: anyio.CancelScope) -> None:
        ends = anyio.current_time() + lease
        while True:
            await anyio.sleep(lease / 3)
            asked = anyio.current_time()
            try:
                with anyio.CancelScope(shield=True):  # cut off inside, SQLite's write lock could outlive it
                    held = await self._extend(name, owner, lease)
            except (SQLAlchemyError, OSError) as error:
                logger.warning("the lock '%s' cannot be renewed, trying again: %s", name, error)
                held = asked < ends
            else:
                ends = asked + lease
            if not held:
                lost.set()
                block.cancel()
                return

    async def _wait_for(self, name: str, owner: str, lease: float, wait: float) -> int:
        deadline = anyio.current_time() + wait
        while True:
            token = await retry_on_conflict(lambda: self._acquire(name, owner, lease))
            if token is not None:
                return token
            if anyio.current_time() >= deadline:
                raise TimeoutError(f"lock '{name}' is held by another for longer than {wait:g} s")
            await anyio.sleep(random.uniform(0.01, 0.05))  # noqa: S311  # spreads load, no secret

    async def _acquire(self, name: str, owner: str, lease: float) -> int | None:
        values = {"owner": owner, "until": now_seconds() + lease}
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

    async def _extend(self, name: str, owner: str, lease: float) -> bool:
        async with self._engine.begin() as connection:
            held = update(table).where(table.c.name == name, table.c.owner == owner)
            return bool((await connection.execute(held.values(until=now_seconds() + lease))).rowcount)

    async def _release(self, name: str, owner: str) -> None:
        held = update(table).where(table.c.name == name, table.c.owner == owner)
        try:
            async with self._engine.begin() as connection:
                await connection.execute(held.values(owner=None, until=0.0))
        except (SQLAlchemyError, OSError) as error:  # what happened in the block says more
            logger.warning("the lock '%s' cannot be given back and its lease will run out: %s", name, error)
