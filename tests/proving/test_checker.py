"""The checker finds every planted fault, and nothing where there is none."""

from __future__ import annotations

import random

from hypothesis import given, strategies as st

from reliamq.proving.checker import Committed, Effected, Facts, check

KEYS = ("ada", "bob", "eve")


@st.composite
def runs(draw: st.DrawFn) -> tuple[list[Committed], list[Effected]]:
    """A run without a fault: every key's effects in its order, keys mixed."""
    counts = {key: draw(st.integers(1, 6)) for key in KEYS}
    committed = [Committed(f"{key}-{n}", key, n, n) for key, count in counts.items() for n in range(1, count + 1)]
    turns = draw(st.permutations([one.key for one in committed]))
    waiting = {key: [one for one in committed if one.key == key] for key in KEYS}
    effects = [waiting[key].pop(0) for key in turns]
    return committed, [Effected(one.message_id, one.key, one.number, one.amount) for one in effects]


def balances(effects: list[Effected]) -> dict[str, int]:
    return {key: sum(one.amount for one in effects if one.key == key) for key in KEYS}


@given(runs())
def test_a_run_without_a_fault_holds(run: tuple[list[Committed], list[Effected]]) -> None:
    committed, effects = run

    assert check(Facts(committed, effects, balances=balances(effects))).holds


@given(runs(), st.randoms())
def test_a_missing_effect_is_lost(run: tuple[list[Committed], list[Effected]], choose: random.Random) -> None:
    committed, effects = run
    gone = choose.choice(effects)
    left = [one for one in effects if one is not gone]
    verdict = check(Facts(committed, left, confirmed=[gone.message_id], balances=balances(left)))

    assert (verdict.lost, verdict.false_confirms) == (1, 1)
    assert verdict.examples["lost"] == [gone.message_id]
    assert verdict.unbalanced == 1


@given(runs(), st.randoms())
def test_a_repeated_effect_is_doubled(run: tuple[list[Committed], list[Effected]], choose: random.Random) -> None:
    committed, effects = run
    effects = [*effects, choose.choice(effects)]
    verdict = check(Facts(committed, effects, balances=balances(effects)))

    assert (verdict.lost, verdict.doubled, verdict.reordered, verdict.unbalanced) == (0, 1, 0, 1)


@given(runs())
def test_an_effect_of_a_rolled_back_transaction_is_a_phantom(run: tuple[list[Committed], list[Effected]]) -> None:
    committed, effects = run
    verdict = check(Facts(committed, [*effects, Effected("ghost", "ada", 99)]))

    assert (verdict.phantom, verdict.lost) == (1, 0)
    assert not verdict.holds


def test_an_effect_before_an_earlier_one_of_its_key_is_reordered() -> None:
    committed = [Committed(str(n), "ada", n) for n in (1, 2, 3)]
    effects = [Effected(str(n), "ada", n) for n in (2, 1, 3)]

    assert check(Facts(committed, effects)).reordered == 1


def test_a_dead_letter_is_not_lost_and_redeliveries_are_counted() -> None:
    committed = [Committed("a", "ada", 1, 5), Committed("b", "ada", 2, 7)]
    facts = Facts(
        committed, [Effected("b", "ada", 2, 7)], delivered=["a", "b", "b"], dead_letters=["a"], balances={"ada": 7}
    )
    verdict = check(facts)

    assert verdict.holds
    assert (verdict.redelivered, verdict.dead_letters) == (1, 1)


def test_what_was_in_flight_at_an_interruption_is_not_lost_and_not_missing_from_a_balance() -> None:
    committed = [Committed(str(n), "ada", n, n) for n in (1, 2, 3)]
    facts = Facts(committed, [Effected("1", "ada", 1, 1)], confirmed=["1", "2"], balances={"ada": 1}, interrupted=True)
    verdict = check(facts)

    assert verdict.holds
    assert (verdict.lost, verdict.in_flight) == (0, 2)


def test_what_a_later_one_of_its_key_overtook_is_lost_also_in_a_run_that_was_interrupted() -> None:
    committed = [Committed(str(n), "ada", n) for n in (1, 2, 3)] + [Committed("b", "bob", 1)]
    facts = Facts(committed, [Effected("2", "ada", 2), Effected("2", "ada", 2)], interrupted=True)
    verdict = check(facts)

    assert verdict.examples["lost"] == ["1"]
    assert (verdict.lost, verdict.doubled, verdict.in_flight) == (1, 1, 2)
