"""A Kafka partition's window: nothing is lost or skipped, keys keep their order and attempts are counted, whoever
crashes when (C1, C2, C3, C4, C6)."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from hypothesis import given, settings, strategies as st

from reliamq.spi import Entry, Room
from reliamq_kafka.consuming.window import PartitionWindow, Times
from reliamq_kafka.wire.progress import MAX_CHARACTERS, MAX_MARKS, Attempts, Progress, decode, encode

LEASE = 30.0


@dataclass(frozen=True)
class Stored:
    offset: int
    key: bytes | None
    value: bytes | None = b"body"
    headers: Sequence[tuple[str, bytes]] = ()
    timestamp: int = 0


offsets = st.integers(0, 100_000)
marks = st.builds(
    Attempts, st.integers(0, 30), st.integers(0, 9), st.booleans(), st.booleans(), st.sampled_from([0, 17_000_000_001])
)


@given(offset=offsets, ahead=st.sets(st.integers(0, 3_000)), marked=st.dictionaries(st.integers(0, 3_000), marks))
def test_what_is_committed_is_read_as_it_was(offset: int, ahead: set[int], marked: dict[int, Attempts]) -> None:
    """C4"""
    progress = Progress(
        offset=offset,
        known=offset + 3_000,
        limit=offset + 4_000,
        unfinished=sorted(offset + one for one in ahead),
        attempts={offset + place: one for place, one in marked.items()},
    )

    read = decode(offset, encode(progress))

    assert read == progress


@given(lots=st.randoms(use_true_random=True), spread=st.integers(1, 60))
@settings(deadline=None, max_examples=30)
def test_what_is_committed_always_fits_and_never_says_that_more_is_finished_than_is(
    lots: random.Random, spread: int
) -> None:
    """C1 C4"""
    unfinished = sorted(lots.sample(range(4_000 * spread), 4_000))
    attempts = {
        place: Attempts(lots.randint(0, 40), lots.randint(0, 9), lots.random() < 0.5, True, lots.randint(0, 10**10))
        for place in lots.sample(unfinished, MAX_MARKS)
    }
    progress = Progress(0, 4_000 * spread, 4_000 * spread, unfinished, attempts)

    text = encode(progress)

    assert len(text) <= MAX_CHARACTERS
    read = decode(0, text)
    assert read is not None
    assert [one for one in unfinished if one < read.known] == list(read.unfinished)
    assert {place: (one.failures, one.crashes) for place, one in read.attempts.items()} == {
        place: (one.failures, one.crashes) for place, one in attempts.items()
    }


def test_a_text_that_is_none_of_ours_is_told_apart() -> None:
    for text in ("", "reset by hand", "z", "z!", "[2]", "[1,0,0,0,[1],[]]", '{"a":1}', "[1,0,0,0,[],[1,2]]"):
        assert decode(5, text) is None, text


@dataclass
class Fate:
    """What is true of one record."""

    record: Stored
    done: bool = False
    failures: int = 0
    crashes: int = 0
    apart: bool = False
    due: float = 0.0


@dataclass
class Partition:
    """A log, its committed progress, and the members that follow one another on it."""

    log: list[Fate] = field(default_factory=list)
    committed: tuple[int, str] = (0, "")
    now: float = 1_000.0
    hands: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    written: list[Fate] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.restart()

    def times(self) -> Times:
        return Times(self.now, self.now + 500_000.0)

    def restart(self) -> None:
        """Another member begins where the committed progress says."""
        offset, text = self.committed
        progress = decode(offset, text) or Progress(offset, offset, offset)
        self.window = PartitionWindow("g", progress, self.times())
        self.out: dict[int, tuple[Entry, int]] = {}
        self.begun: set[int] = set()

    def publish(self, key: bytes | None) -> None:
        offset = self.log[-1].record.offset + 1 + (len(self.log) % 7 == 6) if self.log else 0
        self.log.append(Fate(Stored(offset, key)))

    def fetch(self, count: int) -> None:
        self.window.fetched([one.record for one in self.log if one.record.offset >= self.window.position][:count])

    def commit(self, *, closing: bool = False) -> None:
        progress = self.window.progress(self.times(), closing=closing)
        self.committed = progress.offset, encode(progress)
        self.written = [replace(one) for one in self.log]
        self.window.limit = progress.limit

    def fate(self, offset: int) -> Fate:
        (found,) = [one for one in self.log if one.record.offset == offset]
        return found

    def take(self, limit: int) -> None:
        for entry in self.window.take(Room(limit, 10**9, self.now + LEASE, self.hands), now=self.now):
            fate = self.fate(entry.position)
            assert entry.position not in self.out, "handed out twice at once"
            assert fate.due <= self.now + 0.2
            if not entry.apart and fate.record.key is not None:
                for other in self.log:
                    if other.record.key == fate.record.key and other.record.offset < entry.position and not other.done:
                        assert other.record.offset in self.out or other.apart, "went before an earlier one of its key"
            assert entry.failures >= fate.failures or entry.redelivered
            self.out[entry.position] = (entry, entry.hand)


KEYS = [b"a", b"b", b"c", None]


@given(lots=st.randoms(use_true_random=True), steps=st.integers(5, 120))
@settings(deadline=None, max_examples=300)
def test_whatever_happens_every_record_is_finished_in_its_keys_order(lots: random.Random, steps: int) -> None:
    """C1 C2 C3 C4 C6"""
    part = Partition()
    for _ in range(steps):
        action = lots.choices(
            ["publish", "fetch", "take", "ack", "retry", "release", "begin", "expire", "commit", "crash", "close"],
            [6, 6, 6, 6, 3, 2, 2, 1, 5, 0.6, 0.6],
        )[0]
        act(part, action, lots)
        part.now += lots.choice([0.0, 0.1, 3.0])

    for _ in range(len(part.log) * 4 + 10):
        part.now += 40.0
        part.window.expire(part.now)
        part.out.clear()
        part.fetch(1_000)
        part.commit()
        part.take(1_000)
        for entry, hand in list(part.out.values()):
            if part.window.held(entry.position, hand):
                part.fate(entry.position).done = True
                part.window.finish(entry)
        part.out.clear()
    assert all(one.done for one in part.log)
    part.commit(closing=True)
    end = part.log[-1].record.offset + 1 if part.log else 0
    assert part.committed[0] == end


def act(part: Partition, action: str, lots: random.Random) -> None:
    window = part.window
    held = [entry for entry, hand in part.out.values() if window.held(entry.position, hand)]
    part.out = {entry.position: (entry, entry.hand) for entry in held}
    one = lots.choice(held) if held else None
    if action == "publish":
        for _ in range(lots.randint(1, 6)):
            part.publish(lots.choice(KEYS))
    elif action == "fetch":
        part.fetch(lots.randint(1, 9))
    elif action == "take":
        if window.needs_limit:
            part.commit()
        part.take(lots.randint(1, 6))
    elif action == "commit":
        part.commit()
    elif action == "expire":
        part.now += LEASE
        for entry in window.expire(part.now):
            part.fate(entry.position).crashes += entry.position in part.begun
        part.begun.clear()
    elif action == "crash":
        part.restart()
        newer = [Fate(one.record) for one in part.log[len(part.written) :]]
        part.log = [replace(one) for one in (*part.written, *newer)]  # what was not committed is forgotten
    elif action == "close":
        part.commit(closing=True)
        part.restart()
    elif one is not None:
        settle(part, action, one, lots)


def settle(part: Partition, action: str, one: Entry, lots: random.Random) -> None:
    window, fate = part.window, part.fate(one.position)
    if action == "ack":
        fate.done = True
        window.finish(one)
    elif action == "retry":
        fate.apart = fate.apart or one.content.key is None or lots.random() < 0.4
        fate.failures += 1
        fate.due = part.now + lots.choice([0.0, 2.0])
        window.retry(one, due=fate.due, apart=fate.apart, counts=True)
    elif action == "release":
        window.release(one)
    elif action == "begin":
        window.begin(one)
        part.begun.add(one.position)


def test_attempts_survive_crashes_and_closings() -> None:
    """C4"""
    part = Partition()
    for key in (b"a", b"b", b"c", b"d"):
        part.publish(key)
    part.fetch(10)
    part.commit()
    part.take(10)
    failed, started, done = (part.out[n][0] for n in (0, 1, 3))
    part.window.retry(failed, due=part.now + 5, apart=False, counts=True)
    part.window.begin(started)
    part.window.finish(done)
    part.fate(3).done = True
    part.commit()

    part.restart()  # killed
    part.fetch(10)
    part.commit()
    part.take(10)

    def known() -> dict[int, tuple[int, int, bool]]:
        return {n: (one.failures, one.crashes, one.redelivered) for n, (one, _) in part.out.items()}

    assert known() == {1: (0, 1, True), 2: (0, 0, True)}  # 0 waits, 3 is finished
    part.now += 6
    part.take(10)
    assert known()[0] == (1, 0, False)

    part.commit(closing=True)
    part.restart()
    part.fetch(10)
    part.commit()
    part.take(10)
    assert known() == {0: (1, 0, True), 1: (0, 1, True), 2: (0, 0, True)}  # 2 was suspected: so is all before it


def test_a_clean_end_leaves_nothing_suspected() -> None:
    """C8"""
    part = Partition()
    for _ in range(5):
        part.publish(b"k")
    part.fetch(10)
    part.commit()
    part.take(3)
    part.window.finish(part.out[0][0])
    part.log[0].done = True
    part.commit(closing=True)

    part.restart()
    part.fetch(10)
    part.commit()
    part.take(10)

    assert [(n, one.redelivered, one.failures) for n, (one, _) in part.out.items()] == [
        (n, False, 0) for n in (1, 2, 3, 4)
    ]


def test_what_is_fetched_and_held_is_bounded() -> None:
    """C10"""
    part = Partition()
    part.log = [Fate(Stored(n, b"k", b"x" * 1_000)) for n in range(10_000)]
    fetched = 0
    while part.window.wants_more() and fetched < 10_000:
        part.fetch(500)
        fetched += 500
    assert fetched < 5_000
    part.commit()
    part.take(100)
    assert not part.window.wants_more(), "it waits until a good part is free"


def test_hand_outs_wait_for_the_limit_to_be_committed() -> None:
    """C4"""
    part = Partition()
    for _ in range(3):
        part.publish(b"k")
    part.fetch(3)
    part.take(10)
    assert part.out == {}
    assert part.window.needs_limit
    part.commit()
    part.take(10)
    assert not part.window.needs_limit
    assert len(part.out) == 3


def returned(offset: int, failures: int) -> Stored:
    """A record that came back from a long wait."""
    facts = [("reliamq_group", b"g"), ("reliamq_failures", b"%d" % failures), ("reliamq_crashes", b"0")]
    return Stored(offset, b"%d" % offset, headers=facts)


def test_any_number_of_records_that_come_back_with_attempts_goes_out_and_fits() -> None:
    """C4 C6"""
    part = Partition()
    part.log = [Fate(returned(n, n % 7)) for n in range(3_000)]
    part.fetch(3_000)
    finished = 0
    for _ in range(20):
        part.commit()
        assert len(part.committed[1]) <= MAX_CHARACTERS
        part.take(500)
        for entry, _ in part.out.values():
            assert entry.failures == entry.position % 7
            part.fate(entry.position).done = True
            part.window.finish(entry)
            finished += 1
        part.out.clear()
    assert finished == 3_000


def test_a_partition_whose_attempts_fill_what_can_be_written_down_goes_on_after_a_restart() -> None:
    """C4"""
    part = Partition()
    for number in range(1_000):
        part.publish(b"%d" % number)
    part.fetch(1_000)
    part.commit()
    part.take(500)
    for entry, _ in list(part.out.values()):
        part.window.retry(entry, due=part.now + 1, apart=False, counts=True)
    part.commit()
    part.restart()
    part.now += 5
    part.fetch(1_000)
    part.commit()

    part.take(1_000)

    assert len(part.out) >= MAX_MARKS


@given(apart=st.booleans())
def test_who_had_a_message_after_its_retry_is_suspected_when_they_die(apart: bool) -> None:
    """C4"""
    part = Partition()
    part.publish(b"k")
    part.fetch(1)
    part.commit()
    part.take(1)
    (entry, _) = part.out[0]
    part.window.retry(entry, due=part.now + 1, apart=apart, counts=True)
    part.commit()
    part.now += 2
    part.out.clear()
    part.take(1)  # nothing is committed by handing out

    part.restart()
    part.fetch(1)
    part.commit()
    part.take(1)

    (entry, _) = part.out[0]
    assert (entry.failures, entry.redelivered) == (1, True)
