"""What the tests run in processes of their own, to kill them: ``process.py publish|consume URL …``.

It says what it has done in lines of JSON, each written at once.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from datetime import UTC, datetime, timedelta

import anyio

from reliamq.embedded.backend import EmbeddedBackend
from reliamq.spi import Ack, Confirmation, Message


def say(*facts: object) -> None:
    os.write(1, json.dumps(facts).encode() + b"\n")


def order(name: str, number: int, keys: int) -> Message:
    return Message(
        topic="orders",
        body=b"x" * 200,
        id=f"{name}-{number}",
        type="OrderPlaced",
        source="tests",
        time=datetime.now(UTC),
        key=f"{name}-{number % keys}".encode(),
        sequence=number,
    )


async def publish(url: str, name: str, messages: int, batch: int) -> None:
    """Publish, two batches at a time, and say the id of each message that was confirmed."""
    async with EmbeddedBackend(url).publisher() as publisher, anyio.create_task_group() as tasks:

        async def send(first: int, keys: int) -> None:
            for start in range(first, messages, 2 * batch):
                part = [order(name, number, keys) for number in range(start, min(start + batch, messages))]
                outcomes = await publisher.send(part, deadline=time.monotonic() + 60)
                assert all(isinstance(outcome, Confirmation) for outcome in outcomes), outcomes
                say(*(outcome.message_id for outcome in outcomes))

        tasks.start_soon(send, 0, 3)
        tasks.start_soon(send, batch, 3)


async def consume(url: str, lease_seconds: float, settle: bool) -> None:
    """Say each delivery, then settle it; end when nothing has come for a while."""
    lease = timedelta(seconds=lease_seconds)
    async with EmbeddedBackend(url).subscription("orders", "g", lease=lease) as member:
        say("ready")
        while deliveries := await member.receive(50, max_bytes=1 << 20, wait=timedelta(seconds=3)):
            now = time.monotonic_ns()
            say(*((one.message.id, (one.message.key or b"").decode(), one.message.sequence, now) for one in deliveries))
            if not settle:
                await anyio.sleep(3600)
            late = await member.settle([Ack(delivery) for delivery in deliveries])
            assert not late, late


async def fork(url: str) -> None:
    """Fork while the broker is open; the child publishes with the backend that it inherited."""
    backend = EmbeddedBackend(url)

    async def send(name: str) -> None:
        async with backend.publisher() as publisher:
            outcomes = await publisher.send([order(name, 0, 1)], deadline=time.monotonic() + 30)
            assert isinstance(outcomes[0], Confirmation), outcomes

    async with backend.publisher():
        await send("before")
        child = os.fork()
        if child == 0:
            asyncio.events._set_running_loop(None)  # the parent's loop is not the child's
            anyio.run(send, "child")
            os._exit(0)
        _, status = await anyio.to_thread.run_sync(os.waitpid, child, 0)
        assert status == 0
        await send("after")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["publish", url, name, messages, batch]:
            anyio.run(publish, url, name, int(messages), int(batch))
        case ["consume", url, lease_seconds, settle]:
            anyio.run(consume, url, float(lease_seconds), settle == "settle")
        case ["fork", url]:
            anyio.run(fork, url)
        case _:
            sys.exit(2)
