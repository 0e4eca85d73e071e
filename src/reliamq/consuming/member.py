"""One member of one group on one topic: receives, runs lanes, renews leases, stops without losing or repeating.

It owns the tasks that handlers run in; no handler runs inside a client's callback.  What it holds is bounded in
messages and bytes (C10).  What a delivery leads to is decided in ``pipeline`` and carried out in ``settlement``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import timedelta

import anyio

from reliamq.consuming.lanes import Lanes
from reliamq.consuming.pipeline import Pipeline
from reliamq.consuming.retry import Conclusion
from reliamq.consuming.settlement import Settler
from reliamq.consuming.suspects import Suspects
from reliamq.consuming.time_limit import TimeLimit
from reliamq.spi import BrokerUnavailable, DeadLetters, Delivery, Release, Retry, Settlement, Subscription

__all__ = ["GroupMember", "Limits"]

logger = logging.getLogger("reliamq.consuming")
RECEIVE_WAIT = timedelta(seconds=1)
STUCK_SECONDS = 1.0
LIMIT_CHECK_SECONDS = 0.05
UNAVAILABLE_PAUSE_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Limits:
    """prefetch, prefetch_bytes: most that is held unsettled (C10).  stop: time for handlers to finish then (C8)."""

    prefetch: int = 500
    prefetch_bytes: int = 16 * 1024 * 1024
    stop: timedelta = timedelta(seconds=30)


class GroupMember:
    """Consumes one topic for one group until told to stop.

    suspects: shared by all members of the process; a message whose process died in its handler runs alone in it (C4).
    """

    def __init__(
        self,
        subscription: AbstractAsyncContextManager[Subscription],
        dead_letters: DeadLetters,
        pipeline: Pipeline,
        *,
        concurrency: int,
        limits: Limits,
        suspects: Suspects,
        label: str,
    ) -> None:
        self._opening, self._dead_letters, self._pipeline = subscription, dead_letters, pipeline
        self._limits, self._suspects, self._label = limits, suspects, label
        self._concurrency, self._lanes = concurrency, Lanes()
        self._held: dict[int, Delivery] = {}
        self._held_bytes = 0
        self._running: dict[int, TimeLimit] = {}
        self._lost: set[int] = set()
        self._sleeping: list[asyncio.Event] = []  # lanes without work
        self._room = anyio.Event()
        self._generation = 0
        self._held_back: set[int] = set()  # keyed deliveries that the broker is to have back and does not know of yet
        self._stopping = False

    async def run(self, stop: anyio.Event) -> None:
        """Consume until ``stop`` is set, then finish (C8): running handlers get until the deadline, the rest is
        released.

        Cancelled: handlers are cancelled; what is unsettled comes back to others when the subscription closes.
        """
        self._clock = asyncio.get_running_loop().time
        async with self._opening as subscription:
            self._subscription = subscription
            self._settler = Settler(subscription, self._dead_letters, settled=self._after_settling)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._settler.run)
                tasks.start_soon(self._renew_for_ever)
                tasks.start_soon(self._check_limits_for_ever)
                await self._consume(stop)
                with anyio.move_on_after(self._limits.stop.total_seconds()) as patience:
                    await self._settler.flush()
                if patience.cancelled_caught:
                    logger.error("%s: the broker took no settlements in time; they come again", self._label)
                tasks.cancel_scope.cancel()

    async def _consume(self, stop: anyio.Event) -> None:
        async with anyio.create_task_group() as lanes:
            for _ in range(self._concurrency):
                lanes.start_soon(self._work_lane)
            await self._receive_until(stop)
            self._release_unstarted()
            with anyio.move_on_after(self._limits.stop.total_seconds()) as patience:
                while self._running:
                    await self._wait_for_room()
            if patience.cancelled_caught:
                logger.warning("%s: %d handlers did not finish in time; released", self._label, len(self._running))
            lanes.cancel_scope.cancel()

    # --- receiving -------------------------------------------------------------------------------------------------

    async def _receive_until(self, stop: anyio.Event) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._receive_for_ever)
            await stop.wait()
            self._stopping = True
            # Cancelled in the middle of a receive: what was taken is given back when the subscription closes.
            tasks.cancel_scope.cancel()

    async def _receive_for_ever(self) -> None:
        while True:
            room = self._limits.prefetch - len(self._held)
            room_bytes = self._limits.prefetch_bytes - self._held_bytes
            # Asking for a handful at a time would make each batch small; wait until a good part is free.
            if room * 4 < self._limits.prefetch or room_bytes <= 0:
                self._release_behind_stuck()
                with anyio.move_on_after(STUCK_SECONDS):
                    await self._wait_for_room()
                continue
            if self._held_back:
                # What is handed out now may be older than what the broker hears next; were it asked again and again
                # meanwhile, nobody could ever tell.
                await self._wait_for_room()
                continue
            self._lanes.forget(self._generation)
            self._generation += 1
            try:
                deliveries = await self._subscription.receive(room, max_bytes=room_bytes, wait=RECEIVE_WAIT)
            except BrokerUnavailable as error:
                logger.warning("%s: nothing can be received, trying again: %s", self._label, error)
                await anyio.sleep(UNAVAILABLE_PAUSE_SECONDS)
                continue
            self._dispatch(deliveries)

    def _dispatch(self, deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            self._held[id(delivery)] = delivery
            self._held_bytes += delivery.message.size
            if self._lanes.refuses(delivery, self._generation):
                self._give_back(delivery)  # at once, so that the next receive waits for it
            elif self._lanes.add(delivery, self._generation) and self._sleeping:
                self._sleeping.pop().set()

    async def _wait_for_room(self) -> None:
        self._room = anyio.Event()
        await self._room.wait()

    # --- lanes -----------------------------------------------------------------------------------------------------

    async def _work_lane(self) -> None:
        waker = asyncio.Event()
        while True:
            while (taken := self._lanes.take(self._clock())) is not None:
                delivery, generation = taken
                if id(delivery) in self._lost:
                    self._forget(delivery)
                elif not self._lanes.admits(delivery, generation):
                    self._give_back(delivery)
                else:
                    await self._attempt(delivery)
                self._lanes.ends(delivery)
            waker.clear()
            self._sleeping.append(waker)
            await waker.wait()

    async def _attempt(self, delivery: Delivery) -> None:
        limit = self._running[id(delivery)] = TimeLimit(self._clock)
        conclusion: Conclusion | None = None
        try:
            async with limit.timeout:
                conclusion = await self._start(delivery, limit)
        except TimeoutError:
            if not limit.timeout.expired():  # not ours; what a handler raises is a conclusion by now
                raise
            if id(delivery) not in self._lost:
                conclusion = self._pipeline.timed_out(delivery, limit)
        except asyncio.CancelledError:
            # Stopped from outside in the middle of it: rolled back, given to others at once, not an attempt (C8).
            self._settler.add(Release(delivery))
            raise
        finally:
            del self._running[id(delivery)]
            if self._stopping:
                self._room.set()
        if conclusion is None:  # somebody else has it: nothing to settle
            self._forget(delivery)
            return
        if isinstance(conclusion, Release) or (isinstance(conclusion, Retry) and conclusion.keep_order):
            self._hold_key(delivery)
        self._settler.add(conclusion)

    async def _start(self, delivery: Delivery, limit: TimeLimit) -> Conclusion | None:
        """Run one attempt; None when the delivery is somebody else's by now."""
        verdict = self._pipeline.verdict_on_crashes(delivery) if delivery.crashes else None
        if verdict is not None:
            return verdict
        if delivery.crashes:
            async with self._suspects.alone():
                return await self._start_recorded(delivery, limit)
        while self._suspects.gate is not None:
            await self._suspects.gate.wait()
        self._suspects.enter()
        try:
            if delivery.redelivered:
                return await self._start_recorded(delivery, limit)
            return await self._within_timeout(delivery, limit)
        finally:
            self._suspects.leave()

    async def _start_recorded(self, delivery: Delivery, limit: TimeLimit) -> Conclusion | None:
        while True:
            try:
                owned = await self._subscription.begin([delivery])
            except BrokerUnavailable as error:
                logger.warning("%s: a start cannot be recorded, waiting: %s", self._label, error)
                await anyio.sleep(UNAVAILABLE_PAUSE_SECONDS)
                continue
            if not owned or id(delivery) in self._lost:
                return None
            return await self._within_timeout(delivery, limit)

    async def _within_timeout(self, delivery: Delivery, limit: TimeLimit) -> Conclusion:
        if not self._subscription.may_start(delivery):
            return Release(delivery)  # the broker wants it back, or gave it to somebody else already
        limit.allow(self._pipeline.timeout(delivery))
        try:
            return await self._pipeline.conclude(delivery, limit)
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if limit.timeout.expired() or (task is not None and task.cancelling()):
                raise
            # Looks like a cancellation and nobody cancelled: the handler's client did (a lost connection, say).
            return self._pipeline.failed(delivery, RuntimeError(f"the handler raised {error!r} by itself"))

    async def _check_limits_for_ever(self) -> None:
        while True:
            await anyio.sleep(LIMIT_CHECK_SECONDS)
            now = self._clock()
            for limit in self._running.values():
                limit.check(now)

    # --- leases and settlement -------------------------------------------------------------------------------------

    async def _renew_for_ever(self) -> None:
        while True:
            await anyio.sleep(self._subscription.lease_seconds / 3)
            held = [delivery for delivery in self._held.values() if id(delivery) not in self._lost]
            if not held:
                continue
            try:
                kept = {id(delivery) for delivery in await self._subscription.extend(held)}
            except BrokerUnavailable as error:
                logger.warning("%s: %d leases cannot be renewed: %s", self._label, len(held), error)
                continue
            self._lose([one for one in held if id(one) not in kept and id(one) in self._held])

    def _lose(self, lost: Sequence[Delivery]) -> None:
        """Stop working on what is somebody else's now."""
        for delivery in lost:
            logger.warning("%s: the lease of message %s was lost", self._label, delivery.message.id)
            self._lost.add(id(delivery))
            limit = self._running.get(id(delivery))
            if limit is not None:
                limit.stop_now()

    def _release_behind_stuck(self) -> None:
        """Give back what waits behind a message of its key that takes long, so that other keys find room (C3).

        The broker keeps it until that message is settled.
        """
        for delivery in self._lanes.take_behind_stuck(before=self._clock() - STUCK_SECONDS):
            self._give_back(delivery)

    def _give_back(self, delivery: Delivery) -> None:
        """Release it, and run nothing of its key until the broker has it: it comes again, and must be first (C3)."""
        self._hold_key(delivery)
        self._settler.add(Release(delivery))

    def _hold_key(self, delivery: Delivery) -> None:
        if delivery.message.key is not None:
            self._held_back.add(id(delivery))
            self._lanes.hold(delivery.message.key)

    def _release_unstarted(self) -> None:
        for delivery in self._lanes.clear():
            self._settler.add(Release(delivery))

    def _after_settling(self, settlements: Sequence[Settlement]) -> None:
        for settlement in settlements:
            delivery = settlement.delivery
            if id(delivery) in self._held_back and delivery.message.key is not None:
                self._held_back.discard(id(delivery))
                self._lanes.lift(delivery.message.key, self._generation)
            self._forget(delivery)

    def _forget(self, delivery: Delivery) -> None:
        if self._held.pop(id(delivery), None) is not None:
            self._held_bytes -= delivery.message.size
            self._lost.discard(id(delivery))
        self._room.set()
