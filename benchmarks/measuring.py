"""What all contestants are measured with."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import anyio

CALLERS = 256
TURN = 5_000
"""Messages: a quarter of a second or so."""
Send: TypeAlias = Callable[[int], Awaitable[object]]
"""Sends the message with this number and waits until it is confirmed."""


@dataclass(frozen=True, slots=True)
class Reading:
    """rate: messages a second.  cpu: of this process, microseconds a message."""

    rate: float
    cpu: float


class Clock:
    """From the first of a number of messages to the last.  finished: set at the last.

    What was handled together with the first was done before the clock ran, and is not counted.
    """

    def __init__(self, messages: int) -> None:
        self._left, self._counted = messages, 0
        self._began = self._ended = (0.0, 0.0)
        self.finished = asyncio.Event()

    def handled(self, messages: int = 1) -> None:
        """Some were, just now."""
        self._left -= messages
        if not self._counted:
            self._began, self._counted = _now(), self._left
        elif self._left <= 0 and not self.finished.is_set():
            self._ended = _now()
            self.finished.set()

    @property
    def reading(self) -> Reading:
        """What was measured; of a clock that has finished."""
        return _reading(self._began, self._ended, self._counted)


async def call_side_by_side(messages: int, one: Send, callers: int = CALLERS, first: int = 0) -> Reading:
    """What so many callers reach, each awaiting one after another.  first: the number that they begin with."""
    numbers = iter(range(first, first + messages))

    async def call() -> None:
        for number in numbers:
            await one(number)

    began = _now()
    async with anyio.create_task_group() as tasks:
        for _ in range(callers):
            tasks.start_soon(call)
    return _reading(began, _now(), messages)


async def call_in_turns(messages: int, sends: Mapping[str, Send], begins: int) -> dict[str, Reading]:
    """What each of them reaches where all take short turns: what else the machine does meets them alike.

    begins: who is first, and in the turns that follow another one.
    """
    names = list(sends)
    turns: dict[str, list[tuple[int, Reading]]] = defaultdict(list)
    for turn, first in enumerate(range(0, messages, TURN)):
        count, shift = min(TURN, messages - first), (begins + turn) % len(names)
        for name in names[shift:] + names[:shift]:
            turns[name].append((count, await call_side_by_side(count, sends[name], first=first)))
    return {name: _all_of(of_one) for name, of_one in turns.items()}


def _all_of(turns: Sequence[tuple[int, Reading]]) -> Reading:
    messages = sum(count for count, _ in turns)
    seconds = sum(count / reading.rate for count, reading in turns)
    return Reading(messages / seconds, sum(count * reading.cpu for count, reading in turns) / messages)


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _reading(began: tuple[float, float], ended: tuple[float, float], messages: int) -> Reading:
    return Reading(messages / (ended[0] - began[0]), (ended[1] - began[1]) / messages * 1e6)


class Rates:
    """What each contestant reached, round by round: messages a second, and this process's CPU for one of them."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._rates: dict[str, list[float]] = defaultdict(list)
        self._cpu: dict[str, list[float]] = defaultdict(list)

    async def take(self, name: str, turn: Awaitable[Reading]) -> None:
        """It is this contestant's turn."""
        self.note(name, await turn)

    def note(self, name: str, reading: Reading) -> None:
        """What a contestant reached in this round."""
        self._rates[name].append(reading.rate)
        self._cpu[name].append(reading.cpu)

    def show(self) -> None:
        """A line for each: its rate, its CPU, and reliamq's rate as a multiple of it."""
        for name, rates in self._rates.items():
            cpu = statistics.median(self._cpu[name])
            line = f"{self._what:13} {name:16} {statistics.median(rates):>9,.0f}/s {cpu:>7,.0f} µs"
            if name != "reliamq" and "reliamq" in self._rates:
                ratios = [ours / theirs for ours, theirs in zip(self._rates["reliamq"], rates, strict=True)]
                line += f"   reliamq/{name} {statistics.median(ratios):6.2f}  ({min(ratios):.2f} to {max(ratios):.2f})"
            print(line)
