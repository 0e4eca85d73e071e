"""Lanes keep a key's order through retries, and never hold up another key for it (C3, C6)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from hypothesis import given, settings, strategies as st

from reliamq.consuming.lanes import Lanes
from reliamq.spi import Delivery, Message

keys = st.one_of(st.none(), st.binary(max_size=3))


def delivery(key: bytes | None, number: int) -> Delivery:
    message = Message("t", b"", f"id-{number}", "T", "tests", datetime.now(UTC), key=key)
    return Delivery(message, "g", str(number), number)


@given(chosen=st.lists(keys, max_size=40), lanes=st.integers(1, 5), lots=st.randoms(use_true_random=True))
def test_a_key_is_in_one_lane_at_a_time_and_no_lane_idles_while_a_key_is_ready(
    chosen: Sequence[bytes | None], lanes: int, lots: random.Random
) -> None:
    queue = Lanes()
    for number, key in enumerate(chosen):
        queue.add(delivery(key, number), 1)
    running: list[Delivery] = []
    ran: list[Delivery] = []
    while len(ran) < len(chosen):
        while len(running) < lanes and (taken := queue.take(0.0)) is not None:
            running.append(taken[0])
        busy = [one.message.key for one in running if one.message.key is not None]
        assert len(busy) == len(set(busy)), "a key ran in two lanes"
        left = {chosen[n] for n in range(len(chosen))} if len(running) < lanes else set()
        idle_for = [key for key in left if key is not None and key not in busy]
        assert all(one.message.key not in idle_for for one in behind(chosen, running, ran)), "a lane idled"
        done = running.pop(lots.randrange(len(running)))
        queue.ends(done)
        ran.append(done)

    for key in {key for key in chosen if key is not None}:
        numbers = [int(one.position) for one in ran if one.message.key == key]
        assert numbers == sorted(numbers)
    assert queue.take(0.0) is None
    assert not queue._lines


def behind(chosen: Sequence[bytes | None], running: list[Delivery], ran: list[Delivery]) -> list[Delivery]:
    """What neither runs nor ran."""
    gone = {int(one.position) for one in (*running, *ran)}
    return [delivery(key, number) for number, key in enumerate(chosen) if number not in gone]


@given(chosen=st.lists(keys, max_size=40), started=st.integers(0, 5))
def test_clearing_takes_out_all_that_has_not_started(chosen: Sequence[bytes | None], started: int) -> None:
    queue = Lanes()
    for number, key in enumerate(chosen):
        queue.add(delivery(key, number), 1)
    running = [taken[0] for _ in range(started) if (taken := queue.take(0.0)) is not None]

    left = queue.clear()

    assert {int(one.position) for one in (*running, *left)} == set(range(len(chosen)))
    for one in running:
        queue.ends(one)
    assert queue.take(0.0) is None


@given(chosen=st.lists(keys, min_size=1, max_size=40))
def test_what_waits_behind_a_stuck_message_of_its_key_can_be_taken_out(chosen: Sequence[bytes | None]) -> None:
    queue = Lanes()
    for number, key in enumerate(chosen):
        queue.add(delivery(key, number), 1)
    stuck, quick = queue.take(1.0), queue.take(5.0)
    assert stuck is not None

    taken = queue.take_behind_stuck(before=2.0)

    key = stuck[0].message.key
    expected = [n for n, other in enumerate(chosen) if other == key and other is not None][1:]
    assert [int(one.position) for one in taken] == expected
    assert quick is None or quick[0] not in taken


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
    """A member with two lanes, whose settlements reach the broker later."""

    def __init__(self, broker: Broker, failing: set[tuple[bytes, int]]) -> None:
        self.broker, self.failing = broker, failing
        self.lanes, self.generation = Lanes(), 0
        self.running: list[tuple[Delivery, int]] = []
        self.settlements: list[tuple[str, Held]] = []
        self.arriving: list[Held] | None = None
        self.done: dict[bytes, list[int]] = {key: [] for key in broker.queues}

    def receive(self, limit: int) -> None:
        """Ask the broker, unless it is to hear first of something that goes back."""
        if self.arriving is None and all(kind == "ack" for kind, _ in self.settlements):
            self.lanes.forget(self.generation)
            self.generation += 1
            self.arriving = self.broker.receive(limit, self.generation)

    def arrive(self) -> None:
        """The answer, some time later."""
        for one in self.arriving or ():
            given = delivery(one[0], one[1])
            if self.lanes.refuses(given, self.generation):
                self._give_back("release", one)
            else:
                self.lanes.add(given, self.generation)
        self.arriving = None

    def _give_back(self, kind: str, one: Held) -> None:
        self.lanes.hold(one[0])
        self.settlements.append((kind, one))

    def settle(self) -> None:
        if not self.settlements:
            return
        kind, one = self.settlements.pop(0)
        if kind == "ack":
            self.broker.acknowledge(one)
        else:
            self.broker.give_back(one)
            self.lanes.lift(one[0], self.generation)

    def start(self) -> None:
        """A lane takes the next; what may be stale goes back."""
        taken = self.lanes.take(0.0) if len(self.running) < 2 else None
        if taken is None:
            return
        if self.lanes.admits(*taken):
            self.running.append(taken)
            return
        self._give_back("release", self._held(taken))
        self.lanes.ends(taken[0])

    def end(self, place: int) -> None:
        """A handler returns or fails."""
        if not self.running:
            return
        taken = self.running.pop(place % len(self.running))
        key, number, _ = one = self._held(taken)
        if (key, number) in self.failing:
            self.failing.discard((key, number))
            self._give_back("retry", one)
        else:
            assert number <= len(self.done[key]), "ran before an earlier message of its key was finished"
            if number == len(self.done[key]):  # else it came again, and its processed id says so
                self.done[key].append(number)
            self.settlements.append(("ack", one))
        self.lanes.ends(taken[0])

    def _held(self, taken: tuple[Delivery, int]) -> Held:
        return (taken[0].message.key or b"", int(taken[0].position), taken[1])


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
        kinds = ["receive", "arrive", "start", "end", "settle", "expire"]
        action = lots.choices(kinds, [4, 4, 6, 6, 4, 1 if step < 200 else 0])[0]
        if action == "receive":
            worker.receive(lots.randint(1, 8))
        elif action == "expire" and broker.held:
            broker.give_back(lots.choice(sorted(broker.held)))
        elif action == "end":
            worker.end(lots.randint(0, 1))
        elif action in ("arrive", "start", "settle"):
            getattr(worker, action)()

    assert worker.done == {bytes([key]): list(range(size)) for key, size in enumerate(sizes)}


@given(held=st.sets(st.integers(0, 5), min_size=1), other=st.integers(6, 9))
def test_a_key_that_waits_holds_up_no_other_and_is_forgotten_in_the_end(held: set[int], other: int) -> None:
    lanes = Lanes()
    for number in held:
        lanes.hold(bytes([number]))

    assert lanes.admits(delivery(bytes([other]), 0), 1)
    assert lanes.admits(delivery(None, 0), 1)
    assert not any(lanes.admits(delivery(bytes([number]), 0), 99) for number in held)  # until the broker knows

    for number in held:
        lanes.lift(bytes([number]), 1)
    lanes.forget(2)
    assert not lanes._marks
