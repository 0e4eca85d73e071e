"""What can be done with one lease, whether of an effect or a lock: a hash, changed by one script at a time.

Time is the server's, and so is the token.  Hashes expire by themselves.
"""

from __future__ import annotations

import itertools
import secrets
from datetime import timedelta
from typing import Any

from reliamq_redis.leases.connections import Connections, Unsafe
from reliamq_redis.scripts import script

__all__ = ["BUSY", "DONE", "GRANTED", "LeaseSteps"]

GRANT, RENEW, COMPLETE = script("grant"), script("renew"), script("complete")
GRANTED, BUSY, DONE = b"granted", b"busy", b"done"
LEAST_WAIT = timedelta(seconds=1)
LOST, LOST_OF_ONE = 10_000, 16


class LeaseSteps:
    """remember: how long a lease that nobody completed is remembered after its end.

    Each step raises StoreUnavailable when it may or may not have been done.
    """

    def __init__(self, connections: Connections, *, remember: timedelta) -> None:
        self._connections, self._remember = connections, _milliseconds(remember)
        self._name, self._numbers = secrets.token_hex(4), itertools.count()
        self._lost: dict[str, tuple[str, ...]] = {}

    async def grant(self, key: str, lease: timedelta) -> tuple[bytes, Any]:
        """GRANTED and the token, BUSY and for how many milliseconds, or DONE and the kept result.

        What is granted or done, replicas have.  A grant that they do not have in time is given back, because a failover
        could grant it again to somebody else.
        Cancelled, or the answer lost: it may be granted.  Then it runs out by itself, or is had here by asking again.
        """
        claim, lost = f"{self._name}/{next(self._numbers)}", self._lost.get(key, ())
        try:
            answer = await self._grant(key, lease, claim, *lost)
        except BaseException:
            self._note_lost(key, claim)
            raise
        self._lost.pop(key, None)
        return answer

    async def _grant(self, key: str, lease: timedelta, *claims: str) -> tuple[bytes, Any]:
        async with self._connections.to(key) as connection:
            said, value = await connection.run(GRANT, key, _milliseconds(lease), self._remember, *claims)
            if said == BUSY:
                return said, value
            try:
                await connection.be_safe(max(LEAST_WAIT, lease / 2).total_seconds())  # later, it is hardly worth having
            except Unsafe:
                if said == GRANTED:
                    await connection.run(RENEW, key, value, 0, self._remember)
                raise
            return said, value

    def _note_lost(self, key: str, claim: str) -> None:
        """Of those that nobody asked for again the oldest are forgotten."""
        self._lost[key] = (*self._lost.pop(key, ()), claim)[-LOST_OF_ONE:]
        if len(self._lost) > LOST:
            del self._lost[next(iter(self._lost))]

    async def renew(self, key: str, token: int, lease: timedelta) -> bool:
        """Renew it, or give it back if ``lease`` is nothing; False: a later one was granted, or it is done.

        Replicas are not waited for: a failover that forgets a renewal shortens the lease, and the next renewal makes it
        good, or says who has it.
        """
        async with self._connections.to(key) as connection:
            return bool(await connection.run(RENEW, key, token, _milliseconds(lease), self._remember))

    async def complete(self, key: str, token: int, result: bytes | None, keep: timedelta, *, again: bool) -> bool:
        """Mark it as done; False: a later one was granted, or it was done before.  When this returns, replicas have it.

        again: the answer to the same step was lost, so that it may be that which has done it.
        """
        results = () if result is None else (result,)
        async with self._connections.to(key) as connection:
            done = await connection.run(COMPLETE, key, token, _milliseconds(keep), int(again), *results)
            if done:
                await connection.be_safe()
            return bool(done)


def _milliseconds(time: timedelta) -> int:
    return time // timedelta(milliseconds=1)
