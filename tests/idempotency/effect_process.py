"""A worker's process that applies one effect and waits at a chosen place to be killed.

Run as ``python -m tests.idempotency.effect_process DATABASE MESSAGE_ID STAGE GUARD``.  At the stage ("inside": the
effect is made and not committed; "after": all is committed; "race": right before it starts) it writes the stage's name
and reads a line from its input.  At the end it writes "True" or "False": whether the effect was its own; "lost" when
its lease was.  DATABASE: with GUARD "lease" also the URL of what keeps leases.
"""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import anyio

from reliamq.backends import open_leases
from reliamq.database import open_engine
from reliamq.idempotency import LeaseGuard, SqlLeaseStore, TransactionGuard
from reliamq.spi import EffectBusy, IdempotencyStore, LeaseLost, ProcessedId

from .conftest import Effect

LEASE = timedelta(seconds=1)


def halt(stage: str, at: str) -> None:
    if stage == at:
        sys.stdout.write(f"{stage}\n")
        sys.stdout.flush()
        sys.stdin.readline()


async def main(database: str, message_id: str, stage: str, guard: str) -> None:
    one = ProcessedId("topic", "g", "handler", message_id)
    run = in_transaction if guard == "transaction" else under_lease
    sys.stdout.write(f"{await run(database, one, stage)}\n")


async def in_transaction(database: str, one: ProcessedId, stage: str) -> bool:
    async def effect(session: Any) -> None:
        session.add(Effect(message_id=one.message_id, pid=os.getpid()))
        await session.flush()
        halt("inside", stage)

    async with open_engine(database) as engine:
        await engine.dispose()
        halt("race", stage)
        applied = await TransactionGuard(engine).apply(one, effect)
        halt("after", stage)
    return applied


async def under_lease(database: str, one: ProcessedId, stage: str) -> bool | str:
    async def effect(_token: Any) -> None:
        halt("inside", stage)

    async with open_store(database) as store, LeaseGuard(store, lease=LEASE) as guard:
        try:
            return await guard.apply(one, effect)
        except EffectBusy:
            return False
        except LeaseLost:
            return "lost"


@asynccontextmanager
async def open_store(database: str) -> AsyncIterator[IdempotencyStore]:
    if database.startswith(("sqlite", "postgresql", "mysql")):
        async with open_engine(database) as engine:
            yield SqlLeaseStore(engine)
    else:
        async with open_leases(database).idempotency_store(remember=timedelta(days=1)) as store:
            yield store


if __name__ == "__main__":
    anyio.run(main, *sys.argv[1:])
