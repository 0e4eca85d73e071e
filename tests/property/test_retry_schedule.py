"""Delays grow up to their ceiling, within their jitter, and add up to what the window must exceed (C6, I5)."""

from __future__ import annotations

from datetime import timedelta

import pytest
from hypothesis import given, strategies as st

from reliamq.handlers import Backoff
from reliamq.spi import ConfigurationError

TICK = timedelta(microseconds=2)  # what a float of seconds and a timedelta may differ by
short = st.timedeltas(min_value=timedelta(0), max_value=timedelta(minutes=10))


@st.composite
def policies(draw: st.DrawFn) -> Backoff:
    first = draw(short)
    return Backoff(
        attempts=draw(st.integers(1, 200)),
        first=first,
        factor=draw(st.one_of(st.floats(1, 1e30), st.floats(1, 3), st.integers(1, 10))),
        ceiling=first + draw(st.timedeltas(min_value=timedelta(0), max_value=timedelta(days=30))),
        jitter=draw(st.floats(0, 1)),
    )


@given(policy=policies(), failures=st.integers(1, 5_000))
def test_a_delay_is_between_its_jitters_bounds_and_below_the_ceiling(policy: Backoff, failures: int) -> None:
    whole = Backoff(attempts=1, first=policy.first, factor=policy.factor, ceiling=policy.ceiling, jitter=0)
    full = whole.delay(failures)

    delay = policy.delay(failures)

    assert full * (1 - policy.jitter) - TICK <= delay <= full + TICK
    assert full <= policy.ceiling + TICK


@given(policy=policies(), failures=st.integers(1, 5_000))
def test_delays_without_jitter_never_shrink_and_start_with_the_first(policy: Backoff, failures: int) -> None:
    even = Backoff(first=policy.first, factor=policy.factor, ceiling=policy.ceiling, jitter=0)

    assert even.delay(1) == policy.first
    assert even.delay(failures) <= even.delay(failures + 1)


@given(first=st.timedeltas(min_value=timedelta(seconds=1), max_value=timedelta(minutes=1)), factor=st.floats(1.01, 10))
def test_every_growing_schedule_reaches_its_ceiling(first: timedelta, factor: float) -> None:
    policy = Backoff(first=first, factor=factor, ceiling=first * 100, jitter=0)

    assert policy.delay(1_000) == policy.ceiling


@given(policy=policies())
def test_the_longest_time_is_not_below_any_sum_of_delays(policy: Backoff) -> None:
    delays = [policy.delay(failures) for failures in range(1, policy.attempts)]

    assert sum(delays, timedelta(0)) <= policy.longest() + TICK * policy.attempts


@given(own=policies(), other=policies())
def test_the_longest_time_counts_policies_for_exceptions_and_the_most_specific_one_is_chosen(
    own: Backoff, other: Backoff
) -> None:
    policy = Backoff(attempts=own.attempts, first=own.first, ceiling=own.ceiling, on={OSError: other})

    assert policy.longest() >= other.longest()
    assert policy.policy_for(ConnectionError()) is other
    assert policy.policy_for(ValueError()) is policy


@given(delay=short, limit=short)
def test_a_key_waits_for_delays_up_to_its_limit(delay: timedelta, limit: timedelta) -> None:
    assert Backoff(keep_order_up_to=limit).keeps_order(delay) is (delay <= limit)


@pytest.mark.parametrize(
    "wrong",
    [
        {"attempts": 0},
        {"first": timedelta(seconds=-1)},
        {"factor": 0.5},
        {"ceiling": timedelta(milliseconds=1)},
        {"jitter": 1.5},
    ],
)
def test_a_policy_out_of_range_is_refused_by_name(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        Backoff(**wrong)  # type: ignore[arg-type]
