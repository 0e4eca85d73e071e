"""The proof on a Kafka cluster that loses processes and brokers.

Times are generous: a group notices a killed member after its session (6 s at least), a cluster a killed broker as late.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from tests.proving.test_prove import BROKEN, PROVE, prove
from tests.servers.kafka import KafkaCluster

pytestmark = [pytest.mark.xdist_group("kafka"), pytest.mark.timeout(300)]

KILL_BROKER = f"{sys.executable} -m tests.servers kafka"
NONE_WRONG = dict.fromkeys(("lost", "doubled", "reordered", "phantom", "false_confirms", "unbalanced", "crashes"), 0)


def url(cluster: KafkaCluster) -> str:
    """Of the cluster, for groups that notice a killed member as soon as Kafka lets them."""
    return f"{cluster.url}?session_timeout_seconds=6&partitions=6"


def test_processes_and_a_broker_are_killed_and_nothing_is_lost_doubled_or_reordered(whole: KafkaCluster) -> None:
    code, counters = prove(
        *("--broker", url(whole), "--messages", "300", "--kill-every", "1"),
        *("--kill-broker", KILL_BROKER, "--kill-broker-every", "5"),
        timeout=280,
    )

    assert {name: counters[name] for name in NONE_WRONG} == NONE_WRONG
    assert code == 0
    assert counters["broker_kills"] >= 1
    assert counters["kills"] >= 5
    assert counters["confirmed"] == counters["committed"] == counters["effects"] == 285


@pytest.mark.parametrize(("rule", "counter"), BROKEN)
def test_a_broken_rule_is_caught(whole: KafkaCluster, rule: str, counter: str) -> None:
    code, counters = prove(
        "--broker", url(whole), "--break", rule, "--messages", "600", "--deadline", "15", timeout=280
    )

    assert code == 1
    assert counters[counter] > 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_starts_the_broker_that_was_killed(whole: KafkaCluster, number: int) -> None:
    arguments = ("--broker", url(whole), "--messages", "100000", "--kill-broker", KILL_BROKER)
    process = subprocess.Popen(
        [*PROVE, *arguments, "--kill-broker-every", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while all(broker.running for broker in whole.brokers):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    said, _ = process.communicate(timeout=120)

    assert all(broker.running for broker in whole.brokers)
    assert process.returncode == 130
    assert "kills and 1 of brokers" in said
