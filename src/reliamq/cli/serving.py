"""Running an application until a signal: the first SIGTERM or SIGINT finishes work, the second cancels it.

What a cancelled worker held is given back; what a killed one held comes back after its lease.
"""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable

import anyio

from reliamq.app import Reliamq

__all__ = ["serve"]


async def serve(app: Reliamq, work: Callable[[anyio.Event], Awaitable[None]]) -> None:
    """Open ``app`` and run ``work`` until it ends or a signal says so."""
    stop = anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_listen, stop, tasks.cancel_scope)
        async with app:
            await work(stop)
        tasks.cancel_scope.cancel()


async def _listen(stop: anyio.Event, scope: anyio.CancelScope) -> None:
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            if stop.is_set():
                scope.cancel()
            stop.set()
