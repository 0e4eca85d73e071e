"""Brokers are killed by a command of the user's: one at a time, and whatever happens started again."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from reliamq.proving.brokers import BrokerCommand, BrokerKiller
from reliamq.spi import ConfigurationError
from tests.proving.test_prove import PROVE

CLUSTER = """\
import pathlib, sys, time
verb, *name = sys.argv[1:]
with open({log!r}, "a") as log:
    log.write(" ".join([verb, *name]) + chr(10))
if verb == "list":
    print("one\\n\\ntwo")
if verb in {failing!r}:
    sys.exit("it would not " + verb)
if verb == "start":
    time.sleep({start_seconds})
    with open({log!r}, "a") as log:
        log.write("whole" + chr(10))
"""


class Cluster:
    """A command that writes down what it is told.  failing: verbs that it cannot do."""

    def __init__(self, folder: Path, *failing: str, start_seconds: float = 0.0) -> None:
        self._log, script = folder / "log", folder / "cluster.py"
        script.write_text(CLUSTER.format(log=str(self._log), failing=failing, start_seconds=start_seconds))
        self.command = f"{sys.executable} '{script}'"

    @property
    def told(self) -> list[str]:
        return self._log.read_text().splitlines() if self._log.exists() else []

    def killer(self, seed: int = 1) -> BrokerKiller:
        return BrokerKiller(BrokerCommand(self.command), every=0.01, seed=seed)


def wait_for_kills(killer: BrokerKiller, count: int) -> None:
    deadline = time.monotonic() + 30
    while len(killer.kills) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_no_broker_is_killed_before_the_last_one_is_whole(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    killer = cluster.killer()
    killer.start()
    wait_for_kills(killer, 5)
    killer.wait()

    assert not killer.is_at_work
    expected = [line for _, name in killer.kills for line in (f"kill {name}", f"start {name}", "whole")]
    assert cluster.told == ["list", *expected]
    assert {name for _, name in killer.kills} == {"one", "two"}


def test_who_is_killed_is_chosen_by_the_seed(tmp_path: Path) -> None:
    chosen = []
    for _ in range(2):
        killer = Cluster(tmp_path).killer(seed=7)
        killer.start()
        wait_for_kills(killer, 4)
        killer.wait()
        chosen.append([name for _, name in killer.kills][:4])

    assert chosen[0] == chosen[1]


@pytest.mark.parametrize(("verb", "kills"), [("kill", 0), ("start", 1)])
def test_a_command_that_fails_is_told_and_the_broker_is_started(tmp_path: Path, verb: str, kills: int) -> None:
    cluster = Cluster(tmp_path, verb)
    killer = cluster.killer()
    killer.start()
    killer.wait()
    while killer.is_at_work:
        time.sleep(0.01)

    if len(cluster.told) > 1:  # it may have been told to end before it began
        assert len(killer.kills) == kills
        assert cluster.told[2].startswith("start ")
        with pytest.raises(ConfigurationError, match=f"{verb} (one|two)' ended with 1: it would not {verb}"):
            killer.check()


WRONG = {
    "--kill-broker /nowhere": "'/nowhere list' cannot be run: No such file or directory",
    "--kill-broker false": "'false list' ended with 1",
    "--kill-broker true": "'true list' named no broker",
    "--kill-broker ''": "the command is empty",
    '--kill-broker "\'"': "cannot be read: No closing quotation",
    "--kill-broker-every 3": "give --kill-broker, or there is nothing to kill brokers with",
    "--kill-broker 'echo 1'": "is a file and no broker; give --broker",
}


@pytest.mark.parametrize("arguments", WRONG)
def test_what_cannot_kill_brokers_is_refused_before_anything_runs(arguments: str) -> None:
    words = ["sh", "-c", f'exec "$@" {arguments}', "sh", *PROVE, "--messages", "20"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)

    assert done.returncode == 2
    assert WRONG[arguments] in done.stderr
    assert done.stderr.count("\n") == 1
