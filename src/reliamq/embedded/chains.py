"""Keeping chains in order: the first of a chain is ready, unless one of it is leased, and the others wait.

A chain is what one key has behind a group's cursor; ``schema.sql`` has its states.  Callers note the chains that they
changed in the temporary table ``touched`` and then call :func:`put_in_order`.  It promises C3; why a message left its
place is the callers' business.  Every step is one statement for any number of chains.
"""

from __future__ import annotations

import sqlite3

__all__ = ["give_back_later", "join_due", "pass_cursor", "put_in_order", "recover_expired", "release_owner"]

# `first` is the place from which on leases of the chain must come back, because one before them did.
TOUCH_EXPIRED = """
INSERT INTO touched SELECT chain, min(position) FROM delivery
WHERE group_id = :group AND state = 2 AND due_at <= :now AND chain IS NOT NULL GROUP BY chain"""

COUNT_AS_LOST = """handed_out = 1, crashes = crashes + begun, begun = 0, owner = 0, claim = 0, due_at = 0,
  state = iif(chain IS NULL, 1, 0)"""

RECOVER = f"UPDATE delivery SET {COUNT_AS_LOST} WHERE group_id = :group AND state = 2 AND due_at <= :now"

RECOVER_LATER = f"""
UPDATE delivery SET {COUNT_AS_LOST}
WHERE group_id = :group AND position IN (
  SELECT d.position FROM touched t CROSS JOIN delivery d
  ON d.group_id = :group AND d.chain = t.chain AND d.state = 2 AND d.position > t.first)"""

GIVE_BACK_LATER = """
UPDATE delivery SET state = 0, owner = 0, claim = 0, begun = 0, due_at = 0
WHERE group_id = :group AND position IN (
  SELECT d.position FROM touched t CROSS JOIN delivery d
  ON d.group_id = :group AND d.chain = t.chain AND d.state = 2 AND d.position > t.first)"""

TOUCH_OWNED = """
INSERT INTO touched SELECT DISTINCT chain, NULL FROM delivery INDEXED BY delivery_due
WHERE group_id = :group AND state = 2 AND owner = :owner AND (:claim IS NULL OR claim = :claim)
AND chain IS NOT NULL"""

RELEASE_OWNED = """
UPDATE delivery INDEXED BY delivery_due
SET state = iif(chain IS NULL, 1, 0), owner = 0, claim = 0, begun = 0, due_at = 0
WHERE group_id = :group AND state = 2 AND owner = :owner AND (:claim IS NULL OR claim = :claim)"""

CURSOR_PASSED = """
UPDATE delivery INDEXED BY delivery_behind SET state = 3
WHERE group_id = :group AND state = 4 AND position <= :cursor"""

TOUCH_DUE = """
INSERT INTO touched SELECT DISTINCT m.key, NULL FROM delivery d JOIN message m ON m.seq = d.seq
WHERE d.group_id = :group AND d.state = 3 AND d.due_at <= :now AND m.key IS NOT NULL"""

JOIN_DUE = """
UPDATE delivery SET chain = m.key, state = iif(m.key IS NULL, 1, 0), due_at = 0 FROM message m
WHERE m.seq = delivery.seq AND delivery.group_id = :group AND delivery.state = 3 AND delivery.due_at <= :now"""

# A chain with nothing leased starts with its first; with something leased it has no start.
NO_LONGER_FIRST = """
UPDATE delivery SET state = 0 WHERE group_id = :group AND position IN (
  SELECT r.position FROM touched t CROSS JOIN delivery r ON r.group_id = :group AND r.chain = t.chain AND r.state = 1
  WHERE EXISTS (SELECT 1 FROM delivery d WHERE d.group_id = :group AND d.chain = t.chain AND d.state = 2)
  OR EXISTS (
    SELECT 1 FROM delivery d
    WHERE d.group_id = :group AND d.chain = t.chain AND d.state = 0 AND d.position < r.position))
"""

FIRST_IS_READY = """
UPDATE delivery SET state = 1 WHERE group_id = :group AND position IN (
  SELECT (
    SELECT d.position FROM delivery d
    WHERE d.group_id = :group AND d.chain = t.chain AND d.state = 0 ORDER BY d.position LIMIT 1)
  FROM touched t
  WHERE NOT EXISTS (SELECT 1 FROM delivery d WHERE d.group_id = :group AND d.chain = t.chain AND d.state IN (1, 2)))"""


def put_in_order(connection: sqlite3.Connection, group: int) -> None:
    """Make the noted chains right again, and forget that they were noted."""
    values = {"group": group}
    connection.execute(NO_LONGER_FIRST, values)
    connection.execute(FIRST_IS_READY, values)
    connection.execute("DELETE FROM touched")


def recover_expired(connection: sqlite3.Connection, group: int, now: float) -> None:
    """Take back what nobody settled or extended in time (C2), and what the same member held after it in its chain.

    A recorded start that was not settled counts as a crash (C4).
    """
    values = {"group": group, "now": now}
    connection.execute(TOUCH_EXPIRED, values)
    connection.execute(RECOVER, values)
    connection.execute(RECOVER_LATER, values)
    put_in_order(connection, group)


def give_back_later(connection: sqlite3.Connection, group: int) -> None:
    """Unlease what lies behind ``first`` in the noted chains, as never attempted (C3)."""
    connection.execute(GIVE_BACK_LATER, {"group": group})


def release_owner(connection: sqlite3.Connection, group: int, owner: int, claim: int | None = None) -> None:
    """Give back all that a member holds, or got in one hand-out, in its old place, as never attempted (C8)."""
    values = {"group": group, "owner": owner, "claim": claim}
    connection.execute(TOUCH_OWNED, values)
    connection.execute(RELEASE_OWNED, values)
    put_in_order(connection, group)


def pass_cursor(connection: sqlite3.Connection, group: int, cursor: int) -> None:
    """Those that gave way and have now been passed by all of their key's others wait for their time alone."""
    connection.execute(CURSOR_PASSED, {"group": group, "cursor": cursor})


def join_due(connection: sqlite3.Connection, group: int, now: float) -> None:
    """Put those that gave way, and whose time has come, back into their chains (C6)."""
    values = {"group": group, "now": now}
    connection.execute(TOUCH_DUE, values)
    connection.execute(JOIN_DUE, values)
    put_in_order(connection, group)
