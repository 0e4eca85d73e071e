"""The publisher of an open application: made when it opens, drained when it closes (P7)."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio

from reliamq.publishing import ConfirmingPublisher
from reliamq.settings import PublisherSettings
from reliamq.spi import Backend

__all__ = ["open_publisher"]

logger = logging.getLogger("reliamq")


@asynccontextmanager
async def open_publisher(backend: Backend, limits: PublisherSettings) -> AsyncIterator[ConfirmingPublisher]:
    """Run a publisher on the backend; at the end wait for outstanding confirms and name what stayed unconfirmed."""
    async with backend.publisher() as sender, anyio.create_task_group() as tasks:
        publisher = ConfirmingPublisher(
            sender,
            batch=limits.batch,
            max_messages=limits.in_flight,
            max_bytes=limits.in_flight_bytes,
        )
        tasks.start_soon(publisher.run)
        try:
            yield publisher
        finally:
            # Shielded, because a cancelled run too says what is in doubt; bounded by the deadline.
            with anyio.CancelScope(shield=True):
                unconfirmed = await publisher.drain(limits.close_deadline)
            if unconfirmed:
                logger.error("closed with %d unconfirmed: %s", len(unconfirmed), ", ".join(unconfirmed))
            tasks.cancel_scope.cancel()
