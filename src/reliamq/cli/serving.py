"""Running an application until a signal: the first SIGTERM or SIGINT finishes work, the second cancels it.

What a cancelled worker held is given back; what a killed one held comes back after its lease.
"""

from __future__ import annotations

import gc
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
            # What was imported stays: a garbage collector that goes through it again and again takes a fifth of a busy
            # relay's time (https://docs.python.org/3/library/gc.html#gc.freeze)
            gc.collect()
            gc.freeze()
            await work(stop)
        tasks.cancel_scope.cancel()


async def _listen(stop: anyio.Event, scope: anyio.CancelScope) -> None:
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            if stop.is_set():
                scope.cancel()
            stop.set()
