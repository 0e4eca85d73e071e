"""A message's time is written as every reader of CloudEvents expects it, and read back as it was."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

from hypothesis import example, given, strategies as st

from reliamq.spi import rfc3339

zones = st.just(UTC) | st.integers(-23 * 60, 23 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))


@given(st.datetimes(timezones=zones))
@example(datetime(1, 1, 1, tzinfo=UTC))
@example(datetime(2026, 12, 1, 23, 59, 59, 7, tzinfo=UTC))
@example(datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC))
def test_a_time_is_written_as_the_standard_library_writes_it(time: datetime) -> None:
    assert rfc3339(time) == time.isoformat()
    assert datetime.fromisoformat(rfc3339(time)) == time
