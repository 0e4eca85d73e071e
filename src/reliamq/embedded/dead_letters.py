"""Where given-up messages rest, in the broker's own file.

A dead letter keeps the original bytes and headers and says who gave up, when and why (C5); it does not expire.
Replaying is the core's: publish, wait for the confirmation, remove.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from reliamq.embedded.database import Database
from reliamq.embedded.errors import StoreFailure, is_bad_value
from reliamq.embedded.rows import MESSAGE_JSON, columns_of, message_of
from reliamq.spi import Confirmation, DeadLetterRecord, Outcome, Rejection, RejectionReason

__all__ = ["EmbeddedDeadLetters"]

ADD = """
INSERT INTO dead_letter (key, only_group, id, type, source, time, content_type, sequence, headers, body,
  topic, group_name, handler, reason, traceback, attempts, died_at, position)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (topic, group_name, id) DO UPDATE SET
  (key, only_group, type, source, time, content_type, sequence, headers, body) =
  (excluded.key, excluded.only_group, excluded.type, excluded.source, excluded.time, excluded.content_type,
   excluded.sequence, excluded.headers, excluded.body),
  (handler, reason, traceback, attempts, died_at, position) =
  (excluded.handler, excluded.reason, excluded.traceback, excluded.attempts, excluded.died_at, excluded.position)"""

FIND = f"""
SELECT json_group_array(json_array(topic, group_name, handler, reason, traceback, attempts, died_at, position, number,
  {MESSAGE_JSON}))
FROM (
  SELECT * FROM dead_letter m
  WHERE (:topic IS NULL OR topic = :topic) AND (:group IS NULL OR group_name = :group) AND (:id IS NULL OR id = :id)
  ORDER BY number LIMIT :limit
) m"""

REMOVE = """
DELETE FROM dead_letter WHERE (topic, group_name, id, died_at) IN (
  SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]'), json_extract(value, '$[2]'),
    json_extract(value, '$[3]')
  FROM json_each(?))"""


class EmbeddedDeadLetters:
    """A :class:`~reliamq.spi.DeadLetters` on one database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, records: Sequence[DeadLetterRecord], *, deadline: float) -> Sequence[Outcome]:
        """Store dead letters; see the contract."""
        if not records:
            return ()
        try:
            rows = [_columns(record) for record in records]
            # Cancelled here: they are stored all the same; adding them again replaces them
            await self._database.write(lambda connection: connection.executemany(ADD, rows).rowcount, deadline=deadline)
        except StoreFailure as failure:
            return [failure.outcome(record.message.id) for record in records]
        except Exception as error:
            if not is_bad_value(error):
                raise
            if len(records) == 1:
                detail = f"SQLite cannot store it: {error}"
                return (Rejection(records[0].message.id, RejectionReason.INVALID, detail, error),)
            return [outcome for one in records for outcome in await self.add((one,), deadline=deadline)]
        return [Confirmation(record.message.id) for record in records]

    async def find(
        self, *, topic: str | None = None, group: str | None = None, message_id: str | None = None, limit: int = 100
    ) -> Sequence[DeadLetterRecord]:
        """Those that match, oldest first; see the contract."""
        values = {"topic": topic, "group": group, "id": message_id, "limit": max(0, limit)}
        try:
            found = await self._database.read(lambda connection: connection.execute(FIND, values).fetchone()[0])
        except StoreFailure as failure:
            raise failure.unavailable(self._database.location.url) from failure
        return [_record(row) for row in sorted(json.loads(found), key=lambda row: row[NUMBER])]

    async def remove(self, records: Sequence[DeadLetterRecord]) -> int:
        """Remove these; see the contract."""
        if not records:
            return 0
        names = json.dumps([(one.message.topic, one.group, one.message.id, one.died_at.isoformat()) for one in records])

        def job(connection: sqlite3.Connection) -> int:
            return connection.execute(REMOVE, (names,)).rowcount

        try:
            return await self._database.write(job)
        except StoreFailure as failure:
            raise failure.unavailable(self._database.location.url) from failure


NUMBER = 8


def _columns(record: DeadLetterRecord) -> tuple[Any, ...]:
    return (
        *columns_of(record.message)[3:],
        record.message.topic,
        record.group,
        record.handler,
        record.reason,
        record.traceback,
        record.attempts,
        record.died_at.isoformat(),
        record.position,
    )


def _record(row: Sequence[Any]) -> DeadLetterRecord:
    topic, group, handler, reason, traceback, attempts, died_at, position, _, *columns = row
    return DeadLetterRecord(
        message=message_of(topic, columns),
        group=group,
        handler=handler,
        reason=reason,
        traceback=traceback,
        attempts=attempts,
        died_at=datetime.fromisoformat(died_at),
        position=position,
    )
