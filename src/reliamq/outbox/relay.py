"""The relay: claim, send, settle, again.

A row leaves the table only after its confirm (O2); a crash anywhere sends the same message again with the same id (O4).
Within a key nothing is stored behind a row that was not confirmed (O3): claims are sent *chained*.  A broker that is
down costs waiting and no attempt (O5).
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
import uuid
from collections.abc import Iterable, Sequence
from datetime import timedelta

import anyio
from sqlalchemy.exc import SQLAlchemyError

from reliamq.outbox.resting import Resting
from reliamq.outbox.waking import Bell, ringing
from reliamq.spi import (
    CLAIM_BYTES,
    BrokerUnavailable,
    Confirmation,
    InDoubt,
    OutboxRow,
    OutboxStore,
    Outcome,
    Publisher,
    Rejection,
)
from reliamq.spi.arguments import check_time, check_whole_number

__all__ = ["Relay"]

logger = logging.getLogger("reliamq.outbox")
FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 5.0


class Relay:
    """Sends what the outbox holds.  Run as many as you like, in as many processes.

    batch, batch_bytes: rows claimed at once; the one whose body reaches so many bytes is the last.
    lease: after which a dead relay's rows are free.
    poll: how long to sleep when nothing waits, unless a transaction of this process wakes it.
    deadline: how long a batch may wait for its confirms; at most half the lease counts, so that a live relay keeps it.
    clean_every: how often to look for kept rows whose window is over (O7); while there are more, after each batch.
    Raises ConfigurationError naming the argument that is wrong.
    """

    def __init__(
        self,
        store: OutboxStore,
        publisher: Publisher,
        *,
        batch: int = 2000,
        batch_bytes: int = CLAIM_BYTES,
        poll: timedelta = timedelta(milliseconds=50),
        lease: timedelta = timedelta(seconds=15),
        deadline: timedelta = timedelta(seconds=30),
        clean_every: timedelta = timedelta(seconds=10),
        name: str | None = None,
    ) -> None:
        for what, number in (("batch", batch), ("batch_bytes", batch_bytes)):  # of nothing it would relay nothing
            check_whole_number(f"relay: {what}", number, least=1)
        for what, length in (("poll", poll), ("lease", lease), ("deadline", deadline), ("clean_every", clean_every)):
            check_time(f"relay: {what}", length)
        self._store, self._publisher = store, publisher
        self._batch, self._batch_bytes = batch, batch_bytes
        self._poll, self._lease = poll.total_seconds(), lease
        self._patience = min(deadline.total_seconds(), lease.total_seconds() / 2)
        self._clean_every, self._clean_at = clean_every.total_seconds(), time.monotonic()
        self._sending, self._backlog, self._resting = asyncio.Lock(), asyncio.Event(), Resting()
        self.name = name or f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"

    async def run(self, stop: anyio.Event) -> None:
        """Relay until ``stop`` is set; the batch in hand is finished first.

        Cancelled: what was sent and not settled is sent again, with the same ids, after the lease.
        """
        with ringing() as bell:
            loops = [asyncio.ensure_future(one) for one in (self._lead(stop, bell), self._help(stop))]
            try:
                await asyncio.gather(*loops)
            finally:
                for loop in loops:
                    loop.cancel()
                with anyio.CancelScope(shield=True):  # they must not outlive what they use
                    await asyncio.wait(loops)

    async def _lead(self, stop: anyio.Event, bell: Bell) -> None:
        pause = FIRST_PAUSE_SECONDS
        while not stop.is_set():
            await self._clean()
            relayed = await self._turn(self.name)
            if relayed is None:
                await _sleep(pause, stop)
                pause = min(pause * 2, LONGEST_PAUSE_SECONDS)
                continue
            pause = FIRST_PAUSE_SECONDS
            if not relayed:
                await self._idle(stop, bell)

    async def _idle(self, stop: anyio.Event, bell: Bell) -> None:
        """Until it is time to look again."""
        rest = self._resting.seconds()
        if rest:
            await _sleep(rest, stop)
        else:
            await _sleep(self._poll, stop, bell)

    async def _help(self, stop: anyio.Event) -> None:
        """While one claim is not enough, be a second relay: the one talks to the database while the other one sends."""
        while not stop.is_set():
            self._backlog.clear()
            await _sleep(None, stop, self._backlog)
            pause = FIRST_PAUSE_SECONDS
            while not stop.is_set():
                relayed = await self._turn(f"{self.name}/2")
                if relayed == 0:
                    break
                if relayed is None:  # nobody else has its buckets before their lease ends, so it looks again
                    await _sleep(pause, stop)
                pause = min(pause * 2, LONGEST_PAUSE_SECONDS) if relayed is None else FIRST_PAUSE_SECONDS

    async def _turn(self, owner: str) -> int | None:
        """Relay one claim: how many rows it had; None if database or broker was out of reach.  owner: of the claim."""
        try:
            # Counted from before the claim: one who was paused after it must not send what is others' by now.
            deadline = time.monotonic() + self._patience
            rows = await self._claim(owner)
            await self._relay(owner, rows, deadline)
            if self._is_full(rows):
                self._backlog.set()
            return len(rows)
        except (SQLAlchemyError, BrokerUnavailable, OSError) as error:  # asyncpg's connect raises OSError
            logger.warning("the relay waits: %s", error)
            return None

    async def _claim(self, owner: str) -> Sequence[OutboxRow]:
        """Rows of topics that do not rest; nothing, if it is too early to look past those that do."""
        if not self._resting.may_look():
            return []
        resting, began = self._resting.topics(), time.monotonic()
        rows = await self._store.claim(
            owner, limit=self._batch, max_bytes=self._batch_bytes, lease=self._lease, resting=resting
        )
        if resting:
            self._resting.looked(time.monotonic() - began, found=bool(rows))
        return rows

    def _is_full(self, rows: Sequence[OutboxRow]) -> bool:
        return len(rows) == self._batch or sum(len(one.message.body) for one in rows) >= self._batch_bytes

    async def _clean(self) -> None:
        """Remove kept rows whose window is over: at most two for each that a batch sends, so that removing keeps up and
        sending goes on.
        """
        if time.monotonic() < self._clean_at:
            return
        try:
            removed = await self._store.clean(limit=2 * self._batch)
        except (SQLAlchemyError, OSError) as error:  # no row is needed gone, and sending must not wait for it
            logger.warning("removing old sent rows waits: %s", error)
            removed = 0
        if removed < 2 * self._batch:
            self._clean_at = time.monotonic() + self._clean_every

    async def _relay(self, owner: str, rows: Sequence[OutboxRow], deadline: float) -> None:
        """Send and settle one claim.  Topics that took nothing rest."""
        if not rows:
            return
        confirmed: list[OutboxRow] = []
        rejected: list[tuple[OutboxRow, Rejection]] = []
        left: list[Rejection | InDoubt] = []
        try:
            for one, outcome in await self._send(rows, deadline):
                if isinstance(outcome, Confirmation):
                    confirmed.append(one)
                elif isinstance(outcome, Rejection) and outcome.reason.judges_message:
                    rejected.append((one, outcome))
                    logger.warning("row %d (%s) rejected: %s", one.position, one.message.id, outcome.detail)
                else:  # not one line each, and nothing to write: an outage is no fault of theirs
                    left.append(outcome)
        finally:
            # Also when sending failed: the claim ends at once.
            await self._store.settle(owner, confirmed=confirmed, rejected=rejected)
        if left:
            logger.warning("%d of %d rows wait on; the first: %s", len(left), len(rows), left[0].detail)
        took = {one.message.topic for one in confirmed} | {one.message.topic for one, _ in rejected}
        self._resting.judge({one.message.topic for one in rows}, took)

    async def _send(self, rows: Sequence[OutboxRow], deadline: float) -> Iterable[tuple[OutboxRow, Outcome]]:
        """Rows and outcomes; nothing, where it is so late that the rows may soon be others'.  One call at a time; see
        the contract.
        """
        async with self._sending:
            if time.monotonic() >= deadline:
                return ()
            outcomes = await self._publisher.send([one.message for one in rows], deadline=deadline, chained=True)
        if len(outcomes) != len(rows):  # before any is taken for another row's
            raise ValueError(f"the publisher gave {len(outcomes)} outcomes for {len(rows)} messages")
        return zip(rows, outcomes, strict=True)


async def _sleep(seconds: float | None, *until: anyio.Event | asyncio.Event | Bell) -> None:
    """Or shorter, until one of these comes.  seconds: None: only until then."""
    waiting = [asyncio.ensure_future(one.wait()) for one in until]
    try:
        await asyncio.wait(waiting, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for one in waiting:
            one.cancel()
