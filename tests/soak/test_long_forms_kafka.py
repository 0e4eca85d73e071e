"""The long forms on Kafka: many seeds, many messages, and brokers that die.  ``make soak`` runs them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.brokers.conftest import on_kafka
from tests.brokers.test_consuming import handle_slowly, stop_cleanly, storm
from tests.proving.test_prove import BROKEN, prove
from tests.proving.test_prove_cluster import NONE_WRONG, kill_broker, url
from tests.servers.kafka import KafkaCluster
from tests.soak.test_long_forms import Note, judge_backlog, note

pytestmark = [pytest.mark.slow, pytest.mark.anyio, pytest.mark.xdist_group("kafka"), pytest.mark.timeout(7200)]


@pytest.mark.parametrize("seed", range(1, 11))
def test_twenty_thousand_messages_while_everything_is_killed(
    whole: KafkaCluster, seed: int, record_property: Note
) -> None:
    """A process and a broker every five seconds; never two brokers at once."""
    code, counters = prove(
        *("--broker", url(whole), "--messages", "20000", "--seed", str(seed), "--kill-every", "5"),
        *("--kill-broker", kill_broker(whole), "--kill-broker-every", "5", "--deadline", "600"),
        timeout=3600,
    )
    note(record_property, counters)

    assert {name: counters[name] for name in NONE_WRONG} == NONE_WRONG, counters
    assert code == 0, counters
    assert counters["confirmed"] == counters["committed"] == counters["effects"] == 19_000
    assert counters["broker_kills"] >= 3
    assert counters["kills"] >= 8


@pytest.mark.parametrize("seed", range(1, 4))
@pytest.mark.parametrize(("rule", "counter"), BROKEN)
def test_a_broken_rule_is_caught_whatever_the_seed(
    whole: KafkaCluster, rule: str, counter: str, seed: int, record_property: Note
) -> None:
    code, counters = prove(
        *("--broker", url(whole), "--break", rule, "--messages", "1000", "--deadline", "20", "--seed", str(seed)),
        timeout=600,
    )
    note(record_property, counters)

    assert code == 1
    assert counters[counter] > 0


async def test_a_handler_of_ninety_seconds_with_a_poll_interval_of_thirty(kafka: KafkaCluster, tmp_path: Path) -> None:
    await handle_slowly(on_kafka(kafka), tmp_path, f"soak-{time.time_ns()}", seconds=90, poll_interval_seconds=30)


async def test_a_hundred_clean_stops_under_load(kafka: KafkaCluster, tmp_path: Path) -> None:
    await stop_cleanly(on_kafka(kafka), tmp_path, f"soak-{time.time_ns()}", stops=100)


async def test_a_storm_of_a_minute(kafka: KafkaCluster, tmp_path: Path) -> None:
    await storm(on_kafka(kafka), tmp_path, f"soak-{time.time_ns()}", seconds=60, messages=6_000)


def test_a_backlog_of_a_million_costs_no_memory(kafka: KafkaCluster, record_property: Note) -> None:
    judge_backlog("benchmarks.kafka_backlog", "1000000", record_property=record_property)
