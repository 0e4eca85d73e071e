"""A lane through crashes, handovers, expiries, retries, lost commands and lost answers: C1 to C4, C6, C12.

What a member knows is :class:`LaneWindow`; the server's side is a real server that runs the real scripts, so that both
are in the model.  Its clock stands still for what is tested: leases end, and delays are over, when the model says so.
"""

from __future__ import annotations

import itertools
import random
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from redis import Redis

from reliamq.spi import Delivery, Entry, Message, Retry, Room
from reliamq_redis.catalog.names import LaneKeys
from reliamq_redis.consuming.window import Changes, Held, LaneWindow, order_of
from reliamq_redis.scripts import Script, script
from reliamq_redis.wire.attempts import Attempts
from reliamq_redis.wire.records import fields_of, message_of, own_fields
from tests.servers.redis import RedisServers, ValkeyServers

PREFETCH, FETCHED = 8, 5
LEASE = 10.0
FOR_EVER = 86_400_000
WALL_AHEAD = 1e9
ACQUIRE, FETCH, WRITE = script("acquire"), script("fetch"), script("write")


@pytest.fixture(scope="module", params=[RedisServers, ValkeyServers], ids=["redis", "valkey"])
def client(request: pytest.FixtureRequest) -> Iterator[Redis]:
    """Of a server of its own, which keeps nothing."""
    folder = Path(tempfile.mkdtemp(prefix="reliamq-lane-"))  # pytest's own folders have names too long for a socket
    command = [request.param.server_program(), "--port", "0", "--unixsocket", f"{folder}/socket", "--save", ""]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL) as server:
        while not (folder / "socket").exists():
            time.sleep(0.01)
        with Redis(unix_socket_path=f"{folder}/socket") as client:
            yield client
        server.terminate()
    shutil.rmtree(folder)


# --- what is true -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Known:
    """Of one message.

    begun: by which process, since it had the lane.  away: it is outside its lane.  suspect: whoever had it died.
    """

    done: bool = False
    failures: int = 0
    crashes: int = 0
    begun: str | None = None
    apart: bool = False
    away: bool = False
    suspect: bool = False


@dataclass
class Truth:
    """now: as the member has it.  sure: as the server has it.

    due: when it comes back, if it is away.  is_due: the server has noticed that it is.
    """

    message: Message
    now: Known = field(default_factory=Known)
    sure: Known = field(default_factory=Known)
    due: float = 0.0
    is_due: bool = False

    @property
    def is_ours(self) -> bool:
        """It is for the group ``g``, too."""
        return self.message.only_group is None

    def change(self, **values: Any) -> None:
        self.now = replace(self.now, **values)

    def come_back(self) -> None:
        if self.sure.away and self.is_due:
            self.now = self.sure = replace(self.sure, away=False)

    def lose(self) -> None:
        """What was not written is gone with the window; the process goes on, but not with what it had begun."""
        self.now = replace(self.sure, begun=None)

    def die(self, process: str, *, had_it: bool) -> None:
        """Whoever has the lane next counts a start that the process had written down."""
        crashed = self.sure.begun is not None
        suspect = self.sure.suspect or (had_it and not self.sure.done and not self.sure.away)
        self.now = self.sure = replace(self.sure, begun=None, crashes=self.sure.crashes + crashed, suspect=suspect)


