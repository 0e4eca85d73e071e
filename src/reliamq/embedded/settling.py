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
Returned = tuple[int, float, int, str]  # position, due at, failures to add, reason

OWNED = """
SELECT json_group_array(json_array(d.position, d.claim)),
  EXISTS (SELECT 1 FROM delivery WHERE group_id = :group AND state = 0)
FROM json_each(:receipts) r CROSS JOIN delivery d
ON d.group_id = :group AND d.position = json_extract(r.value, '$[0]') AND d.claim = json_extract(r.value, '$[1]')"""

TOUCH_FROM = """
INSERT INTO touched SELECT chain, min(position) FROM delivery
WHERE group_id = :group AND position IN (SELECT value FROM json_each(:positions)) AND +chain IS NOT NULL
GROUP BY chain"""

TOUCH = """
INSERT OR IGNORE INTO touched SELECT DISTINCT chain, NULL FROM delivery
WHERE group_id = :group AND position IN (SELECT value FROM json_each(:positions)) AND +chain IS NOT NULL"""

FINISH = "DELETE FROM delivery WHERE group_id = :group AND position IN (SELECT value FROM json_each(:positions))"

NOTE_RETURNED = """
INSERT INTO returned SELECT json_extract(value, '$[0]'), key, json_extract(value, '$[1]'), json_extract(value, '$[2]'),
  json_extract(value, '$[3]')
FROM json_each(:rows)"""

GIVE_BACK = """
UPDATE delivery SET state = iif(chain IS NULL, 1, 0), owner = 0, claim = 0, begun = 0,
  due_at = r.due_at, failures = failures + r.counts, reason = r.reason
FROM returned r
WHERE delivery.group_id = :group AND delivery.position = r.position
AND delivery.position IN (SELECT position FROM returned)"""

RESERVE = """
UPDATE topic SET last = last + :count WHERE id = (SELECT topic_id FROM group_ WHERE id = :group)
RETURNING last - :count"""

GIVE_WAY = f"""
UPDATE delivery SET state = {BEHIND}, chain = NULL, owner = 0, claim = 0, begun = 0,
  due_at = r.due_at, failures = failures + r.counts, reason = r.reason, position = :before + 1 + r.place
FROM returned r
WHERE delivery.group_id = :group AND delivery.position = r.position
AND delivery.position IN (SELECT position FROM returned)"""

BEGIN = """
UPDATE delivery SET begun = 1
WHERE group_id = :group AND position IN (SELECT value FROM json_each(:positions))"""

EXTEND = """
UPDATE delivery SET due_at = :until
WHERE group_id = :group AND position IN (SELECT value FROM json_each(:positions))"""


def owned_of(connection: sqlite3.Connection, group: int, receipts: Sequence[Receipt]) -> tuple[set[Receipt], bool]:
    """Which receipts still hold, and whether anything in the group waits for its chain."""
    found, waiting = connection.execute(OWNED, {"group": group, "receipts": json.dumps(receipts)}).fetchone()
    return {(position, claim) for position, claim in json.loads(found)}, bool(waiting)


def begin(connection: sqlite3.Connection, group: int, receipts: Sequence[Receipt]) -> set[Receipt]:
    """Record starts (C4); the receipts that still hold."""
    owned, _ = owned_of(connection, group, receipts)
    connection.execute(BEGIN, {"group": group, "positions": _json(position for position, _ in owned)})
    return owned


def extend(connection: sqlite3.Connection, group: int, receipts: Sequence[Receipt], until: float) -> set[Receipt]:
    """Renew leases (C7); the receipts that still hold."""
    owned, _ = owned_of(connection, group, receipts)
    connection.execute(EXTEND, {"group": group, "until": until, "positions": _json(position for position, _ in owned)})
    return owned


def settle(
    connection: sqlite3.Connection,
    group: int,
    settlements: Sequence[tuple[Receipt, Settlement]],
    now: float,
) -> set[Receipt]:
    """End deliveries; the receipts that still held, whose deliveries are settled now."""
    owned, waiting = owned_of(connection, group, [receipt for receipt, _ in settlements])
    acked: list[int] = []
    back: list[Returned] = []
    away: list[Returned] = []
    unsettled = set(owned)
    for receipt, settlement in settlements:
        if receipt not in unsettled:
            continue
        unsettled.remove(receipt)  # settled twice in one batch: the first counts
        position, _ = receipt
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
        _return(connection, GIVE_BACK, back, {"group": group})
        give_back_later(connection, group)
    if away:
        _give_way(connection, group, away)
    if touching:
        put_in_order(connection, group)
    return owned


def _touch(connection: sqlite3.Connection, group: int, back: Sequence[Returned], ended: Sequence[int]) -> None:
    if back:
        connection.execute(TOUCH_FROM, {"group": group, "positions": _json(row[0] for row in back)})
    if ended:
        connection.execute(TOUCH, {"group": group, "positions": _json(ended)})


def _give_way(connection: sqlite3.Connection, group: int, away: Sequence[Returned]) -> None:
    """Move behind everything that the topic has now: new positions, which the cursor has yet to pass."""
    (before,) = connection.execute(RESERVE, {"group": group, "count": len(away)}).fetchone()
    _return(connection, GIVE_WAY, away, {"group": group, "before": before})


def _return(connection: sqlite3.Connection, change: str, rows: Sequence[Returned], values: dict[str, int]) -> None:
    connection.execute(NOTE_RETURNED, {"rows": json.dumps(rows)})
    connection.execute(change, values)
    connection.execute("DELETE FROM returned")


def _json(positions: Iterable[int]) -> str:
    return json.dumps(list(positions))
