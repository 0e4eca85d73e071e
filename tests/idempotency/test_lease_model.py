"""Any interleaving of holders, late holders and time: one holder, growing tokens, done stays done (I3)."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import anyio
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from reliamq.idempotency import MemoryLeaseStore
from reliamq.spi import IdempotencyStore, LeaseGrant, LeaseState, ProcessedId

NAMES = ("x", "y")
KEEP = 50.0
names = st.sampled_from(NAMES)
picks = st.integers(0, 50)
seconds = st.integers(0, 10)


class Leases(RuleBasedStateMachine):
    """Of any store.

    now: seconds, by the store's clock.
    grants: all that were ever given, by name; the last one is the only one that may still act.
    lost: names whose last grant nobody was told of, as the store knows.
    """

    store: IdempotencyStore

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.grants: dict[str, list[LeaseGrant]] = {name: [] for name in NAMES}
        self.until: dict[str, float] = dict.fromkeys(NAMES, 0.0)
        self.lost = set[str]()
        self.done: dict[str, bytes] = {}
        self.done_until: dict[str, float] = {}

    def call(self, function, *arguments, **named):  # type: ignore[no-untyped-def]
        """Await a method of the store."""
        raise NotImplementedError

    def identity(self, name: str) -> ProcessedId:
        return ProcessedId("t", "g", "h", name)

    def pick(self, name: str, number: int) -> tuple[LeaseGrant, bool] | None:
        """One of the grants, and whether it is the newest of an effect that is not done."""
        given = self.grants[name]
        if not given:
            return None
        grant = given[number % len(given)]
        return grant, grant is given[-1] and name not in self.done

    @rule(name=names, seconds=seconds)
    def acquire(self, name: str, seconds: int) -> None:
        answer = self.call(self.store.acquire, self.identity(name), lease=timedelta(seconds=seconds))
        if name in self.done:
            assert answer == LeaseState(done=True, result=self.done[name])
        elif self.until[name] > self.now and name not in self.lost:
            assert answer == LeaseState(done=False, busy_seconds=self.until[name] - self.now)
        else:
            assert isinstance(answer, LeaseGrant)
            self.granted(name, answer, seconds)
        self.lost.discard(name)

    def granted(self, name: str, grant: LeaseGrant, seconds: int) -> None:
        assert all(grant.token > older.token for older in self.grants[name])
        self.grants[name].append(grant)
        self.until[name] = self.now + seconds

    @rule(name=names, number=picks, seconds=seconds)
    def extend(self, name: str, number: int, seconds: int) -> None:
        if picked := self.pick(name, number):
            grant, newest = picked
            assert self.call(self.store.extend, grant, lease=timedelta(seconds=seconds)) is newest
            if newest:
                self.until[name] = self.now + seconds

    @rule(name=names, number=picks, result=st.binary(max_size=3))
    def complete(self, name: str, number: int, result: bytes) -> None:
        if picked := self.pick(name, number):
            grant, newest = picked
            keep = timedelta(seconds=KEEP)
            assert self.call(self.store.complete, grant, result=result, keep=keep) is newest
            if newest:
                self.done[name], self.done_until[name] = result, self.now + KEEP

    @rule(name=names, number=picks)
    def abandon(self, name: str, number: int) -> None:
        if picked := self.pick(name, number):
            grant, newest = picked
            self.call(self.store.abandon, grant)
            if newest:
                self.until[name] = 0.0

    @rule(seconds=st.integers(1, 30))
    def time_passes(self, seconds: int) -> None:
        self.now += seconds


class LeasesInMemory(Leases):
    def __init__(self) -> None:
        super().__init__()
        self.store: MemoryLeaseStore = MemoryLeaseStore(clock=lambda: self.now)

    def call(self, function: Any, *arguments: Any, **named: Any) -> Any:
        async def awaited() -> Any:
            return await function(*arguments, **named)

        return anyio.run(awaited)

    @rule()
    def clean(self) -> None:
        gone = [name for name, end in self.done_until.items() if end <= self.now]
        assert self.call(self.store.clean, limit=10) == len(gone)
        for name in gone:
            del self.done[name], self.done_until[name]
            self.grants[name], self.until[name] = [], 0.0

    @invariant()
    def memory_is_bounded(self) -> None:
        assert len(self.store._entries) <= len(NAMES)


TestLeases = LeasesInMemory.TestCase
TestLeases.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
