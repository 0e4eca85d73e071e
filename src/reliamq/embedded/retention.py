"""Removing what every group has finished, once its topic's retention is over.

It never removes a message that a group has not finished (C9), removes in small pieces between other work, and reads no
backlog: from time to time it notes how far all groups have come, and what was noted a retention ago may go.  When to
sweep is the worker's business.
"""

from __future__ import annotations

import sqlite3
import time

from reliamq.embedded.schema import TOPIC_SHIFT

__all__ = ["Sweeper"]

PIECE = 2_000  # messages looked at in one transaction: some ten milliseconds
AGAIN_LEAST, AGAIN_FOR_EACH = 1.0, 0.000_1  # seconds until the messages passed over are looked at again
MARKS = 64  # notes kept within one retention

READ_TOPICS = """
SELECT t.id, t.retention,
  coalesce((SELECT min(cursor) FROM group_ WHERE topic_id = t.id), 0) AS floor,
  coalesce((SELECT max(at) FROM finished WHERE topic_id = t.id), 0) AS marked_at,
  coalesce((SELECT max(seq) FROM finished WHERE topic_id = t.id), t.id << :shift) AS marked,
  coalesce((SELECT max(seq) FROM finished WHERE topic_id = t.id AND at <= :now - t.retention), 0) AS expired
FROM topic t"""

MARK = "INSERT OR REPLACE INTO finished (topic_id, at, seq) VALUES (:topic, :now, :floor)"

FORGET_MARKS = "DELETE FROM finished WHERE topic_id = :topic AND seq < :expired"

END_OF_PIECE = """
SELECT count(*), max(seq) FROM (
  SELECT seq FROM message WHERE seq > :after AND seq <= :limit ORDER BY seq LIMIT :piece)"""

REMOVE = """
DELETE FROM message WHERE seq > :after AND seq <= :end
AND NOT EXISTS (
  SELECT 1 FROM group_ g JOIN delivery d ON d.group_id = g.id AND d.position = message.seq
  WHERE g.topic_id = :topic)
AND NOT EXISTS (SELECT 1 FROM delivery d WHERE d.seq = message.seq AND d.position <> d.seq)"""


class Sweeper:
    """Remembers, for each topic, how far this process has swept since it last began at the start.

    What is passed over because a group has not finished it is looked at again, the later the more there is of it.
    """

    def __init__(self) -> None:
        self._swept: dict[int, int] = {}
        self._passed_over = 0
        self._again_at = 0.0

    def has_work(self, connection: sqlite3.Connection, now: float) -> bool:
        """Whether a sweep would do anything; a few index look-ups for each topic."""
        if self._passed_over and time.monotonic() >= self._again_at:
            self._swept.clear()
            self._passed_over = 0
        return any(
            (floor > marked and _mark_is_due(retention, marked_at, now))
            or min(expired, floor) > self._swept.get(topic, 0)
            for topic, retention, floor, marked_at, marked, expired in _topics(connection, now)
        )

    def sweep(self, connection: sqlite3.Connection, now: float) -> bool:
        """Do one piece of work for each topic; True when there is more."""
        more = False
        for topic, retention, floor, marked_at, marked, expired in _topics(connection, now):
            if floor > marked and _mark_is_due(retention, marked_at, now):
                connection.execute(MARK, {"topic": topic, "now": now, "floor": floor})
                expired = floor if retention <= 0 else expired
            if expired:
                connection.execute(FORGET_MARKS, {"topic": topic, "expired": expired})
            more |= self._remove_piece(connection, topic, min(expired, floor))
        return more

    def _remove_piece(self, connection: sqlite3.Connection, topic: int, limit: int) -> bool:
        after = self._swept.get(topic, topic << TOPIC_SHIFT)
        if limit <= after:
            return False
        piece = {"topic": topic, "after": after, "limit": limit, "piece": PIECE}
        count, end = connection.execute(END_OF_PIECE, piece).fetchone()
        if count:
            removed = connection.execute(REMOVE, {"topic": topic, "after": after, "end": end}).rowcount
            self._pass_over(count - removed)
        self._swept[topic] = end if count == PIECE else limit
        return bool(count == PIECE)

    def _pass_over(self, messages: int) -> None:
        self._passed_over += messages
        self._again_at = time.monotonic() + AGAIN_LEAST + self._passed_over * AGAIN_FOR_EACH


def _topics(connection: sqlite3.Connection, now: float) -> list[tuple[int, float, int, float, int, int]]:
    return connection.execute(READ_TOPICS, {"now": now, "shift": TOPIC_SHIFT}).fetchall()


def _mark_is_due(retention: float, marked_at: float, now: float) -> bool:
    return abs(now - marked_at) >= retention / MARKS
