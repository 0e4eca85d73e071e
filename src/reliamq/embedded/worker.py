"""The thread that owns a broker's connection and does all of its SQL: group commit.

It takes every job that is queued, runs them in one transaction and answers only after its COMMIT, so that many
publishers, claims and settlements share one fsync (P1).  A job that fails fails alone.  Which jobs there are, and who
waits how long for them, is left to the other modules.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Generic, TypeVar

from reliamq.embedded.errors import StoreFailure, failure_of
from reliamq.embedded.opening import connect
from reliamq.embedded.retention import Sweeper
from reliamq.embedded.settings import Location
from reliamq.embedded.writelock import WriteLock
from reliamq.spi import RejectionReason

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


class _GroupFailed(Exception):
    """What happened concerns a whole group of jobs, so running each of them alone would not help."""

    def __init__(self, failure: StoreFailure, *, reopen: bool) -> None:
        super().__init__(failure.detail)
        self.failure, self.reopen = failure, reopen


class Worker:
    """One thread, one connection.  ``submit``, ``withdraw``, ``watch`` and ``stop`` may be called from any thread."""

    def __init__(self, location: Location, clock: Callable[[], float]) -> None:
        self._location, self._clock = location, clock
        self._name = location.path or location.url
        self._queue: queue.SimpleQueue[Job[Any] | None] = queue.SimpleQueue()
        self._mutex = threading.Lock()  # guards started/withdrawn of jobs, and the watches
        self._watches: set[Watch] = set()
        self._lock = WriteLock(location.path)
        self._connection: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None
        self._seen_version = 0
        self._looked_at = self._news_at = time.monotonic()
        self._last_job: Job[Any] | None = None
        self._sweeper = Sweeper()
        self._sweep_at = self._news_at + _SWEEP
        self._wrote = False
        threading.Thread(target=self._work, name=f"reliamq {self._name}", daemon=True).start()

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
        self._close()
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
            job.run(self._connection or self._open())
        except Exception as error:  # whatever it is, who waits for it is told
            job.error = self._judged(error)

    def _write(self, jobs: Sequence[Job[Any]]) -> None:
        """Run a group; if one of it fails, run each on its own, so that only the one at fault fails."""

        def run_all(connection: sqlite3.Connection) -> None:
            for job in jobs:
                if self._start(job):
                    job.run(connection)

        try:
            self._transaction(run_all)
        except Exception as error:  # as above
            if len(jobs) == 1 or isinstance(error, _GroupFailed | StoreFailure):
                for job in jobs:
                    job.error = self._judged(error)
            else:
                for job in jobs:
                    self._write([job])

    def _transaction(self, run: Callable[[sqlite3.Connection], None]) -> None:
        """Raises _GroupFailed, what opening raises, and, with everything rolled back, what ``run`` raises."""
        connection = self._connection or self._open()
        try:
            with self._lock.held():
                self._begin(connection)
                try:
                    run(connection)
                except BaseException:
                    if connection.in_transaction:  # when the disk is full SQLite itself may have rolled back
                        connection.execute("ROLLBACK")
                    raise
                self._commit(connection)
        except _GroupFailed as error:
            if error.reopen:
                self._reopen_next_time()
            raise

    def _begin(self, connection: sqlite3.Connection) -> None:
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:
            raise _GroupFailed(failure_of(error, self._name, committing=False), reopen=False) from error
        if self._location.path is not None and _identity_of(self._location.path) != self._identity:
            connection.execute("ROLLBACK")
            raise _GroupFailed(
                StoreFailure(
                    RejectionReason.UNAVAILABLE,
                    f"{self._name}: the file was deleted or replaced while it was in use, and would keep nothing; "
                    "nothing was stored. Put it back, or declare the topics again in the new one.",
                ),
                reopen=True,
            )

    def _commit(self, connection: sqlite3.Connection) -> None:
        try:
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            with suppress(sqlite3.Error):  # the first failure is the one to tell
                connection.execute("ROLLBACK")
            # After a failed fsync the kernel may call the next one good: go on with what the disk really has
            raise _GroupFailed(failure_of(error, self._name, committing=True), reopen=True) from error

    def _start(self, job: Job[Any]) -> bool:
        with self._mutex:
            job.started = not job.withdrawn
            return job.started

    def _judged(self, error: Exception) -> Exception:
        """A failure of the file in our words; anything else (a bad value, a fault of this program) as it is."""
        if isinstance(error, _GroupFailed):
            return error.failure
        if isinstance(error, sqlite3.ProgrammingError | sqlite3.DataError):
            return error
        if isinstance(error, sqlite3.DatabaseError | OSError):
            return failure_of(error, self._name, committing=False)
        return error

    # --- opening and closing ---------------------------------------------------------------------------------------

    def _open(self) -> sqlite3.Connection:
        with self._lock.held():  # two that switch a new file to WAL at once would lock each other out
            connection = connect(self._location)
        self._identity = None if self._location.path is None else _identity_of(self._location.path)
        self._connection = connection
        self._seen_version = self._data_version(connection)
        return connection

    def _reopen_next_time(self) -> None:
        self._disconnect()
        self._lock.close()  # it may be gone as well

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(sqlite3.Error):  # what is wrong with it was told already
                connection.close()

    def _close(self) -> None:
        try:
            with self._lock.held():  # the last to close empties the WAL: not while others open
                if self._connection is not None:
                    self._connection.close()
        except (sqlite3.Error, OSError, StoreFailure) as error:  # what was committed is safe in the WAL
            logger.warning("%s: could not be closed properly: %s", self._name, error)
        self._connection = None
        self._lock.close()

    # --- housekeeping ----------------------------------------------------------------------------------------------

    def _sweep_when_due(self) -> None:
        """Remove a piece of what retention lets go, a few times a second, and again at once while there is more."""
        now = time.monotonic()
        if now < self._sweep_at:
            return
        more = False
        if self._connection is not None:
            try:
                more = self._sweep(self._connection)
            except Exception as error:  # whatever it is, those who use the broker are not to suffer from it
                logger.warning("%s: could not remove finished messages, will try again: %s", self._name, error)
        self._sweep_at = now if more else now + (_SWEEP if self._wrote else _SWEEP_IDLE)
        self._wrote = False

    def _sweep(self, connection: sqlite3.Connection) -> bool:
        more = False
        now = self._clock()

        def run(connection: sqlite3.Connection) -> None:
            nonlocal more
            more = self._sweeper.sweep(connection, now)

        if self._sweeper.has_work(connection, now):
            self._transaction(run)
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
        if self._connection is None or self._location.path is None or now - self._looked_at < _QUICK:
            return
        self._looked_at = now
        try:
            version = self._data_version(self._connection)
        except sqlite3.Error:
            version = -1  # whatever it is: those who watch will look, and meet it themselves
        if version != self._seen_version:
            self._seen_version, self._news_at = version, now
            with self._mutex:
                topics = frozenset(watch.topic for watch in self._watches)
            self._answer((), topics)

    @staticmethod
    def _data_version(connection: sqlite3.Connection) -> int:
        (version,) = connection.execute("PRAGMA data_version").fetchone()
        return int(version)


def _identity_of(path: str) -> tuple[int, int] | None:
    """Which file is at ``path``, so that a deleted one, which takes every write and keeps none, is noticed."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _tell(futures: Sequence[asyncio.Future[None]], events: Sequence[asyncio.Event]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)
    for event in events:
        event.set()
