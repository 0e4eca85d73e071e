"""Any delay is cut into a bounded number of waits, and none ends early (C6)."""

from __future__ import annotations

import math
from datetime import timedelta

from hypothesis import given, strategies as st

from reliamq_kafka.delays.delayed import (
    PARTITIONS,
    Delayed,
    attempts_of,
    due_at,
    first_wait,
    group_of,
    original,
    returning,
)
from reliamq_kafka.wire.progress import Attempts

DAY = 24 * 3600
delays = st.timedeltas(timedelta(seconds=0.1), timedelta(days=30)) | st.timedeltas(
    timedelta(seconds=0.1), timedelta(minutes=2)
)
lateness = st.one_of(st.just(0.0), st.floats(0, 1.5), st.floats(0, DAY))
names = st.text(max_size=20)
headers = st.lists(st.tuples(st.sampled_from(["a", "ce_id", "reliamq_header_x", "reliamq_left"]), st.binary()))


@given(delay=delays, late=st.lists(lateness, min_size=30, max_size=30), partitions=st.integers(14, 24))
def test_every_delay_ends_after_few_waits_and_never_early(delay: timedelta, late: list[float], partitions: int) -> None:
    """C6"""
    delayed = first_wait("t", "g", Attempts(), delay)
    longest = 1 << (min(partitions, PARTITIONS) - 1)
    most = math.ceil(delay.total_seconds() / longest) + PARTITIONS
    elapsed, waits, unpunctual = 0.0, 0, 0.0
    while delayed.left or not waits:
        number, delayed = delayed.into(partitions)
        assert number < min(partitions, PARTITIONS)
        behind = late[waits] if waits < len(late) else 0.0
        delayed = delayed.late(behind)
        elapsed += (1 << number) + behind
        unpunctual += behind
        waits += 1
        assert waits <= most

    assert elapsed >= delay.total_seconds() - 1e-6
    assert elapsed <= delay.total_seconds() + 1 + unpunctual + 1e-6


@given(delay=delays)
def test_a_punctual_delay_takes_the_longest_waits_first_and_is_late_by_less_than_a_second(delay: timedelta) -> None:
    """C6"""
    delayed, waits = first_wait("t", "g", Attempts(), delay), list[int]()
    while delayed.left:
        number, delayed = delayed.into(PARTITIONS)
        waits.append(number)

    assert waits == sorted(waits, reverse=True)
    assert len(set(waits[:-1])) >= len([one for one in waits[:-1] if one < PARTITIONS - 1])
    total = sum(1 << number for number in waits)
    assert 0 <= total - delay.total_seconds() < 1
    assert len(waits) <= 5 + PARTITIONS


@given(seconds=st.integers(1, 30 * DAY), late=st.floats(0, 100 * DAY))
def test_what_is_very_late_is_taken_off_but_never_more(seconds: int, late: float) -> None:
    left = Delayed("t", "g", 0, 0, seconds).late(late).left

    assert left == (seconds if late < 60 else max(0, seconds - math.floor(late)))


def test_a_wait_is_over_its_partitions_seconds_after_the_brokers_time() -> None:
    assert due_at(0, 1_700_000_000_500) == 1_700_000_001.5
    assert due_at(19, 1_000) == 1 + 524_288


@given(own=headers, topic=names, group=names, failures=st.integers(0, 99), crashes=st.integers(0, 9), delay=delays)
def test_headers_come_back_as_they_were_with_the_attempts(
    own: list[tuple[str, bytes]], topic: str, group: str, failures: int, crashes: int, delay: timedelta
) -> None:
    """C4 C6"""
    delayed = first_wait(topic, group, Attempts(failures, crashes), delay)
    stored = [*original(own), *delayed.headers()]

    assert Delayed.read(stored) == delayed
    back = returning(stored, delayed)
    mine = [(name, data) for name, data in own if name != "reliamq_left"]
    assert back[: len(mine)] == mine
    assert ("ce_onlygroup", group.encode()) in back
    assert attempts_of(back, group) == Attempts(failures, crashes)
    assert attempts_of(back, group + "x") == Attempts()
    assert group_of(back) == group
    assert original(back) == [*mine, ("ce_onlygroup", group.encode())]


def test_a_record_that_never_waited_brings_nothing() -> None:
    assert attempts_of([("ce_id", b"1")], "g") == Attempts()
    assert attempts_of([("reliamq_group", b"g"), ("reliamq_failures", b"many")], "g") == Attempts()
    assert group_of([("ce_id", b"1")]) is None
