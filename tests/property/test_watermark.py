"""The watermark never passes unfinished work, never goes back, and ends where all is finished (C1, C12)."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from reliamq.spi import Watermark

gaps = st.lists(st.integers(1, 5), min_size=1, max_size=40)


@given(gaps=gaps, data=st.data())
def test_the_mark_is_always_the_last_position_below_which_all_is_finished(gaps: list[int], data: st.DataObject) -> None:
    positions = [sum(gaps[: count + 1]) for count in range(len(gaps))]
    mark, delivered, finished, settled = Watermark(), [], set(), None
    to_deliver = list(positions)
    while to_deliver or set(delivered) - finished:
        open_now = [one for one in delivered if one not in finished]
        if to_deliver and (not open_now or data.draw(st.booleans())):
            delivered.append(to_deliver.pop(0))
            mark.deliver(delivered[-1])
        else:
            done = data.draw(st.sampled_from(open_now))
            finished.add(done)
            mark.finish(done)
        expected = _prefix(delivered, finished)
        moved = mark.advance()
        assert moved == (expected if expected != settled else None)
        settled = expected
        assert len(mark) == len([one for one in delivered if settled is None or one > settled])
    assert settled == positions[-1]


def _prefix(delivered: list[int], finished: set[int]) -> int | None:
    last = None
    for one in delivered:
        if one not in finished:
            return last
        last = one
    return last


@given(gaps=gaps, strangers=st.lists(st.integers(-10, 300)))
def test_finishing_twice_or_what_was_never_delivered_changes_nothing(gaps: list[int], strangers: list[int]) -> None:
    positions = [sum(gaps[: count + 1]) for count in range(len(gaps))]
    mark = Watermark()
    for one in positions:
        mark.deliver(one)
    for one in strangers:
        if one not in positions:
            mark.finish(one)
    assert mark.advance() is None

    for one in positions + positions:
        mark.finish(one)

    assert mark.advance() == positions[-1]
    assert mark.advance() is None
    assert len(mark) == 0


@given(first=st.integers(), step=st.integers(0, 100), finished=st.booleans())
def test_positions_that_do_not_grow_are_refused_also_when_nothing_is_open(
    first: int, step: int, finished: bool
) -> None:
    mark = Watermark()
    mark.deliver(first)
    if finished:
        mark.finish(first)
        assert mark.advance() == first

    with pytest.raises(ValueError, match="delivered after"):
        mark.deliver(first - step)