class Server:
    """The lane as the server has it: the scripts, and how time passes."""

    def __init__(self, client: Redis, truths: dict[str, Truth]) -> None:
        self.client, self.truths = client, truths
        self.keys = LaneKeys(f"{uuid.uuid4()}", 0, "g")
        client.xgroup_create(self.keys.stream, "g", "0", mkstream=True)
        for truth in truths.values():
            fields = fields_of(truth.message)
            client.xadd(self.keys.stream, dict(zip(fields[::2], fields[1::2], strict=True)))

    def run(self, one: Script, keys: Sequence[str], *arguments: Any) -> Any:
        return self.client.eval(one.text, len(keys), *keys, *arguments)

    def acquire(self, process: str) -> Any:
        keys = self.keys
        return self.run(ACQUIRE, [keys.stream, keys.state, keys.attempts], "g", process, FOR_EVER)

    def end_leases(self) -> None:
        self.client.hset(self.keys.state, "until", 1)

    def fetch(self, token: int, start: str, count: int) -> Any:
        keys = self.keys
        names = [keys.stream, keys.state, keys.delayed, keys.waiting]
        answer = self.run(FETCH, names, "g", token, FOR_EVER, start, count)
        if answer is not None:
            for truth in self.truths.values():
                truth.come_back()
        return answer

    def write(self, token: int, changes: Changes, *, last: bool) -> bool:
        keys = self.keys
        attempts = [part for name, one in changes.attempts.items() for part in (name, one.text())]
        away = [part for name, _, fields in changes.away for part in (name, FOR_EVER, len(fields), *fields)]
        arguments = [
            *("g", token, 0 if last else FOR_EVER),
            *(len(changes.finished), *changes.finished),
            *(len(changes.forgotten), *changes.forgotten),
            *(len(changes.attempts), *attempts),
            *away,
        ]
        names = [keys.stream, keys.state, keys.attempts, keys.delayed, keys.waiting]
        return bool(self.run(WRITE, names, *arguments))

    def bring_forward(self, now: float) -> None:
        """What is away and due comes back with the next fetch."""
        for name in self.client.zrange(self.keys.delayed, 0, -1):
            fields = self.client.xrange(self.keys.stream, name, name)[0][1]
            truth = self.truths[fields[b"id"].decode()]
            if truth.due <= now:
                truth.is_due = True
                self.client.zadd(self.keys.delayed, {name: 1})

    def check(self) -> None:
        """What it has of each message is what it must have."""
        pending = {one["message_id"] for one in self.client.xpending_range(self.keys.stream, "g", "-", "+", 1000)}
        away = set(self.client.zrange(self.keys.delayed, 0, -1))
        assert away == set(self.client.hkeys(self.keys.waiting))
        assert not pending & away
        position = self.client.xinfo_groups(self.keys.stream)[0]["last-delivered-id"].decode()
        live = dict[str, bytes]()
        for name, fields in self.client.xrange(self.keys.stream):
            if name in pending | away or order_of(name.decode()) > order_of(position):
                identity = fields[b"id"].decode()
                assert identity not in live, "twice"
                live[identity] = name
        for identity, truth in self.truths.items():
            if truth.is_ours:
                assert (identity in live) is not truth.sure.done, truth
                assert (live.get(identity) in away) is truth.sure.away, truth

    def is_empty(self) -> bool:
        keys = self.keys
        pending = self.client.xpending(keys.stream, "g")["pending"]
        return not pending and not self.client.exists(keys.attempts, keys.delayed, keys.waiting)


# --- who has it ---------------------------------------------------------------------------------------------------


