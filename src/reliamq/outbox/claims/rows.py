"""Rows that a relay may send, in terms that all databases share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from types import MappingProxyType
from typing import Any

from sqlalchemy import Integer, Select, bindparam, select, text
from sqlalchemy.orm import InstrumentedAttribute, aliased

from reliamq.database import now_seconds
from reliamq.outbox.table import OutboxMessage
from reliamq.spi import Message, OutboxRow
from reliamq.spi.messages import NO_HEADERS

__all__ = [
    "LIMIT",
    "ROW_COLUMNS",
    "SHARE",
    "due",
    "first_positions",
    "held_back",
    "may_go",
    "outbox_row",
    "share_of",
    "waiting",
]

FAIRNESS = 4  # a bucket may give that many times its even share of a claim, so that a full one is not starved

row = OutboxMessage
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


def held_back(bucket: Any = row.bucket) -> Any:
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


waiting = row.parked_at.is_(None)
due = (waiting, row.available_at <= now_seconds())
may_go = (*due, ~held_back())


def first_positions(bucket: Any, *conditions: Any) -> Select[Any]:
    """Of one bucket, those that may go.

    Asked for in the order of the index on (bucket, position), and with a range where ``=`` would mean the same: a
    planner that guesses wrong how full a bucket is can then not choose to read the whole table.
    """
    first = select(row.position).where(row.bucket.between(bucket, bucket), *conditions, *may_go)
    return first.order_by(row.bucket, row.position)


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
