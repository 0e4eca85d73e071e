"""The proof on a cluster that loses processes and servers.

Times are generous: a Kafka group notices a killed member after its session (6 s at least), a cluster a killed server as
late.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from tests.proving.test_prove import BROKEN, PROVE, prove
from tests.servers.cluster import Cluster

pytestmark = pytest.mark.timeout(300)

NONE_WRONG = dict.fromkeys(("lost", "doubled", "reordered", "phantom", "false_confirms", "unbalanced", "crashes"), 0)
OPTIONS: dict[str, str] = {"kafka": "?session_timeout_seconds=6&partitions=6", "rabbitmq": "", "redis": ""}
WHOLE = {"kafka": "whole", "rabbitmq": "whole_rabbitmq", "redis": "whole_redis"}


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in OPTIONS])
def cluster(request: pytest.FixtureRequest) -> Cluster:
    """Made whole again afterwards."""
    found = request.getfixturevalue(WHOLE[request.param])
    assert isinstance(found, Cluster)
    return found


def url(cluster: Cluster) -> str:
    """For groups that notice a killed member as soon as the broker lets them."""
    return cluster.url + OPTIONS[cluster.name]


def kill_broker(cluster: Cluster) -> str:
    """The command that the proof kills servers with."""
    return f"{sys.executable} -m tests.servers {cluster.name}"


def test_processes_and_a_server_are_killed_and_nothing_is_lost_doubled_or_reordered(cluster: Cluster) -> None:
    code, counters = prove(
        *("--broker", url(cluster), "--messages", "300", "--kill-every", "1"),
        *("--kill-broker", kill_broker(cluster), "--kill-broker-every", "5"),
        timeout=280,
    )

    assert {name: counters[name] for name in NONE_WRONG} == NONE_WRONG
    assert code == 0
    assert counters["broker_kills"] >= 1
    assert counters["kills"] >= 5
    assert counters["confirmed"] == counters["committed"] == counters["effects"] == 285


# The other rules are broken in front of the broker: on a second one these are long forms
RULES = [pytest.param(rule, counter, marks=[] if rule == "ack-first" else pytest.mark.slow) for rule, counter in BROKEN]


@pytest.mark.parametrize(("rule", "counter"), RULES)
def test_a_broken_rule_is_caught(cluster: Cluster, rule: str, counter: str) -> None:
    code, counters = prove(
        "--broker", url(cluster), "--break", rule, "--messages", "600", "--deadline", "15", timeout=280
    )

    assert code == 1
    assert counters[counter] > 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_starts_the_server_that_was_killed(cluster: Cluster, number: int) -> None:
    arguments = ("--broker", url(cluster), "--messages", "100000", "--kill-broker", kill_broker(cluster))
    process = subprocess.Popen(
        [*PROVE, *arguments, "--kill-broker-every", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: not all(server.running for server in cluster.servers))
    process.send_signal(number)
    said, _ = process.communicate(timeout=120)

    assert all(server.running for server in cluster.servers)
    assert process.returncode == 130
    assert "kills and 1 of brokers" in said


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
