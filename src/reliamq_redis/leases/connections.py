"""Connections on which a step and the wait for its replicas follow one another.

A few for each server, each used by one caller at a time: who writes at the same moment shares the server's own group
commit.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from reliamq.spi import BrokerUnavailable, Durability, StoreUnavailable
from reliamq_redis.scripts import Script
from reliamq_redis.settings import RedisSettings
from reliamq_redis.wire.errors import FAILURES, explained, said
from reliamq_redis.wire.pipe import Pipe, Unfinished, open_pipe
from reliamq_redis.wire.servers import Address, Servers

__all__ = ["Connection", "Connections", "Unsafe"]

MOST = 64
"""Connections at once; more callers wait."""


class Unsafe(Exception):
    """It was done, and is not as safe as it must be."""


class Connection:
    """To the server that has a key, for as long as a caller needs it."""

    def __init__(self, pipe: Pipe, settings: RedisSettings, durability: Durability) -> None:
        self._pipe, self._seconds = pipe, settings.request_timeout_seconds
        self._durability = durability
        self._replicas = settings.replicas if durability is Durability.REPLICATED else 0

    async def run(self, script: Script, key: str, *arguments: Any) -> Any:
        """Run a script on one key.  Raises Unfinished, and the server's error.  Cancelled: it may be done."""
        calls: Sequence[tuple[Sequence[str], Sequence[Any]]] = [((key,), arguments)]
        (answer,) = await self._pipe.run(script, calls, self._seconds)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def be_safe(self, seconds: float | None = None) -> None:
        """Wait until what was written here has come to as many replicas as are asked for, and to disks where the
        server can tell.

        seconds: how long at most; by default as an answer may take.  Raises Unsafe, Unfinished.
        """
        if self._durability is Durability.DEVELOPMENT:
            return
        limit = self._seconds if seconds is None else min(seconds, self._seconds)
        reached = await self._pipe.wait(self._replicas, limit)
        if isinstance(reached, Exception):
            raise Unsafe(f"not kept safely: {said(reached)}") from reached
        if reached < self._replicas:
            where = "on their disks" if self._pipe.to_disk else "in memory"
            raise Unsafe(f"not kept safely: the primary has it, and {reached} of {self._replicas} replicas {where}")


class Connections:
    """All connections of one store."""

    def __init__(self, settings: RedisSettings, servers: Servers, durability: Durability) -> None:
        self._settings, self._servers, self._durability = settings, servers, durability
        self._idle: dict[Address, list[Pipe]] = {}
        self._free = asyncio.Semaphore(MOST)
        self._closed = False

    @asynccontextmanager
    async def to(self, key: str) -> AsyncIterator[Connection]:
        """A connection to the server that has the key.

        Raises StoreUnavailable, for what fails inside as well: it may have been done.
        """
        async with self._free:
            try:
                address = await self._servers.holder(key)
                async with self._pipe(address) as pipe:
                    yield Connection(pipe, self._settings, self._durability)
            except (*FAILURES, BrokerUnavailable, Unfinished, Unsafe) as error:
                self._servers.forget()
                detail = error.detail if isinstance(error, BrokerUnavailable) else explained(self._settings, error)
                raise StoreUnavailable(self._settings.url, detail) from error

    @asynccontextmanager
    async def _pipe(self, address: Address) -> AsyncIterator[Pipe]:
        idle = self._idle.get(address)
        pipe = idle.pop() if idle else await self._open(address)
        try:
            yield pipe
        finally:
            if self._closed:
                await pipe.close()
            elif pipe.lost:
                await self._end(address)  # the others' server is probably gone as well
            else:
                self._idle.setdefault(address, []).append(pipe)

    async def _open(self, address: Address) -> Pipe:
        async with asyncio.timeout(self._settings.request_timeout_seconds):
            return await open_pipe(self._servers.client(address))

    async def _end(self, address: Address) -> None:
        """End what nobody uses.  Waits for nothing."""
        for pipe in self._idle.pop(address, ()):
            await pipe.close()

    async def close(self) -> None:
        """End all; what is in use, when it comes back."""
        self._closed = True
        for address in tuple(self._idle):
            await self._end(address)
