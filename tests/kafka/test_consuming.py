"""Safe arrival on a real cluster: slow handlers, killed workers, members that come and go (C1 to C4, C7, C8)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from pathlib import Path

import anyio
import pytest
from pydantic import BaseModel
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from reliamq import Delivery, Reliamq, RetryAfter
from reliamq.database import open_engine
from reliamq.settings import Settings, WorkerSettings
from reliamq_kafka.settings import read_settings
from reliamq_kafka.wire.admin import group_id, open_admin
from tests.servers.kafka import KafkaCluster

pytestmark = [pytest.mark.anyio, pytest.mark.xdist_group("kafka"), pytest.mark.timeout(180)]

SESSION_SECONDS = 6


class Order(BaseModel):
    number: int
    account: str


def make_app(
    kafka: KafkaCluster, folder: Path, topic: str, *, lease: float = 5.0, broker: str | None = None, **options: object
) -> Reliamq:
    kafka_options = {"session_timeout_seconds": SESSION_SECONDS, "rebalance_timeout_seconds": 10, **options}
    return Reliamq(
        Settings(
            broker=broker or kafka.url,
            database=f"sqlite:///{folder}/database.db",
            worker=WorkerSettings(lease=timedelta(seconds=lease), stop_deadline=timedelta(seconds=10)),
            backends={"kafka": kafka_options},
        )
    )


@pytest.fixture
def topic() -> str:
    return f"consuming-{uuid.uuid4()}"


@asynccontextmanager
async def working(app: Reliamq) -> AsyncIterator[None]:
    """Run the application's worker; stopped cleanly at the end."""
    stop = anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(app.run_worker, stop)
        yield
        stop.set()


async def eventually(condition: Callable[[], bool], seconds: float = 60) -> None:
    with anyio.fail_after(seconds):
        while not condition():
            await anyio.sleep(0.02)


async def publish(app: Reliamq, topic: str, numbers: range, accounts: int) -> None:
    async with anyio.create_task_group() as tasks:
        for number in numbers:
            order = Order(number=number, account=f"account {number % accounts}")
            tasks.start_soon(app.topics[topic].publish, order)


# --- one worker ---------------------------------------------------------------------------------------------------


async def test_a_handler_that_takes_longer_than_lease_session_and_poll_interval_runs_once(
    kafka: KafkaCluster, tmp_path: Path, topic: str
) -> None:
    """C7"""
    await handle_slowly(kafka, tmp_path, topic, seconds=14, poll_interval=6)


async def handle_slowly(kafka: KafkaCluster, folder: Path, topic: str, *, seconds: float, poll_interval: float) -> None:
    app = make_app(kafka, folder, topic, lease=2, poll_interval_seconds=poll_interval, partitions=1)
    orders = app.topic(topic, Order, key=lambda order: order.account)
    starts = Counter[int]()
    done: list[int] = []

    @app.handler(orders, group="g", effects="repeatable", timeout=timedelta(seconds=2 * seconds))
    async def slow(order: Order) -> None:
        starts[order.number] += 1
        await anyio.sleep(seconds if order.number == 0 else 0)
        done.append(order.number)

    async with app, working(app):
        await publish(app, topic, range(4), accounts=4)
        await eventually(lambda: len(done) == 4, seconds=seconds + 60)

    assert starts == {0: 1, 1: 1, 2: 1, 3: 1}
    assert done[-1] == 0, "the others were not held up"


async def test_clean_stops_under_load_repeat_nothing_and_leave_nothing_behind(
    kafka: KafkaCluster, tmp_path: Path, topic: str
) -> None:
    """C8"""
    await stop_cleanly(kafka, tmp_path, topic, stops=6)


