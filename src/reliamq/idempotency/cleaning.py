"""Marks do not pile up: what is older than its window is removed while a worker runs (I5).

In small chunks, by an index, and never in the way of handlers.  A window too short to be safe is refused at the start.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import timedelta
from typing import Protocol

import anyio
import anyio.lowlevel
from sqlalchemy import Table, delete, select, tuple_
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from reliamq.database import now_seconds
from reliamq.spi import ConfigurationError, StoreUnavailable

__all__ = ["Cleanable", "check_window", "remove_expired", "run_cleaning"]

logger = logging.getLogger("reliamq.idempotency")
CHUNK = 500


class Cleanable(Protocol):
    """What has marks that expire."""

    async def clean(self, *, limit: int) -> int:
        """Remove up to ``limit`` expired marks; how many."""
        ...


async def run_cleaning(stores: Sequence[Cleanable], *, every: timedelta, stop: anyio.Event) -> None:
    """Clean ``stores`` every so often until ``stop`` is set.  Cancelled: a chunk is removed or not."""
    while not stop.is_set():
        for store in stores:
            try:
                while await store.clean(limit=CHUNK) == CHUNK:
                    await anyio.lowlevel.checkpoint()  # others first
            except (SQLAlchemyError, OSError, StoreUnavailable) as error:  # no mark need be gone; the next round tries
                logger.warning("cleaning up processed ids waits: %s", error)
        with anyio.move_on_after(every.total_seconds()):
            await stop.wait()


async def remove_expired(engine: AsyncEngine, table: Table, limit: int) -> int:
    """Remove up to ``limit`` rows whose time is over, oldest first, by their index; how many.  One transaction."""
    key, over = list(table.primary_key), table.c.expires_at <= now_seconds()
    expired = select(*key).where(over).order_by(table.c.expires_at).limit(limit)
    async with engine.begin() as connection:
        # Several workers clean side by side, each other rows; and what is locked here is not renewed meanwhile
        rows = [tuple(row) for row in await connection.execute(expired.with_for_update(skip_locked=True))]
        if rows:
            await connection.execute(delete(table).where(tuple_(*key).in_(rows)))
    return len(rows)


def check_window(keep: timedelta, longest_retry: timedelta, replay_horizon: timedelta) -> None:
    """Refuse a window in which a message could come back after its mark is gone (I5).

    keep: how long marks are kept.  longest_retry: from the first attempt to the last.  replay_horizon: how old a dead
    letter may be when it is replayed.  Raises ConfigurationError.
    """
    needed = longest_retry + replay_horizon
    if keep < needed:
        raise ConfigurationError(
            f"worker.processed_window is {keep}, but retries may take {longest_retry} and dead letters may be "
            f"replayed for {replay_horizon} after that: a message could take effect twice. Set it to at least {needed}"
        )
