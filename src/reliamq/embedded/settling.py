"""Ending deliveries: acks, retries, releases, and the proofs of ownership before each of them.

A receipt is a position and the number of the hand-out, so what comes too late finds another number there and changes
nothing (C12).  When it returns and is committed, chains are in order.  Each step is one statement for the whole batch.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Sequence

from reliamq.embedded.chains import give_back_later, put_in_order
from reliamq.embedded.schema import BEHIND
from reliamq.spi import Ack, Release, Retry, Settlement

__all__ = ["Receipt", "begin", "extend", "owned_of", "settle"]

Receipt = tuple[int, int]

OWNED = """
SELECT json_group_array(d.position),
  EXISTS (SELECT 1 FROM delivery WHERE group_id = :group AND state = 0)
FROM json_each(:receipts) r JOIN delivery d
ON d.group_id = :group AND d.position = json_extract(r.value, '$[0]') AND d.claim = json_extract(r.value, '$[1]')"""

TOUCH_FROM = """
INSERT INTO touched SELECT chain, min(position) FROM delivery
WHERE group_id = :group AND position IN (SELECT value FROM json_each(:positions)) AND chain IS NOT NULL
GROUP BY chain"""

TOUCH = """
INSERT OR IGNORE INTO touched SELECT DISTINCT chain, NULL FROM delivery
WHERE group_id = :group AND position IN (SELECT value FROM json_each(:positions)) AND chain IS NOT NULL"""

FINISH = "DELETE FROM delivery WHERE group_id = :group AND position IN (SELECT value FROM json_each(:positions))"

GIVE_BACK = """
UPDATE delivery SET state = iif(chain IS NULL, 1, 0), owner = 0, claim = 0, begun = 0,
  due_at = json_extract(r.value, '$[1]'), failures = failures + json_extract(r.value, '$[2]'),
  reason = json_extract(r.value, '$[3]')
FROM json_each(:rows) r
WHERE delivery.group_id = :group AND delivery.position = json_extract(r.value, '$[0]')"""

RESERVE = """
UPDATE topic SET last = last + :count WHERE id = (SELECT topic_id FROM group_ WHERE id = :group)
RETURNING last - :count"""

GIVE_WAY = f"""
UPDATE delivery SET state = {BEHIND}, chain = NULL, owner = 0, claim = 0, begun = 0,
  position = :before + 1 + r.key,
  due_at = json_extract(r.value, '$[1]'), failures = failures + json_extract(r.value, '$[2]'),
  reason = json_extract(r.value, '$[3]')
FROM json_each(:rows) r
WHERE delivery.group_id = :group AND delivery.position = json_extract(r.value, '$[0]')"""

BEGIN = """
UPDATE delivery SET begun = 1
WHERE group_id = :group AND position IN (SELECT value FROM json_each(:positions))"""

EXTEND = """
UPDATE delivery SET due_at = :until
WHERE group_id = :group AND position IN (SELECT value FROM json_each(:positions))"""


def owned_of(connection: sqlite3.Connection, group: int, receipts: Sequence[Receipt]) -> tuple[set[int], bool]:
    """Which positions are still held under their receipts, and whether anything in the group waits for its chain."""
    found, waiting = connection.execute(OWNED, {"group": group, "receipts": json.dumps(receipts)}).fetchone()
    return set(json.loads(found)), bool(waiting)


def begin(connection: sqlite3.Connection, group: int, receipts: Sequence[Receipt]) -> set[int]:
    """Record starts (C4); the positions still held."""
    owned, _ = owned_of(connection, group, receipts)
    connection.execute(BEGIN, {"group": group, "positions": _json(owned)})
    return owned


def extend(connection: sqlite3.Connection, group: int, receipts: Sequence[Receipt], until: float) -> set[int]:
    """Renew leases (C7); the positions still held."""
    owned, _ = owned_of(connection, group, receipts)
    connection.execute(EXTEND, {"group": group, "until": until, "positions": _json(owned)})
    return owned


def settle(
    connection: sqlite3.Connection,
    group: int,
    settlements: Sequence[tuple[Receipt, Settlement]],
    now: float,
) -> set[int]:
    """End deliveries; the positions that were still held, and so are settled."""
    owned, waiting = owned_of(connection, group, [receipt for receipt, _ in settlements])
    acked: list[int] = []
    back: list[tuple[int, float, int, str]] = []
    away: list[tuple[int, float, int, str]] = []
    for (position, _), settlement in settlements:
        if position not in owned:
            continue
        match settlement:
            case Ack():
                acked.append(position)
            case Release():
                back.append((position, 0.0, 0, ""))
            case Retry(delivery, delay, keep_order, counts, reason):
                place = back if keep_order or delivery.message.key is None else away
                place.append((position, now + delay.total_seconds(), int(counts), reason))
    touching = waiting or bool(back or away)
    if touching:
        _touch(connection, group, back, acked + [row[0] for row in away])
    if acked:
        connection.execute(FINISH, {"group": group, "positions": _json(acked)})
    if back:
        connection.execute(GIVE_BACK, {"group": group, "rows": json.dumps(back)})
        give_back_later(connection, group)
    if away:
        _give_way(connection, group, away)
    if touching:
        put_in_order(connection, group)
    return owned


def _touch(
    connection: sqlite3.Connection,
    group: int,
    back: Sequence[tuple[int, float, int, str]],
    ended: Sequence[int],
) -> None:
    if back:
        connection.execute(TOUCH_FROM, {"group": group, "positions": _json(row[0] for row in back)})
    if ended:
        connection.execute(TOUCH, {"group": group, "positions": _json(ended)})


def _give_way(connection: sqlite3.Connection, group: int, away: Sequence[tuple[int, float, int, str]]) -> None:
    """Move behind everything that the topic has now: new positions, which the cursor has yet to pass."""
    (before,) = connection.execute(RESERVE, {"group": group, "count": len(away)}).fetchone()
    connection.execute(GIVE_WAY, {"group": group, "before": before, "rows": json.dumps(away)})


def _json(positions: Iterable[int]) -> str:
    return json.dumps(list(positions))