async def stop_cleanly(kafka: KafkaCluster, folder: Path, topic: str, stops: int) -> None:
    app = make_app(kafka, folder, topic, partitions=4)
    orders = app.topic(topic, Order, key=lambda order: order.account)
    runs = Counter[int]()
    per_stop = 150

    @app.handler(orders, group="g", effects="repeatable", concurrency=8)
    async def handle(order: Order) -> None:
        runs[order.number] += 1
        await anyio.sleep(0.001)

    async with app:
        for stop in range(stops):
            await publish(app, topic, range(stop * per_stop, (stop + 1) * per_stop), accounts=20)
            before = runs.total()
            async with working(app):
                await eventually(lambda before=before: runs.total() >= before + per_stop // 2)
        async with working(app):
            await eventually(lambda: len(runs) == stops * per_stop)

    assert set(runs.values()) == {1}


async def test_what_gives_way_for_long_leaves_its_partition_and_comes_back_with_its_attempts(
    kafka: KafkaCluster, tmp_path: Path, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C4 C6"""
    monkeypatch.setattr("reliamq_kafka.consuming.subscription.LONG", timedelta(seconds=0.5))
    app = make_app(kafka, tmp_path, topic, partitions=1)
    orders = app.topic(topic, Order, key=lambda order: order.account)
    attempts: list[tuple[int, int]] = []
    waits = 6.0

    @app.handler(orders, group="g", effects="repeatable")
    async def handle(order: Order, delivery: Delivery) -> None:
        attempts.append((order.number, delivery.attempt))
        if order.number == 0 and delivery.attempt <= 2:
            raise RetryAfter(timedelta(seconds=waits), reason="not yet", keep_order=False)

    async with app, working(app), open_admin(read_settings(kafka.url, {})) as admin:
        began = time.monotonic()
        await publish(app, topic, range(3), accounts=1)
        await eventually(lambda: len(attempts) == 3)
        while (await admin.committed(group_id(topic, "g"), topic, [0]))[0] < 3:
            assert len(attempts) == 3, "its partition waited for it"
            await anyio.sleep(0.05)
        await eventually(lambda: len(attempts) == 5)
        assert time.monotonic() - began >= 2 * waits

    assert attempts == [(0, 1), (1, 1), (2, 1), (0, 2), (0, 3)]


# --- several members ----------------------------------------------------------------------------------------------


async def test_members_that_come_and_go_lose_nothing_keep_keys_in_order_and_double_no_effect(
    kafka: KafkaCluster, tmp_path: Path, topic: str
) -> None:
    """C1 C2 C3 I2"""
    await storm(kafka, tmp_path, topic, seconds=16, messages=1_600)


async def storm(kafka: KafkaCluster, folder: Path, topic: str, *, seconds: float, messages: int) -> None:
    apps = [make_app(kafka, folder, topic, partitions=16) for _ in range(3)]
    for app in apps:
        register(app, topic)
    async with apps[0] as first, open_engine(first.settings.database or "") as engine:
        async with engine.begin() as connection:
            await connection.execute(
                text("CREATE TABLE effects (id INTEGER PRIMARY KEY, number INTEGER, account TEXT)")
            )
        ends = time.monotonic() + seconds
        async with working(first), anyio.create_task_group() as tasks:
            tasks.start_soon(publish_for, first, topic, messages, seconds)
            for app in apps[1:]:
                tasks.start_soon(come_and_go, app, ends)

            async def rows() -> list[tuple[int, str]]:
                async with engine.connect() as connection:
                    found = await connection.execute(text("SELECT number, account FROM effects ORDER BY id"))
                    return [(row[0], row[1]) for row in found]

            with anyio.fail_after(seconds + 60):
                while len(await rows()) < messages or time.monotonic() < ends:
                    await anyio.sleep(0.2)
        effects = await rows()
    assert sorted(number for number, _ in effects) == list(range(messages))
    for account in {account for _, account in effects}:
        numbers = [number for number, other in effects if other == account]
        assert numbers == sorted(numbers), account


def register(app: Reliamq, topic: str) -> None:
    orders = app.topic(topic, Order, key=lambda order: order.account)

    @app.handler(orders, group="g", effects="transaction", concurrency=4)
    async def apply(order: Order, session: AsyncSession) -> None:
        await session.execute(
            text("INSERT INTO effects (number, account) VALUES (:number, :account)"), order.model_dump()
        )


async def publish_for(app: Reliamq, topic: str, messages: int, seconds: float) -> None:
    for start in range(0, messages, 40):
        await publish(app, topic, range(start, start + 40), accounts=40)
        await anyio.sleep(seconds * 40 / messages * 0.8)


async def come_and_go(app: Reliamq, ends: float) -> None:
    """Join or leave every two seconds."""
    async with app:
        while time.monotonic() < ends:
            async with working(app):
                await anyio.sleep(2)
            await anyio.sleep(2)


async def test_a_second_member_takes_its_share_and_a_lone_one_gets_it_back(
    kafka: KafkaCluster, tmp_path: Path, topic: str
) -> None:
    """C2"""
    apps = [make_app(kafka, tmp_path, topic, partitions=8) for _ in range(2)]
    one, two = (count_runs(app, topic) for app in apps)
    async with apps[0], apps[1], working(apps[0]):
        await publish(apps[0], topic, range(100), accounts=50)
        await eventually(lambda: len(one) == 100)
        numbers = 100
        async with working(apps[1]):
            while not two:
                await publish(apps[0], topic, range(numbers, numbers + 50), accounts=50)
                numbers += 50
                await anyio.sleep(0.3)
        await publish(apps[0], topic, range(numbers, numbers + 50), accounts=50)
        await eventually(lambda: len(one + two) == numbers + 50)

    assert set((one + two).values()) == {1}


def count_runs(app: Reliamq, topic: str) -> Counter[int]:
    runs = Counter[int]()
    orders = app.topic(topic, Order, key=lambda order: order.account)

    @app.handler(orders, group="g", effects="repeatable")
    async def handle(order: Order) -> None:
        runs[order.number] += 1

    return runs


# --- worker processes ---------------------------------------------------------------------------------------------


class Service:
    """``reliamq run`` on :mod:`tests.kafka.service`."""

    def __init__(self, kafka: KafkaCluster, folder: Path, topic: str, options: str = "") -> None:
        self.folder = folder
        self.environment = {
            **os.environ,
            "SERVICE_FOLDER": str(folder),
            "SERVICE_TOPIC": topic,
            "RELIAMQ_BROKER": f"{kafka.url}?partitions=1{options or f'&session_timeout_seconds={SESSION_SECONDS}'}",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }

    def publish(self, *jobs: dict[str, object]) -> None:
        (self.folder / "jobs.ndjson").write_text("\n".join(json.dumps(job) for job in jobs))
        self._reliamq("publish", self.environment["SERVICE_TOPIC"], "--file", "jobs.ndjson", "--app", TARGET).check()

    def dead_letters(self) -> list[dict[str, str]]:
        listed = self._reliamq(
            "dead-letters", "list", "--app", TARGET, "--json", "--topic", self.environment["SERVICE_TOPIC"]
        )
        return json.loads(listed.check())  # type: ignore[no-any-return]

    def _reliamq(self, *arguments: str) -> Finished:
        done = subprocess.run(
            [*RELIAMQ, *arguments], cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=60
        )
        return Finished(done)

    @contextmanager
    def worker(
        self, command: tuple[str, ...] = ("-m", "reliamq.cli.worker_process"), **environment: str
    ) -> Iterator[subprocess.Popen[bytes]]:
        with (self.folder / "log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, *command, TARGET],
                cwd=self.folder,
                env={**self.environment, **environment},
                stdout=log,
                stderr=log,
            )
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)

    def lines(self, kind: str) -> list[int]:
        path = self.folder / kind
        return [int(line) for line in path.read_text().splitlines()] if path.exists() else []


class Finished:
    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        self._done = done

    def check(self) -> str:
        assert self._done.returncode == 0, self._done.stderr
        return self._done.stdout


TARGET = "tests.kafka.service:app"
RELIAMQ = (sys.executable, "-c", "from reliamq.cli import main; main()")


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def test_the_slow_head_of_a_killed_worker_comes_again_and_its_fast_tail_does_not(
    kafka: KafkaCluster, tmp_path: Path, topic: str
) -> None:
    """C1 C2: which of the later messages are finished is written down beside the offset."""
    service = Service(kafka, tmp_path, topic)
    head = {"number": 0, "account": "slow", "seconds": 1_000}
    service.publish(head, *[{"number": number, "account": f"account {number}"} for number in range(1, 400)])
    with service.worker() as worker:
        wait_until(lambda: len(service.lines("done")) == 399)
        time.sleep(1)  # they are settled
        worker.kill()

    with service.worker(SERVICE_HURRY="yes"):
        wait_until(lambda: 0 in service.lines("done"))
        time.sleep(1)

    assert Counter(service.lines("done")) == Counter(range(400))


def test_a_message_that_kills_its_process_ends_as_a_dead_letter_and_its_neighbours_are_handled(
    kafka: KafkaCluster, tmp_path: Path, topic: str
) -> None:
    """C4"""
    service = Service(kafka, tmp_path, topic)
    jobs: list[dict[str, object]] = [{"number": number, "account": f"account {number}"} for number in range(50)]
    jobs.insert(20, {"number": 1_000, "account": "killer", "deadly": True})
    service.publish(*jobs)
    run = ("-c", "from reliamq.cli import main; main()", "run")
    with service.worker(command=run):
        wait_until(lambda: bool(service.dead_letters()), seconds=120)
        wait_until(lambda: set(service.lines("done")) == set(range(50)))

    (dead,) = service.dead_letters()
    assert "died" in dead["reason"]
    assert 1_000 not in service.lines("done")


def test_a_member_with_a_name_that_is_killed_and_started_again_goes_on_at_once(
    kafka: KafkaCluster, tmp_path: Path, topic: str
) -> None:
    """C2: its group does not wait for the end of its session (KIP-345)."""
    service = Service(kafka, tmp_path, topic, "&session_timeout_seconds=45&instance_id=tests-{worker}")
    service.publish({"number": 0, "account": "slow", "seconds": 1_000})
    with service.worker() as worker:
        wait_until(lambda: service.lines("started") == [0])
        worker.kill()
        worker.wait()

    with service.worker(SERVICE_HURRY="yes"):
        wait_until(lambda: service.lines("done") == [0], seconds=20)
