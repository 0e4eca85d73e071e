"""The long forms on Redis and Valkey: many seeds, many messages, and primaries that die.  ``make soak`` runs them."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest

from reliamq_redis.settings import read_settings
from tests.brokers.application import Service, wait_until
from tests.brokers.conftest import on_redis
from tests.brokers.test_consuming import handle_slowly, stop_cleanly, storm
from tests.proving.test_prove import BROKEN, prove
from tests.proving.test_prove_cluster import NONE_WRONG, kill_broker
from tests.redis.steps import declare
from tests.redis.test_publishing import confirm_and_kill
from tests.servers.redis import RedisServers
from tests.soak.test_long_forms import Note, note

pytestmark = [pytest.mark.slow, pytest.mark.anyio, pytest.mark.timeout(7200)]
KINDS = ("redis", "valkey")
IDLE_SECONDS, MOST_OF_A_CORE = 30.0, 0.01


@pytest.fixture(params=[pytest.param(kind, marks=pytest.mark.xdist_group(kind)) for kind in KINDS])
def servers(request: pytest.FixtureRequest) -> RedisServers:
    """Whole, and made so again afterwards."""
    found = request.getfixturevalue(f"whole_{request.param}")
    assert isinstance(found, RedisServers)
    return found


@pytest.mark.parametrize("seed", range(1, 11))
def test_twenty_thousand_messages_while_everything_is_killed(
    servers: RedisServers, seed: int, record_property: Note
) -> None:
    """A process every five seconds and the primary every five: never two servers at once, but the only primary."""
    code, counters = prove(
        *("--broker", servers.url, "--messages", "20000", "--seed", str(seed), "--kill-every", "5"),
        *("--kill-broker", kill_broker(servers), "--kill-broker-every", "5", "--deadline", "600"),
        timeout=3600,
    )
    note(record_property, counters)

    assert {name: counters[name] for name in NONE_WRONG} == NONE_WRONG, counters
    assert code == 0, counters
    assert counters["confirmed"] == counters["committed"] == counters["effects"] == 19_000
    assert counters["broker_kills"] >= 3
    assert counters["kills"] >= 5


@pytest.mark.parametrize("seed", range(1, 4))
@pytest.mark.parametrize(("rule", "counter"), BROKEN)
def test_a_broken_rule_is_caught_whatever_the_seed(
    servers: RedisServers, rule: str, counter: str, seed: int, record_property: Note
) -> None:
    code, counters = prove(
        *("--broker", servers.url, "--break", rule, "--messages", "1000"),
        *("--deadline", "20", "--seed", str(seed)),
        timeout=600,
    )
    note(record_property, counters)

    assert code == 1
    assert counters[counter] > 0


async def test_twenty_thousand_confirmed_messages_and_both_servers_killed(servers: RedisServers) -> None:
    settings = read_settings(servers.url, {})
    await confirm_and_kill(servers, settings, await declare(settings, "g"), count=20_000)


async def test_a_handler_of_ninety_seconds(servers: RedisServers, tmp_path: Path) -> None:
    await handle_slowly(on_redis(servers), tmp_path, f"soak-{time.time_ns()}", seconds=90)


async def test_a_hundred_clean_stops_under_load(servers: RedisServers, tmp_path: Path) -> None:
    await stop_cleanly(on_redis(servers), tmp_path, f"soak-{time.time_ns()}", stops=100)


async def test_a_storm_of_a_minute(servers: RedisServers, tmp_path: Path) -> None:
    await storm(on_redis(servers), tmp_path, f"soak-{time.time_ns()}", seconds=60, messages=6_000)


def test_a_worker_that_has_nothing_to_do_costs_less_than_a_hundredth_of_a_core(
    servers: RedisServers, tmp_path: Path
) -> None:
    service = Service(on_redis(servers), tmp_path, f"soak-{time.time_ns()}")
    service.publish({"number": 1, "account": "a"})
    with service.worker() as worker:
        wait_until(lambda: service.lines("done") == [1])
        time.sleep(5)
        process = psutil.Process(worker.pid)
        before = sum(process.cpu_times()[:2])
        time.sleep(IDLE_SECONDS)
        assert sum(process.cpu_times()[:2]) - before < MOST_OF_A_CORE * IDLE_SECONDS
