"""Carries conclusions to the broker, in batches, in one task.

A dead letter is confirmed in its place before its original is acknowledged, one rule for every broker (C5).  Nothing is
dropped: what the broker could not take is kept and tried again.  When :meth:`Settler.flush` returns, all is settled.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import anyio

from reliamq.consuming.retry import Conclusion, GivenUp
from reliamq.spi import (
    Ack,
    BrokerUnavailable,
    Confirmation,
    DeadLetters,
    Outcome,
    Rejection,
    Settlement,
    Subscription,
)

__all__ = ["Settler"]

logger = logging.getLogger("reliamq.consuming")
PAUSE_SECONDS = 0.2
DEAD_LETTER_SECONDS = 10.0
FEW_CHARACTERS = 200


class Settler:
    """Gathers what lanes concluded and settles what has gathered.

    settled: called with each batch once the broker has it.
    """

    def __init__(
        self,
        subscription: Subscription,
        dead_letters: DeadLetters,
        *,
        settled: Callable[[Sequence[Settlement]], None],
    ) -> None:
        self._subscription, self._dead_letters, self._settled = subscription, dead_letters, settled
        self._pending: list[Conclusion] = []
        self._waiting = 0  # dead letters that are tried again later
        self._work = anyio.Event()
        self._idle = anyio.Event()
        self._idle.set()

    def add(self, conclusion: Conclusion) -> None:
        """Have it settled.  Does not wait."""
        if not self._pending:
            self._idle = anyio.Event() if self._idle.is_set() else self._idle
            self._work.set()
        self._pending.append(conclusion)

    async def flush(self) -> None:
        """Wait until everything added so far is settled."""
        await self._idle.wait()

    async def run(self) -> None:
        """Settle until cancelled.  Cancelled: what is unsettled comes back after its lease (C2)."""
        while True:
            await self._work.wait()
            self._work = anyio.Event()
            while self._pending:
                batch, self._pending = self._pending, []
                await self._settle(batch)
            if not self._waiting:
                self._idle.set()

    async def _settle(self, batch: list[Conclusion]) -> None:
        given_up = [conclusion for conclusion in batch if isinstance(conclusion, GivenUp)]
        settlements: list[Settlement] = [conclusion for conclusion in batch if not isinstance(conclusion, GivenUp)]
        if given_up:
            settlements += await self._bury(given_up)
        if settlements:
            await self._tell(settlements)

    async def _bury(self, given_up: list[GivenUp]) -> list[Settlement]:
        """Store dead letters; acknowledgements for those confirmed.  The others are concluded once more."""
        try:
            outcomes: Sequence[Outcome] = await self._dead_letters.add(
                [one.record for one in given_up], deadline=time.monotonic() + DEAD_LETTER_SECONDS
            )
        except BrokerUnavailable as error:
            logger.error("%d dead letters wait, their originals stay unacknowledged: %s", len(given_up), error)
            self._later(given_up)
            return []
        buried: list[Settlement] = []
        again: list[GivenUp] = []
        for one, outcome in zip(given_up, outcomes, strict=True):
            if isinstance(outcome, Confirmation):
                buried.append(Ack(one.delivery))
            else:
                refused = isinstance(outcome, Rejection) and outcome.reason.judges_message
                again.append(_in_few_words(one) if refused else one)
                logger.error("dead letter %s not stored, original kept: %s", one.record.message.id, outcome.detail)
        if again:
            self._later(again)
        return buried

    def _later(self, conclusions: Sequence[Conclusion]) -> None:
        """Conclude these once more after a pause; what comes meanwhile need not wait for them."""
        self._waiting += len(conclusions)
        asyncio.get_running_loop().call_later(PAUSE_SECONDS, self._again, conclusions)

    def _again(self, conclusions: Sequence[Conclusion]) -> None:
        self._waiting -= len(conclusions)
        for conclusion in conclusions:
            self.add(conclusion)

    async def _tell(self, settlements: list[Settlement]) -> None:
        while True:
            try:
                late = await self._subscription.settle(settlements)
            except BrokerUnavailable as error:
                logger.warning("%d settlements wait: %s", len(settlements), error)
                await anyio.sleep(PAUSE_SECONDS)
            else:
                break
        acknowledged_late = [one.delivery.message.id for one in late if isinstance(one, Ack)]
        if acknowledged_late:
            logger.warning("lease lost before the acknowledgement, delivered again: %s", ", ".join(acknowledged_late))
        self._settled(settlements)


def _in_few_words(one: GivenUp) -> GivenUp:
    """The same dead letter with less said about it: what the broker refused can only be what we added."""
    reason = one.record.reason[:FEW_CHARACTERS].encode("ascii", "backslashreplace").decode()
    return replace(one, record=replace(one.record, reason=reason, traceback=""))
