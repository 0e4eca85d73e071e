"""A member that is in its group while somebody asks for messages.

For a backend whose members share out what there is (partitions, lanes): who asks for nothing and holds nothing lets
others have its share, and who asks again comes back.  Being in the group, and what is lost with it, is the backend's.

Not imported by ``reliamq.spi`` itself: only such a backend needs it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from reliamq.spi.errors import BrokerUnavailable

__all__ = ["REJOIN_SECONDS", "Presence"]

IDLE_SECONDS = 2.0
"""Whoever asks for nothing and holds nothing for so long lets others have its share."""
REJOIN_SECONDS, LONGEST_REJOIN_SECONDS = 0.2, 15.0


class Presence(ABC):
    """label: whose, for people.  logger: the backend's.

    failures: what the client raises when the broker or the way to it fails.
    rejoin_seconds: the pause before it joins again; each time that it goes wrong doubles it.
    changed: set whenever something may have become possible: messages came, shares changed hands.
    stopping: nobody works on what is handed out any more; set before :meth:`stay` is cancelled.
    had_share: since it joined last, something was its own.
    """

    def __init__(
        self,
        label: str,
        logger: logging.Logger,
        failures: tuple[type[Exception], ...],
        *,
        rejoin_seconds: float = REJOIN_SECONDS,
    ) -> None:
        self.label, self._logger, self._rejoin_seconds = label, logger, rejoin_seconds
        self._failures: tuple[type[Exception], ...] = (*failures, BrokerUnavailable)
        self.changed = asyncio.Event()
        self.stopping = self.had_share = False
        self._wanted = asyncio.Event()
        self._receivers, self._asked_at = 0, time.monotonic()
        self._failure: BrokerUnavailable | None = None

    # --- what the backend does -------------------------------------------------------------------------------------

    @abstractmethod
    async def join(self) -> None:
        """Be in the group until :meth:`is_idle`.  Raises BrokerUnavailable and the client's failures.

        Cancelled: the group is left cleanly.
        """

    @abstractmethod
    def handed(self) -> int:
        """How many deliveries are handed out and not settled."""

    @abstractmethod
    def unavailable(self, what: str, error: BaseException) -> BrokerUnavailable:
        """The error for callers.  what: was being done."""

    # --- who asks --------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def asking(self) -> AsyncIterator[None]:
        """Somebody waits for messages: be a member meanwhile."""
        self._receivers += 1
        self._wanted.set()
        try:
            yield
        finally:
            self._receivers -= 1
            self._asked_at = time.monotonic()

    def abandon(self) -> None:
        """Leases ran out: unless somebody asks, nobody is there any more."""
        self._asked_at = time.monotonic() - IDLE_SECONDS
        self.changed.set()

    def is_idle(self) -> bool:
        """Whether others may have its share."""
        return not self._receivers and not self.handed() and time.monotonic() - self._asked_at >= IDLE_SECONDS

    # --- what keeps it away ----------------------------------------------------------------------------------------

    def fail(self, what: str, error: BaseException) -> None:
        """Whoever receives hears of it.  what: was being done."""
        self._failure = self.unavailable(what, error)
        self.changed.set()

    def check(self) -> None:
        """Raise what keeps this member from its share, once."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    # --- in the group ----------------------------------------------------------------------------------------------

    async def stay(self) -> None:
        """Be in the group while somebody asks; until cancelled, which leaves it cleanly."""
        pause = self._rejoin_seconds
        while True:
            await self._wanted.wait()
            began, self.had_share = time.monotonic(), False
            if await self._joined():
                if not self._receivers:  # else somebody came to ask while it was left
                    self._wanted.clear()
                continue
            went_well = self.had_share or time.monotonic() - began > LONGEST_REJOIN_SECONDS
            pause = self._rejoin_seconds if went_well else min(2 * pause, LONGEST_REJOIN_SECONDS)
            await asyncio.sleep(pause)

    async def _joined(self) -> bool:
        try:
            await self.join()
        except self._failures as error:
            self._logger.warning("%s: out of the group, joining again: %s", self.label, error)
            self.fail(self.label, error)
        except Exception as error:  # a fault of ours or the client's: whoever receives must hear of it, not wait
            self._logger.exception("%s: out of the group, joining again", self.label)
            self.fail(f"the member of {self.label} failed", error)
        else:
            return True
        return False
