"""Many processes on one file, and processes that are killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from itertools import chain, groupby
from pathlib import Path

import anyio
import pytest

from reliamq.embedded.backend import EmbeddedBackend
from reliamq.embedded.writelock import WriteLock
from reliamq.spi import Ack

from .conftest import LEASE, declare, message, publish, receive, texts

pytestmark = pytest.mark.anyio
SCRIPT = Path(__file__).with_name("process.py")


class Process(subprocess.Popen[bytes]):
    """``process.py`` with arguments."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(
            [sys.executable, "-W", "error", str(SCRIPT), *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def facts(self) -> Iterator[list[object]]:
        """What it says, line by line, until it ends or is killed."""
        assert self.stdout is not None
        for line in self.stdout:
            if line.endswith(b"\n"):
                yield json.loads(line)

    def finished(self) -> list[list[object]]:
        """All that it says; it must end well."""
        output, errors = self.communicate(timeout=100)
        assert self.returncode == 0, errors.decode()
        assert errors == b""
        return [json.loads(line) for line in output.splitlines()]

    def killed(self) -> list[list[object]]:
        """Kill it with SIGKILL, now; what it had said by then."""
        self.kill()
        output, _ = self.communicate(timeout=100)
        return [json.loads(line) for line in output.splitlines(keepends=True) if line.endswith(b"\n")]


def declared(url: str) -> EmbeddedBackend:
    backend = EmbeddedBackend(url)
    anyio.run(declare, backend)
    return backend


def test_eight_publish_and_eight_consume_and_nothing_is_lost_doubled_or_out_of_order(file_url: str) -> None:
    declared(file_url)
    consumers = [Process("consume", file_url, 60, "settle") for _ in range(8)]
    publishers = [Process("publish", file_url, f"p{number}", 300, 5) for number in range(8)]
    confirmed = [id_ for process in publishers for line in process.finished() for id_ in line]
    delivered = [fact for process in consumers for line in process.finished() if line != ["ready"] for fact in line]
    assert len(confirmed) == 8 * 300
    assert sorted(id_ for id_, *_ in delivered) == sorted(confirmed)  # type: ignore[misc]  # JSON
    in_time = sorted(delivered, key=lambda fact: (fact[1], fact[3]))  # type: ignore[index]  # JSON
    for key, facts in groupby(in_time, key=lambda fact: fact[1]):  # type: ignore[index]  # JSON
        numbers = [fact[2] for fact in facts]  # type: ignore[index]  # JSON
        for parity in (0, 1):  # a publisher's two tasks send every other batch
            mine = [number for number in numbers if number // 5 % 2 == parity]
            assert mine == sorted(mine), key


@pytest.mark.parametrize("seed", range(4))
def test_what_a_publisher_had_confirmed_is_there_after_it_was_killed(file_url: str, seed: int) -> None:
    backend = declared(file_url)
    process = Process("publish", file_url, "p", 1_000_000, random.Random(seed).choice([1, 16, 200]))
    confirmed: list[object] = []
    for line in process.facts():
        confirmed += line
        if len(confirmed) > 300 * (seed + 1):
            break
    confirmed += chain.from_iterable(process.killed())

    async def all_ids() -> list[object]:
        ids: list[object] = []
        async with backend.subscription("orders", "g", lease=LEASE) as member:
            while deliveries := await receive(member, 2_000):
                ids += [delivery.message.id for delivery in deliveries]
                assert list(await member.settle([Ack(delivery) for delivery in deliveries])) == []
        return ids

    stored = anyio.run(all_ids)
    assert len(stored) == len(set(stored))
    assert set(confirmed) <= set(stored)
    assert len(stored) <= len(confirmed) + 400, "at most the two batches that were under way"


def test_what_a_killed_consumer_held_comes_back_after_its_lease(file_url: str) -> None:
    backend = declared(file_url)

    async def fill() -> None:
        async with backend.publisher() as publisher:
            await publish(publisher, *(message(str(n), "k") for n in range(10)))

    async def drain() -> list[tuple[str, bool, int]]:
        async with backend.subscription("orders", "g", lease=LEASE) as member:
            assert texts(await receive(member)) == [], "the dead consumer's lease is not over"
            back = await member.receive(10, max_bytes=1 << 20, wait=timedelta(seconds=30))
        return [(one.message.body.decode(), one.redelivered, one.attempt) for one in back]

    anyio.run(fill)
    process = Process("consume", file_url, 2, "keep")
    facts = process.facts()
    assert next(facts) == ["ready"]
    assert len(next(facts)) == 10
    process.killed()
    assert anyio.run(drain) == [(str(n), True, 1) for n in range(10)]


def test_a_writer_that_is_killed_inside_a_transaction_leaves_the_file_to_the_others(file_url: str) -> None:
    backend = declared(file_url)

    async def cycle() -> None:
        async with backend.publisher() as publisher, backend.subscription("orders", "g", lease=LEASE) as member:
            for round_ in range(4):
                process = Process("publish", file_url, f"p{round_}", 1_000_000, 200)
                next(process.facts())
                process.killed()
                await publish(publisher, message(f"after {round_}"))
                while deliveries := await receive(member, 5_000):
                    await member.settle([Ack(delivery) for delivery in deliveries])

    anyio.run(cycle)


def test_a_forked_child_uses_the_broker_by_a_connection_of_its_own(file_url: str) -> None:
    backend = declared(file_url)

    async def all_bodies() -> list[str]:
        async with backend.subscription("orders", "g", lease=LEASE) as member:
            return [delivery.message.id for delivery in await receive(member)]

    Process("fork", file_url).finished()
    assert anyio.run(all_bodies) == ["before-0", "child-0", "after-0"]


def test_a_forked_child_does_not_keep_the_write_lock_of_its_killed_parent(tmp_path: Path) -> None:
    script = f"""
import os, time
from reliamq.embedded.writelock import WriteLock
with WriteLock({str(tmp_path / "broker.db")!r}).held():
    if os.fork() == 0:
        time.sleep(20)
        os._exit(0)
    print("held", flush=True)
    time.sleep(20)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, start_new_session=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"held\n"
        parent.kill()
        taken = threading.Event()

        def take() -> None:
            with WriteLock(str(tmp_path / "broker.db")).held():
                taken.set()

        threading.Thread(target=take, daemon=True).start()
        try:
            assert taken.wait(5)
        finally:
            os.killpg(parent.pid, signal.SIGKILL)
