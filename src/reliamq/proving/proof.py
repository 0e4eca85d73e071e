"""One proof, from the first process to the verdict.

Starts the fleet, kills at the plan's pace, waits until all that was committed has taken effect or the deadline passes,
stops, and gathers the facts.  Showing it is left to ``command`` and ``report``.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import FrameType

import anyio
from sqlalchemy import Engine, func, select
from sqlalchemy.orm import Session

from reliamq.database import READING, open_engine, open_sync_engine
from reliamq.proving.brokers import BrokerKiller
from reliamq.proving.checker import Committed, Effected, Facts, Verdict, check
from reliamq.proving.ledger import LedgerReader
from reliamq.proving.plan import Plan
from reliamq.proving.processes import Fleet, Member
from reliamq.proving.scenario import GROUP, Account, Effect, OrderRow, make_app, reset_tables
from reliamq.settings import masked
from reliamq.spi import ConfigurationError, DeadLetterRecord

__all__ = ["Progress", "Proof", "Result"]

LOOK_EVERY = 0.05
LEAST_KILLS = 5
COUNT_EVERY = 0.5
STOP_PATIENCE = 15.0


@dataclass(frozen=True, slots=True)
class Progress:
    """How far it is; for showing."""

    phase: str
    committed: int
    confirmed: int
    delivered: int
    effects: int
    kills: int
    broker_kills: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Result:
    """What came of it.

    messages: orders that were to be placed.  rolled_back: those of them that were, on purpose.
    kills, broker_kills: seconds since 1970, and who.
    crashes: processes that ended by themselves.  finished: all took effect before the deadline.
    interrupted: by Ctrl-C or SIGTERM; the rest is the ledger so far.  latencies: seconds from commit to effect.
    """

    verdict: Verdict
    messages: int
    rolled_back: int
    kills: Sequence[tuple[float, str]]
    crashes: Sequence[str]
    seconds: float
    finished: bool
    interrupted: bool
    latencies: Sequence[float]
    broker_kills: Sequence[tuple[float, str]] = ()
    timeline: dict[str, list[float]] = field(default_factory=dict)

    @property
    def unplaced(self) -> int:
        """Orders that were neither committed nor rolled back, though there was time."""
        return 0 if self.interrupted else self.messages - self.verdict.committed - self.rolled_back

    @property
    def holds(self) -> bool:
        """Whether all that was planned was done, and nothing is wrong."""
        return self.verdict.holds and not self.crashes and not self.unplaced


class Proof:
    """kill_every: seconds between kills of processes, 0: none.  brokers: who kills those, if anybody does.
    deadline: seconds for the rest after the last commit and the last broker's return.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        kill_every: float,
        brokers: BrokerKiller,
        deadline: float,
        show: Callable[[Progress], None] = lambda _: None,
    ) -> None:
        self.plan, self._kill_every, self._deadline, self._show = plan, kill_every, deadline, show
        self._brokers = brokers
        self._fleet = Fleet(plan)
        self._reader = LedgerReader(plan.ledger_folder)
        self._random = random.Random(plan.seed)  # noqa: S311  # repeatable, not secret
        self._began = time.monotonic()
        self._counted_at = 0.0
        self._effects = 0
        self._applied_all = False

    def prepare(self) -> None:
        """Reach the servers and begin with empty tables.  Raises ReliamqError or SQLAlchemyError when that fails."""
        anyio.run(self._prepare)

    async def _prepare(self) -> None:
        app, _ = make_app(self.plan)
        if not app.backend.capabilities.shared_between_processes:
            raise ConfigurationError(
                f"{masked(self.plan.broker)} is in the memory of one process, and the prover has several; "
                "use embedded:///file.db or a networked broker"
            )
        if self._brokers.kills_brokers and not app.backend.capabilities.networked:
            raise ConfigurationError(
                f"--kill-broker: {masked(self.plan.broker)} is a file and no broker; give --broker"
            )
        async with open_engine(self.plan.database) as engine:
            await app.create_tables()
            async with app.outbox_store() as store:
                status = await store.status()
            if status.waiting or status.parked:
                raise ConfigurationError(
                    f"the database's outbox holds {status.waiting + status.parked} rows of somebody else; "
                    "prove with a database of its own"
                )
            await reset_tables(engine, self.plan)
        async with app:
            pass

    def run(self) -> Result:
        """Run it.  KeyboardInterrupt: everything is ended and the ledger so far is the result."""
        self._began = time.monotonic()
        self._interrupted = finished = False
        with ExitStack() as stack:
            engine = stack.enter_context(open_sync_engine(self.plan.database))
            stack.callback(self._brokers.wait)  # whatever happens, nobody is left dead
            stack.callback(self._fleet.kill_all)  # and nobody is left behind
            for number in (signal.SIGINT, signal.SIGTERM):
                stack.callback(signal.signal, number, signal.signal(number, self._interrupt))
            try:
                self._fleet.start()
                self._brokers.start()
                self._work_under_fire(engine)
                self._await_brokers()
                finished = self._drain(engine)
                self._fleet.stop(STOP_PATIENCE)
            except KeyboardInterrupt:
                self._fleet.kill_all()
                self._brokers.wait()
            return self._result(engine, finished, self._interrupted)

    def _interrupt(self, _number: int, _frame: FrameType | None) -> None:
        self._interrupted = True  # Python drops an exception that is raised in a finalizer, so the loops look as well
        raise KeyboardInterrupt

    # --- phases ----------------------------------------------------------------------------------------------------

    def _work_under_fire(self, engine: Engine) -> None:
        """Until the applications have placed all their orders, and a proof with kills has had enough of them."""
        next_kill = time.monotonic() + self._kill_every
        while not (self._fleet.has_placed_all() or self._fleet.cannot_place()) or self._needs_kills():
            self._look("working")
            if self._kill_every and time.monotonic() >= next_kill:
                self._kill_one()
                next_kill = time.monotonic() + self._kill_every
            self._count_effects(engine)

    def _await_brokers(self) -> None:
        """Until whoever was killed last is whole again: the deadline is for what comes then."""
        self._brokers.end()
        while self._brokers.is_at_work:
            self._look("waiting for a broker")
        self._brokers.check()

    def _needs_kills(self) -> bool:
        """Whether there are too few kills yet, and somebody to kill."""
        if self._fleet.cannot_place():
            return False
        if self._brokers.kills_brokers and not self._brokers.kills:
            return True
        if not self._kill_every:
            return False
        return len(self._fleet.kills) < LEAST_KILLS and any(map(self._is_victim, self._fleet.running()))

    def _drain(self, engine: Engine) -> bool:
        """Whether all that was committed takes effect by the deadline."""
        until = time.monotonic() + self._deadline
        while time.monotonic() < until:
            self._look("draining")
            if self._all_applied(engine):
                return True
        return False

    def _kill_one(self) -> None:
        ready = [one for one in self._fleet.running() if self._is_victim(one) and self._is_worth_killing(one)]
        if ready:
            self._fleet.kill(self._random.choice(ready))

    def _is_worth_killing(self, member: Member) -> bool:
        """A worker that is not in its group yet has nothing to lose; one for which nothing is left is idle by right."""
        pid = member.process.pid or 0
        if member.role == "worker" and not self._applied_all:
            return self._reader.has_received(member.name, pid)
        return self._reader.is_ready(member.name, pid)

    def _is_victim(self, member: Member) -> bool:
        return self.plan.broken is None or member.role == self.plan.broken.victim

    def _look(self, phase: str) -> None:
        if self._interrupted:
            raise KeyboardInterrupt
        time.sleep(LOOK_EVERY)
        self._fleet.look_after()
        self._brokers.check()
        self._reader.read()
        counts = self._reader.counts
        seconds = time.monotonic() - self._began
        self._show(
            Progress(
                phase,
                counts["committed"],
                counts["confirmed"],
                counts["delivered"],
                self._effects,
                len(self._fleet.kills),
                len(self._brokers.kills),
                seconds,
            )
        )

    def _count_effects(self, engine: Engine) -> None:
        """For showing; not at every look, because counting is not free."""
        if time.monotonic() - self._counted_at > COUNT_EVERY:
            self._all_applied(engine)

    def _all_applied(self, engine: Engine) -> bool:
        self._counted_at = time.monotonic()
        with engine.connect() as connection:
            connection.execution_options(**{READING: True})
            committed = connection.scalar(select(func.count()).select_from(OrderRow)) or 0
            self._effects = connection.scalar(select(func.count(Effect.message_id.distinct()))) or 0
        self._applied_all = self._effects >= committed
        return self._applied_all

    # --- the end ---------------------------------------------------------------------------------------------------

    def _result(self, engine: Engine, finished: bool, interrupted: bool) -> Result:
        self._reader.read()
        with Session(engine) as session:
            # Effects first: a server may still finish a killed process's commit, and no effect is before its order.
            effects = session.scalars(select(Effect).order_by(Effect.place)).all()
            orders = session.scalars(select(OrderRow).order_by(OrderRow.committed_at)).all()
            balances = {one.name: one.balance for one in session.scalars(select(Account))}
        said = {
            kind: [id_ for event in self._reader.events if event.kind == kind for id_ in event.ids] for kind in _KINDS
        }
        facts = Facts(
            committed=[Committed(one.message_id, one.account, one.number, one.amount) for one in orders],
            effects=[Effected(one.message_id, one.account, one.number, one.amount) for one in effects],
            confirmed=said["confirmed"],
            delivered=said["delivered"],
            dead_letters=[one.message.id for one in anyio.run(self._dead_letters)],
            balances=balances,
            interrupted=interrupted,
        )
        rolled_back = {id_ for event in self._reader.events if event.kind == "rolled_back" for id_ in event.ids}
        committed_at = {one.message_id: one.committed_at for one in orders}
        return Result(
            verdict=check(facts),
            messages=self.plan.messages,
            rolled_back=len(rolled_back),
            kills=self._fleet.kills,
            broker_kills=self._brokers.kills,
            crashes=self._fleet.crashes,
            seconds=time.monotonic() - self._began,
            finished=finished,
            interrupted=interrupted,
            latencies=[
                max(0.0, one.applied_at - committed_at[one.message_id])
                for one in effects
                if one.message_id in committed_at
            ],
            timeline={
                "committed": sorted(committed_at.values()),
                "effects": sorted(one.applied_at for one in effects),
                **{kind: sorted(e.at for e in self._reader.events if e.kind == kind for _ in e.ids) for kind in _KINDS},
            },
        )

    async def _dead_letters(self) -> Sequence[DeadLetterRecord]:
        app, topic = make_app(self.plan)
        async with app.dead_letters() as desk:
            return await desk.list(topic=topic.name, group=GROUP, limit=1_000_000)


_KINDS = ("confirmed", "delivered")
