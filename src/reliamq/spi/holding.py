"""How a lock is held, whatever keeps it: waited for, renewed, lost or given back (I4).

For a :class:`~reliamq.spi.DistributedLock` whose store takes, renews and gives back in one step each.  It promises that
the block is cancelled as soon as its lease may have ended, and that nothing of a renewal comes after the lock was given
back.

Not imported by ``reliamq.spi`` itself, because it loads anyio.
"""

from __future__ import annotations

import logging
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Protocol

import anyio

from reliamq.spi.errors import LeaseLost
from reliamq.spi.stores import FencingToken

__all__ = ["LockSteps", "held"]

logger = logging.getLogger("reliamq.locks")
ASK_SECONDS = (0.01, 0.05)
"""Between two attempts to take it; drawn, so that many who wait do not ask at once."""


class LockSteps(Protocol):
    """What a store of locks does, in one step each; leases in seconds.  Each raises what its store raises."""

    async def take(self, name: str, lease: float) -> int | None:
        """Take it: the fencing token, larger than every one before; None while another has it."""
        ...

    async def renew(self, token: FencingToken, lease: float) -> bool:
        """Renew it; False: somebody else was granted it."""
        ...

    async def give_back(self, token: FencingToken) -> None:
        """Let others have it at once, unless they have it already."""
        ...


@asynccontextmanager
async def held(steps: LockSteps, name: str, *, lease: float, wait: float) -> AsyncIterator[FencingToken]:
    """Hold a lock for the block; see :meth:`reliamq.spi.DistributedLock.hold`.  lease, wait: seconds."""
    token, ends = await _taken(steps, name, lease, wait)
    lost, failure = True, None
    try:
        async with anyio.create_task_group() as tasks:
            tasks.cancel_scope.deadline = ends
            tasks.start_soon(_keep, steps, token, lease, tasks.cancel_scope)
            try:
                yield token
            except Exception as error:  # raised below as it is, not as a group of one
                failure = error
            lost = tasks.cancel_scope.cancel_called
            tasks.cancel_scope.cancel()
    finally:
        await _give_back(steps, token)
    if lost:
        raise LeaseLost("", name, "the lock's lease ran out and somebody else may hold it") from failure
    if failure is not None:
        raise failure


async def _taken(steps: LockSteps, name: str, lease: float, wait: float) -> tuple[FencingToken, float]:
    """Wait for it; the token, and when its lease has ended.  Raises TimeoutError.

    By this process's clock, from before it was granted: where it is kept it never ends earlier.
    Cancelled: if it was granted just then, its lease runs out by itself.
    """
    deadline = anyio.current_time() + wait
    while True:
        began = anyio.current_time()
        token = await steps.take(name, lease)
        if token is not None:
            return FencingToken(name, token), began + lease
        if anyio.current_time() >= deadline:
            raise TimeoutError(f"lock '{name}' is held by another for longer than {wait:g} s")
        await anyio.sleep(random.uniform(*ASK_SECONDS))  # noqa: S311  # spreads load, no secret


async def _keep(steps: LockSteps, token: FencingToken, lease: float, block: anyio.CancelScope) -> None:
    """Renew it for as long as it is held, which puts off the block's end; end it when somebody else was granted it."""
    while True:
        await anyio.sleep(lease / 3)
        began = anyio.current_time()
        try:
            with anyio.CancelScope(shield=True):  # what is on its way may be done later than all that follows
                kept = await steps.renew(token, lease)
        except Exception as error:  # the store is away: the lease goes on until it ends
            logger.warning("the lock '%s' cannot be renewed, trying again: %s", token.name, error)
            continue
        if not kept:
            block.cancel()
            return
        block.deadline = began + lease


async def _give_back(steps: LockSteps, token: FencingToken) -> None:
    """Cancelled or not, others need not wait for the lease to end."""
    with anyio.CancelScope(shield=True):
        try:
            await steps.give_back(token)
        except Exception as error:  # what happened in the block says more
            logger.warning("the lock '%s' cannot be given back and its lease will run out: %s", token.name, error)
