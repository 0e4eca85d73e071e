"""The long forms on RabbitMQ: many seeds, many messages, and nodes that die.  ``make soak`` runs them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from reliamq_rabbitmq.settings import read_settings
from tests.brokers.conftest import on_rabbitmq
from tests.brokers.test_consuming import handle_slowly, stop_cleanly, storm
from tests.proving.test_prove import BROKEN, prove
from tests.proving.test_prove_cluster import NONE_WRONG, kill_broker, url
from tests.rabbitmq.test_publishing import confirm_and_kill_all
from tests.servers.rabbitmq import RabbitmqCluster
from tests.soak.test_long_forms import Note, note

pytestmark = [pytest.mark.slow, pytest.mark.anyio, pytest.mark.xdist_group("rabbitmq"), pytest.mark.timeout(7200)]


@pytest.mark.parametrize("seed", range(1, 11))
def test_twenty_thousand_messages_while_everything_is_killed(
    whole_rabbitmq: RabbitmqCluster, seed: int, record_property: Note
) -> None:
    """A process every five seconds and a node every eight; never two nodes at once."""
    code, counters = prove(
        *("--broker", url(whole_rabbitmq), "--messages", "20000", "--seed", str(seed), "--kill-every", "5"),
        *("--kill-broker", kill_broker(whole_rabbitmq), "--kill-broker-every", "8", "--deadline", "600"),
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
    whole_rabbitmq: RabbitmqCluster, rule: str, counter: str, seed: int, record_property: Note
) -> None:
    code, counters = prove(
        *("--broker", url(whole_rabbitmq), "--break", rule, "--messages", "1000"),
        *("--deadline", "20", "--seed", str(seed)),
        timeout=600,
    )
    note(record_property, counters)

    assert code == 1
    assert counters[counter] > 0


async def test_twenty_thousand_confirmed_messages_and_all_nodes_killed(whole_rabbitmq: RabbitmqCluster) -> None:
    settings = read_settings(whole_rabbitmq.url, {"lanes": 4})
    await confirm_and_kill_all(whole_rabbitmq, settings, count=20_000)


async def test_a_handler_of_ninety_seconds(rabbitmq: RabbitmqCluster, tmp_path: Path) -> None:
    await handle_slowly(on_rabbitmq(rabbitmq), tmp_path, f"soak-{time.time_ns()}", seconds=90)


async def test_a_hundred_clean_stops_under_load(rabbitmq: RabbitmqCluster, tmp_path: Path) -> None:
    await stop_cleanly(on_rabbitmq(rabbitmq), tmp_path, f"soak-{time.time_ns()}", stops=100)


async def test_a_storm_of_a_minute(rabbitmq: RabbitmqCluster, tmp_path: Path) -> None:
    await storm(on_rabbitmq(rabbitmq), tmp_path, f"soak-{time.time_ns()}", seconds=60, messages=6_000)
