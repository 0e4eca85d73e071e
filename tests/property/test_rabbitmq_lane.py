"""A lane through crashes, closings, expiries, retries and renewals: C1 to C4, and what may be acknowledged."""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from hypothesis import given, settings, strategies as st

from reliamq.spi import Entry, Message, Room
from reliamq_rabbitmq.consuming.window import Held, LaneWindow
from reliamq_rabbitmq.wire.attempts import NONE, Attempts
from reliamq_rabbitmq.wire.channel import Received

PREFETCH = 8
LEASE = 10.0


@dataclass
class Truth:
    """What is true of one message.  out: it is handed out.  written: what of its attempts survives a crash."""

    message: Message
    redelivered: bool = False
    done: bool = False
    apart: bool = False
    failures: int = 0
    crashes: int = 0
    begun: bool = False


@dataclass
class Queue:
    """The broker's side: a quorum queue with one consumer, its ledger, and whether that has an open record."""

    ready: deque[Truth]
    returned: deque[Truth] = field(default_factory=deque)  # goes first (rabbit_fifo)
    unacknowledged: dict[int, Truth] = field(default_factory=dict)
    tags: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    ledger: dict[str, Attempts] = field(default_factory=dict)
    opened: bool = False

    def deliver(self, window: LaneWindow, now: float) -> None:
        while (self.returned or self.ready) and len(self.unacknowledged) < PREFETCH:
            truth, tag = (self.returned or self.ready).popleft(), next(self.tags)
            self.unacknowledged[tag] = truth
            if window.take_in(Received(tag, truth.redelivered, None, {}, b""), truth.message, NONE, now=now):
                self.acknowledge(*window.acks())

    def acknowledge(self, up_to: int | None, alone: Sequence[int]) -> None:
        tags = list(alone)
        if up_to is not None:
            assert up_to in self.unacknowledged, "the broker closes the channel for an unknown tag"
            tags = [tag for tag in self.unacknowledged if tag <= up_to] + tags
        for tag in tags:
            truth = self.unacknowledged.pop(tag)
            assert truth.done, "acknowledged unhandled"

    def requeue(self, tag: int) -> None:
        truth = self.unacknowledged.pop(tag)
        truth.redelivered = True
        self.returned.append(truth)

    def take_back_silently(self) -> None:
        """The channel goes on counting its tags; what is acknowledged by an old one is ignored."""
        for tag in list(self.unacknowledged):
            self.requeue(tag)

    def give_back_all(self) -> None:
        for tag in list(self.unacknowledged):
            self.requeue(tag)
        self.tags = itertools.count(1)


