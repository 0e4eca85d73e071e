"""Keeps a number of worker processes running: starts again who dies, with growing pauses, and hands signals on.

A process that says its configuration is wrong is not started again, unless workers have run well before: then somebody
is changing it, and those that run go on.  Processes share nothing with the supervisor.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from types import FrameType

from reliamq.cli.target import REFUSED, TRY_AGAIN
from reliamq.spi import WORKER_NUMBER

__all__ = ["Supervisor"]

logger = logging.getLogger("reliamq.run")
LONGEST_PAUSE = 30.0
STEADY_SECONDS = 10.0
LOOK_EVERY = 0.1


@dataclass(slots=True)
class _Place:
    """One worker's place and who fills it.  number: from 0; whoever fills it can go by it."""

    number: int
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    failures: int = 0
    start_at: float = 0.0


class Supervisor:
    """command: of one worker.  workers: how many."""

    def __init__(self, command: list[str], workers: int) -> None:
        self._command = command
        self._places = [_Place(number) for number in range(workers)]
        self._signals = 0
        self._refused = False
        self._ran_well = False

    def run(self) -> int:
        """Supervise until a signal, then until all have ended; the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        while True:
            for place in self._places:
                self._look_at(place)
            if self._refused and not self._signals:
                self._on_signal(signal.SIGTERM, None)
            if (self._signals or self._refused) and not any(place.process for place in self._places):
                return REFUSED if self._refused else 0
            time.sleep(LOOK_EVERY)

    def _look_at(self, place: _Place) -> None:
        if place.process is None:
            if not self._signals and not self._refused and time.monotonic() >= place.start_at:
                self._start(place)
            return
        code = place.process.poll()
        if code is None:
            return
        pid, place.process = place.process.pid, None
        self._ran_well |= time.monotonic() - place.started_at > STEADY_SECONDS and code != TRY_AGAIN
        if code == REFUSED and not self._ran_well:
            self._refused = True
        elif not self._signals:
            self._plan_restart(place, pid, code)

    def _start(self, place: _Place) -> None:
        # A process group of its own: a Ctrl-C in the terminal reaches the supervisor alone, which hands it on once.
        environment = {**os.environ, WORKER_NUMBER: str(place.number)}
        place.process = subprocess.Popen(self._command, env=environment, start_new_session=True)  # noqa: S603  # our own
        place.started_at = time.monotonic()
        logger.info("worker %d started", place.process.pid)

    def _plan_restart(self, place: _Place, pid: int, code: int) -> None:
        steady = time.monotonic() - place.started_at > STEADY_SECONDS
        place.failures = 1 if steady else place.failures + 1
        pause = min(0.5 * 2 ** (place.failures - 1), LONGEST_PAUSE)
        place.start_at = time.monotonic() + pause
        logger.error("worker %d %s; starting again in %.1f s", pid, _how(code), pause)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        """First: finish.  Second: stop now, which a worker does by itself.  Third: kill."""
        self._signals += 1
        for place in self._places:
            if place.process is not None and place.process.poll() is None:
                place.process.send_signal(signal.SIGTERM if self._signals < 3 else signal.SIGKILL)


def _how(code: int) -> str:
    if code == TRY_AGAIN:
        return "could not reach broker or database"
    return f"was killed by signal {-code}" if code < 0 else f"ended with {code}"


def worker_command(target: str) -> list[str]:
    """How one worker process is started."""
    return [sys.executable, "-m", "reliamq.cli.worker_process", target]
