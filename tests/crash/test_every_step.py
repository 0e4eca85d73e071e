"""A process that dies at any step neither loses the message nor doubles its effect (O1, O2, O4, C1, C2, C5, I1, I2)."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import anyio
import pytest
from _pytest.mark.structures import ParameterSet

from reliamq.backends import open_backend
from reliamq.spi import DeadLetterRecord
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
Run = Callable[..., int]
ON_KAFKA = pytest.mark.xdist_group("kafka")


def on_brokers() -> Iterator[ParameterSet]:
    """Each step on each broker.  Who places an order meets no broker: on a second one these are long forms."""
    for broker in ("embedded", "kafka"):
        for role, step in STEPS:
            marks = [ON_KAFKA] * (broker == "kafka") + [pytest.mark.slow] * (broker == "kafka" and role == "place")
            yield pytest.param(broker, role, step, marks=marks, id=f"{broker}-{role} dies {step}")


class Pipeline:
    """The roles in a folder, on a broker."""

    def __init__(self, folder: Path, broker: str, **environment: str) -> None:
        self.folder, self.broker, self.topic = folder, broker, environment.get("CRASH_TOPIC", "orders")
        self._environment = {**os.environ, **environment}

    def run(self, role: str, step: str = "") -> int:
        command = [sys.executable, "-m", "tests.crash.pipeline", role, str(self.folder), step]
        root = Path(__file__).parent.parent.parent
        done = subprocess.run(command, cwd=root, env=self._environment, capture_output=True, text=True, timeout=90)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        return done.returncode

    def dies(self, role: str, step: str) -> None:
        """Run the roles up to this one, kill it at the step."""
        for earlier in ROLES[: ROLES.index(role)] if role in ROLES else ROLES[:2]:
            assert self.run(earlier) == 0
        assert self.run(role, step) == -signal.SIGKILL

    def dead_letters(self) -> list[DeadLetterRecord]:
        async def find() -> list[DeadLetterRecord]:
            async with open_backend(self.broker).dead_letters() as dead_letters:
                return list(await dead_letters.find(topic=self.topic))

        return anyio.run(find)

    def check(self) -> None:
        """One order, one effect, nothing left to send."""
        database = sqlite3.connect(self.folder / "database.db")
        try:
            assert database.execute("SELECT number FROM orders").fetchall() == [(1,)]
            assert database.execute("SELECT number FROM effects").fetchall() == [(1,)]
            assert database.execute("SELECT count(*) FROM reliamq_outbox").fetchall() == [(0,)]
        finally:
            database.close()


@pytest.fixture(params=["embedded", pytest.param("kafka", marks=ON_KAFKA)])
def pipeline(request: pytest.FixtureRequest, tmp_path: Path) -> Pipeline:
    if request.param == "embedded":
        return Pipeline(tmp_path, f"embedded:///{tmp_path}/broker.db")
    kafka: KafkaCluster = request.getfixturevalue("kafka")
    url = f"{kafka.url}?session_timeout_seconds=6"  # after which others get what a killed worker had
    topic = f"crash-{uuid.uuid4()}"
    return Pipeline(tmp_path, url, CRASH_BROKER=url, CRASH_TOPIC=topic, CRASH_WATCH_SECONDS="7")


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
