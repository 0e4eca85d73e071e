"""The long forms: many seeds, many messages.  ``make soak`` runs them, by hand before a release."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.proving.test_prove import BROKEN, prove

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("seed", range(1, 21))
def test_twenty_thousand_messages_under_fire(seed: int) -> None:
    code, counters = prove(
        *("--messages", "20000", "--kill-every", "0.5", "--seed", str(seed), "--deadline", "120"), timeout=1800
    )

    assert code == 0, counters
    assert counters["committed"] == counters["effects"] == 19_000
    assert counters["kills"] > 100


@pytest.mark.parametrize("seed", range(1, 11))
@pytest.mark.parametrize(("rule", "counter"), BROKEN)
def test_a_broken_rule_is_caught_whatever_the_seed(rule: str, counter: str, seed: int) -> None:
    code, counters = prove("--break", rule, "--messages", "1000", "--deadline", "8", "--seed", str(seed), timeout=300)

    assert code == 1
    assert counters[counter] > 0


def test_a_backlog_of_a_million_costs_no_memory() -> None:
    """Its rates are not judged: they are a benchmark's business, `make bench`."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.embedded", "50000", "1000000"],
        capture_output=True,
        text=True,
        timeout=1800,
        check=True,
    )

    memory = done.stdout.partition("memory ")[2].split()
    before, after = int(memory[0]), int(memory[2])
    assert after < before * 1.5 + 50, done.stdout