class Member:
    """A process that has the lane: fetches, takes, works, writes."""

    def __init__(self, server: Server, process: str, lots: random.Random, now: float) -> None:
        self.server, self.process, self.lots, self.now = server, process, lots, now
        self.truths = server.truths
        self.hands = itertools.count(1)
        self.acquire()

    def acquire(self) -> None:
        token, anew, died, position, suspect, attempts, _ = self.server.acquire(self.process)
        assert token
        assert not anew
        known = {n.decode(): Attempts.read(t.decode()) for n, t in zip(attempts[::2], attempts[1::2], strict=True)}
        self.token, self.reached = token, position.decode()
        self.out: list[tuple[Entry[Held], int]] = []
        self.window = LaneWindow(
            "g", known, died=bool(died), suspect=suspect.decode(), wall_ahead=WALL_AHEAD, prefetch=PREFETCH
        )
        self.take_in(self.pending("0-0"), came_back=True)
        self.window.all_came()

    # --- fetching --------------------------------------------------------------------------------------------------

    def pending(self, start: str) -> list[Any]:
        entries: list[Any] = []
        while True:
            _, page, _ = self.server.fetch(self.token, start, FETCHED)
            entries += page
            if len(page) < FETCHED:
                return entries
            start = page[-1][0].decode()

    def fetch(self, *, answered: bool = True) -> None:
        """As a lane does it."""
        self.server.bring_forward(self.now)
        if not (room := min(self.window.room, FETCHED)):
            return
        position, entries, _ = self.server.fetch(self.token, ">", room)
        if not answered:
            return
        if order_of(position.decode()) > order_of(self.reached):
            entries = self.pending(self.reached)
        if entries:
            self.reached = entries[-1][0].decode()
        self.take_in(entries, came_back=False)

    def take_in(self, entries: Sequence[Any], *, came_back: bool) -> None:
        for name, fields in entries:
            message, notes = message_of("t", fields), own_fields(fields)
            if message.only_group is None:
                held = Held(message, name.decode(), ours=True)
                self.window.take_in(held, Attempts.carried(notes), came_back=came_back, now=self.now)
            else:
                self.window.pass_over(name.decode())

    # --- working ---------------------------------------------------------------------------------------------------

    def take(self, limit: int) -> None:
        self.held()
        room = Room[Held](limit, 1 << 30, self.now + LEASE, self.hands)
        for entry in self.window.take(room, now=self.now):
            truth = self.truths[entry.content.message.id]
            assert not truth.now.done, "handed out after it was finished"
            assert not truth.now.away, "handed out while it is away"
            assert all(entry.content.message.id != other.content.message.id for other, _ in self.out), "twice at once"
            assert (entry.failures, entry.crashes) == (truth.now.failures, truth.now.crashes)
            assert entry.redelivered or not truth.now.suspect
            self.check_order(truth)
            self.out.append((entry, entry.hand))

    def check_order(self, truth: Truth) -> None:
        """All before it of its key are done, handed out, or have given way."""
        handed = {entry.content.message.id for entry, _ in self.out}
        for other in self.truths.values():
            if other is truth:
                break
            if other.message.key == truth.message.key is not None and not other.now.apart and not truth.now.apart:
                assert other.now.done or other.message.id in handed or not other.is_ours, "out of order"

    def held(self) -> list[Entry[Held]]:
        self.out = [(entry, hand) for entry, hand in self.out if self.window.held(entry.position, hand)]
        return [entry for entry, _ in self.out]

    def act(self) -> None:
        held = self.held()
        if not held or self.lots.random() < 0.2:
            self.fetch(answered=self.lots.random() > 0.2)
            self.take(self.lots.randint(1, 5))
        else:
            self.settle(self.lots.choice(held))
        self.write()
        self.server.check()
        self.now += 1.0

    def settle(self, entry: Entry[Held]) -> None:
        truth = self.truths[entry.content.message.id]
        match self.lots.choice(["ack", "ack", "ack", "retry", "away", "release", "begin", "expire"]):
            case "ack":
                truth.change(done=True, begun=None)
                self.window.finish(entry)
            case "retry":
                apart, counts = truth.message.key is None or self.lots.random() < 0.3, self.lots.random() < 0.8
                truth.change(apart=truth.now.apart or apart, failures=truth.now.failures + counts, suspect=False)
                truth.change(begun=None)
                self.window.retry(entry, due=self.now + self.lots.choice([0.0, 3.0]), apart=apart, counts=counts)
            case "away":
                truth.change(apart=True, failures=truth.now.failures + 1, begun=None, away=True, suspect=False)
                delay = self.lots.choice([1.0, 100.0])
                truth.due, truth.is_due = self.now + delay, False
                delivery = Delivery(entry.content.message, "g", "", (), 0, 0, False)
                self.window.send_away(entry, Retry(delivery, timedelta(seconds=delay), keep_order=False))
            case "release":
                truth.change(begun=None)
                self.window.release(entry)
            case "begin":
                truth.change(begun=self.process)
                self.window.begin(entry)
            case "expire":
                self.expire()
        self.unbegin()

    def expire(self) -> None:
        for one in self.held():
            mine = self.truths[one.content.message.id]
            mine.change(crashes=mine.now.crashes + (mine.now.begun is not None), begun=None)
        self.now += LEASE + 1
        self.window.expire(self.now)

    def unbegin(self) -> None:
        """What its key had handed out behind it came back too, and a start of it counts no more."""
        still = {entry.content.message.id for entry in self.held()}
        for other in self.truths.values():
            if other.now.begun == self.process and other.message.id not in still:
                other.change(begun=None)

    # --- writing ---------------------------------------------------------------------------------------------------

    def write(self, *, last: bool = False) -> bool:
        """Whether it is known to be written.  The command may be lost, or its answer."""
        fate = self.lots.choice(["written"] * 6 + ["command lost", "answer lost"])
        changes = self.window.changes()
        if fate != "command lost":
            for name in changes.finished:
                fields = self.server.client.xrange(self.server.keys.stream, name, name)[0][1]
                truth = self.truths[fields[b"id"].decode()]
                assert truth.now.done or not truth.is_ours, "acknowledged unhandled"
            assert self.server.write(self.token, changes, last=last)
            for truth in self.truths.values():
                truth.sure = truth.now
        if fate != "written":
            self.window.not_written(changes)
        return fate == "written"

    # --- how it ends -----------------------------------------------------------------------------------------------

    def had(self) -> set[str]:
        return {entry.content.message.id for entry, _ in self.out}

    def crash(self) -> None:
        """Perhaps while it hands over, and its handlers go on."""
        if self.lots.random() < 0.3:
            self.write()
        had = self.had()
        for identity, truth in self.truths.items():
            truth.die(self.process, had_it=identity in had)
        self.server.end_leases()

    def close(self) -> None:
        """Cleanly: the lane is given back, and whoever comes next knows all."""
        self.window.release_all()
        for truth in self.truths.values():
            if truth.now.begun == self.process:
                truth.change(begun=None)
        while not self.write(last=True):
            pass

    def blip(self) -> None:
        """It loses the lane, and has it again at once."""
        for truth in self.truths.values():
            truth.lose()
        self.acquire()

    def haunt(self) -> None:
        """It has been taken for dead, and does not know."""
        before = self.server.client.hgetall(self.server.keys.state)
        assert self.server.fetch(self.token, ">", 5) is None
        assert not self.server.write(self.token, self.window.changes(), last=self.lots.random() < 0.5)
        assert self.server.client.hgetall(self.server.keys.state) == before
        self.server.check()


