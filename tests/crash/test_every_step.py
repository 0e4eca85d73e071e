"""A process that dies at any step neither loses the message nor doubles its effect (O1, O2, O4, C1, C2, C5, I1, I2)."""

from __future__ import annotations

import multiprocessing
import signal
import sqlite3
import uuid
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest
from _pytest.mark.structures import ParameterSet

from reliamq.backends import open_backend
from reliamq.spi import DeadLetterRecord
from tests.crash.pipeline import Surroundings, run_role
from tests.servers.kafka import KafkaCluster

STEPS = [
    ("place", "before insert"),
    ("place", "after insert"),
    ("place", "after commit"),
    ("relay", "before claim"),
    ("relay", "after claim"),
    ("relay", "before send"),
    ("relay", "after confirm"),
    ("relay", "before delete"),
    ("relay", "after delete"),
    ("work", "after receive"),
    ("work", "before start"),
    ("work", "before effect commit"),
    ("work", "after effect commit"),
    ("work", "before ack"),
    ("work", "after ack"),
]
BURIALS = ["before burial", "after burial", "before ack", "after ack"]
ROLES = ["place", "relay", "work"]
PATIENCE_SECONDS = 90
ON_KAFKA = pytest.mark.xdist_group("kafka")


def on_brokers() -> Iterator[ParameterSet]:
    """Each step on each broker.  Who places an order meets no broker: on a second one these are long forms."""
    for broker in ("embedded", "kafka"):
        for role, step in STEPS:
            marks = [ON_KAFKA] * (broker == "kafka") + [pytest.mark.slow] * (broker == "kafka" and role == "place")
            yield pytest.param(broker, role, step, marks=marks, id=f"{broker}-{role} dies {step}")


class Pipeline:
    """The roles in their surroundings."""

    def __init__(self, around: Surroundings) -> None:
        self._around = around
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload([run_role.__module__])

    def run(self, role: str, step: str = "") -> int:
        log = self._around.folder / f"{role}.log"
        process = self._processes.Process(target=run_role, args=(role, self._around, step, log))
        process.start()
        process.join(PATIENCE_SECONDS)
        if process.exitcode is None:
            process.kill()
        assert process.exitcode in (0, -signal.SIGKILL), log.read_text()
        return process.exitcode

    def dies(self, role: str, step: str) -> None:
        """Run the roles up to this one, kill it at the step."""
        for earlier in ROLES[: ROLES.index(role)] if role in ROLES else ROLES[:2]:
            assert self.run(earlier) == 0
        assert self.run(role, step) == -signal.SIGKILL

    def dead_letters(self) -> list[DeadLetterRecord]:
        async def find() -> list[DeadLetterRecord]:
            async with open_backend(self._around.broker).dead_letters() as dead_letters:
                return list(await dead_letters.find(topic=self._around.topic))

        return anyio.run(find)

    def check(self) -> None:
        """One order, one effect, nothing left to send."""
        database = sqlite3.connect(self._around.folder / "database.db")
        try:
            assert database.execute("SELECT number FROM orders").fetchall() == [(1,)]
            assert database.execute("SELECT number FROM effects").fetchall() == [(1,)]
            assert database.execute("SELECT count(*) FROM reliamq_outbox").fetchall() == [(0,)]
        finally:
            database.close()


@pytest.fixture(params=["embedded", pytest.param("kafka", marks=ON_KAFKA)])
def pipeline(request: pytest.FixtureRequest, tmp_path: Path) -> Pipeline:
    if request.param == "embedded":
        return Pipeline(Surroundings(tmp_path, f"embedded:///{tmp_path}/broker.db"))
    kafka: KafkaCluster = request.getfixturevalue("kafka")
    url = f"{kafka.url}?session_timeout_seconds=6"  # after which others get what a killed worker had
    return Pipeline(Surroundings(tmp_path, url, f"crash-{uuid.uuid4()}", watch_seconds=7))


@pytest.mark.parametrize(("pipeline", "role", "step"), list(on_brokers()), indirect=["pipeline"])
def test_a_crash_at_this_step_loses_nothing_and_doubles_nothing(role: str, step: str, pipeline: Pipeline) -> None:
    pipeline.dies(role, step)

    for again in ROLES[ROLES.index(role) :]:
        assert pipeline.run(again) == 0
    pipeline.check()


@pytest.mark.parametrize("step", BURIALS)
def test_a_crash_around_a_burial_leaves_one_dead_letter_with_the_original_bytes(step: str, pipeline: Pipeline) -> None:
    """C5"""
    pipeline.dies("bury", step)

    assert pipeline.run("bury") == 0
    (record,) = pipeline.dead_letters()
    assert record.message.body == b'{"number":1,"account":"ada"}'
    assert (record.message.key, record.group) == (b"ada", "g")
    assert "nobody wants it" in record.reason
