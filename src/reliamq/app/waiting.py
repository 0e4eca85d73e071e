"""A networked broker that is away for a moment, or not whole yet, is waited for: the processes of a deployment start in
any order, and a broker that is started again must not take them along.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from typing import TypeVar

import anyio

from reliamq.spi import Backend, BrokerUnavailable, DurabilityError

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
    """What ``attempt`` gives, once the broker can be reached and, where ``attempt`` audits, is whole.

    patience: seconds for which it is waited for.  stop: ends the waiting.
    Raises BrokerUnavailable when it could not be reached until then, DurabilityError when it was not whole; of a broker
    that is no other machine, and of what does not pass by itself, at once.
    """
    ends = anyio.current_time() + (patience if backend.capabilities.networked else 0)
    while True:
        try:
            return await attempt()
        except (BrokerUnavailable, DurabilityError) as error:
            passing = isinstance(error, BrokerUnavailable) or error.passing
            if not passing or anyio.current_time() >= ends or (stop is not None and stop.is_set()):
                raise
            logger.warning("waiting for the broker, trying again: %s", error)
        with anyio.move_on_after(PAUSE_SECONDS):
            await (stop.wait() if stop is not None else anyio.sleep_forever())
