"""The relay's side of the outbox table: claim, settle, look after.  What becomes of sent rows is in ``sent``.

A relay leases *buckets* of keys for one batch, by the database's clock (O8): relays share the work without talking to
each other, and a dead one's share is free when its lease ends.  No lock and no transaction is held while a broker is
asked.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import cache
from types import MappingProxyType
from typing import Any

from sqlalchemy import (
    Delete,
    Integer,
    Select,
    Update,
    bindparam,
    case,
    delete,
    func,
    literal,
    or_,
    select,
    text,
    union_all,
    update,
)
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.orm import aliased

from reliamq.database import MYSQL, READING, now_seconds
from reliamq.outbox.sent import CHUNK, SentRows, chunks
from reliamq.outbox.table import BUCKETS, OutboxLease, OutboxMessage
from reliamq.spi import ConfigurationError, KeptWindow, Message, OutboxRow, OutboxStatus, ParkedRow, Rejection
from reliamq.spi.messages import NO_HEADERS

__all__ = ["SqlOutboxStore"]

LONGEST_RETRY_SECONDS = 300.0
FAIRNESS = 4  # a bucket may give that many times its even share of a claim, so that a full one is not starved
MAX_ERROR_CHARACTERS = 2_000

row, lease_of = OutboxMessage, OutboxLease
_waiting = row.parked_at.is_(None)


class SqlOutboxStore:
    """The OutboxStore contract on a SQL database.

    max_attempts: rejections of one row before it is parked (O5).
    keep: how long sent rows are kept, to be sent again (O7); 0: they are deleted, and the tables for it not needed.
    """

    def __init__(self, engine: AsyncEngine, *, max_attempts: int = 10, keep: timedelta = timedelta(0)) -> None:
        if engine.dialect.name in MYSQL:
            # At its default level a claim would see rows as they were before it had their buckets, and send again what
            # the relay before it has just sent
            engine = engine.execution_options(isolation_level="READ COMMITTED")
        self._engine, self._max_attempts = engine, max_attempts
        self._sent = SentRows(engine, keep) if keep else None

    # --- sending ---------------------------------------------------------------------------------------------------

    async def claim(self, relay: str, *, limit: int, lease: timedelta) -> Sequence[OutboxRow]:
        """See :meth:`reliamq.spi.OutboxStore.claim`.  One transaction.

        Raises ConfigurationError when rows are to be kept and the database lacks the tables for it.
        """
        if self._sent is not None:
            await self._sent.check()
        if not await self._anything_to_send():
            return []
        async with self._engine.begin() as connection:
            buckets = await self._free_buckets(connection, relay)
            if not buckets:
                return []
            await connection.execute(
                update(lease_of)
                .where(lease_of.bucket.in_(buckets))
                .values(owner=relay, until=now_seconds() + lease.total_seconds())
            )
            replays = 0 if self._sent is None else await self._sent.replays(connection)
            found = await connection.execute(*_first_rows(buckets, limit, connection.dialect.name))
            rows = [_outbox_row(one, replays) for one in found]
            if not rows:  # sent by others just now: nobody is to wait for a lease on nothing
                await connection.rollback()
            return rows

    async def _anything_to_send(self) -> bool:
        """An idle relay must not take a write lock each time it looks."""
        async with self._engine.connect() as connection:
            await connection.execution_options(**{READING: True})
            return await connection.scalar(_first_bucket()) is not None

    async def _free_buckets(self, connection: AsyncConnection, relay: str) -> Sequence[int]:
        """Buckets with rows to send that no live relay holds; the half that waited longest, so that others find some
        too.
        """
        if self._engine.dialect.name in MYSQL:
            has_rows = await _mysql_has_rows(connection)
        else:
            has_rows = _first_bucket(row.bucket >= lease_of.bucket).scalar_subquery() == lease_of.bucket
        free = or_(lease_of.until <= now_seconds(), lease_of.owner == relay)
        query = select(lease_of.bucket).where(free, has_rows).order_by(lease_of.until)
        buckets = (await connection.scalars(query.with_for_update(skip_locked=True, of=lease_of))).all()
        return buckets[: (len(buckets) + 1) // 2]

    async def settle(
        self, relay: str, *, confirmed: Sequence[OutboxRow], rejected: Sequence[tuple[OutboxRow, Rejection]]
    ) -> None:
        """See :meth:`reliamq.spi.OutboxStore.settle`.  One transaction."""
        async with self._engine.begin() as connection:
            if self._sent is None:
                for positions in chunks(sorted(one.position for one in confirmed)):
                    await connection.execute(delete(row).where(row.position.in_(positions)))
            else:
                await self._sent.take_over(connection, confirmed)
            for one, rejection in rejected:
                await connection.execute(self._after_rejection(one, rejection))
            await connection.execute(
                update(lease_of).where(lease_of.owner == relay).values(owner=None, until=now_seconds())
            )

    def _after_rejection(self, one: OutboxRow, rejection: Rejection) -> Any:
        change = update(row).where(row.position == one.position)
        error = f"{rejection.reason}: {rejection.detail}"[:MAX_ERROR_CHARACTERS]
        if not rejection.reason.judges_message:
            return change.values(error=error)
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
            now_seconds() - func.min(case((_waiting, row.created_at))),
            func.count(case((_waiting & (row.attempts > 0), 1))),
            func.max(case((_waiting, row.attempts))),
        ).select_from(row)
        async with self._engine.connect() as connection:
            await connection.execution_options(**{READING: True})
            every, parked, oldest, retrying, attempts = (await connection.execute(query)).one()
            kept, since = (0, None) if self._sent is None else await self._sent.count(connection)
        age = None if oldest is None else max(0.0, float(oldest))
        return OutboxStatus(every - parked, parked, age, kept, since, retrying, attempts or 0)

    async def parked(self, *, limit: int) -> Sequence[ParkedRow]:
        """See :meth:`reliamq.spi.OutboxStore.parked`."""
        query = select(row).where(row.parked_at.is_not(None)).order_by(row.position).limit(limit)
        async with self._engine.connect() as connection:
            await connection.execution_options(**{READING: True})
            found = (await connection.execute(query)).all()
        return [
            ParkedRow(_outbox_row(one), one.error or "", datetime.fromtimestamp(one.parked_at, UTC)) for one in found
        ]

    async def requeue(self, message_ids: Sequence[str] | None) -> int:
        """See :meth:`reliamq.spi.OutboxStore.requeue`."""
        return await self._change_parked(update(row).values(parked_at=None, attempts=0, available_at=0.0), message_ids)

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
        return await self._sent_rows().replay(since, until, topic)

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


def _held_back(bucket: Any = row.bucket) -> Any:
    """Whether an earlier row of the same key waits for its retry (O3).

    bucket: the row's, or a constant: MySQL uses the index on (bucket, available_at) whole with that alone.
    """
    earlier = aliased(row, name="earlier")
    return (
        select(earlier.position)
        .where(
            earlier.bucket == bucket,
            earlier.parked_at.is_(None),
            text("earlier.available_at > 0"),  # as the partial index says it
            earlier.available_at > now_seconds(),
            earlier.key == row.key,
            earlier.topic == row.topic,
        )
        .exists()
    )


_due = (_waiting, row.available_at <= now_seconds())
_may_go = (*_due, ~_held_back())


def _first_bucket(*conditions: Any) -> Select[Any]:
    """The first bucket with a row that may go.

    Asked for in the order of the index on (bucket, position), and with a range where ``=`` would mean the same: a
    planner that guesses wrong how full a bucket is can then not choose to read the whole table (O6).
    """
    return select(row.bucket).where(*conditions, *_may_go).order_by(row.bucket, row.position).limit(1)


async def _mysql_has_rows(connection: AsyncConnection) -> Any:
    """Whether a bucket has rows that may go.  MySQL reads its index from the beginning for a range of an outer row, and
    looks at every row of a bucket for those that are held back, unless it is asked bucket by bucket.
    """
    somewhere = row.bucket.in_(range(BUCKETS))  # a range of the index for each
    later = select(row.bucket).where(somewhere, _waiting, row.available_at > now_seconds()).distinct()
    held = (await connection.scalars(later)).all()
    ready = [bucket for bucket in held if await connection.scalar(_mysql_first(literal(bucket), 1)) is not None]
    # Not EXISTS, of which it makes a join with the whole table
    first = select(row.bucket).where(row.bucket == lease_of.bucket, *_due).order_by(row.position).limit(1)
    free_of_holds = lease_of.bucket.not_in(held) & first.scalar_subquery().is_not(None)
    return or_(lease_of.bucket.in_(ready), free_of_holds)


def _mysql_first(bucket: Any, limit: Any) -> Select[Any]:
    """The first rows of one bucket that may go."""
    may_go = (row.bucket == bucket, *_due, ~_held_back(bucket))
    return select(row.position).where(*may_go).order_by(row.position).limit(limit)


@cache  # one for each number of buckets: making it anew costs more than the database's work
def _first_rows_of(buckets: int, dialect: str) -> Select[Any]:
    """The first rows of so many buckets, each by the index: one ORDER BY over all would sort the whole backlog (O6).

    MySQL sorts a whole bucket unless it is asked for with ``=``, and looks for each row of the table in an IN list.
    Parameters: bucket_0 and so on, share (most of one bucket), limit.
    """
    share, limit = bindparam("share", type_=Integer), bindparam("limit", type_=Integer)
    firsts = []
    for number in range(buckets):
        bucket = bindparam(f"bucket_{number}", type_=Integer)
        if dialect in MYSQL:
            first = _mysql_first(bucket, share)
        else:  # a range, as above
            first = select(row.position).where(row.bucket.between(bucket, bucket), *_may_go)
            first = first.order_by(row.bucket, row.position).limit(share)
        firsts.append(select(first.subquery()))
    union = union_all(*firsts)
    if dialect in MYSQL:
        chosen = union.subquery()
        return select(row).join(chosen, chosen.c.position == row.position).order_by(row.position).limit(limit)
    return select(row).where(row.position.in_(union)).order_by(row.position).limit(limit)


def _first_rows(buckets: Sequence[int], limit: int, dialect: str) -> tuple[Select[Any], dict[str, int]]:
    share = limit if len(buckets) == 1 else FAIRNESS * limit // len(buckets) + 1
    chosen = {f"bucket_{number}": bucket for number, bucket in enumerate(buckets)}
    return _first_rows_of(len(buckets), dialect), {**chosen, "share": share, "limit": limit}


def _outbox_row(found: Any, replays: int = 0) -> OutboxRow:
    message = Message(
        topic=found.topic,
        body=bytes(found.body),
        id=found.message_id,
        type=found.type,
        source=found.source,
        time=datetime.fromisoformat(found.time),
        key=None if found.key is None else bytes(found.key),
        content_type=found.content_type,
        sequence=found.position,
        only_group=found.only_group,
        headers=MappingProxyType(json.loads(found.headers)) if found.headers else NO_HEADERS,
    )
    return OutboxRow(found.position, message, found.attempts, replays)
