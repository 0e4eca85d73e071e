"""The store of leases for effects outside a database (I3)."""

from __future__ import annotations

from datetime import timedelta

from reliamq.spi import LeaseGrant, LeaseState, ProcessedId
from reliamq_redis.catalog.names import lease_of
from reliamq_redis.leases.steps import BUSY, DONE, LeaseSteps

__all__ = ["RedisLeaseStore"]

IN_DOUBT = 10_000


class RedisLeaseStore:
    """The IdempotencyStore contract on Redis or Valkey.

    Each effect is one hash, changed by one script at a time, so that two workers never both start.  Time is the
    server's; a Cluster's and a failover's servers must agree about it, to a small part of a lease.  Everything expires
    by itself.

    **What a failover can forget.**  A grant, a kept result and the mark "done" are told only when ``replicas`` replicas
    have them (on their disks, from Redis 7.2 and with Valkey), so they outlive the primary if one of *those* is
    promoted: with ``replicas`` as many as there are, always; with fewer, usually, because the one that has most is
    preferred.  What was forgotten all the same comes to this: a running effect may start once more beside the first,
    whose token is smaller and who is told so; an effect that was done may be produced again, under a larger token, if
    its message comes again.  Renewals are not waited for; a failover that forgets one shortens a lease.  A server that
    evicts (``maxmemory-policy``) or keeps no append-only file forgets without a failover, and is refused on opening.
    A SQL database forgets none of this: where money moves, keep leases there, or have the other side know the message's
    id, besides refusing smaller tokens.
    """

    def __init__(self, steps: LeaseSteps) -> None:
        self._steps = steps
        self._in_doubt: dict[LeaseGrant, None] = {}

    async def acquire(self, identity: ProcessedId, *, lease: timedelta) -> LeaseGrant | LeaseState:
        """See :meth:`reliamq.spi.IdempotencyStore.acquire`.  Raises StoreUnavailable.

        Cancelled, or the answer lost: it may be granted.  Then it is busy for others until the lease has run out, and
        had here by asking again.
        """
        said, value = await self._steps.grant(lease_of(identity), lease)
        if said == DONE:
            return LeaseState(done=True, result=value)
        if said == BUSY:
            return LeaseState(done=False, busy_seconds=value / 1000)
        return LeaseGrant(identity, int(value), lease.total_seconds())

    async def extend(self, grant: LeaseGrant, *, lease: timedelta) -> bool:
        """See :meth:`reliamq.spi.IdempotencyStore.extend`.  Raises StoreUnavailable.  Cancelled: it may be renewed."""
        return await self._steps.renew(lease_of(grant.identity), grant.token, lease)

    async def complete(self, grant: LeaseGrant, *, result: bytes | None, keep: timedelta) -> bool:
        """See :meth:`reliamq.spi.IdempotencyStore.complete`.  Raises StoreUnavailable: ask again, which says True also
        if it was this call that has done it.

        Cancelled: as when it raises.
        """
        again = grant in self._in_doubt
        self._doubt(grant)
        done = await self._steps.complete(lease_of(grant.identity), grant.token, result, keep, again=again)
        self._in_doubt.pop(grant, None)
        return done

    def _doubt(self, grant: LeaseGrant) -> None:
        """Until the answer has come.  Of those who never asked again the oldest are forgotten."""
        self._in_doubt[grant] = None
        if len(self._in_doubt) > IN_DOUBT:
            del self._in_doubt[next(iter(self._in_doubt))]

    async def abandon(self, grant: LeaseGrant) -> None:
        """See :meth:`reliamq.spi.IdempotencyStore.abandon`.  Raises StoreUnavailable: then it runs out by itself."""
        await self._steps.renew(lease_of(grant.identity), grant.token, timedelta())

    async def clean(self, *, limit: int) -> int:
        """See :meth:`reliamq.spi.IdempotencyStore.clean`: 0, because the server removes what has expired."""
        del limit
        return 0
