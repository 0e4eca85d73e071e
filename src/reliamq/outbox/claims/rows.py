"""Rows that a relay may send, in terms that all databases share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from types import MappingProxyType
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Double,
    Integer,
    Select,
    String,
    Update,
    bindparam,
    func,
    or_,
    select,
    text,
    update,
)
from sqlalchemy.orm import InstrumentedAttribute, aliased

from reliamq.database import now_seconds
from reliamq.outbox.table import OutboxLease, OutboxMessage
from reliamq.spi import Message, OutboxRow
from reliamq.spi.messages import NO_HEADERS

__all__ = [
    "LIMIT",
    "MAX_BYTES",
    "ROW_COLUMNS",
    "SHARE",
    "awake",
    "bytes_before",
    "due",
    "earlier",
    "first_positions",
    "free_buckets",
    "lease",
    "may_go",
    "outbox_row",
    "resting_parameters",
    "share_of",
    "waiting",
    "waiting_for_retry",
]

FAIRNESS = 4  # a bucket may give that many times its even share of a claim, so that a full one is not starved

row, lease_of = OutboxMessage, OutboxLease
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
"""Parameters: how many rows of one bucket, and of all."""
MAX_BYTES = bindparam("max_bytes", type_=BigInteger)
"""A parameter: the row with so many ``bytes_before`` it is none of the claim."""
earlier = aliased(row, name="earlier")
_earlier_waits = earlier.parked_at.is_(None)


def waiting_for_retry(bucket: Any = row.bucket, not_parked: Any = _earlier_waits) -> Select[Any]:
    """Earlier rows of the row's key that wait for their retry and hold it back (O3).

    bucket: the row's, or a constant: MySQL uses the index on (bucket, available_at) whole with that alone.
    not_parked: this condition, as the database needs it.
    """
    return select(earlier.position).where(
        earlier.bucket == bucket,
        not_parked,
        text("earlier.available_at > 0"),  # as the partial index says it
        earlier.available_at > now_seconds(),
        earlier.key == row.key,
        earlier.topic == row.topic,
    )


waiting = row.parked_at.is_(None)
due = (waiting, row.available_at <= now_seconds())


def awake(some_rest: bool) -> tuple[ColumnElement[bool], ...]:
    """The condition that a row's topic does not rest, where some do.  Parameter: resting.

    A condition of its own, because each row of a resting topic is read for it.
    """
    return (row.topic.not_in(bindparam("resting", type_=String, expanding=True)),) if some_rest else ()


def may_go(some_rest: bool) -> tuple[ColumnElement[bool], ...]:
    """The conditions of a row that may be sent.  The costly one comes last."""
    return (*due, *awake(some_rest), ~waiting_for_retry().exists())


def resting_parameters(resting: Sequence[str]) -> dict[str, Any]:
    """For ``awake``."""
    return {"resting": list(resting)} if resting else {}


def bytes_before(body: Any = row.body, position: Any = row.position) -> ColumnElement[int]:
    """Of the bodies before a row."""
    return func.coalesce(func.sum(func.length(body)).over(order_by=position, rows=(None, -1)), 0)


def first_positions(bucket: Any, *conditions: Any) -> Select[Any]:
    """Of one bucket, those that fulfil the conditions.

    Asked for in the order of the index on (bucket, position), and with a range where ``=`` would mean the same: a
    planner that guesses wrong how full a bucket is can then not choose to read the whole table.
    """
    first = select(row.position).where(row.bucket.between(bucket, bucket), *conditions)
    return first.order_by(row.bucket, row.position)


def free_buckets(has_rows: ColumnElement[bool]) -> Select[int]:
    """Buckets that no other live relay holds, locked; those that waited longest first.  has_rows: whether it has any.

    Parameter: relay.
    """
    free = or_(lease_of.until <= now_seconds(), lease_of.owner == bindparam("relay", type_=String))
    query = select(lease_of.bucket).where(free, has_rows).order_by(lease_of.until)
    return query.with_for_update(skip_locked=True, of=lease_of)


def lease(chosen: ColumnElement[bool]) -> Update:
    """Lease the chosen buckets.  Parameters: relay, seconds."""
    until = now_seconds() + bindparam("seconds", type_=Double)
    return update(lease_of).where(chosen).values(owner=bindparam("relay"), until=until)


def share_of(buckets: Sequence[int], limit: int) -> int:
    """Most rows of one of so many buckets in a claim of so many rows."""
    return limit if len(buckets) == 1 else FAIRNESS * limit // len(buckets) + 1


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
