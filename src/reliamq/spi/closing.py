"""For backends: clients are opened whole, they are closed by a cancelled task too, and nobody waits for that for ever.

Not imported by ``reliamq.spi`` itself, because it loads anyio.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

import anyio

__all__ = ["CLOSE_SECONDS", "close_in_time", "keep_until_it_ends", "start_whole", "to_its_end"]

logger = logging.getLogger("reliamq.backends")
CLOSE_SECONDS = 5.0
_kept = set[asyncio.Task[Any]]()  # the event loop itself would forget them


async def start_whole(
    starting: Coroutine[Any, Any, None], close: Callable[[], Coroutine[Any, Any, None]], what: str
) -> None:
    """Connect a client.  Raises what its start raises.

    Cancelled: it is closed when it has started.  A start that is cancelled itself forgets the connection that it is
    opening just then.
    """
    task = asyncio.ensure_future(starting)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await close_in_time(_close_after(task, close), what)
        raise


async def _close_after(starting: asyncio.Task[None], close: Callable[[], Coroutine[Any, Any, None]]) -> None:
    try:
        await asyncio.wait({starting})
        _note_failure(starting)
    finally:  # also at the end of the event loop
        await close()


async def to_its_end(ending: Coroutine[Any, Any, None]) -> None:
    """Run what must not be broken off, and is bounded itself.  A cancellation meanwhile is raised afterwards."""
    task = asyncio.ensure_future(ending)
    cancelled: asyncio.CancelledError | None = None
    with anyio.CancelScope(shield=True):  # a cancelled scope would cancel each wait anew
        while not task.done():
            try:
                await asyncio.wait({task})
            except asyncio.CancelledError as error:
                cancelled = error
    if cancelled is None:
        task.result()
    else:
        _note_failure(task)
        raise cancelled


async def close_in_time(closing: Coroutine[Any, Any, None], what: str) -> None:
    """Close a client.

    One that takes long is left to end by itself: each of its waits has a limit, and cut off it would leave its tasks
    and connections behind.  It never raises for the client's errors: who closes has what it wanted.
    """
    task = asyncio.ensure_future(closing)
    keep_until_it_ends(task)
    await to_its_end(_wait(task))
    if not task.done():
        logger.warning("%s has not closed within %s s; it goes on doing so", what, CLOSE_SECONDS)


async def _wait(task: asyncio.Task[None]) -> None:
    await asyncio.wait({task}, timeout=CLOSE_SECONDS)


def keep_until_it_ends(task: asyncio.Task[Any]) -> None:
    """Have a task go on though perhaps nobody waits for it any more."""
    _kept.add(task)
    task.add_done_callback(_kept.discard)
    task.add_done_callback(_note_failure)


def _note_failure(task: asyncio.Task[Any]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.warning("a client has not closed cleanly: %r", error)
