"""What all contestants are measured with."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import anyio

CALLERS = 256


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


async def call_side_by_side(messages: int, one: Callable[[int], Awaitable[object]], callers: int = CALLERS) -> Reading:
    """What so many callers reach, each awaiting one after another."""
    numbers = iter(range(messages))

    async def call() -> None:
        for number in numbers:
            await one(number)

    began = _now()
    async with anyio.create_task_group() as tasks:
        for _ in range(callers):
            tasks.start_soon(call)
    return _reading(began, _now(), messages)


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
        reading = await turn
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
