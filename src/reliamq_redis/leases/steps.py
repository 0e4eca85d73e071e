"""What can be done with one lease, whether of an effect or a lock: a hash, changed by one script at a time.

Time is the server's, and so is the token.  Hashes expire by themselves.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from reliamq_redis.leases.connections import Connections, Unsafe
from reliamq_redis.scripts import script

__all__ = ["BUSY", "DONE", "GRANTED", "LeaseSteps"]

GRANT, RENEW, COMPLETE = script("grant"), script("renew"), script("complete")
GRANTED, BUSY, DONE = b"granted", b"busy", b"done"
LEAST_WAIT = timedelta(seconds=1)


class LeaseSteps:
    """remember: how long a lease that nobody completed is remembered after its end.

    Each step raises StoreUnavailable when it may or may not have been done.
    """

    def __init__(self, connections: Connections, *, remember: timedelta) -> None:
        self._connections, self._remember = connections, _milliseconds(remember)

    async def grant(self, key: str, lease: timedelta) -> tuple[bytes, Any]:
        """GRANTED and the token, BUSY and for how many milliseconds, or DONE and the kept result.

        What is granted or done, replicas have.  A grant that they do not have in time is given back, because a failover
        could grant it again to somebody else.  Cancelled: a grant runs out by itself.
        """
        async with self._connections.to(key) as connection:
            said, value = await connection.run(GRANT, key, _milliseconds(lease), self._remember)
            if said == BUSY:
                return said, value
            try:
                await connection.be_safe(max(LEAST_WAIT, lease / 2).total_seconds())  # later, it is hardly worth having
            except Unsafe:
                if said == GRANTED:
                    await connection.run(RENEW, key, value, 0, self._remember)
                raise
            return said, value

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
