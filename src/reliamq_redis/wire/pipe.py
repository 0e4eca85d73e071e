"""One connection for writing: commands go out in one piece, and ``WAIT`` follows on the same connection.

``WAIT`` asks about what its own connection wrote last, and says "yes" on one that wrote nothing (Redis documentation,
WAIT).  So a connection that ended is never made again under the same handle, as the client would do by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from reliamq_redis.scripts import Script
from reliamq_redis.wire.errors import FAILURES

__all__ = ["ANSWER_SECONDS", "Pipe", "Unfinished", "open_pipe"]

ANSWER_SECONDS = 0.1
"""Before the deadline the server ends its waiting, so that it can still say what was reached."""
MARGIN_SECONDS = 2.0
"""How much later than asked a server may answer that it has waited."""


class Unfinished(Exception):
    """The connection ended, or no answer came: what was asked may have been done."""


class Pipe:
    """One connection, used by one task at a time.

    to_disk: the server can tell what is on disks (``WAITAOF``).
    lost: it ended.
    """

    def __init__(self, connection: Any, *, to_disk: bool) -> None:
        self._connection, self.to_disk = connection, to_disk
        self.lost = False

    async def run(
        self, script: Script, calls: Sequence[tuple[Sequence[str], Sequence[Any]]], seconds: float
    ) -> list[Any]:
        """Run a script several times, with keys and arguments; answers, or the server's errors, in order.

        Raises Unfinished.
        """
        commands = [("EVALSHA", script.digest, len(keys), *keys, *arguments) for keys, arguments in calls]
        answers = await self._exchange(commands, seconds)
        unknown = [index for index, answer in enumerate(answers) if _is_unknown(answer)]
        if unknown:  # nothing of these was done; the server knows the script from now on, until it starts again
            whole = [
                ("EVAL", script.text, len(keys), *keys, *arguments)
                for keys, arguments in (calls[index] for index in unknown)
            ]
            for index, answer in zip(unknown, await self._exchange(whole, seconds), strict=True):
                answers[index] = answer
        return answers

    async def wait(self, replicas: int, seconds: float) -> Any:
        """Wait until so many replicas have what was written here before, on their disks if ``to_disk``, and this server
        too; how many replicas have it, or the server's error.

        Raises Unfinished.
        """
        milliseconds = max(1, int(seconds * 1000))
        if self.to_disk:
            (answer,) = await self._exchange([("WAITAOF", 1, replicas, milliseconds)], seconds + MARGIN_SECONDS)
            if not isinstance(answer, list):
                return answer
            return int(answer[1]) if answer[0] else ResponseError("the primary has it not on its disk yet")
        if not replicas:
            return 0
        (answer,) = await self._exchange([("WAIT", replicas, milliseconds)], seconds + MARGIN_SECONDS)
        return answer

    async def _exchange(self, commands: Sequence[Sequence[Any]], seconds: float) -> list[Any]:
        if self.lost:
            raise Unfinished("the connection has ended")
        try:
            async with asyncio.timeout(seconds):
                await self._connection.send_packed_command(self._connection.pack_commands(commands), check_health=False)
                return [await self._answer() for _ in commands]
        except FAILURES as error:
            await self.close()
            raise Unfinished(str(error) or f"no answer within {seconds:.1f} s") from error
        except BaseException:
            await self.close()  # cancelled: an answer that comes later would be taken for another's
            raise

    async def _answer(self) -> Any:
        try:
            return await self._connection.read_response()
        except ResponseError as error:
            return error

    async def close(self) -> None:
        """End it; waits for nothing."""
        self.lost = True
        await self._connection.disconnect(nowait=True)


def _is_unknown(answer: Any) -> bool:
    return isinstance(answer, ResponseError) and type(answer).__name__ == "NoScriptError"


async def open_pipe(client: Redis) -> Pipe:
    """Connect to a client's server, and see that it will answer when it is asked to wait: before anything is written.

    Raises the client's errors.  Cancelled: nothing stays open.
    """
    connection = client.connection_pool.make_connection()
    try:
        await connection.connect()
        await connection.send_command("COMMAND", "INFO", "WAITAOF")
        (known,) = await connection.read_response()
        await connection.send_command(*(("WAIT", 0, 1) if known is None else ("WAITAOF", 0, 0, 1)))
        await connection.read_response()
    except BaseException:
        await connection.disconnect(nowait=True)
        raise
    return Pipe(connection, to_disk=known is not None)
