"""The long forms: many seeds, many messages.  ``make soak`` runs them, by hand before a release."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping

import pytest

from tests.proving.test_prove import BROKEN, prove

pytestmark = pytest.mark.slow

Note = Callable[[str, object], None]
"""What pytest's ``record_property`` is: the table at the end shows what is noted."""
NOTED = ("effects", "lost", "doubled", "reordered", "phantom", "redelivered", "kills", "broker_kills")


def note(record_property: Note, counters: Mapping[str, object]) -> None:
    """Have the counters of a proof in the table."""
    for name in NOTED:
        if name in counters:
            record_property(name, counters[name])


@pytest.mark.parametrize("seed", range(1, 21))
def test_twenty_thousand_messages_under_fire(seed: int, record_property: Note) -> None:
    code, counters = prove(
        *("--messages", "20000", "--kill-every", "0.5", "--seed", str(seed), "--deadline", "120"), timeout=1800
    )
    note(record_property, counters)

    assert code == 0, counters
    assert counters["committed"] == counters["effects"] == 19_000
    assert counters["kills"] > 100


@pytest.mark.parametrize("seed", range(1, 11))
@pytest.mark.parametrize(("rule", "counter"), BROKEN)
def test_a_broken_rule_is_caught_whatever_the_seed(rule: str, counter: str, seed: int, record_property: Note) -> None:
    code, counters = prove("--break", rule, "--messages", "1000", "--deadline", "8", "--seed", str(seed), timeout=300)
    note(record_property, counters)

    assert code == 1
    assert counters[counter] > 0


def test_a_backlog_of_a_million_costs_no_memory(record_property: Note) -> None:
    """Its rates are not judged: they are a benchmark's business, `make bench`."""
    judge_backlog("benchmarks.embedded", "50000", "1000000", record_property=record_property)


def judge_backlog(benchmark: str, *arguments: str, record_property: Note) -> None:
    """Run a benchmark that says "memory BEFORE → AFTER MiB" of a worker."""
    done = subprocess.run(
        [sys.executable, "-m", benchmark, *arguments], capture_output=True, text=True, timeout=3600, check=True
    )

    memory = done.stdout.partition("memory ")[2].split()
    before, after = int(memory[0]), int(memory[2])
    record_property("said", " ".join(done.stdout.split()))
    assert after < before * 1.5 + 50, done.stdout
