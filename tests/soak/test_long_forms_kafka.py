"""The long forms on Kafka: many seeds, many messages, and brokers that die.  ``make soak`` runs them."""

from __future__ import annotations

import pytest

from tests.proving.test_prove import BROKEN, prove
from tests.proving.test_prove_kafka import KILL_BROKER, NONE_WRONG
from tests.servers.kafka import KafkaCluster

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("kafka"), pytest.mark.timeout(7200)]


@pytest.mark.parametrize("seed", range(1, 11))
def test_twenty_thousand_messages_while_everything_is_killed(whole: KafkaCluster, seed: int) -> None:
    code, counters = prove(
        *("--broker", whole.url, "--messages", "20000", "--seed", str(seed), "--kill-every", "2"),
        *("--kill-broker", KILL_BROKER, "--kill-broker-every", "5", "--deadline", "600"),
        timeout=3600,
    )

    assert {name: counters[name] for name in NONE_WRONG} == NONE_WRONG, counters
    assert code == 0, counters
    assert counters["confirmed"] == counters["committed"] == counters["effects"] == 19_000
    assert counters["broker_kills"] > 3
    assert counters["kills"] > 30


@pytest.mark.parametrize("seed", range(1, 4))
@pytest.mark.parametrize(("rule", "counter"), BROKEN)
def test_a_broken_rule_is_caught_whatever_the_seed(whole: KafkaCluster, rule: str, counter: str, seed: int) -> None:
    code, counters = prove(
        *("--broker", whole.url, "--break", rule, "--messages", "1000", "--deadline", "20", "--seed", str(seed)),
        timeout=600,
    )

    assert code == 1
    assert counters[counter] > 0
