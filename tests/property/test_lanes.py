"""Lanes keep a key's order through retries, and never hold up another key for it (C3, C6)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from hypothesis import given, settings, strategies as st

from reliamq.consuming.lanes import Lane, Lanes
from reliamq.spi import Delivery, Message

keys = st.one_of(st.none(), st.binary(max_size=3))


def delivery(key: bytes | None, number: int) -> Delivery:
    message = Message("t", b"", f"id-{number}", "T", "tests", datetime.now(UTC), key=key)
    return Delivery(message, "g", str(number), number)


@given(count=st.integers(1, 9), chosen=st.lists(keys, max_size=40))
def test_a_key_has_one_lane_and_what_has_none_is_spread(count: int, chosen: Sequence[bytes | None]) -> None:
    lanes = Lanes(count)
    homes: dict[bytes, Lane] = {}
    for number, key in enumerate(chosen):
        one = delivery(key, number)
        lane = lanes.lane_of(one)
        assert lane in lanes.lanes
        if key is not None:
            assert homes.setdefault(key, lane) is lane
        lane.queue.append((one, 1))

    assert {one.position for one in lanes.queued()} == {str(number) for number in range(len(chosen))}
    assert len(lanes.clear()) == len(chosen)
    assert not lanes.queued()


@given(count=st.integers(1, 9), messages=st.integers(0, 60))
def test_messages_without_a_key_fill_lanes_evenly(count: int, messages: int) -> None:
    lanes = Lanes(count)
    for number in range(messages):
        one = delivery(None, number)
        lanes.lane_of(one).queue.append((one, 1))

    lengths = [len(lane.queue) for lane in lanes.lanes]
    assert max(lengths) - min(lengths) <= 1


Held = tuple[bytes, int, int]  # key, number, which receive gave it


@dataclass
class Broker:
    """What a broker promises of keys: in order, and after a retry what the member holds of the key comes again too."""

    queues: dict[bytes, list[int]]
    held: set[Held] = field(default_factory=set)

    def receive(self, limit: int, generation: int) -> list[Held]:
        taken = [(key, number, generation) for key, queue in self.queues.items() for number in queue][:limit]
        for key, number, _ in taken:
            self.queues[key].remove(number)
        self.held.update(taken)
        return taken

    def release(self, one: Held) -> None:
        """It comes again in its old place; too late, and nothing happens (C12)."""
        if one in self.held:
            self.held.remove(one)
            self.queues[one[0]] = sorted([*self.queues[one[0]], one[1]])

    def retry(self, one: Held) -> None:
        for other in [other for other in self.held if other[0] == one[0] and other[1] >= one[1]]:
            self.release(other)


@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    fails=st.sets(st.tuples(st.integers(0, 2), st.integers(0, 5))),
    lots=st.randoms(use_true_random=True),
)
@settings(deadline=None, max_examples=300)
def test_whatever_fails_and_whenever_the_broker_hears_of_it_a_keys_messages_run_in_order(
    sizes: list[int], fails: set[tuple[int, int]], lots: random.Random
) -> None:
    broker = Broker({bytes([key]): list(range(size)) for key, size in enumerate(sizes)})
    done: dict[bytes, list[int]] = {key: [] for key in broker.queues}
    failing = {(bytes([key]), number) for key, number in fails}
    lane, generation = Lane(), 0
    retries: list[Held] = []  # decided here, not yet known to the broker
    for _ in range(2_000):
        if not broker.held and not any(broker.queues.values()):
            break
        action = lots.choice(["receive", "work", "settle"])
        if action == "receive":
            generation += 1
            for key, number, _ in broker.receive(lots.randint(1, 8), generation):
                lane.queue.append((delivery(key, number), generation))
        elif action == "settle" and retries:
            one = retries.pop(0)
            broker.retry(one)
            lane.lift(one[0], generation)
        elif action == "work" and lane.queue:
            _work(lane, broker, failing, retries, done)
        if not lane.queue:
            lane.forget(generation)

    assert done == {bytes([key]): list(range(size)) for key, size in enumerate(sizes)}


def _work(
    lane: Lane,
    broker: Broker,
    failing: set[tuple[bytes, int]],
    retries: list[Held],
    done: dict[bytes, list[int]],
) -> None:
    given_, generation = lane.queue.popleft()
    key, number = given_.message.key or b"", int(given_.position)
    one = (key, number, generation)
    if not lane.admits(given_, generation):
        broker.release(one)
    elif (key, number) in failing:
        failing.discard((key, number))
        lane.hold(key)
        retries.append(one)
    else:
        assert number == len(done[key]), "ran before an earlier message of its key was finished, or twice"
        done[key].append(number)
        broker.held.discard(one)


@given(held=st.sets(st.integers(0, 5), min_size=1), other=st.integers(6, 9))
def test_a_key_that_waits_holds_up_no_other_and_is_forgotten_in_the_end(held: set[int], other: int) -> None:
    lane = Lane()
    for number in held:
        lane.hold(bytes([number]))

    assert lane.admits(delivery(bytes([other]), 0), 1)
    assert lane.admits(delivery(None, 0), 1)
    assert not any(lane.admits(delivery(bytes([number]), 0), 99) for number in held)  # until the broker knows

    for number in held:
        lane.lift(bytes([number]), 1)
    lane.forget(2)
    assert not lane._waiting_keys
