"""Handing out: which messages a member gets next.

First what was set aside or came back and is ready, then the log from the group's cursor on.  A message whose key
somebody else holds, or whose key waits for its retry, is set aside, so that other keys are not held up by it (C3), and
the log is read once.  So a hand-out costs what it hands out, whatever the backlog.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from reliamq.embedded.chains import join_due, pass_cursor, recover_expired
from reliamq.embedded.rows import MESSAGE_JSON
from reliamq.embedded.schema import LEASED, WAITING

__all__ = ["Member", "Taken", "Wanted", "claim", "look"]

# CROSS JOIN and INDEXED BY tell SQLite the order and the index: without statistics it may read a whole group instead.
READ_GROUP = """
SELECT g.name, g.cursor, t.last, g.claims + 1,
  EXISTS (SELECT 1 FROM delivery d WHERE d.group_id = g.id AND d.state = 2 AND d.due_at <= :now),
  EXISTS (SELECT 1 FROM delivery d INDEXED BY delivery_behind
    WHERE d.group_id = g.id AND d.state = 4 AND d.position <= g.cursor),
  EXISTS (SELECT 1 FROM delivery d WHERE d.group_id = g.id AND d.state = 3 AND d.due_at <= :now),
  EXISTS (SELECT 1 FROM delivery d WHERE d.group_id = g.id AND d.state = 1 AND d.due_at <= :now)
FROM group_ g JOIN topic t ON t.id = g.topic_id WHERE g.id = :group"""

LOOK = """
SELECT g.cursor < t.last
  OR EXISTS (SELECT 1 FROM delivery d INDEXED BY delivery_behind
    WHERE d.group_id = g.id AND d.state = 4 AND d.position <= g.cursor),
  (SELECT min(due_at) FROM delivery d WHERE d.group_id = g.id AND d.state = 1),
  (SELECT min(due_at) FROM delivery d WHERE d.group_id = g.id AND d.state = 2),
  (SELECT min(due_at) FROM delivery d WHERE d.group_id = g.id AND d.state = 3)
FROM group_ g JOIN topic t ON t.id = g.topic_id WHERE g.id = :group"""

HEADS = """
SELECT json_group_array(json_array(position, size, keyed)) FROM (
  SELECT d.position, m.size, d.chain IS NOT NULL AS keyed FROM delivery d JOIN message m ON m.seq = d.seq
  WHERE d.group_id = :group AND d.state = 1 AND d.due_at <= :now ORDER BY d.due_at, d.position LIMIT :limit)"""

FOLLOWERS = """
SELECT json_group_array(json_array(h.value, f.position, m.size, f.due_at))
FROM json_each(:heads) h
CROSS JOIN delivery d ON d.group_id = :group AND d.position = h.value
CROSS JOIN delivery f ON f.group_id = :group AND f.position IN (
  SELECT w.position FROM delivery w
  WHERE w.group_id = :group AND w.chain = d.chain AND w.state = 0 ORDER BY w.position LIMIT :depth)
JOIN message m ON m.seq = f.seq"""

LEASE = """
UPDATE delivery SET state = 2, owner = :owner, claim = :claim, due_at = :until
WHERE group_id = :group AND position IN (SELECT value FROM json_each(:positions))"""

SCAN = """
SELECT json_group_array(json_array(seq, size, blocked)) FROM (
  SELECT m.seq, m.size, m.key IS NOT NULL AND (
    EXISTS (SELECT 1 FROM delivery d WHERE d.group_id = :group AND d.chain = m.key AND d.state < 2)
    OR coalesce((
      SELECT d.owner FROM delivery d WHERE d.group_id = :group AND d.chain = m.key AND d.state = 2 LIMIT 1
      ), :owner) <> :owner) AS blocked
  FROM message m
  WHERE m.seq > :cursor AND m.seq <= :last AND (m.only_group IS NULL OR m.only_group = :name)
  ORDER BY m.seq LIMIT :scan)"""

TAKE_IN = """
INSERT INTO delivery (group_id, position, seq, chain, state, due_at, owner, claim)
SELECT :group, m.seq, m.seq, m.key, :state, :until, :owner, :claim
FROM json_each(:seqs) s CROSS JOIN message m ON m.seq = s.value"""

ADVANCE = "UPDATE group_ SET cursor = :cursor, claims = :claim WHERE id = :group"

FETCH = f"""
SELECT json_group_array(json_array(d.position, d.failures, d.crashes, d.handed_out, {MESSAGE_JSON}))
FROM json_each(:positions) p
CROSS JOIN delivery d ON d.group_id = :group AND d.position = p.value
CROSS JOIN message m ON m.seq = d.seq"""

SCAN_AHEAD = 500  # rows read beyond what is wanted, once there are some that must be set aside
ROUNDS = 3  # readings of the log in one transaction, so that it stays short


@dataclass(frozen=True, slots=True)
class Member:
    """One subscription: the group's and its own number."""

    group: int
    owner: int


@dataclass(slots=True)
class Wanted:
    """What still fits into a hand-out.  The first message always fits."""

    messages: int
    bytes: int
    empty: bool = True

    @property
    def room(self) -> bool:
        """Whether anything more can fit."""
        return self.messages > 0 and (self.bytes > 0 or self.empty)

    def fits(self, size: int) -> bool:
        """Whether one more of ``size`` bytes fits; if so it is counted."""
        if self.messages <= 0 or (size > self.bytes and not self.empty):
            return False
        self.messages -= 1
        self.bytes -= size
        self.empty = False
        return True


