"""The long forms of the outbox: large tables, many relays, and relays, databases and brokers that are killed.

``make soak`` runs them.  Rates are a benchmark's business: ``python -m benchmarks.outbox``.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import anyio
import psutil
import psycopg
import pytest
from sqlalchemy import insert, make_url
from sqlalchemy.ext.asyncio import AsyncSession

from reliamq import outbox
from reliamq.database import open_engine
from reliamq.outbox import OutboxMessage, SqlOutboxStore
from reliamq.outbox.table import columns_of
from reliamq_kafka.settings import read_settings
from tests.brokers.application import wait_until
from tests.cli import RELIAMQ
from tests.kafka.conftest import log_of
from tests.outbox.conftest import Order as Small, Recorder, drain, orders as small
from tests.proving.test_prove import prove
from tests.proving.test_prove_cluster import NONE_WRONG, OPTIONS, WHOLE
from tests.servers.cluster import Cluster, free_ports
from tests.servers.kafka import KafkaCluster
from tests.servers.postgresql import PostgresqlServer, run_postgresql
from tests.soak.relaying_service import Order, orders
from tests.soak.test_long_forms import Note, note

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]
ON_KAFKA = pytest.mark.xdist_group("kafka")

ROOT = Path(__file__).parents[2]
PORTS = range(16_000, 17_000)
RELAY = [*RELIAMQ, "relay", "tests.soak.relaying_service:app"]
BATCH = 1_000
IN_FLIGHT = 2 * BATCH
"""Rows that one relay may have sent and not yet removed."""
RELAY_MIB = 150


@pytest.fixture(scope="module")
def own_postgresql() -> Iterator[PostgresqlServer]:
    """One that may be killed, and whose tables are ours."""
    with run_postgresql(port=free_ports(1, PORTS)[0]) as server:
        yield server


@pytest.fixture
def database(own_postgresql: PostgresqlServer) -> Iterator[str]:
    """The URL of a database with the outbox's tables."""
    with own_postgresql.fresh_database() as url:
        anyio.run(_create_tables, url)
        yield url


async def _create_tables(url: str) -> None:
    async with open_engine(url) as engine:
        await outbox.create_tables_async(engine)