# --- the model ----------------------------------------------------------------------------------------------------


def message(number: int, lots: random.Random) -> Message:
    only = "h" if lots.random() < 0.1 else None
    key = lots.choice([b"a", b"b", b"c", b"\xff", None])
    return Message("t", b"body", f"{number}", "Thing", "tests", datetime.now(UTC), key=key, only_group=only)


@pytest.mark.slow  # it runs on real servers, an example for many seconds of work
@settings(max_examples=50, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(20, 120))
def test_whatever_happens_every_message_is_finished_once_in_its_keys_order_with_its_attempts(
    client: Redis, lots: random.Random, steps: int
) -> None:
    run(client, lots, steps)


def run(client: Redis, lots: random.Random, steps: int) -> None:
    truths = {f"{number}": Truth(message(number, lots)) for number in range(30)}
    server, processes = Server(client, truths), (f"process {number}" for number in itertools.count())
    member = Member(server, next(processes), lots, 1000.0)
    for _ in range(steps):
        match lots.choices(["act", "crash", "close", "blip"], [90, 4, 4, 4])[0]:
            case "act":
                member.act()
            case "blip":
                member.blip()
            case end:
                zombie = member
                member.crash() if end == "crash" else member.close()
                member = Member(server, next(processes), lots, zombie.now + 5)
                zombie.haunt()
    finish_all(member)

    assert all(truth.sure.done is truth.is_ours for truth in truths.values())
    assert server.is_empty()
    client.flushdb()


def finish_all(member: Member) -> None:
    for _ in range(10 * len(member.truths)):
        member.now += 10
        member.fetch()
        member.take(5)
        for entry in member.held():
            member.truths[entry.content.message.id].change(done=True)
            member.window.finish(entry)
        while not member.write():
            pass
        if member.server.is_empty() and all(truth.sure.done for truth in member.truths.values() if truth.is_ours):
            return