class Member:
    """A member that has the lane: takes, works, writes, until it crashes or closes."""

    def __init__(self, queue: Queue, truths: dict[str, Truth], now: float) -> None:
        self.queue, self.truths, self.now = queue, truths, now
        self.window = LaneWindow(dict(queue.ledger), suspicious=queue.opened, wall_ahead=1e9)
        self.hands = itertools.count(1)
        self.out: list[tuple[Entry[Held], int]] = []
        queue.opened = True
        queue.deliver(self.window, now)

    def take(self, limit: int) -> None:
        self.held()
        room = Room[Held](limit, 1 << 30, self.now + LEASE, self.hands)
        for entry in self.window.take(room, now=self.now):
            truth = self.truths[entry.content.message.id]
            assert not truth.done, "handed out after it was finished"
            assert all(entry is not other for other, _ in self.out), "handed out twice at once"
            assert (entry.failures, entry.crashes) == (truth.failures, truth.crashes)
            self.check_order(truth)
            self.out.append((entry, entry.hand))

    def check_order(self, truth: Truth) -> None:
        """All before it of its key are done, handed out, or have given way."""
        handed = {entry.content.message.id for entry, _ in self.out}
        for other in self.truths.values():
            if other is truth:
                break
            if other.message.key == truth.message.key and not other.apart and not truth.apart:
                assert other.done or other.message.id in handed, "out of order"

    def held(self) -> list[Entry[Held]]:
        self.out = [(entry, hand) for entry, hand in self.out if self.window.held(entry.position, hand)]
        return [entry for entry, _ in self.out]

    def act(self, lots: random.Random) -> None:
        held = self.held()
        if not held:
            self.take(lots.randint(1, 5))
            return
        entry = lots.choice(held)
        truth = self.truths[entry.content.message.id]
        match lots.choice(["ack", "ack", "ack", "retry", "release", "begin", "expire", "renew", "blip", "take"]):
            case "ack":
                truth.done = True
                self.window.finish(entry)
            case "retry":
                apart = truth.message.key is None or lots.random() < 0.3
                truth.apart, truth.failures, truth.begun = truth.apart or apart, truth.failures + 1, False
                self.window.retry(entry, due=self.now + lots.choice([0.0, 3.0]), apart=apart, counts=True)
                self.unbegin(truth)
            case "release":
                truth.begun = False
                self.window.release(entry)
                self.unbegin(truth)
            case "begin":
                self.window.begin(entry)
                truth.begun = True
            case "expire":
                self.now += LEASE + 1
                for one in held:
                    mine = self.truths[one.content.message.id]
                    mine.crashes, mine.begun = mine.crashes + mine.begun, False
                self.window.expire(self.now)
            case "renew":
                self.write()
                self.window.renew()
                self.queue.give_back_all()
            case "blip":  # the broker takes everything back, and gives it to the same consumer, telling nobody
                if self.window.caught_up:
                    self.queue.take_back_silently()
            case "take":
                self.take(lots.randint(1, 5))
        self.write()
        self.queue.deliver(self.window, self.now)
        self.now += 1.0

    def unbegin(self, truth: Truth) -> None:
        """What its key had handed out behind it came back too, and a start of it counts no more."""
        still = {entry.content.message.id for entry in self.held()}
        for other in self.truths.values():
            if other.begun and other.message.id not in still:
                other.begun = False

    def write(self) -> None:
        changed, ended = self.window.changes()
        self.queue.ledger |= changed
        up_to, tags = self.window.acks()
        self.queue.acknowledge(up_to, tags)
        for name in ended:
            self.queue.ledger.pop(name, None)

    def crash(self) -> None:
        for truth in self.truths.values():
            truth.crashes, truth.begun = truth.crashes + truth.begun, False
        self.queue.give_back_all()

    def close(self) -> None:
        self.window.release_all()
        self.write()
        self.queue.ledger |= self.window.suspects()
        self.queue.opened = self.window.owes
        for truth in self.truths.values():
            truth.begun = False
        self.queue.give_back_all()


def message(number: int, key: bytes | None) -> Message:
    return Message("t", b"body", f"{number}", "Thing", "tests", datetime.now(UTC), key=key)


@settings(max_examples=300, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(20, 120))
def test_whatever_happens_every_message_is_finished_once_in_its_keys_order_with_its_attempts(
    lots: random.Random, steps: int
) -> None:
    truths = {f"{number}": Truth(message(number, lots.choice([b"a", b"b", b"c", None]))) for number in range(30)}
    queue, now = Queue(deque(truths.values())), 1000.0
    member = Member(queue, truths, now)
    for _ in range(steps):
        fate = lots.random()
        if fate < 0.04:
            member.crash()
        elif fate < 0.08:
            member.close()
        else:
            member.act(lots)
            continue
        member = Member(queue, truths, member.now + 100)
    finish_all(member, truths)

    assert all(truth.done for truth in truths.values())
    assert not queue.unacknowledged
    assert not queue.ready
    assert not queue.returned


def finish_all(member: Member, truths: dict[str, Truth]) -> None:
    for _ in range(10 * len(truths)):
        member.now += 10
        member.take(5)
        for entry in member.held():
            truths[entry.content.message.id].done = True
            member.window.finish(entry)
        member.write()
        member.queue.deliver(member.window, member.now)