async def _fill(url: str, topic: str, rows: int, accounts: int) -> None:
    orders.name = topic
    async with open_engine(url) as engine:
        for start in range(0, rows, 5_000):
            numbers = range(start, min(start + 5_000, rows))
            messages = [orders.message(Order(account=f"a-{n % accounts}", number=n // accounts)) for n in numbers]
            async with engine.begin() as connection:
                await connection.execute(insert(OutboxMessage), [columns_of(message) for message in messages])


class Relays:
    """``reliamq relay``, several times, each started again when it was killed."""

    def __init__(self, count: int, broker: str, database: str, topic: str, folder: Path) -> None:
        self._folder, self.kills = folder, 0
        self._environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "RELAYED_TOPIC": topic,
            "RELIAMQ_BROKER": broker,
            "RELIAMQ_DATABASE": database,
            "RELIAMQ_RELAY__LEASE": "3s",
        }
        self.processes = [self._start() for _ in range(count)]

    def _start(self) -> subprocess.Popen[bytes]:
        with (self._folder / "log").open("ab") as log:
            return subprocess.Popen(RELAY, cwd=self._folder, env=self._environment, stdout=log, stderr=log)

    def kill(self, index: int) -> None:
        """And start it again."""
        self.processes[index].kill()
        self.processes[index].wait()
        self.processes[index] = self._start()
        self.kills += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.send_signal(signal.SIGTERM)
        for process in self.processes:
            process.wait(60)


def _ask(url: str, question: str) -> Any:
    place = make_url(url)
    with psycopg.connect(place.render_as_string(hide_password=False), connect_timeout=10) as connection:
        row = connection.execute(question).fetchone()  # type: ignore[call-overload]  # made from constants
    return None if row is None else row[0]


def _waiting(url: str) -> int:
    return int(_ask(url, "SELECT count(*) FROM reliamq_outbox WHERE parked_at IS NULL"))


def _broker(kafka: KafkaCluster) -> str:
    return f"{kafka.url}?partitions=3"


# --- relays and databases that die ------------------------------------------------------------------------------------


@ON_KAFKA
def test_four_relays_drain_two_hundred_thousand_rows_while_they_and_the_database_are_killed(
    kafka: KafkaCluster, own_postgresql: PostgresqlServer, database: str, tmp_path: Path, record_property: Note
) -> None:
    """O2 O3 O4"""
    topic, rows, accounts = f"soak-{uuid.uuid4()}", 200_000, 1_000
    anyio.run(_fill, database, topic, rows, accounts)
    dice, began, was_killed = random.Random(1), time.monotonic(), False
    with Relays(4, _broker(kafka), database, topic, tmp_path) as relays:
        while left := _waiting(database):
            time.sleep(3)
            relays.kill(dice.randrange(4))
            if left < rows // 2 and not was_killed:
                own_postgresql.process.kill()
                time.sleep(1)
                own_postgresql.process.start()
                was_killed = True
    record_property("seconds", round(time.monotonic() - began))
    record_property("kills", relays.kills)

    log = anyio.run(log_of, read_settings(_broker(kafka), {}), topic)
    sent = [Order.model_validate_json(record.value) for partition in log for record in partition]
    repeated = len(sent) - len({(order.account, order.number) for order in sent})
    record_property("repeated", repeated)
    assert was_killed
    assert _by_account(sent) == {f"a-{account}": list(range(rows // accounts)) for account in range(accounts)}
    assert repeated <= IN_FLIGHT * (relays.kills + 4)


def _by_account(sent: Sequence[Order]) -> dict[str, list[int]]:
    """The first appearance of each number, in order."""
    numbers: dict[str, dict[int, None]] = defaultdict(dict)
    for order in sent:
        numbers[order.account].setdefault(order.number)
    return {account: list(found) for account, found in numbers.items()}


# --- a broker that is away --------------------------------------------------------------------------------------------


@ON_KAFKA
def test_ten_minutes_without_a_broker_cost_no_attempt_and_little_of_the_database(
    whole: KafkaCluster, database: str, tmp_path: Path, record_property: Note
) -> None:
    """O5"""
    topic, committed = (
        f"soak-{uuid.uuid4()}",
        "SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()",
    )
    anyio.run(_fill, database, topic, 100, 100)
    with Relays(2, _broker(whole), database, topic, tmp_path) as relays:
        wait_until(lambda: _waiting(database) == 0, 60)
        for server in whole.servers:
            server.stop()
        anyio.run(_fill, database, topic, 10_000, 100)
        time.sleep(10)
        before, busy = _ask(database, committed), _processor_seconds(relays)
        time.sleep(600)
        transactions, busy = _ask(database, committed) - before, _processor_seconds(relays) - busy
        record_property("transactions", transactions)
        record_property("processor seconds", round(busy, 1))
        assert _ask(database, "SELECT max(attempts) FROM reliamq_outbox") == 0
        assert _waiting(database) == 10_000
        whole.start()
        wait_until(lambda: _waiting(database) == 0, 180)

    assert transactions < 5_000
    assert busy < 60


def _processor_seconds(relays: Relays) -> float:
    return sum(sum(psutil.Process(process.pid).cpu_times()[:2]) for process in relays.processes)


# --- a hot key --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(1, 4))
@pytest.mark.anyio
async def test_a_hundred_concurrent_transactions_of_a_hot_key_are_sent_in_the_order_of_their_commits(
    database: str, seed: int
) -> None:
    """O3"""
    dice, committed, recorder = random.Random(seed), defaultdict[str, list[int]](list), Recorder()
    witness, turns = anyio.Lock(), iter(range(4_000))

    async def book_for_ever(engine: Any) -> None:
        for number in turns:
            account = dice.choice("aaaaab")
            async with AsyncSession(engine) as session:
                outbox.add(session, small, Small(account=account, number=number))
                await session.flush()
                await anyio.sleep(dice.uniform(0, 0.003))
                async with witness:
                    await session.commit()
                    committed[account].append(number)

    async with open_engine(database) as engine:
        async with anyio.create_task_group() as tasks:
            for _ in range(100):
                tasks.start_soon(book_for_ever, engine)
        await drain(SqlOutboxStore(engine), recorder, recorder)

    assert {account: recorder.numbers(account) for account in "ab"} == committed


# --- a backlog --------------------------------------------------------------------------------------------------------


@ON_KAFKA
def test_a_million_rows_cost_a_relay_no_memory_and_leave_no_bloat(
    kafka: KafkaCluster, database: str, tmp_path: Path, record_property: Note
) -> None:
    """O6"""
    topic, sizes, memory = f"soak-{uuid.uuid4()}", list[int](), list[int]()
    for _ in range(3):
        anyio.run(_fill, database, topic, 1_000_000, 1_000)
        with Relays(2, _broker(kafka), database, topic, tmp_path) as relays:
            while _waiting(database):
                time.sleep(2)
                memory.append(max(psutil.Process(one.pid).memory_info().rss >> 20 for one in relays.processes))
        sizes.append(int(_ask(database, "SELECT pg_total_relation_size('reliamq_outbox')")) >> 20)
    record_property("MiB of the table after each round", sizes)
    record_property("MiB of a relay", f"{memory[len(memory) // 10]} to {max(memory)}")

    assert max(memory) < RELAY_MIB
    assert sizes[-1] <= 1.5 * sizes[0]


# --- the proof on PostgreSQL ------------------------------------------------------------------------------------------


@pytest.fixture(params=["embedded", *(pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in WHOLE)])
def broker(request: pytest.FixtureRequest) -> Callable[[], Sequence[str]]:
    """The prover's arguments for a broker."""
    if request.param == "embedded":
        return list
    cluster = request.getfixturevalue(WHOLE[request.param])
    assert isinstance(cluster, Cluster)
    return lambda: ("--broker", cluster.url + OPTIONS[cluster.name])


@pytest.mark.parametrize("seed", range(1, 11))
def test_the_proof_holds_on_postgresql(
    own_postgresql: PostgresqlServer, broker: Callable[[], Sequence[str]], seed: int, record_property: Note
) -> None:
    with own_postgresql.fresh_database() as url:
        code, counters = prove(
            *broker(),
            *("--database", url, "--messages", "4000", "--seed", str(seed)),
            *("--kill-every", "2", "--deadline", "300"),
            timeout=3600,
        )
    note(record_property, counters)

    assert {name: counters[name] for name in NONE_WRONG} == NONE_WRONG, counters
    assert code == 0
    assert counters["confirmed"] == counters["committed"] == counters["effects"] == 3_800
