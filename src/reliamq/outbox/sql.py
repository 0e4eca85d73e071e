"""The relay's side of the outbox table: claim, settle, look after.  What becomes of sent rows is in ``sent``.

A relay leases *buckets* of keys for one batch, by the database's clock (O8): relays share the work without talking to
each other, and a dead one's share is free when its lease ends.  No lock and no transaction is held while a broker is
asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Delete, Update, bindparam, case, delete, func, select, update
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from reliamq.database import READING, now_seconds
from reliamq.outbox.claims import claims_on
from reliamq.outbox.claims.rows import ROW_COLUMNS, outbox_row, waiting
from reliamq.outbox.sent import CHUNK, SentRows, these
from reliamq.outbox.standstill import end_if_it_stands_still
from reliamq.outbox.table import OutboxLease, OutboxMessage
from reliamq.spi import CLAIM_BYTES, ConfigurationError, KeptWindow, OutboxRow, OutboxStatus, ParkedRow, Rejection

__all__ = ["SqlOutboxStore"]

LONGEST_RETRY_SECONDS = 300.0
MAX_ERROR_CHARACTERS = 2_000

row, lease_of = OutboxMessage, OutboxLease


_GIVE_BACK = update(lease_of).where(lease_of.owner == bindparam("relay")).values(owner=None, until=now_seconds())


class SqlOutboxStore:
    """The OutboxStore contract on a SQL database.

    max_attempts: rejections of one row before it is parked (O5).
    keep: how long sent rows are kept, to be sent again (O7); 0: they are deleted, and the tables for it not needed.
    """

    def __init__(self, engine: AsyncEngine, *, max_attempts: int = 10, keep: timedelta = timedelta(0)) -> None:
        if engine.dialect.name != "sqlite":
            # At a stricter level, which is MySQL's own, one relay's claim would make another's fail, or wait
            engine = engine.execution_options(isolation_level="READ COMMITTED")
        self._engine, self._max_attempts = engine, max_attempts
        self._sent = SentRows(engine, keep) if keep else None
        self._claims, self._idle, self._replays = claims_on(engine), True, 0

    # --- sending ---------------------------------------------------------------------------------------------------

    async def claim(
        self, relay: str, *, limit: int, lease: timedelta, max_bytes: int = CLAIM_BYTES, resting: Sequence[str] = ()
    ) -> Sequence[OutboxRow]:
        """See :meth:`reliamq.spi.OutboxStore.claim`.

        Raises ConfigurationError when rows are to be kept and the database lacks the tables for it.
        """
        if self._sent is not None:
            await self._sent.check()
        await self._claims.prepare(idle=self._idle)
        if self._idle and not await self._anything_to_send(resting):
            return []
        rows = await self._claim(relay, limit, lease, max(1, max_bytes), resting)
        self._idle = not rows
        return rows

    async def _claim(
        self, relay: str, limit: int, lease: timedelta, max_bytes: int, resting: Sequence[str]
    ) -> Sequence[OutboxRow]:
        """Buckets first, in a transaction of their own: while it lasts no other relay finds any."""
        async with self._engine.connect() as connection:
            async with connection.begin():
                buckets = await self._claims.lease(connection, relay, lease.total_seconds(), resting)
            if not buckets:
                return []
            await connection.execution_options(**{READING: True})
            rows = await self._first_rows(connection, buckets, limit, max_bytes, resting)
        if not rows:  # they were taken away just now: nobody is to wait for a lease on nothing
            await self.settle(relay, confirmed=(), rejected=())
        return rows

    async def _first_rows(
        self, connection: AsyncConnection, buckets: Sequence[int], limit: int, max_bytes: int, resting: Sequence[str]
    ) -> list[OutboxRow]:
        """Of buckets that are leased: what was sent of them before is gone by now."""
        replays = 0 if self._sent is None else await self._sent.replays(connection)
        if replays != self._replays:
            self._replays = replays
            self._claims.forget()
        found = await self._claims.first_rows(connection, buckets, limit, max_bytes, resting)
        return [outbox_row(one, replays) for one in found]

    async def _anything_to_send(self, resting: Sequence[str]) -> bool:
        """An idle relay must not take a write lock each time it looks."""
        async with self._engine.connect() as connection:
            await connection.execution_options(**{READING: True})
            return await self._claims.anything(connection, resting)

    async def settle(
        self, relay: str, *, confirmed: Sequence[OutboxRow], rejected: Sequence[tuple[OutboxRow, Rejection]]
    ) -> None:
        """See :meth:`reliamq.spi.OutboxStore.settle`.  One transaction."""
        async with self._engine.begin() as connection:
            replays = 0 if self._sent is None else await self._sent.hold(connection)
            await self._claims.plan_settlement(connection)
            if self._sent is None:
                for chosen in these(connection, row, [one.position for one in confirmed]):
                    await connection.execute(delete(row).where(chosen))
            else:
                await self._sent.take_over(connection, confirmed, replays)
            for one, rejection in rejected:
                if rejection.reason.judges_message:
                    await connection.execute(self._after_rejection(one, rejection))
            await connection.execute(_GIVE_BACK, {"relay": relay})

    def _after_rejection(self, one: OutboxRow, rejection: Rejection) -> Any:
        change = update(row).where(row.position == one.position)
        error = f"{rejection.reason}: {rejection.detail}"[:MAX_ERROR_CHARACTERS]
        attempts = one.attempts + 1
        if attempts >= self._max_attempts:
            return change.values(error=error, attempts=attempts, parked_at=now_seconds())
        delay = min(float(2**attempts), LONGEST_RETRY_SECONDS)
        return change.values(error=error, attempts=attempts, available_at=now_seconds() + delay)

    # --- looking after ---------------------------------------------------------------------------------------------

    async def status(self) -> OutboxStatus:
        """See :meth:`reliamq.spi.OutboxStore.status`."""
        if self._sent is not None:
            await self._sent.check()
        query = select(
            func.count(),
            func.count(row.parked_at),
            now_seconds() - func.min(case((waiting, row.created_at))),
            func.count(case((waiting & (row.attempts > 0), 1))),
            func.max(case((waiting, row.attempts))),
        ).select_from(row)
        async with self._engine.connect() as connection:
            await connection.execution_options(**{READING: True})
            every, parked, oldest, retrying, attempts = (await connection.execute(query)).one()
            kept, since = (0, None) if self._sent is None else await self._sent.count(connection)
        age = None if oldest is None else max(0.0, float(oldest))
        return OutboxStatus(every - parked, parked, age, kept, since, retrying, attempts or 0)

    async def parked(self, *, limit: int) -> Sequence[ParkedRow]:
        """See :meth:`reliamq.spi.OutboxStore.parked`."""
        query = (
            select(row.error, row.parked_at, *ROW_COLUMNS)
            .where(row.parked_at.is_not(None))
            .order_by(row.position)
            .limit(limit)
        )
        async with self._engine.connect() as connection:
            await connection.execution_options(**{READING: True})
            found = (await connection.execute(query)).all()
        return [ParkedRow(outbox_row(one), error or "", datetime.fromtimestamp(at, UTC)) for error, at, *one in found]

    async def requeue(self, message_ids: Sequence[str] | None) -> int:
        """See :meth:`reliamq.spi.OutboxStore.requeue`."""
        back = update(row).values(parked_at=None, attempts=0, available_at=0.0)
        requeued = await self._change_parked(back, message_ids)
        self._claims.forget()
        return requeued

    async def purge(self, message_ids: Sequence[str] | None) -> int:
        """See :meth:`reliamq.spi.OutboxStore.purge`."""
        return await self._change_parked(delete(row), message_ids)

    async def _change_parked(self, change: Update | Delete, message_ids: Sequence[str] | None) -> int:
        """One transaction: all, or nothing."""
        change = change.where(row.parked_at.is_not(None))
        parts = [change]
        if message_ids is not None:
            starts = range(0, len(message_ids), CHUNK)
            parts = [change.where(row.message_id.in_(message_ids[start : start + CHUNK])) for start in starts]
        async with self._engine.begin() as connection:
            await end_if_it_stands_still(connection)
            return sum([int((await connection.execute(part)).rowcount) for part in parts])

    # --- sent rows -------------------------------------------------------------------------------------------------

    async def kept(
        self, *, since: datetime | timedelta, until: datetime | timedelta | None = None, topic: str | None = None
    ) -> KeptWindow:
        """See :meth:`reliamq.spi.OutboxStore.kept`."""
        return await self._sent_rows().window(since, until, topic)

    async def replay(
        self, *, since: datetime | timedelta, until: datetime | timedelta | None = None, topic: str | None = None
    ) -> int:
        """See :meth:`reliamq.spi.OutboxStore.replay`."""
        replayed = await self._sent_rows().replay(since, until, topic)
        self._claims.forget()
        return replayed

    async def clean(self, *, limit: int) -> int:
        """See :meth:`reliamq.spi.OutboxStore.clean`."""
        return 0 if self._sent is None else await self._sent.clean(limit)

    def _sent_rows(self) -> SentRows:
        if self._sent is None:
            raise ConfigurationError(
                "sent rows are not kept, so there is nothing to send again; set outbox.keep, such as '1d', and what is "
                "sent from then on can be"
            )
        return self._sent
