"""Order, leases and attempts against a model: any number of keys and members, in a time that the test advances.

The model knows what may be handed out, not what must be handed out next; that nothing is forgotten is checked whenever
a member goes away empty-handed, and at the end.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from reliamq.embedded.backend import EmbeddedBackend
from reliamq.spi import Ack, Delivery, Message, Release, Retry, Settlement, Subscription

from .conftest import Clock, declare, message, publish, receive, topic

T = TypeVar("T")
LEASE = 30.0
KEYS = ["a", "a", "a", "b", "b", None]
_names = itertools.count()

Fate = Callable[[Delivery], Settlement] | None


def _retry(seconds: int, *, keep_order: bool = True, counts: bool = True) -> Fate:
    return lambda delivery: Retry(
        delivery, timedelta(seconds=seconds), keep_order=keep_order, counts=counts, reason="because"
    )


FATES = st.lists(
    st.sampled_from(
        [
            None,
            Ack,
            Ack,
            Release,
            _retry(0),
            _retry(5),
            _retry(40, counts=False),
            _retry(0, keep_order=False),
            _retry(5, keep_order=False),
            _retry(40, keep_order=False, counts=False),
        ]
    ),
    min_size=5,
    max_size=5,
)
MASK = st.lists(st.booleans(), min_size=5, max_size=5)


@dataclass
class Tracked:
    """What the model knows about one message in the group."""

    message: Message
    position: int
    done: bool = False
    holder: int | None = None
    delivery: Delivery | None = None
    until: float = 0.0
    due: float = 0.0
    apart: bool = False
    begun: bool = False
    failures: int = 0
    crashes: int = 0
    redelivered: bool = False

    def back(self, due: float = 0.0) -> None:
        self.holder, self.delivery, self.begun, self.due = None, None, False, due

    def lost(self) -> None:
        self.crashes += self.begun
        self.redelivered = True
        self.back()


class Broker(RuleBasedStateMachine):
    """Members come and go, crash and are slow, and a key's messages stay in order."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.runner = asyncio.Runner()
        self.stack = AsyncExitStack()
        self.tracked: dict[str, Tracked] = {}
        self.last = 0
        self.members: dict[int, tuple[Subscription, AsyncExitStack]] = {}
        self.seen: list[tuple[int, Delivery]] = []
        self.settled: set[tuple[int, Any]] = set()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    @initialize()
    def start(self) -> None:
        self.backend = EmbeddedBackend(f"memory://model-{next(_names)}", clock=self.clock)
        self.run(declare(self.backend, topic("orders", "g", "other")))
        self.publisher = self.run(self.stack.enter_async_context(self.backend.publisher()))
        for number in range(2):
            self.enter(number)

    def enter(self, number: int) -> None:
        stack = AsyncExitStack()
        context = self.backend.subscription("orders", "g", lease=timedelta(seconds=LEASE))
        self.members[number] = (self.run(stack.enter_async_context(context)), stack)

    # --- what may happen -------------------------------------------------------------------------------------------

    @rule(keys=st.lists(st.sampled_from(KEYS), min_size=1, max_size=8))
    def publish(self, keys: list[str | None]) -> None:
        messages = [message("m", key) for key in keys]
        self.run(publish(self.publisher, *messages))
        for one in messages:
            self.last += 1
            self.tracked[one.id] = Tracked(one, self.last)

    @rule(seconds=st.sampled_from([3.0, 9.0, 18.0, 31.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule(member=st.integers(0, 1), limit=st.integers(1, 6))
    def receive(self, member: int, limit: int) -> None:
        self.recover_expired()
        deliveries = self.run(receive(self.members[member][0], limit))
        assert len(deliveries) <= limit
        for delivery in deliveries:
            self.check_handed_out(member, delivery)
        if not deliveries:
            assert self.available() == []

    @rule(limit=st.integers(1, 4))
    def both_receive(self, limit: int) -> None:
        for member in (0, 1):
            self.receive(member, limit)

    def deliveries(self, member: int, stale: bool) -> list[Delivery]:
        """What a member was given: what it holds, or also what it has no longer."""
        return [
            delivery
            for owner, delivery in self.seen
            if owner == member and (stale or self.tracked[delivery.message.id].delivery is delivery)
        ]

    @rule(member=st.integers(0, 1), fates=FATES)
    def settle_what_is_held(self, member: int, fates: list[Fate]) -> None:
        """Each delivery gets its fate; those without one are kept."""
        held = self.deliveries(member, stale=False)
        self.settle(member, [fate(delivery) for fate, delivery in zip(fates, held, strict=False) if fate])

    @rule(member=st.integers(0, 1), fates=FATES)
    def settle_late_or_twice(self, member: int, fates: list[Fate]) -> None:
        newest = {delivery.message.id: delivery for delivery in self.deliveries(member, stale=True)}
        self.settle(member, [fate(one) for fate, one in zip(fates, newest.values(), strict=False) if fate])

    def settle(self, member: int, settlements: list[Settlement]) -> None:
        late = self.run(self.members[member][0].settle(settlements))
        assert list(late) == self.expect_settled(member, settlements)

    @rule(member=st.integers(0, 1), stale=st.booleans(), chosen=MASK)
    def begin(self, member: int, stale: bool, chosen: list[bool]) -> None:
        deliveries = list(itertools.compress(self.deliveries(member, stale), chosen))
        held = [one for one in deliveries if self.tracked[one.message.id].delivery is one]
        assert list(self.run(self.members[member][0].begin(deliveries))) == held
        for delivery in held:
            self.tracked[delivery.message.id].begun = True

    @rule(member=st.integers(0, 1), stale=st.booleans(), chosen=MASK)
    def extend(self, member: int, stale: bool, chosen: list[bool]) -> None:
        deliveries = list(itertools.compress(self.deliveries(member, stale), chosen))
        held = [one for one in deliveries if self.tracked[one.message.id].delivery is one]
        assert list(self.run(self.members[member][0].extend(deliveries))) == held
        for delivery in held:
            self.tracked[delivery.message.id].until = self.clock.now + LEASE

    @rule(member=st.integers(0, 1))
    def leave_and_come_back(self, member: int) -> None:
        self.run(self.members[member][1].aclose())
        for tracked in self.tracked.values():
            if tracked.holder == member:
                tracked.back()
        self.seen = [(owner, delivery) for owner, delivery in self.seen if owner != member]
        self.settled = {(owner, receipt) for owner, receipt in self.settled if owner != member}
        self.enter(member)

    # --- the model -------------------------------------------------------------------------------------------------

    def chain_of(self, tracked: Tracked) -> list[Tracked]:
        """The others of its key that are not finished."""
        if tracked.message.key is None:
            return []
        return [
            other
            for other in self.tracked.values()
            if other is not tracked and other.message.key == tracked.message.key and not other.done
        ]

    def recover_expired(self) -> None:
        expired = [one for one in self.tracked.values() if one.holder is not None and one.until <= self.clock.now]
        for tracked in expired:
            for other in self.chain_of(tracked):
                if other.holder is not None and other.position > tracked.position:
                    other.lost()
        for tracked in expired:
            if tracked.holder is not None:
                tracked.lost()

    def check_handed_out(self, member: int, delivery: Delivery) -> None:
        tracked = self.tracked[delivery.message.id]
        assert delivery.message == tracked.message
        assert not tracked.done
        assert tracked.holder is None
        assert tracked.due <= self.clock.now
        assert int(delivery.position) == tracked.position
        assert (delivery.failures, delivery.crashes, delivery.redelivered) == (
            tracked.failures,
            tracked.crashes,
            tracked.redelivered,
        )
        for other in self.chain_of(tracked):
            if other.holder is not None:
                assert other.holder == member, "two members hold one key"
            elif not other.apart:
                assert other.position > tracked.position, "handed out before an earlier one of its key"
        tracked.holder, tracked.delivery, tracked.apart = member, delivery, False
        tracked.until = self.clock.now + LEASE
        self.seen.append((member, delivery))

    def available(self) -> list[Tracked]:
        """What somebody must get now, because nothing stands in its way."""
        return [
            tracked
            for tracked in self.tracked.values()
            if not tracked.done
            and tracked.holder is None
            and tracked.due <= self.clock.now
            and all(
                other.holder is None
                and (other.position > tracked.position or (other.apart and other.due > self.clock.now))
                for other in self.chain_of(tracked)
            )
        ]

    def expect_settled(self, member: int, settlements: Sequence[Settlement]) -> list[Settlement]:
        late: list[Settlement] = []
        back: list[Tracked] = []
        for settlement in settlements:
            tracked = self.tracked[settlement.delivery.message.id]
            if tracked.delivery is not settlement.delivery:
                if (member, settlement.delivery.receipt) not in self.settled:
                    late.append(settlement)
                continue
            self.settled.add((member, settlement.delivery.receipt))
            match settlement:
                case Ack():
                    tracked.done = True
                    tracked.back()
                case Release():
                    tracked.back()
                    back.append(tracked)
                case Retry(_, delay, keep_order, counts):
                    tracked.back(self.clock.now + delay.total_seconds())
                    tracked.failures += counts
                    if keep_order or tracked.message.key is None:
                        back.append(tracked)
                    else:
                        self.last += 1
                        tracked.position, tracked.apart = self.last, True
        for tracked in back:
            for other in self.chain_of(tracked):
                if other.holder is not None and other.position > tracked.position:
                    other.back()
        return late

    def teardown(self) -> None:
        if not self.members:
            return
        for _ in range(200):
            if all(tracked.done for tracked in self.tracked.values()):
                break
            self.clock.advance(50)
            self.receive(0, 100)
            held = [one.delivery for one in self.tracked.values() if one.delivery is not None]
            acks = [Ack(delivery) for delivery in held]
            assert self.run(self.members[0][0].settle(acks)) == []
            self.expect_settled(0, acks)
        assert all(tracked.done for tracked in self.tracked.values()), "some were never handed out again"
        for _, stack in self.members.values():
            self.run(stack.aclose())
        self.run(self.stack.aclose())
        self.runner.close()


TestTheBrokerKeepsOrderLeasesAndAttempts = Broker.TestCase
TestTheBrokerKeepsOrderLeasesAndAttempts.settings = settings(
    max_examples=100, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)
