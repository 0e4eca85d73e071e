"""A networked broker that is away for a moment is waited for: the processes of a deployment start in any order, and a
broker that is started again must not take them along.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from typing import TypeVar

import anyio

from reliamq.spi import Backend, BrokerUnavailable

__all__ = ["once_there"]

logger = logging.getLogger("reliamq.app")
PAUSE_SECONDS = 0.5
T = TypeVar("T")


async def once_there(
    backend: Backend,
    attempt: Callable[[], Awaitable[T]],
    *,
    patience: float = math.inf,
    stop: anyio.Event | None = None,
) -> T:
    """What ``attempt`` gives, once the broker can be reached.

    patience: seconds for which it is waited for.  stop: ends the waiting.
    Raises BrokerUnavailable when it could not be reached until then; of a broker that is no other machine, at once.
    """
    ends = anyio.current_time() + (patience if backend.capabilities.networked else 0)
    while True:
        try:
            return await attempt()
        except BrokerUnavailable as error:
            if anyio.current_time() >= ends or (stop is not None and stop.is_set()):
                raise
            logger.warning("the broker cannot be reached, trying again: %s", error)
        with anyio.move_on_after(PAUSE_SECONDS):
            await (stop.wait() if stop is not None else anyio.sleep_forever())
