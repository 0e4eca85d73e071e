"""A TCP proxy that fails on demand: what happens between a client and its server when the network does.

It runs in a thread of its own, so that a test may use it from any event loop, or from none.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Literal, Self

__all__ = ["Proxy"]

CHUNK = 64 * 1024
RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER on, zero seconds: close() sends RST
Direction = Literal["up", "down"]


class Proxy:
    """Forwards a port of 127.0.0.1 to another.

    listen, target: port numbers.
    bytes_up, bytes_down: forwarded so far, to the server and back; a test asks them whether its fault really happened.
    """

    def __init__(self, listen: int, target: int) -> None:
        self.listen, self.target = listen, target
        self.bytes_up = self.bytes_down = 0
        self._delay = 0.0
        self._dropping: set[Direction] = set()
        self._remaining: int | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"proxy {listen}", daemon=True)
        self._server: asyncio.Server | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        self._call(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.refuse()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def connections(self) -> int:
        """How many go through it now."""
        return len(self._writers) // 2

    def cut(self) -> None:
        """Reset every connection; new ones are accepted."""
        self._call(self._reset_all)

    def cut_after(self, count: int) -> None:
        """Reset every connection once ``count`` more bytes came back from the server: in the middle of an answer."""
        self._remaining = count

    def refuse(self) -> None:
        """Reset every connection and refuse new ones, until :meth:`heal`."""
        self._call(self._close)

    def drop(self, *directions: Direction) -> None:
        """Swallow what is sent that way, on open connections and new ones, until :meth:`heal`."""
        self._dropping = set(directions)

    def blackhole(self) -> None:
        """Swallow everything; nobody is told."""
        self.drop("up", "down")

    def delay(self, seconds: float) -> None:
        """Hold every chunk back for so long."""
        self._delay = seconds

    def heal(self) -> None:
        """Forward as at first.  What was swallowed stays so: those connections are reset."""
        if self._dropping:
            self.cut()
        self._dropping, self._delay, self._remaining = set(), 0.0, None
        self._call(self._accept)

    # --- in the proxy's own thread ---------------------------------------------------------------------------------

    def _call(self, function: Callable[[], object]) -> None:
        async def call() -> None:
            result = function()
            if asyncio.iscoroutine(result):
                await result

        asyncio.run_coroutine_threadsafe(call(), self._loop).result(timeout=10)

    async def _accept(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.listen)

    async def _close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        self._reset_all()
        await asyncio.sleep(0)  # lets the pumps see it

    def _reset_all(self) -> None:
        for writer in list(self._writers):
            with suppress(OSError):
                connection = writer.get_extra_info("socket")
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            writer.transport.abort()
        self._writers.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        ours = {writer, upstream_writer}
        self._writers |= ours
        pumps = [
            asyncio.ensure_future(self._pump(reader, upstream_writer, "up")),
            asyncio.ensure_future(self._pump(upstream_reader, writer, "down")),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            for each in ours:
                each.transport.abort()
            self._writers -= ours

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: Direction) -> None:
        with suppress(OSError):
            while chunk := await reader.read(CHUNK):
                if self._delay:
                    await asyncio.sleep(self._delay)
                if direction in self._dropping:
                    continue
                if direction == "down":
                    chunk = self._counted_down(chunk)
                    self.bytes_down += len(chunk)
                else:
                    self.bytes_up += len(chunk)
                writer.write(chunk)
                await writer.drain()
                if self._remaining == 0:
                    self._remaining = None
                    self._reset_all()

    def _counted_down(self, chunk: bytes) -> bytes:
        if self._remaining is None:
            return chunk
        chunk = chunk[: self._remaining]
        self._remaining -= len(chunk)
        return chunk
