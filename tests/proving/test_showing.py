"""What a proof says in the end: whole lines, and numbers that add up."""

from __future__ import annotations

import io
import json
from dataclasses import replace

from rich.console import Console

from reliamq.proving.checker import Committed, Effected, Facts, check
from reliamq.proving.command import _exit_code
from reliamq.proving.proof import Result
from reliamq.proving.showing import print_result, result_json

WHOLE = check(Facts([Committed("a", "ada", 1)], [Effected("a", "ada", 1)], confirmed=["a"], delivered=["a"]))
RESULT = Result(WHOLE, 2, 1, kills=(), crashes=(), seconds=1.0, finished=True, interrupted=False, latencies=())
CUT_OFF = replace(RESULT, interrupted=True, verdict=check(Facts([Committed("a", "ada", 1)], [], interrupted=True)))


def said(result: Result) -> list[str]:
    console = Console(file=io.StringIO(), width=40)
    print_result(result, console)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined,no-any-return]


def test_the_summary_is_one_line_however_narrow_the_window_is() -> None:
    assert said(RESULT) == [
        "1 committed · 1 confirmed · 1 effects · 0 redelivered · 0 kills · 1.0 s",
        "lost 0 · doubled 0 · reordered 0",
    ]


def test_messages_are_what_was_asked_for_with_those_rolled_back_beside_the_committed_ones() -> None:
    counters = json.loads(result_json(RESULT))

    assert (counters["messages"], counters["committed"], counters["rolled_back"], counters["unplaced"]) == (2, 1, 1, 0)


def test_a_crash_or_an_order_that_was_not_placed_is_no_pass() -> None:
    crashed = replace(RESULT, crashes=["worker-0 ended with 1: [boom]"] * 3)
    short = replace(RESULT, messages=5)

    assert "a process ended by itself: worker-0 ended with 1: [boom] (3 times)" in said(crashed)
    assert "3 of 5 planned orders were not placed" in said(short)
    assert [_exit_code(one) for one in (RESULT, crashed, short)] == [0, 1, 1]


def test_an_interruption_says_how_many_were_in_flight_and_has_an_exit_code_of_its_own() -> None:
    assert "interrupted: this is the ledger so far; 1 in flight, not judged" in said(CUT_OFF)
    assert json.loads(result_json(CUT_OFF))["in_flight"] == 1
    assert _exit_code(CUT_OFF) == 130


def test_what_is_wrong_already_is_an_accusation_also_when_interrupted() -> None:
    doubled = check(Facts([Committed("a", "ada", 1)], [Effected("a", "ada", 1)] * 2, interrupted=True))

    assert _exit_code(replace(CUT_OFF, verdict=doubled)) == 1
