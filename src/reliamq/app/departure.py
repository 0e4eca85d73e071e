"""What leaves an open application: its publisher, made when it opens and drained when it closes (P7), and whether sent
rows may be kept for so long (O7).
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import anyio

from reliamq.handlers import Handler
from reliamq.publishing import ConfirmingPublisher
from reliamq.settings import PublisherSettings, Settings
from reliamq.spi import Backend, ConfigurationError

__all__ = ["check_keep", "open_publisher"]

logger = logging.getLogger("reliamq")


def check_keep(settings: Settings, handlers: Sequence[Handler]) -> None:
    """Refuse to keep sent rows for longer than ``handlers`` know what they have processed (I5, O7).

    A row that is sent again at the end of its window may be retried and become a dead letter as any other.  Other
    applications that consume it have settings of their own.  Raises ConfigurationError.
    """
    keep, worker = settings.outbox.keep, settings.worker
    longest = [handler.retry.longest() for handler in handlers if handler.effects != "repeatable"]
    if not (keep and longest):
        return
    needed = keep + max(longest) + worker.replay_horizon
    if worker.processed_window < needed:
        raise ConfigurationError(
            f"worker.processed_window is {worker.processed_window}, but sent rows may be sent again for {keep} "
            f"(outbox.keep), their retries may take {max(longest)} and dead letters may be replayed for "
            f"{worker.replay_horizon} after that: a message could take effect twice. Set it to at least {needed}, or "
            "keep sent rows for less"
        )


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
