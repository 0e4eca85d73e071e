"""Messages as rows and back, in bulk.

Python's sqlite3 gives up the interpreter lock for every row that it steps over, and in a busy program gets it back only
milliseconds later.  So a batch is written by one statement and read as one JSON array, which makes a batch of 500 as
good as a batch of one.  What the rows mean is left to others.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from itertools import chain
from types import MappingProxyType
from typing import Any

from reliamq.spi import Message, rfc3339
from reliamq.spi.messages import NO_HEADERS

__all__ = ["LARGEST_MESSAGE", "MESSAGE_JSON", "SIZE", "columns_of", "headers_text", "insert_messages", "message_of"]

LARGEST_BATCH = 256  # rows of one INSERT: 13 parameters each, of the 32,766 that SQLite takes
LARGEST_MESSAGE = 256 << 20  # bytes; as JSON it is twice that, and SQLite ends at a thousand million
WIDTH = 13  # columns of a message
SIZE = 2  # which of them is its size

MESSAGE_JSON = """m.id, iif(m.key IS NULL, NULL, hex(m.key)), m.only_group, m.type, m.source, m.time, m.content_type,
  m.sequence, m.headers, hex(m.body)"""


def columns_of(message: Message) -> tuple[Any, ...]:
    """A row of ``message`` in the order of the schema; seq and topic are filled in when they are known.

    Raises ValueError for a NUL in its texts: SQLite's JSON would end there.
    """
    if "\0" in f"{message.id}{message.type}{message.source}{message.content_type}{message.only_group}":
        raise ValueError("a NUL character in id, type, source, content type or group")
    return (
        None,
        None,
        message.size,
        message.key,
        message.only_group,
        message.id,
        message.type,
        message.source,
        rfc3339(message.time),
        message.content_type,
        message.sequence,
        headers_text(message.headers),
        message.body,
    )


def headers_text(headers: Mapping[str, str]) -> str | None:
    """User headers as a column."""
    return json.dumps(dict(headers)) if headers else None


def insert_messages(
    connection: sqlite3.Connection, topic_id: int, numbered: Sequence[tuple[int, tuple[Any, ...]]]
) -> int:
    """Store rows under their numbers and return how many were stored: those with an id that is known are left out."""
    stored = 0
    for start in range(0, len(numbered), LARGEST_BATCH):
        part = numbered[start : start + LARGEST_BATCH]
        room = 1 << (len(part) - 1).bit_length()
        values: list[Any] = list(chain.from_iterable(columns for _, columns in part))
        values[0::WIDTH] = [seq for seq, _ in part]
        values[1::WIDTH] = [topic_id] * len(part)
        values.extend([None] * (WIDTH * (room - len(part))))
        stored += connection.execute(_insert(room), values).rowcount
    return stored


@cache
def _insert(rows: int) -> str:
    """The INSERT of up to ``rows`` messages.  Those without a seq are padding: few statements serve all sizes."""
    row = f"({','.join('?' * WIDTH)})"
    return (
        f"INSERT INTO message SELECT * FROM (VALUES {','.join([row] * rows)}) WHERE column1 IS NOT NULL "
        "ON CONFLICT (topic_id, id) DO NOTHING"
    )


def message_of(topic: str, columns: Sequence[Any]) -> Message:
    """Read back what ``MESSAGE_JSON`` selected."""
    id_, key, only_group, type_, source, time, content_type, sequence, headers, body = columns
    return Message(
        topic,
        bytes.fromhex(body),
        id_,
        type_,
        source,
        datetime.fromisoformat(time),
        None if key is None else bytes.fromhex(key),
        content_type,
        sequence,
        only_group,
        NO_HEADERS if headers is None else MappingProxyType(json.loads(headers)),
    )
