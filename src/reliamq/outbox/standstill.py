"""Transactions that nobody goes on with.

A process that is stopped in the middle of one, by SIGSTOP, a debugger or a frozen machine, keeps its locks for as long
as its connection lives, and with them every relay.  PostgreSQL ends its session instead, after a while; the others have
no such setting for one transaction.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Select, func, select
from sqlalchemy.ext.asyncio import AsyncConnection

__all__ = ["end_if_it_stands_still", "settings_of"]

STANDSTILL = "5s"


def settings_of(**settings: str) -> Select[Any]:
    """PostgreSQL's, for the transaction that asks for them, and that it is ended when it stands still."""
    chosen = {**settings, "idle_in_transaction_session_timeout": STANDSTILL}
    return select(*[func.set_config(name, value, True) for name, value in chosen.items()])


async def end_if_it_stands_still(connection: AsyncConnection) -> None:
    """The connection's transaction, on PostgreSQL."""
    if connection.dialect.name == "postgresql":
        await connection.execute(_NOTHING_ELSE)


_NOTHING_ELSE = settings_of()
