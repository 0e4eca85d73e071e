"""The thread that owns a broker's connection and does all of its SQL: group commit.

It takes every job that is queued, runs them in one transaction and answers only after its COMMIT, so that many
publishers, claims and settlements share one fsync (P1).  A job that fails fails alone.  Which jobs there are, and who
waits how long for them, is left to the other modules.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Generic, TypeVar

from reliamq.embedded.errors import StoreFailure
from reliamq.embedded.file import BrokerFile
from reliamq.embedded.retention import Sweeper
from reliamq.embedded.settings import Location

__all__ = ["Job", "Watch", "Worker"]

T = TypeVar("T")
logger = logging.getLogger(__name__)

_QUICK, _CALM, _IDLE = 0.01, 0.025, 0.05  # seconds between two looks for what other processes wrote
_CALM_AFTER, _IDLE_AFTER = 0.5, 3.0  # seconds without any
_SWEEP, _SWEEP_IDLE = 0.25, 5.0  # seconds between two sweeps: after writing, and idle


class Job(Generic[T]):
    """A function of the connection, to be run once, in a transaction if it writes.

    function: may be run a second time after a rollback, so it keeps nothing outside its return value.
    wakes: names of topics in which it makes something available.
    """

    __slots__ = ("error", "function", "future", "loop", "started", "value", "wakes", "withdrawn", "writes")

    def __init__(self, function: Callable[[sqlite3.Connection], T], *, writes: bool, wakes: frozenset[str]) -> None:
        self.function, self.writes, self.wakes = function, writes, wakes
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[None] = self.loop.create_future()
        self.started = self.withdrawn = False
        self.value: T | None = None
        self.error: BaseException | None = None

    def run(self, connection: sqlite3.Connection) -> None:
        """Run, and keep what it returns."""
        self.value, self.error = self.function(connection), None


class Watch:
    """Somebody waiting for news in one topic.  ``event`` is set, in its loop, when there may be some."""

    __slots__ = ("event", "loop", "topic")

    def __init__(self, topic: str) -> None:
        self.topic, self.loop, self.event = topic, asyncio.get_running_loop(), asyncio.Event()


class Worker:
    """One thread, one connection.  ``submit``, ``withdraw``, ``watch`` and ``stop`` may be called from any thread."""

    def __init__(self, location: Location, clock: Callable[[], float]) -> None:
        self._file, self._clock = BrokerFile(location), clock
        self._queue: queue.SimpleQueue[Job[Any] | None] = queue.SimpleQueue()
        self._mutex = threading.Lock()  # guards started/withdrawn of jobs, and the watches
        self._watches: set[Watch] = set()
        self._looked_at = self._news_at = time.monotonic()
        self._last_job: Job[Any] | None = None
        self._sweeper = Sweeper()
        self._sweep_at = self._news_at + _SWEEP
        self._wrote = False
        threading.Thread(target=self._work, name=f"reliamq {self._file.name}", daemon=True).start()

    # --- from any thread -------------------------------------------------------------------------------------------

    def submit(self, job: Job[Any]) -> None:
        """Queue a job.  Its future is done, in its own loop, when its fate is known."""
        self._queue.put(job)

    def withdraw(self, job: Job[Any]) -> bool:
        """Take a job back; False when it was started already, so that its fate is not known yet."""
        with self._mutex:
            job.withdrawn = not job.started
            return job.withdrawn

    def watch(self, watch: Watch) -> None:
        """Set the watch's event from now on when its topic has news."""
        with self._mutex:
            self._watches.add(watch)

    def unwatch(self, watch: Watch) -> None:
        """Forget a watch."""
        with self._mutex:
            self._watches.discard(watch)

    def stop(self, last: Job[Any] | None = None) -> None:
        """End after what is queued; ``last``, answered when the file is closed, tells when."""
        self._last_job = last
        self._queue.put(None)

    # --- the thread ------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while self._turn():
            pass
        self._file.close()
        if self._last_job is not None:
            self._answer([self._last_job], frozenset())

    def _turn(self) -> bool:
        """Do what is queued and what is due; False when it was the last time.  Between turns no job is held."""
        jobs = self._next_jobs()
        self._process([job for job in jobs if job is not None])
        if self._watches:
            self._look_for_foreign_news()
        self._sweep_when_due()
        return None not in jobs

    def _next_jobs(self) -> Sequence[Job[Any] | None]:
        """Everything that is queued; waits for the first, but not longer than until there is something else to do."""
        jobs: list[Job[Any] | None] = []
        pause = max(0.0, self._sweep_at - time.monotonic())
        with suppress(queue.Empty):
            jobs.append(self._queue.get(timeout=min(pause, self._pause()) if self._watches else pause))
            while True:
                jobs.append(self._queue.get_nowait())
        return jobs

    def _process(self, jobs: Sequence[Job[Any]]) -> None:
        reads = [job for job in jobs if not job.writes]
        writes = [job for job in jobs if job.writes]
        for job in reads:
            self._read(job)
        if writes:
            self._wrote = True
            self._sweep_at = min(self._sweep_at, time.monotonic() + _SWEEP)
            self._write(writes)
        if jobs:
            self._answer(jobs, frozenset().union(*(job.wakes for job in writes if job.error is None)))

    def _read(self, job: Job[Any]) -> None:
        try:
            job.run(self._file.connection())
        except Exception as error:  # whatever it is, who waits for it is told
            job.error = self._file.judged(error)

    def _write(self, jobs: Sequence[Job[Any]]) -> None:
        """Run a group; if one of it fails, run each on its own, so that only the one at fault fails."""

        def run_all(connection: sqlite3.Connection) -> None:
            for job in jobs:
                if self._start(job):
                    job.run(connection)

        try:
            self._file.transaction(run_all)
        except Exception as error:  # as above
            if len(jobs) == 1 or isinstance(error, StoreFailure):  # the file's own: alone it would go no better
                for job in jobs:
                    job.error = self._file.judged(error)
            else:
                for job in jobs:
                    self._write([job])

    def _start(self, job: Job[Any]) -> bool:
        with self._mutex:
            job.started = not job.withdrawn
            return job.started

    # --- housekeeping ----------------------------------------------------------------------------------------------

    def _sweep_when_due(self) -> None:
        """Remove a piece of what retention lets go, a few times a second, and again at once while there is more."""
        now = time.monotonic()
        if now < self._sweep_at:
            return
        more = False
        if self._file.is_open:
            try:
                more = self._sweep()
            except Exception as error:  # whatever it is, those who use the broker are not to suffer from it
                logger.warning("%s: could not remove finished messages, will try again: %s", self._file.name, error)
                self._sweeper = Sweeper()  # what it thinks it has removed was rolled back
        self._sweep_at = now if more else now + (_SWEEP if self._wrote else _SWEEP_IDLE)
        self._wrote = False

    def _sweep(self) -> bool:
        more = False
        now = self._clock()

        def run(connection: sqlite3.Connection) -> None:
            nonlocal more
            more = self._sweeper.sweep(connection, now)

        if self._sweeper.has_work(self._file.connection(), now):
            self._file.transaction(run)
        return more

    # --- telling ---------------------------------------------------------------------------------------------------

    def _answer(self, jobs: Sequence[Job[Any]], topics: frozenset[str]) -> None:
        """One call into each loop for all that concerns it."""
        with self._mutex:
            watches = [watch for watch in self._watches if watch.topic in topics] if topics else []
        for loop in {*(job.loop for job in jobs), *(watch.loop for watch in watches)}:
            done = [job.future for job in jobs if job.loop is loop]
            news = [watch.event for watch in watches if watch.loop is loop]
            with suppress(RuntimeError):  # that loop is closed: nobody waits there, and the file has the outcome
                loop.call_soon_threadsafe(_tell, done, news)

    def _pause(self) -> float:
        quiet = self._looked_at - self._news_at
        return _QUICK if quiet < _CALM_AFTER else _CALM if quiet < _IDLE_AFTER else _IDLE

    def _look_for_foreign_news(self) -> None:
        """Ask SQLite whether another process has written; cheap, and not a transaction."""
        now = time.monotonic()
        if now - self._looked_at < _QUICK:
            return
        self._looked_at = now
        if self._file.was_changed():
            self._news_at = now
            with self._mutex:
                topics = frozenset(watch.topic for watch in self._watches)
            self._answer((), topics)


def _tell(futures: Sequence[asyncio.Future[None]], events: Sequence[asyncio.Event]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)
    for event in events:
        event.set()
