"""The coalescing publisher: callers each await their own confirmation, and what has gathered is sent as one batch.

A caller gets its confirmation or one of two exceptions by its deadline: ``Rejected`` (certainly not stored) or
``Unconfirmed`` (P2).  What is in doubt is sent again with the same id until then (P4).  Batches go out side by side
where the backend says that they do not depend on each other (its routes), and one after another where they do (P5).
How a batch is stored is left to the backend.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Hashable, Sequence
from datetime import timedelta

import anyio
from anyio.abc import TaskGroup

from reliamq.publishing.in_flight import InFlight
from reliamq.publishing.resend import Pause
from reliamq.spi import (
    BrokerUnavailable,
    Confirmation,
    InDoubt,
    Message,
    Outcome,
    Publisher,
    Rejection,
    RejectionReason,
    Unconfirmed,
    publish_error,
)

__all__ = ["ConfirmingPublisher"]

EXPIRY_CHECK_SECONDS = 0.05
CLOSED = "the publisher is closed; the message was not sent"


class _Waiting:
    """One caller's message on its way.  last: the newest rejection that was not final; doubt: the newest in doubt."""

    __slots__ = ("doubt", "expires", "last", "message", "outcome", "size")

    def __init__(self, message: Message, size: int, expires: float, outcome: asyncio.Future[Confirmation]) -> None:
        self.message, self.size, self.expires, self.outcome = message, size, expires, outcome
        self.last: Rejection | None = None
        self.doubt: InDoubt | None = None


