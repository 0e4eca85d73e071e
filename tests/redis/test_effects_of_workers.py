"""Effects under leases on Redis, through applications and their workers (I1, I3).

Two applications on brokers of their own are two workers that were given the same message in the same moment.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from datetime import timedelta
from pathlib import Path

import anyio
import pytest
from pydantic import BaseModel

from reliamq import Backoff, Delivery, FencingToken, Reliamq, Topic
from reliamq.settings import Settings, WorkerSettings
from reliamq.spi import ProcessedId
from reliamq_redis.catalog.names import lease_of
from tests.brokers.application import eventually, working
from tests.servers.redis import RedisServers

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]
TARGET = "tests.redis.leased_service:app"


class Parcel(BaseModel):
    number: int


@pytest.fixture
def topic() -> str:
    return f"test-{uuid.uuid4()}"


def make_app(servers: RedisServers, *, lease: float = 30, url: str | None = None) -> Reliamq:
    """With a broker of its own, and leases on the servers."""
    return Reliamq(
        Settings(
            broker=f"memory://{uuid.uuid4()}",
            leases=url or servers.url,
            worker=WorkerSettings(lease=timedelta(seconds=lease)),
        )
    )


class Worker:
    """One application that was given the message.

    tokens, attempts: of each start of its handler.  sent: how often that ended.  go: lets it end.
    """

    def __init__(self, servers: RedisServers, topic: str, *, lease: float = 30, url: str | None = None) -> None:
        self.app = make_app(servers, lease=lease, url=url)
        self.tokens, self.attempts = list[int](), list[int]()
        self.sent, self.go = 0, anyio.Event()
        self.parcels: Topic[Parcel] = self.app.topic(topic, Parcel)

        @self.app.handler(self.parcels, group="g", effects="lease", retry=Backoff(attempts=2), name="send")
        async def send(parcel: Parcel, token: FencingToken, delivery: Delivery) -> None:
            self.tokens.append(token.value)
            self.attempts.append(delivery.attempt)
            await self.go.wait()
            self.sent += 1


@asynccontextmanager
async def all_working(*workers: Worker) -> AsyncIterator[None]:
    async with AsyncExitStack() as stack:
        for worker in workers:
            await stack.enter_async_context(worker.app)
            await stack.enter_async_context(working(worker.app))
        yield


async def test_of_two_workers_with_one_message_one_produces_its_effect(
    servers: RedisServers, topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    """I1"""
    workers = [Worker(servers, topic, lease=1) for _ in range(2)]
    async with all_working(*workers):
        for worker in workers:
            await worker.parcels.publish(Parcel(number=1), id="the same")
        await eventually(lambda: "in progress elsewhere" in caplog.text)
        await anyio.sleep(2)  # over several renewals
        assert sum(len(worker.tokens) for worker in workers) == 1
        for worker in workers:
            worker.go.set()
        await anyio.sleep(3)  # who was refused has asked again

    assert sorted((len(worker.tokens), worker.sent) for worker in workers) == [(0, 0), (1, 1)]


async def test_a_late_worker_is_told_that_it_lost_the_lease(
    servers: RedisServers, topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    """I3: its effect is stopped, and another worker has produced it under a larger token."""
    late, heir = workers = [Worker(servers, topic, lease=1) for _ in range(2)]
    heir.go.set()
    async with all_working(*workers):
        await late.parcels.publish(Parcel(number=1), id="the same")
        await eventually(lambda: len(late.tokens) == 1)
        await heir.parcels.publish(Parcel(number=1), id="the same")
        await eventually(lambda: "in progress elsewhere" in caplog.text)
        while not heir.sent:  # as a long pause of the first one's process would
            end_lease(servers, ProcessedId(topic, "g", "send", "the same"))
            await anyio.sleep(0.1)
        await eventually(lambda: "LeaseLost" in caplog.text)
        await anyio.sleep(3)  # its message came again, and its effect was done

    assert (late.sent, heir.sent) == (0, 1)
    assert len(late.tokens) == len(heir.tokens) == 1
    assert heir.tokens > late.tokens


def end_lease(servers: RedisServers, one: ProcessedId) -> None:
    with servers.client(servers.primary) as primary:
        if primary.hexists(lease_of(one), "until"):
            primary.hset(lease_of(one), "until", 0)


async def test_while_the_store_is_away_no_effect_starts_and_no_attempt_counts(
    servers: RedisServers, topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    """I3"""
    caplog.set_level(logging.WARNING)
    worker = Worker(servers, topic, url=f"{servers.url}?request_timeout_seconds=0.5")
    worker.go.set()
    async with all_working(worker):
        await worker.parcels.publish(Parcel(number=0))
        await eventually(lambda: worker.sent == 1)
        servers.primary.pause()
        try:
            await worker.parcels.publish(Parcel(number=1))
            await eventually(lambda: caplog.text.count("the lease store cannot be used") >= 3)
            assert len(worker.tokens) == 1
        finally:
            servers.primary.resume()
        await eventually(lambda: worker.sent == 2)
        async with worker.app.dead_letters() as desk:
            assert await desk.list() == []

    assert worker.attempts == [1, 1]


async def test_a_worker_process_that_was_stopped_past_its_lease_changes_nothing(
    servers: RedisServers, topic: str, tmp_path: Path
) -> None:
    """I3: the other side refuses its token, it is told, and the message is not handled a third time."""
    service = LeasedService(servers, tmp_path, topic)
    async with Reliamq(Settings(broker=service.environment["RELIAMQ_BROKER"])) as app:
        parcels = app.topic(topic, Parcel, groups=["g"])
        await app.declare()
        await parcels.publish(Parcel(number=1))
        with service.worker("late") as late:
            await eventually(lambda: len(service.notes("started")) == 1)
            late.send_signal(signal.SIGSTOP)
            with service.worker("heir"):
                await eventually(lambda: len(service.notes("sent")) == 1)
                late.send_signal(signal.SIGCONT)
                await eventually(lambda: service.was_told("late"))
                await anyio.sleep(5)  # a third start would have come

    (first, one), (second, another) = service.notes("started")
    assert second > first
    assert another != one
    assert accepted(service.notes("sent")) == 1


def accepted(notes: list[tuple[int, int]]) -> int:
    """How often the other side, which refuses a token smaller than one that it has seen, let it be sent."""
    seen = count = 0
    for token, _ in notes:
        if token >= seen:
            seen, count = token, count + 1
    return count


class LeasedService:
    """Worker processes of :mod:`tests.redis.leased_service`."""

    def __init__(self, servers: RedisServers, folder: Path, topic: str) -> None:
        self.folder = folder
        self.environment = {
            **os.environ,
            "SERVICE_FOLDER": str(folder),
            "SERVICE_TOPIC": topic,
            "RELIAMQ_BROKER": f"{servers.url}?lanes=1&member_timeout_seconds=2",
            "RELIAMQ_LEASES": servers.url,
            "RELIAMQ_WORKER__LEASE": "1s",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }

    @contextmanager
    def worker(self, name: str) -> Iterator[subprocess.Popen[bytes]]:
        command = [sys.executable, "-m", "reliamq.cli.worker_process", TARGET]
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(command, cwd=self.folder, env=self.environment, stdout=log, stderr=log)
        try:
            yield process
        finally:
            process.send_signal(signal.SIGCONT)
            process.send_signal(signal.SIGTERM)
            process.wait(30)

    def notes(self, what: str) -> list[tuple[int, int]]:
        """Token and process of each."""
        path = self.folder / "notes"
        lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
        return [(int(token), int(process)) for said, token, process in lines if said == what]

    def was_told(self, name: str) -> bool:
        """That it lost its lease: of the effect, or of the message, whichever it noticed first."""
        log = (self.folder / f"{name}.log").read_text()
        return "LeaseLost" in log or "the lease of message" in log
