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
    """What a broker promises of keys: in order; with one that comes back, what the member holds after it comes too."""

    queues: dict[bytes, list[int]]
    held: set[Held] = field(default_factory=set)

    def receive(self, limit: int, generation: int) -> list[Held]:
        taken = [(key, number, generation) for key, queue in self.queues.items() for number in queue][:limit]
        for key, number, _ in taken:
            self.queues[key].remove(number)
        self.held.update(taken)
        return taken

    def acknowledge(self, one: Held) -> None:
        """It is finished; too late, and nothing happens (C12)."""
        self.held.discard(one)

    def give_back(self, one: Held) -> None:
        """It and the key's later ones come again in their old places; too late, and nothing happens."""
        if one in self.held:
            for other in [other for other in self.held if other[0] == one[0] and other[1] >= one[1]]:
                self.held.remove(other)
                self.queues[one[0]] = sorted([*self.queues[one[0]], other[1]])


class Worker:
    """A member with one lane, whose settlements reach the broker later."""

    def __init__(self, broker: Broker, failing: set[tuple[bytes, int]]) -> None:
        self.broker, self.failing = broker, failing
        self.lane, self.generation = Lane(), 0
        self.settlements: list[tuple[str, Held]] = []
        self.arriving: list[Held] | None = None
        self.done: dict[bytes, list[int]] = {key: [] for key in broker.queues}

    def receive(self, limit: int) -> None:
        """Ask the broker, unless it is to hear first of something that goes back."""
        if self.arriving is None and all(kind == "ack" for kind, _ in self.settlements):
            self.generation += 1
            self.arriving = self.broker.receive(limit, self.generation)

    def arrive(self) -> None:
        """The answer, some time later."""
        for one in self.arriving or ():
            given = delivery(one[0], one[1])
            if self.lane.refuses(given, self.generation):
                self._give_back("release", one)
            else:
                self.lane.queue.append((given, self.generation))
        self.arriving = None

    def _give_back(self, kind: str, one: Held) -> None:
        self.lane.hold(one[0])
        self.settlements.append((kind, one))

    def settle(self) -> None:
        if not self.settlements:
            return
        kind, one = self.settlements.pop(0)
        if kind == "ack":
            self.broker.acknowledge(one)
        else:
            self.broker.give_back(one)
            self.lane.lift(one[0], self.generation)

    def work(self) -> None:
        if not self.lane.queue:
            return
        given_, generation = self.lane.queue.popleft()
        key, number = given_.message.key or b"", int(given_.position)
        one = (key, number, generation)
        if not self.lane.admits(given_, generation):
            self._give_back("release", one)
        elif (key, number) in self.failing:
            self.failing.discard((key, number))
            self._give_back("retry", one)
        else:
            assert number <= len(self.done[key]), "ran before an earlier message of its key was finished"
            if number == len(self.done[key]):  # else it came again, and its processed id says so
                self.done[key].append(number)
            self.settlements.append(("ack", one))


@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    fails=st.sets(st.tuples(st.integers(0, 2), st.integers(0, 5))),
    lots=st.randoms(use_true_random=True),
)
@settings(deadline=None, max_examples=500)
def test_whatever_fails_or_expires_and_whenever_the_broker_hears_of_it_a_keys_messages_run_in_order(
    sizes: list[int], fails: set[tuple[int, int]], lots: random.Random
) -> None:
    broker = Broker({bytes([key]): list(range(size)) for key, size in enumerate(sizes)})
    worker = Worker(broker, {(bytes([key]), number) for key, number in fails})
    for step in range(4_000):
        if not broker.held and not any(broker.queues.values()):
            break
        action = lots.choices(["receive", "arrive", "work", "settle", "expire"], [4, 4, 6, 4, 1 if step < 200 else 0])[
            0
        ]
        if action == "receive":
            worker.receive(lots.randint(1, 8))
        elif action == "arrive":
            worker.arrive()
        elif action == "settle":
            worker.settle()
        elif action == "expire" and broker.held:
            broker.give_back(lots.choice(sorted(broker.held)))
        elif action == "work":
            worker.work()
        if not worker.lane.queue:
            worker.lane.forget(worker.generation)

    assert worker.done == {bytes([key]): list(range(size)) for key, size in enumerate(sizes)}


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
    assert not lane._marks
