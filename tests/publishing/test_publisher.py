"""The coalescing publisher over a backend that misbehaves on purpose: what callers are told (P2, P5, P7)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import anyio
import anyio.lowlevel
import pytest

from reliamq.publishing import ConfirmingPublisher
from reliamq.spi import Confirmation, Message, Outcome, Rejection, RejectionReason, Unconfirmed

pytestmark = pytest.mark.anyio

SOON = timedelta(seconds=5)


class Backend:
    """Answers each batch with what ``answer`` says; remembers what it was sent."""

    gathering_rounds = 8

    def __init__(self, answer: Callable[[Sequence[Message]], Sequence[Outcome]]) -> None:
        self.answer, self.batches = answer, list[list[str]]()

    def route(self, message: Message) -> None:
        """One for all."""

    async def send(self, batch: Sequence[Message], *, deadline: float, chained: bool = False) -> Sequence[Outcome]:
        self.batches.append([message.id for message in batch])
        await anyio.lowlevel.checkpoint()
        return self.answer(batch)


class Silent:
    """Never answers."""

    gathering_rounds = 1

    def route(self, message: Message) -> None:
        """One for all."""

    async def send(self, batch: Sequence[Message], *, deadline: float, chained: bool = False) -> Sequence[Outcome]:
        await anyio.sleep_forever()
        raise AssertionError


class Partitioned(Backend):
    """Stores each key at a place of its own; the place of ``stuck`` answers nothing until it is freed."""

    def __init__(self, answer: Callable[[Sequence[Message]], Sequence[Outcome]], stuck: bytes) -> None:
        super().__init__(answer)
        self.stuck, self.freed = stuck, anyio.Event()
        self.under_way: set[bytes | None] = set()

    def route(self, message: Message) -> bytes | None:
        return message.key

    async def send(self, batch: Sequence[Message], *, deadline: float, chained: bool = False) -> Sequence[Outcome]:
        (key,) = {message.key for message in batch}
        assert key not in self.under_way, "two batches of one route at the same time"
        self.under_way.add(key)
        if key == self.stuck:
            await self.freed.wait()
        outcomes = await super().send(batch, deadline=deadline, chained=chained)
        self.under_way.remove(key)
        return outcomes


def message(number: int, key: bytes = b"ada") -> Message:
    return Message("orders", b"", str(number), "Order", "tests", datetime.now(UTC), key=key)


def confirmed(batch: Sequence[Message]) -> Sequence[Outcome]:
    return [Confirmation(each.id) for each in batch]


@asynccontextmanager
async def running(publisher: ConfirmingPublisher) -> AsyncIterator[None]:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(publisher.run)
        yield
        tasks.cancel_scope.cancel()


async def test_closing_answers_those_too_who_wait_for_room_and_names_them() -> None:
    """P7"""
    publisher, answers = ConfirmingPublisher(Silent(), max_messages=2), list[str]()

    async def publish(number: int) -> None:
        with pytest.raises(Unconfirmed):
            await publisher.publish(message(number), deadline=timedelta(seconds=60))
        answers.append(str(number))

    with anyio.fail_after(5):
        async with anyio.create_task_group() as callers, running(publisher):
            for number in range(20):
                callers.start_soon(publish, number)
            await anyio.sleep(0.02)
            left = await publisher.drain(timedelta(milliseconds=50))

    assert sorted(left) == sorted(answers) == sorted(map(str, range(20)))


async def test_closing_lets_those_who_wait_for_room_go_first() -> None:
    """P7"""
    publisher = ConfirmingPublisher(Backend(confirmed), max_messages=1)
    async with running(publisher):
        waiting = [asyncio.create_task(publisher.publish(message(number), deadline=SOON)) for number in range(10)]
        await anyio.lowlevel.checkpoint()
        assert await publisher.drain(SOON) == []
        assert [(await each).message_id for each in waiting] == list(map(str, range(10)))


async def test_a_message_that_the_backend_stumbles_over_does_not_take_its_neighbours_along() -> None:
    """P2"""

    def stumble(batch: Sequence[Message]) -> Sequence[Outcome]:
        if any(each.id == "3" for each in batch):
            raise KeyError("3")
        return confirmed(batch)

    publisher = ConfirmingPublisher(Backend(stumble))
    async with running(publisher):
        tasks = [
            asyncio.create_task(publisher.publish(message(number), deadline=timedelta(seconds=1)))
            for number in range(6)
        ]
        answers = await asyncio.gather(*tasks, return_exceptions=True)

    assert [type(answer) for answer in answers] == [Confirmation] * 3 + [Unconfirmed] + [Confirmation] * 2


async def test_what_was_refused_for_now_is_not_overtaken_by_what_came_later() -> None:
    """P5"""
    refusals = 1

    def full_at_first(batch: Sequence[Message]) -> Sequence[Outcome]:
        nonlocal refusals
        if refusals:
            refusals -= 1
            return [Rejection(each.id, RejectionReason.STORAGE_FULL, "full") for each in batch]
        stored.extend(each.id for each in batch)
        return confirmed(batch)

    stored = list[str]()
    publisher = ConfirmingPublisher(Backend(full_at_first), batch=1)
    async with running(publisher):
        await asyncio.gather(*(publisher.publish(message(number), deadline=SOON) for number in range(3)))

    assert stored == ["0", "1", "2"]


async def test_a_place_that_is_stuck_holds_up_no_message_that_is_stored_elsewhere() -> None:
    """P5 P6"""
    backend = Partitioned(confirmed, stuck=b"bob")
    publisher = ConfirmingPublisher(backend)
    done: list[str] = []

    async def publish(number: int, key: bytes) -> None:
        done.append((await publisher.publish(message(number, key), deadline=SOON)).message_id)

    async with running(publisher), anyio.create_task_group() as callers:
        for number in range(40):
            callers.start_soon(publish, number, [b"ada", b"bob", b"cyd", b"dan"][number % 4])
        with anyio.fail_after(2):
            while len(done) < 30:
                await anyio.sleep(0.01)
        assert not {int(one) % 4 for one in done} & {1}
        backend.freed.set()

    assert sorted(map(int, done)) == list(range(40))
    assert len(backend.batches) < 10, "what gathers goes out together"
    of_bob = [int(one) for batch in backend.batches for one in batch if int(one) % 4 == 1]
    assert of_bob == sorted(of_bob)


async def test_callers_who_do_a_little_before_they_publish_on_leave_together_all_the_same() -> None:
    """What is published while a batch is answered for goes into the next one."""
    backend = Backend(confirmed)
    publisher = ConfirmingPublisher(backend)

    async def publish_on(caller: int) -> None:
        for number in range(10):
            await publisher.publish(message(caller * 10 + number), deadline=SOON)
            for _ in range(caller % 6):
                await asyncio.sleep(0)

    async with running(publisher), anyio.create_task_group() as callers:
        for caller in range(32):
            callers.start_soon(publish_on, caller)

    assert len(backend.batches) == 10
