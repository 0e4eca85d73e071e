"""A worker's process that applies one effect and waits at a chosen place to be killed.

Run as ``python -m tests.idempotency.effect_process DATABASE MESSAGE_ID STAGE GUARD``.  At the stage ("inside": the
effect is made and not committed; "after": all is committed; "race": right before it starts) it writes the stage's name
and reads a line from its input.  At the end it writes "True" or "False": whether the effect was its own.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from typing import Any

import anyio

from reliamq.database import open_engine
from reliamq.idempotency import LeaseGuard, SqlLeaseStore, TransactionGuard
from reliamq.spi import EffectBusy, ProcessedId

from .conftest import Effect

LEASE = timedelta(seconds=1)


def halt(stage: str, at: str) -> None:
    if stage == at:
        sys.stdout.write(f"{stage}\n")
        sys.stdout.flush()
        sys.stdin.readline()


async def main(database: str, message_id: str, stage: str, guard: str) -> None:
    one = ProcessedId("topic", "g", "handler", message_id)

    async def in_transaction(session: Any) -> None:
        session.add(Effect(message_id=message_id, pid=os.getpid()))
        await session.flush()
        halt("inside", stage)

    async def under_lease(_token: Any) -> None:
        halt("inside", stage)

    async with open_engine(database) as engine:
        await engine.dispose()
        halt("race", stage)
        if guard == "transaction":
            applied = await TransactionGuard(engine).apply(one, in_transaction)
        else:
            applied = await _under_lease(SqlLeaseStore(engine), one, under_lease)
        halt("after", stage)
    sys.stdout.write(f"{applied}\n")


async def _under_lease(store: SqlLeaseStore, one: ProcessedId, effect: Any) -> bool:
    async with LeaseGuard(store, lease=LEASE) as guard:
        try:
            return await guard.apply(one, effect)
        except EffectBusy:
            return False


if __name__ == "__main__":
    anyio.run(main, *sys.argv[1:])
