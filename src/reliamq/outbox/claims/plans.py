"""How PostgreSQL is to plan what is asked of the outbox: by the index that is made for it, whatever it takes the table
for.

It plans what is asked often once for all values, and from what it knew of the table then; statistics are of none where
they were taken while a large transaction was filling it.
"""

from __future__ import annotations

from sqlalchemy.ext.asyncio import AsyncConnection

from reliamq.outbox.standstill import settings_of

__all__ = ["NO_OTHER_PLANS", "by_index"]

OTHER_PLANS = ("bitmapscan", "seqscan", "mergejoin", "hashjoin")
"""What must not be used instead of the index.  For a bucket that is not known when the plan is made PostgreSQL guesses
one row in two hundred, and would rather read and sort all of it: the whole backlog, where one bucket has it.
"""
# Up to PostgreSQL 17 a plan without its alternative looks so costly that it is compiled, in 200 ms
NO_OTHER_PLANS = {"jit": "off", **{f"enable_{scan}": "off" for scan in OTHER_PLANS}}
_BY_INDEX = settings_of(**NO_OTHER_PLANS)


async def by_index(connection: AsyncConnection) -> None:
    """Have the rest of the connection's transaction planned so."""
    await connection.execute(_BY_INDEX)
