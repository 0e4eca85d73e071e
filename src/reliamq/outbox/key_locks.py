"""Commit order within a key: what adds a message locks its key until the end of its transaction.

PostgreSQL and MySQL draw a position at INSERT and show the row at COMMIT; without the lock two transactions of one key
could commit in the other order, and a relay would send the later message first (O3).  A database with one writer needs
none.  How: ``docs/decisions/0003-relay-order.md`` and ``0019-mysql.md``.

Sorted, so that two flushes cannot block each other.  Two transactions that flush several times can, where they take the
same keys in another order, or where one adds so many keys that it locks shares of them: the database ends one with a
deadlock error, to be run again.  Whoever adds many adds them in one flush, before any other.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import BigInteger, BindParameter, Dialect, Integer, Select, func, select
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from reliamq.database import MYSQL
from reliamq.outbox.table import KEY_LOCKS, OutboxKeyLock, OutboxMessage
from reliamq.spi import ConfigurationError

__all__ = ["check_locked", "key_locks", "lock_number", "locked_position"]

KEY_SPACE, SLOT_SPACE = 0x524C4D51, 0x524C4D52  # "RLMQ": keeps our advisory locks apart from the user's
SLOTS = 256
"""Shares of all keys, on PostgreSQL."""
MANY = 1_000
"""Who adds more keys than that at a time locks all keys of their shares instead: PostgreSQL's table of locks has room
for 6,400 as it is installed (``max_locks_per_transaction``), for all transactions together.
"""


def lock_number(topic: str, key: bytes) -> int:
    """Of a key, as a signed 32-bit integer; keys that share one wait for each other."""
    return zlib.crc32(topic.encode() + b"\0" + key) - 2**31


def key_locks(numbers: Iterable[int], dialect: Dialect) -> Sequence[Select[Any]]:
    """What locks these keys, in as many statements as the database needs; each gives at least one row."""
    chosen = set(numbers)
    if chosen and dialect.name == "postgresql":
        return [_postgresql_locks(chosen)]
    if dialect.name in MYSQL:
        return _mysql_locks(chosen)
    return []


class locked_position(FunctionElement[int]):  # noqa: N801  # reads as an SQL function in statements
    """A position that is drawn when its key is locked, in one statement with the INSERT (PostgreSQL).

    number: of the key's lock.  An element of its own, because SQLAlchemy finds its compiled statement sooner so.
    """

    name = "locked_position"
    inherit_cache = True
    type = BigInteger()

    def __init__(self, number: BindParameter[int]) -> None:
        super().__init__(number)


@compiles(locked_position, "postgresql")
def _postgresql_locked_position(element: locked_position, compiler: SQLCompiler, **options: Any) -> str:
    """Only CASE has an order in which it is evaluated (PostgreSQL's documentation, "Expression Evaluation Rules")."""
    (number,) = element.clauses
    key = f"CAST({compiler.process(number, **options)} AS integer)"
    shared = f"pg_advisory_xact_lock_shared({SLOT_SPACE}, {key} & {SLOTS - 1})"
    alone = f"pg_advisory_xact_lock({KEY_SPACE}, {key})"
    drawn = f"nextval(pg_get_serial_sequence('{OutboxMessage.__tablename__}', '{OutboxMessage.position.key}'))"
    return f"CASE WHEN {shared}::text IS NOT NULL THEN CASE WHEN {alone}::text IS NOT NULL THEN {drawn} END END"


def _postgresql_locks(numbers: set[int]) -> Select[Any]:
    """One statement: the share of a key is locked with others, the key alone; of many keys the shares alone.

    In the order of the shares, then of the keys, in every transaction.
    """
    many = len(numbers) > MANY
    wanted = {number % SLOTS for number in numbers} if many else numbers
    unsorted = select(func.unnest(postgresql.array(sorted(wanted), type_=Integer)).label("number")).subquery()
    slot = unsorted.c.number.op("&")(SLOTS - 1)
    # The rows are sorted before their locks are taken, because a subquery's order is made below what selects from it
    rows = select(unsorted.c.number, slot.label("slot")).order_by(slot, unsorted.c.number).subquery()
    if many:
        return select(func.pg_advisory_xact_lock(SLOT_SPACE, rows.c.slot))
    return select(
        func.pg_advisory_xact_lock_shared(SLOT_SPACE, rows.c.slot), func.pg_advisory_xact_lock(KEY_SPACE, rows.c.number)
    )


def _mysql_locks(numbers: set[int]) -> list[Select[Any]]:
    """MySQL's own named locks (GET_LOCK) do not end with a transaction; row locks do.  One row after the other, because
    a statement over several takes them in the order of its plan.
    """
    slots = sorted({number % KEY_LOCKS for number in numbers})
    return [select(OutboxKeyLock.slot).where(OutboxKeyLock.slot == slot).with_for_update() for slot in slots]


def check_locked(rows: int) -> None:
    """rows: that a statement gave.  Raises ConfigurationError where it locked nothing."""
    if not rows:
        raise ConfigurationError(
            f"table {OutboxKeyLock.__tablename__} lacks rows, so nothing would keep the order of a key; let "
            "outbox.create_tables(engine) add them"
        )
