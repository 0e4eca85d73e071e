"""Distributed locks by name (I4)."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from datetime import timedelta

from reliamq.spi import FencingToken
from reliamq.spi.holding import held
from reliamq_redis.catalog.names import lock_of
from reliamq_redis.leases.steps import GRANTED, LeaseSteps

__all__ = ["RedisLock"]


class RedisLock:
    """The DistributedLock contract on Redis or Valkey.

    What a failover can forget is what :class:`~reliamq_redis.leases.store.RedisLeaseStore` says: two may then hold one
    lock, until the first is told with its next renewal; the second's token is larger.
    """

    def __init__(self, steps: LeaseSteps) -> None:
        self._steps = steps

    def hold(self, name: str, *, lease: timedelta, wait: timedelta) -> AbstractAsyncContextManager[FencingToken]:
        """See :meth:`reliamq.spi.DistributedLock.hold`.  Raises StoreUnavailable on entry."""
        return held(self, name, lease=lease.total_seconds(), wait=wait.total_seconds())

    async def take(self, name: str, lease: float) -> int | None:
        """See :class:`reliamq.spi.holding.LockSteps`."""
        said, value = await self._steps.grant(lock_of(name), timedelta(seconds=lease))
        return int(value) if said == GRANTED else None

    async def renew(self, token: FencingToken, lease: float) -> bool:
        """See :class:`reliamq.spi.holding.LockSteps`."""
        return await self._steps.renew(lock_of(token.name), token.value, timedelta(seconds=lease))

    async def give_back(self, token: FencingToken) -> None:
        """See :class:`reliamq.spi.holding.LockSteps`."""
        await self._steps.renew(lock_of(token.name), token.value, timedelta())
