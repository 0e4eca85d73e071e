"""The asynchronous face of a broker's file: one for each process and file, shared by all that use it.

It promises that a caller who gives up learns whether its job was certainly not done or may be done, and that a
cancelled caller's job is finished all the same.  The SQL is in the worker's thread; what it says is in other modules.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TypeVar

import anyio

from reliamq.embedded.errors import StoreFailure
from reliamq.embedded.settings import Location
from reliamq.embedded.worker import Job, Watch, Worker
from reliamq.spi import RejectionReason

__all__ = ["Database", "database_at"]

T = TypeVar("T")
NO_TOPICS: frozenset[str] = frozenset()

_mutex = threading.Lock()
_databases: weakref.WeakValueDictionary[object, Database] = weakref.WeakValueDictionary()
_inherited: list[Worker] = []  # a parent's connections: closing one in a forked child could harm the file


class Database:
    """One broker's file (or memory) in this process.

    A file is open while somebody has it :meth:`opened`; a broker in memory lives as long as any backend that names it.
    """

    def __init__(self, location: Location, clock: Callable[[], float]) -> None:
        self.location, self.clock = location, clock
        self._worker: Worker | None = None
        self._users = 0
        self._process = os.getpid()

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Have the file open inside the block.  Raises ConfigurationError or BrokerUnavailable when it cannot be."""
        self._enter()
        try:
            try:
                await self.read(lambda connection: None)
            except StoreFailure as failure:
                raise failure.unavailable(self.location.url) from failure
            yield
        finally:
            with anyio.CancelScope(shield=True):
                await self._leave()

    @property
    def is_open(self) -> bool:
        """Whether somebody in this process has it open."""
        return self._worker is not None and self._process == os.getpid()

    def _enter(self) -> None:
        if self._process != os.getpid():
            if self._worker is not None:
                _inherited.append(self._worker)
            self._worker, self._users, self._process = None, 0, os.getpid()
        if self._worker is None:
            self._worker = Worker(self.location, self.clock)
            if self.location.path is None:
                weakref.finalize(self, self._worker.stop)
        self._users += 1

    async def _leave(self) -> None:
        self._users -= 1
        if self._users or self.location.path is None or self._worker is None:
            return
        worker, self._worker = self._worker, None
        closed = Job(lambda connection: None, writes=False, wakes=NO_TOPICS)
        worker.stop(closed)
        await asyncio.wait((closed.future,), timeout=self.location.settings.patience_seconds)

    async def read(self, function: Callable[[sqlite3.Connection], T]) -> T:
        """Run a function that only reads, outside any transaction.  Raises StoreFailure."""
        return await self._done(Job(function, writes=False, wakes=NO_TOPICS), None)

    async def write(
        self,
        function: Callable[[sqlite3.Connection], T],
        *,
        wakes: frozenset[str] = NO_TOPICS,
        deadline: float | None = None,
    ) -> T:
        """Run a function in a transaction that others may share; when this returns it is committed.

        function: keeps to its return value what it finds out, because it may run twice.
        wakes: topics whose waiting receivers should look again.
        deadline: monotonic seconds; None: the settings' patience.
        Raises StoreFailure, and what ``function`` raises.
        Cancelled: the function may be run and committed.
        """
        return await self._done(Job(function, writes=True, wakes=wakes), deadline)

    def write_later(self, function: Callable[[sqlite3.Connection], object], *, wakes: frozenset[str]) -> None:
        """Queue a write that nobody waits for, behind all that is queued."""
        if self._worker is not None:
            self._worker.submit(Job(function, writes=True, wakes=wakes))

    async def _done(self, job: Job[T], deadline: float | None) -> T:
        worker = self._worker
        if worker is None or self._process != os.getpid():
            raise StoreFailure(RejectionReason.UNAVAILABLE, f"{self.location.url} is not open in this process")
        worker.submit(job)
        patience = self.location.settings.patience_seconds if deadline is None else deadline - time.monotonic()
        await asyncio.wait((job.future,), timeout=max(0.0, patience))
        if job.future.done():
            if job.error is not None:
                raise job.error
            return job.value  # type: ignore[return-value]  # done without an error: it has a value
        if worker.withdraw(job):
            raise StoreFailure(
                RejectionReason.UNAVAILABLE,
                f"{self.location.url}: another process held the file until the deadline; nothing was stored.",
            )
        raise StoreFailure(None, f"{self.location.url}: the commit was not finished by the deadline.")

    @contextmanager
    def watching(self, topic: str) -> Iterator[Watch]:
        """Have an event set whenever something may have become available in ``topic``."""
        worker, watch = self._worker, Watch(topic)
        if worker is not None:
            worker.watch(watch)
        try:
            yield watch
        finally:
            if worker is not None:
                worker.unwatch(watch)


def database_at(location: Location, clock: Callable[[], float]) -> Database:
    """The process's database there, the same for all who ask while one of them keeps it."""
    key = location.name if location.path is None else (location.path, location.settings, clock)
    with _mutex:
        database = _databases.get(key)
        if database is None:
            database = _databases[key] = Database(location, clock)
        return database