class ConfirmingPublisher:
    """Batches many callers' messages over one backend publisher.

    publisher: the backend's.  batch: most messages of one send.
    max_messages, max_bytes: the bound on what is in flight (P6).
    Its tasks run inside :meth:`run`, which somebody must keep running.
    """

    def __init__(
        self,
        publisher: Publisher,
        *,
        batch: int = 512,
        max_messages: int = 10_000,
        max_bytes: int = 64 * 1024 * 1024,
    ) -> None:
        self._publisher, self._batch = publisher, batch
        self._in_flight = InFlight(max_messages=max_messages, max_bytes=max_bytes)
        self._routes: dict[Hashable, deque[_Waiting]] = {}  # what waits on each; a task works off each
        self._tasks: TaskGroup | None = None
        self._outstanding: dict[_Waiting, None] = {}
        self._before_room: dict[object, Message] = {}
        self._drained = asyncio.Event()  # it takes nothing new, and has nothing any more
        self._closed = self._over = False  # takes nothing new; gives up on what it has

    # --- callers ---------------------------------------------------------------------------------------------------

    async def publish(self, message: Message, *, deadline: timedelta) -> Confirmation:
        """Store ``message``; see :meth:`reliamq.topics.Topic.publish` for what is raised.

        Cancelled: a message not yet sent is withdrawn; one already sent may be stored.
        """
        if self._closed:
            raise Unconfirmed(message.topic, message.id, CLOSED)
        size = message.size
        expires = time.monotonic() + deadline.total_seconds()
        if not self._in_flight.try_enter(size):
            await self._wait_for_room(message, size, expires)
            if self._over:
                self._in_flight.leave(size)
                raise Unconfirmed(message.topic, message.id, CLOSED)
        waiting = _Waiting(message, size, expires, asyncio.get_running_loop().create_future())
        self._outstanding[waiting] = None
        self._enqueue(waiting)
        try:
            return await waiting.outcome
        finally:
            self._forget(waiting)

    def _enqueue(self, waiting: _Waiting) -> None:
        route = self._publisher.route(waiting.message)
        queue = self._routes.get(route)
        if queue is not None:
            queue.append(waiting)
            return
        self._routes[route] = deque((waiting,))
        if self._tasks is not None:
            self._tasks.start_soon(self._work_off, route)

    async def _wait_for_room(self, message: Message, size: int, expires: float) -> None:
        caller, entered = object(), False
        self._before_room[caller] = message
        try:
            with anyio.move_on_after(expires - time.monotonic()):
                await self._in_flight.enter(size)
                entered = True
        finally:
            del self._before_room[caller]
            if not entered:  # else it is outstanding before anybody looks
                self._note_drained()
        if entered:
            return
        raise Unconfirmed(
            message.topic,
            message.id,
            f"{self._in_flight.messages} messages are in flight and the broker confirmed none in time; not sent",
        )

    def _forget(self, waiting: _Waiting) -> None:
        del self._outstanding[waiting]
        self._in_flight.leave(waiting.size)
        self._note_drained()

    def _note_drained(self) -> None:
        if self._closed and not self._outstanding and not self._before_room:
            self._drained.set()

    async def drain(self, deadline: timedelta) -> Sequence[str]:
        """Take nothing new, wait for outstanding confirms; the ids of those that stayed unconfirmed (P7).

        deadline: how long to wait.  Whoever still waits then gets Unconfirmed.
        """
        self._closed = True
        self._note_drained()
        with anyio.move_on_after(deadline.total_seconds()):
            await self._drained.wait()
        left = [message.id for message in (*self._before_room.values(), *self._messages())]
        self._give_up("the publisher was closed before the broker confirmed")
        return left

    # --- the sending side ------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Send until cancelled.  Whoever still waits when it ends gets Unconfirmed: nobody hangs."""
        try:
            async with anyio.create_task_group() as tasks:
                self._tasks = tasks
                for route in self._routes:
                    tasks.start_soon(self._work_off, route)
                tasks.start_soon(self._expire_for_ever)
        finally:
            self._closed, self._tasks = True, None
            self._give_up("the publisher stopped before the broker confirmed")

    async def _work_off(self, route: Hashable) -> None:
        """Send what waits on a route, batch after batch, until nothing does."""
        queue, pause = self._routes[route], Pause()
        while batch := self._take(queue):
            again = await self._send(batch)
            if again:
                queue.extendleft(reversed(again))
                await anyio.sleep(pause.longer())  # cancelled here: run() tells everybody
            else:
                pause.reset()
                # Those who were just told publish on: the next batch has theirs too, and there are fewer of them.
                for _ in range(self._publisher.gathering_rounds):
                    await asyncio.sleep(0)
        del self._routes[route]

    def _take(self, queue: deque[_Waiting]) -> list[_Waiting]:
        batch: list[_Waiting] = []
        while queue and len(batch) < self._batch:
            waiting = queue.popleft()
            if not waiting.outcome.done():  # else its caller went away, or its deadline passed
                batch.append(waiting)
        return batch

    async def _send(self, batch: list[_Waiting]) -> list[_Waiting]:
        """Send a batch; what must be sent again, in order."""
        deadline = max(waiting.expires for waiting in batch)
        messages = [waiting.message for waiting in batch]
        try:
            outcomes: Sequence[Outcome] = await self._publisher.send(messages, deadline=deadline)
        except BrokerUnavailable as error:
            for waiting in batch:
                waiting.last = waiting.last or _unavailable(waiting.message, error)
            return batch
        except Exception as error:  # a fault of the backend: what it did before is unknown, so all are in doubt
            if len(batch) > 1:  # perhaps one of them is the cause: it must not take its neighbours along
                return [left for waiting in batch for left in await self._send([waiting])]
            outcomes = [InDoubt(message.id, f"the backend failed: {error!r}", error) for message in messages]
        return [waiting for waiting, outcome in zip(batch, outcomes, strict=True) if not _conclude(waiting, outcome)]

    async def _expire_for_ever(self) -> None:
        # One sweep for all callers costs less than a timer each; it is why deadlines are exact to 50 ms only.
        while True:
            await anyio.sleep(EXPIRY_CHECK_SECONDS)
            now = time.monotonic()
            for waiting in self._outstanding:
                if waiting.expires <= now and not waiting.outcome.done():
                    waiting.outcome.set_exception(_at_deadline(waiting, "the broker did not confirm by the deadline"))

    def _messages(self) -> list[Message]:
        return [waiting.message for waiting in self._outstanding]

    def _give_up(self, why: str) -> None:
        self._over = True
        self._in_flight.open()  # whoever waits for room finds the publisher closed
        for waiting in self._outstanding:
            if not waiting.outcome.done():
                waiting.outcome.set_exception(_at_deadline(waiting, why))


def _conclude(waiting: _Waiting, outcome: Outcome) -> bool:
    """Tell the caller, if this outcome is final; whether it was."""
    if waiting.outcome.done():
        return True
    if isinstance(outcome, Confirmation):
        waiting.outcome.set_result(outcome)
        return True
    if isinstance(outcome, InDoubt):
        waiting.doubt = outcome
        return False
    waiting.last = outcome
    if not outcome.reason.judges_message:
        return False
    error = _at_deadline(waiting, outcome.detail) if waiting.doubt else publish_error(waiting.message.topic, outcome)
    waiting.outcome.set_exception(error)
    return True


def _at_deadline(waiting: _Waiting, why: str) -> Exception:
    """What is true when no confirmation came: certain only if no attempt is in doubt and one was refused."""
    if waiting.doubt is None and waiting.last is not None:
        return publish_error(waiting.message.topic, waiting.last)
    doubt = waiting.doubt or InDoubt(waiting.message.id, why)
    return publish_error(waiting.message.topic, InDoubt(doubt.message_id, f"{why}; {doubt.detail}", doubt.cause))


def _unavailable(message: Message, error: BrokerUnavailable) -> Rejection:
    return Rejection(message.id, RejectionReason.UNAVAILABLE, str(error), error)
