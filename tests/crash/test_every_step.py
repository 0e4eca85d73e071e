"""A process that dies at any step neither loses the message nor doubles its effect (O1, O2, O4, C1, C2, C5, I1, I2); a
dead letter has the original's bytes (C5).
"""

from __future__ import annotations

import signal
import sqlite3
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anyio
import pytest

from reliamq.backends import open_backend
from reliamq.spi import DeadLetterRecord
from tests.crash.pipeline import Surroundings, run_role
from tests.forked import exit_code_of
from tests.servers.kafka import KafkaCluster

PLACING = [("place", step) for step in ("before insert", "after insert", "after commit")]
"""Who places an order meets no broker."""
AT_THE_BROKER = [
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
BURIALS = [("bury", step) for step in ("before burial", "after burial", "before ack", "after ack")]
ROLES = ["place", "relay", "work"]
PATIENCE_SECONDS = 90
SIDE_BY_SIDE = 4


class Pipeline:
    """The roles in their surroundings."""

    def __init__(self, around: Surroundings) -> None:
        self._around = around

    def run(self, role: str, step: str = "") -> int:
        log = self._around.folder / f"{role}.log"
        code = exit_code_of(run_role, role, self._around, step, log, timeout=PATIENCE_SECONDS)
        assert code in (0, -signal.SIGKILL), log.read_text()
        return code

    def dies(self, role: str, step: str) -> None:
        """Run the roles up to this one, kill it at the step."""
        for earlier in ROLES[: ROLES.index(role)] if role in ROLES else ROLES[:2]:
            assert self.run(earlier) == 0
        assert self.run(role, step) == -signal.SIGKILL

    def check_a_crash(self, role: str, step: str) -> None:
        """Whoever dies at a step, the roles that follow bring the order to its end: once."""
        self.dies(role, step)
        if role == "bury":
            assert self.run("bury") == 0
            self._check_dead_letter()
            return
        for again in ROLES[ROLES.index(role) :]:
            assert self.run(again) == 0
        self._check_effect()

    def _check_effect(self) -> None:
        """One order, one effect, nothing left to send."""
        database = sqlite3.connect(self._around.folder / "database.db")
        try:
            assert database.execute("SELECT number FROM orders").fetchall() == [(1,)]
            assert database.execute("SELECT number FROM effects").fetchall() == [(1,)]
            assert database.execute("SELECT count(*) FROM reliamq_outbox").fetchall() == [(0,)]
        finally:
            database.close()

    def _check_dead_letter(self) -> None:
        """One, with the original's bytes."""

        async def find() -> list[DeadLetterRecord]:
            async with open_backend(self._around.broker).dead_letters() as dead_letters:
                return list(await dead_letters.find(topic=self._around.topic))

        (record,) = anyio.run(find)
        assert record.message.body == b'{"number":1,"account":"ada"}'
        assert (record.message.key, record.group) == (b"ada", "g")
        assert "nobody wants it" in record.reason


@pytest.mark.parametrize(("role", "step"), [*PLACING, *AT_THE_BROKER, *BURIALS])
def test_a_crash_at_this_step_loses_nothing_and_doubles_nothing(role: str, step: str, tmp_path: Path) -> None:
    Pipeline(Surroundings(tmp_path, f"embedded:///{tmp_path}/broker.db")).check_a_crash(role, step)


@pytest.mark.xdist_group("kafka")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("steps", [AT_THE_BROKER, BURIALS], ids=["steps", "burials"])
def test_on_kafka_a_crash_at_any_step_loses_nothing_and_doubles_nothing(
    steps: Sequence[tuple[str, str]], kafka: KafkaCluster, tmp_path: Path
) -> None:
    """Several side by side: they mostly wait for the session of a killed member to end."""
    url = f"{kafka.url}?session_timeout_seconds=6"

    def check(number: int) -> None:
        folder = tmp_path / str(number)
        folder.mkdir()
        around = Surroundings(folder, url, f"crash-{uuid.uuid4()}", watch_seconds=7)
        Pipeline(around).check_a_crash(*steps[number])

    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        checks = {step: pool.submit(check, number) for number, step in enumerate(steps)}
    failed = {step: error for step, done in checks.items() if (error := done.exception()) is not None}
    assert not failed
