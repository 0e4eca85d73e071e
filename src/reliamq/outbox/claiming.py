"""Which rows a relay may send now, and in which order: the questions that a claim asks.

Each is written so that a planner that guesses wrong how many rows there are cannot choose to read the whole table (O6):
the statistics of a table that is mostly empty say nothing about a backlog.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from functools import cache, partial
from types import MappingProxyType
from typing import Any

from sqlalchemy import ARRAY, Integer, Select, bindparam, func, literal, or_, select, text, true, union_all
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.orm import InstrumentedAttribute, aliased

from reliamq.database import MYSQL, now_seconds
from reliamq.outbox.table import BUCKETS, OutboxLease, OutboxMessage
from reliamq.spi import Message, OutboxRow
from reliamq.spi.messages import NO_HEADERS

__all__ = ["ROW_COLUMNS", "first_bucket", "first_rows", "mysql_has_rows", "outbox_row", "waiting"]

FAIRNESS = 4  # a bucket may give that many times its even share of a claim, so that a full one is not starved

row, lease_of = OutboxMessage, OutboxLease
waiting = row.parked_at.is_(None)
ROW_COLUMNS: Sequence[InstrumentedAttribute[Any]] = (
    row.position,
    row.attempts,
    row.topic,
    row.body,
    row.message_id,
    row.type,
    row.source,
    row.time,
    row.key,
    row.content_type,
    row.only_group,
    row.headers,
)
SHARE, LIMIT = bindparam("share", type_=Integer), bindparam("limit", type_=Integer)
"""How many rows of one bucket, and of all."""
OTHER_PLANS = ("bitmapscan", "seqscan", "mergejoin", "hashjoin")
"""What PostgreSQL must not use instead of the index.  For a bucket that is not known when the plan is made it guesses
one row in two hundred, and would rather read and sort all of it: the whole backlog, where one bucket has it.
"""
_ROWS = select(*ROW_COLUMNS)


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


_due = (waiting, row.available_at <= now_seconds())
_may_go = (*_due, ~_held_back())


def first_bucket(*conditions: Any) -> Select[Any]:
    """The first bucket with a row that may go.

    Asked for in the order of the index on (bucket, position), and with a range where ``=`` would mean the same: a
    planner that guesses wrong how full a bucket is can then not choose to read the whole table (O6).
    """
    return select(row.bucket).where(*conditions, *_may_go).order_by(row.bucket, row.position).limit(1)


async def mysql_has_rows(connection: AsyncConnection) -> Any:
    """Whether a bucket has rows that may go.  MySQL reads its index from the beginning for a range of an outer row, and
    looks at every row of a bucket for those that are held back, unless it is asked bucket by bucket.
    """
    somewhere = row.bucket.in_(range(BUCKETS))  # a range of the index for each
    later = select(row.bucket).where(somewhere, waiting, row.available_at > now_seconds()).distinct()
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


async def first_rows(connection: AsyncConnection, buckets: Sequence[int], limit: int) -> Sequence[Sequence[Any]]:
    """``ROW_COLUMNS`` of the first rows of these buckets, each by the index: one ORDER BY over all would sort the whole
    backlog (O6).  Changes how the rest of the transaction is planned, and how it commits.
    """
    share = limit if len(buckets) == 1 else FAIRNESS * limit // len(buckets) + 1
    dialect = connection.dialect.name
    if dialect == "postgresql":
        await connection.execute(_FOR_THIS_TRANSACTION)
        chosen: dict[str, Any] = {"buckets": buckets}
        query = _POSTGRESQL_FIRST_ROWS
    else:
        chosen = {f"bucket_{number}": bucket for number, bucket in enumerate(buckets)}
        query = _first_rows_of(len(buckets), dialect)
    found: Sequence[Any] = (await connection.execute(query, {**chosen, "share": share, "limit": limit})).all()
    return found


def _postgresql_first_rows() -> Select[Any]:
    """Parameters: buckets, share, limit."""
    buckets = func.unnest(bindparam("buckets", type_=ARRAY(Integer)))
    bucket = buckets.table_valued("number", name="bucket").render_derived()
    first = _first_of_range(bucket.c.number).lateral("first")
    chosen = select(first.c.position).select_from(bucket.join(first, true())).order_by(first.c.position).limit(LIMIT)
    return _ROWS.where(row.position.in_(chosen)).order_by(row.position)


@cache  # one for each number of buckets: making it anew costs more than the database's work
def _first_rows_of(buckets: int, dialect: str) -> Select[Any]:
    """Of so many buckets.  Parameters: bucket_0 and so on, share, limit.

    MySQL sorts a whole bucket unless it is asked for with ``=``, and looks for each row of the table in an IN list.
    """
    first = _first_of_range if dialect not in MYSQL else partial(_mysql_first, limit=SHARE)
    numbers = [bindparam(f"bucket_{number}", type_=Integer) for number in range(buckets)]
    union = union_all(*[select(first(number).subquery()) for number in numbers]).subquery()
    chosen = select(union.c.position).order_by(union.c.position).limit(LIMIT)
    if dialect in MYSQL:
        few = chosen.subquery()
        return _ROWS.join(few, few.c.position == row.position).order_by(row.position)
    return _ROWS.where(row.position.in_(chosen)).order_by(row.position)


def _first_of_range(bucket: Any) -> Select[Any]:
    """The first positions of one bucket.  A range, as above."""
    first = select(row.position).where(row.bucket.between(bucket, bucket), *_may_go)
    return first.order_by(row.bucket, row.position).limit(SHARE)


_FOR_THIS_TRANSACTION = select(
    *[func.set_config(f"enable_{scan}", "off", True) for scan in OTHER_PLANS],
    # A claim need not outlive the database's crash: taken back, it is a lease that ended early
    func.set_config("synchronous_commit", "off", True),
)
_POSTGRESQL_FIRST_ROWS = _postgresql_first_rows()


def outbox_row(found: Sequence[Any], replays: int = 0) -> OutboxRow:
    """From what ``ROW_COLUMNS`` gives."""
    position, attempts, topic, body, message_id, kind, source, time, key, content_type, only_group, headers = found
    message = Message(
        topic,
        bytes(body),
        message_id,
        kind,
        source,
        datetime.fromisoformat(time),
        None if key is None else bytes(key),
        content_type,
        position,
        only_group,
        MappingProxyType(json.loads(headers)) if headers else NO_HEADERS,
    )
    return OutboxRow(position, message, attempts, replays)
