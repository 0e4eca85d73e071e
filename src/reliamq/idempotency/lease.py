"""The guards for effects outside a database, and for those that may be repeated.

A lease keeps others away while an effect is produced, and its fencing token lets the other side refuse a late holder
(I3).  The mark "done" is written after the effect; where leases are kept is left to a store.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

import anyio
import anyio.to_thread
from sqlalchemy.exc import SQLAlchemyError

from reliamq.spi import (
    EffectBusy,
    FencingToken,
    IdempotencyStore,
    LeaseGrant,
    LeaseLost,
    LeaseState,
    ProcessedId,
    StoreUnavailable,
)

__all__ = ["LeaseGuard", "RepeatableGuard"]

logger = logging.getLogger("reliamq.idempotency")


OUTAGE_PAUSE = timedelta(seconds=2)
COMPLETE_PAUSE_SECONDS = 0.2


class _Running:
    """An effect in progress under a grant."""

    __slots__ = ("grant", "limit", "since")

    def __init__(self, grant: LeaseGrant, since: float) -> None:
        self.grant, self.since = grant, since
        self.limit = asyncio.timeout(None)  # none until the lease is lost


class LeaseGuard:
    """The EffectGuard of ``effects="lease"``; an effect gets its FencingToken.  Use as an async context manager.

    lease: how long a crashed holder keeps others away; slow effects renew it.  keep: how long "done" is kept (I5).
    One task renews for all effects in progress, so that a quick effect pays nothing for it.
    """

    def __init__(
        self, store: IdempotencyStore, *, lease: timedelta, keep: timedelta = timedelta(days=14), threads: int = 64
    ) -> None:
        self._store, self._lease, self._keep = store, lease, keep
        self._threads = anyio.CapacityLimiter(threads)
        self._running: dict[int, _Running] = {}
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        tasks = await self._stack.enter_async_context(anyio.create_task_group())
        self._stack.callback(tasks.cancel_scope.cancel)
        tasks.start_soon(self._renew_for_ever)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return await self._stack.__aexit__(kind, error, trace)

    async def apply(self, identity: ProcessedId, effect: Callable[[Any], Awaitable[None]]) -> bool:
        """See :meth:`reliamq.spi.EffectGuard.apply`.  LeaseLost when the lease ran out although it was renewed."""
        return await self._apply(identity, effect, stops=True)

    async def _apply(self, identity: ProcessedId, effect: Callable[[Any], Awaitable[None]], *, stops: bool) -> bool:
        """stops: a cancelled effect is over; a thread is not, and keeps its lease until that runs out."""
        try:
            grant = await self._store.acquire(identity, lease=self._lease)
        except (SQLAlchemyError, OSError) as error:  # the store is away; nothing has started, so it is no attempt
            raise EffectBusy(OUTAGE_PAUSE, f"the lease store cannot be reached ({type(error).__name__})") from error
        except StoreUnavailable as error:  # as above; it says more, and no secret
            raise EffectBusy(OUTAGE_PAUSE, f"the lease store cannot be used: {error}") from error
        if isinstance(grant, LeaseState):
            if grant.done:
                return False
            raise EffectBusy(timedelta(seconds=grant.busy_seconds))
        running = _Running(grant, anyio.current_time())
        try:
            await self._run(running, effect)
        except LeaseLost:
            raise
        except Exception:
            await self._abandon(grant)
            raise
        except BaseException:  # cancelled
            if stops:
                with anyio.CancelScope(shield=True):
                    await self._abandon(grant)
            raise
        await self._complete(grant)
        return True

    async def _complete(self, grant: LeaseGrant) -> None:
        """Write the mark.  Raises LeaseLost, and what the store raises.

        The effect has happened: forgetting it for a cancellation or a moment's outage would repeat it.
        """
        try:
            completed = await self._store.complete(grant, result=None, keep=self._keep)
        except BaseException as error:
            with anyio.CancelScope(shield=True):
                completed = await self._complete_after(error, grant)
            if isinstance(error, asyncio.CancelledError):
                raise
        if not completed:
            raise _lost(grant.identity)

    async def _complete_after(self, error: BaseException, grant: LeaseGrant) -> bool:
        """Try again for as long as a lease lasts; False when it was too late."""
        deadline = anyio.current_time() + self._lease.total_seconds()
        while True:
            if not isinstance(error, asyncio.CancelledError):
                logger.warning("an effect cannot be marked as done, trying again: %s", error)
                await anyio.sleep(COMPLETE_PAUSE_SECONDS)
            try:
                with anyio.fail_after(deadline - anyio.current_time()):
                    return await self._store.complete(grant, result=None, keep=self._keep)
            except Exception as failure:
                if anyio.current_time() + COMPLETE_PAUSE_SECONDS > deadline:
                    raise
                error = failure

    async def _run(self, running: _Running, effect: Callable[[Any], Awaitable[None]]) -> None:
        """Run under the renewed lease; LeaseLost when it could not be kept."""
        self._running[id(running)] = running
        try:
            async with running.limit:
                await effect(_token(running.grant))
        except TimeoutError as error:
            if running.limit.expired():
                raise _lost(running.grant.identity) from error
            raise
        finally:
            del self._running[id(running)]

    async def apply_in_thread(self, identity: ProcessedId, effect: Callable[[Any], None]) -> bool:
        """See :meth:`reliamq.spi.EffectGuard.apply_in_thread`."""

        async def in_thread(token: Any) -> None:
            await anyio.to_thread.run_sync(effect, token, abandon_on_cancel=True, limiter=self._threads)

        return await self._apply(identity, in_thread, stops=False)

    async def _abandon(self, grant: LeaseGrant) -> None:
        """Let the next attempt start at once instead of after the lease."""
        try:
            await self._store.abandon(grant)
        except Exception as error:  # what the effect raised says more; the lease runs out by itself
            logger.warning("a lease cannot be given back and will run out: %s", error)

    async def _renew_for_ever(self) -> None:
        every = self._lease.total_seconds() / 3
        while True:
            await anyio.sleep(every / 2)
            for running in [one for one in self._running.values() if anyio.current_time() - one.since > every / 2]:
                await self._renew(running)

    async def _renew(self, running: _Running) -> None:
        try:
            kept = await self._store.extend(running.grant, lease=self._lease)
        except Exception as error:  # the store is away: the lease may yet hold; completing will tell
            logger.warning("a lease cannot be renewed, trying again: %s", error)
            return
        if not kept and id(running) in self._running and not running.limit.expired():
            running.limit.reschedule(0)  # stop it now


class RepeatableGuard:
    """The EffectGuard of ``effects="repeatable"``: runs it, every time, with None."""

    def __init__(self, *, threads: int = 64) -> None:
        self._threads = anyio.CapacityLimiter(threads)

    async def apply(self, identity: ProcessedId, effect: Callable[[Any], Awaitable[None]]) -> bool:
        """Run the effect."""
        del identity  # nothing is remembered
        await effect(None)
        return True

    async def apply_in_thread(self, identity: ProcessedId, effect: Callable[[Any], None]) -> bool:
        """Run the effect in a worker thread.  Cancelled: the thread runs on."""
        del identity
        await anyio.to_thread.run_sync(effect, None, abandon_on_cancel=True, limiter=self._threads)
        return True


def _token(grant: LeaseGrant) -> FencingToken:
    one = grant.identity
    return FencingToken(f"{one.topic}/{one.group}/{one.handler}/{one.message_id}", grant.token)


def _lost(identity: ProcessedId) -> LeaseLost:
    return LeaseLost(identity.group, identity.message_id, "its effect took longer than the lease could be kept")