@dataclass(frozen=True, slots=True)
class Taken:
    """A hand-out.  rows: position, failures, crashes, handed_out and the message's columns, in order of position."""

    claim: int
    rows: Sequence[Sequence[Any]]


def look(connection: sqlite3.Connection, member: Member, now: float) -> float | None:
    """Seconds until there may be something to hand out: 0 for now, None for not before somebody does something."""
    found = connection.execute(LOOK, {"group": member.group}).fetchone()
    if found is None or found[0]:
        return 0.0
    due = [time for time in found[1:] if time is not None]
    return max(0.0, min(due) - now) if due else None


def claim(connection: sqlite3.Connection, member: Member, wanted: Wanted, *, now: float, until: float) -> Taken | None:
    """Lease the next messages to ``member``; None when the group is gone."""
    values = {"group": member.group, "owner": member.owner, "now": now, "until": until}
    state = connection.execute(READ_GROUP, values).fetchone()
    if state is None:
        return None
    name, cursor, last, number, expired, passed, due, ready = state
    values |= {"name": name, "claim": number}
    if expired:
        recover_expired(connection, member.group, now)
    if passed:
        pass_cursor(connection, member.group, cursor)
    if due or passed:
        join_due(connection, member.group, now)
    positions = _take_ready(connection, values, wanted) if ready or expired or due or passed else []
    scan = wanted.messages
    for _ in range(ROUNDS):
        if cursor == last or not wanted.room:
            break
        taken, cursor = _take_from_log(connection, values, wanted, (cursor, last, scan))
        positions += taken
        scan = wanted.messages + SCAN_AHEAD  # something was set aside
    if not positions and scan > wanted.messages:  # the cursor may just have passed one that gave way
        pass_cursor(connection, member.group, cursor)
        join_due(connection, member.group, now)
        positions = _take_ready(connection, values, wanted)
    connection.execute(ADVANCE, {**values, "cursor": cursor})
    return Taken(number, _fetch(connection, member.group, positions) if positions else ())


def _take_ready(connection: sqlite3.Connection, values: dict[str, Any], wanted: Wanted) -> list[int]:
    """Lease ready messages, and with those that start a chain the next of it."""
    limit = wanted.messages
    (found,) = connection.execute(HEADS, {**values, "limit": limit}).fetchone()
    heads: list[int] = []
    chains: list[int] = []
    for position, size, keyed in json.loads(found):
        if not wanted.fits(size):
            break
        heads.append(position)
        if keyed:
            chains.append(position)
    positions = heads + _followers(connection, values, wanted, chains) if chains else heads
    if positions:
        connection.execute(LEASE, {**values, "positions": json.dumps(positions)})
    return positions


def _followers(
    connection: sqlite3.Connection, values: dict[str, Any], wanted: Wanted, heads: Sequence[int]
) -> list[int]:
    """The next of each chain, as many as fit, evenly; of each chain a piece without a hole, all of it due."""
    if wanted.messages <= 0:
        return []
    depth = -(-wanted.messages // len(heads))
    (found,) = connection.execute(
        FOLLOWERS, {"group": values["group"], "heads": json.dumps(heads), "depth": depth}
    ).fetchone()
    taken: list[int] = []
    ended: set[int] = set()
    for head, position, size, due_at in sorted(json.loads(found)):
        if head not in ended and due_at <= values["now"] and wanted.fits(size):
            taken.append(position)
        else:
            ended.add(head)
    return taken


def _take_from_log(
    connection: sqlite3.Connection, values: dict[str, Any], wanted: Wanted, piece: tuple[int, int, int]
) -> tuple[list[int], int]:
    """Lease messages from the log, set aside those whose keys are taken; what was leased, and how far this came."""
    cursor, last, scan = piece
    (found,) = connection.execute(SCAN, {**values, "cursor": cursor, "last": last, "scan": scan}).fetchone()
    rows = sorted(json.loads(found))
    taken: list[int] = []
    aside: list[int] = []
    reached = last if len(rows) < scan else rows[-1][0]
    for seq, size, blocked in rows:
        if blocked:
            aside.append(seq)
        elif wanted.fits(size):
            taken.append(seq)
        else:
            reached = max([cursor, *taken[-1:], *aside[-1:]])
            break
    if aside:
        put = {"state": WAITING, "until": 0, "owner": 0, "claim": 0}
        connection.execute(TAKE_IN, {**values, **put, "seqs": json.dumps(aside)})
    if taken:
        connection.execute(TAKE_IN, {**values, "state": LEASED, "seqs": json.dumps(taken)})
    return taken, reached


def _fetch(connection: sqlite3.Connection, group: int, positions: Sequence[int]) -> list[list[Any]]:
    (found,) = connection.execute(FETCH, {"group": group, "positions": json.dumps(positions)}).fetchone()
    rows: list[list[Any]] = json.loads(found)
    rows.sort(key=_position)
    return rows


def _position(row: Sequence[Any]) -> int:
    return int(row[0])
