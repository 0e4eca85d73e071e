"""One member of a group on one topic: is there while somebody asks, and has its share of the lanes.

Members say once a second that they are there, each hears who else is, and so each knows its share.  A share that is
wrong for a while costs time and breaks nothing: a lane is had by whoever has its token.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress

from redis.exceptions import ResponseError

from reliamq.spi import BrokerUnavailable, GroupSpec
from reliamq.spi.presence import REJOIN_SECONDS, Presence
from reliamq_redis.catalog.names import TopicKeys
from reliamq_redis.catalog.topics import TopicFacts, declare_topic, groups_of, make_group, read_facts
from reliamq_redis.consuming.lane import FIRST, Lane, LaneLost
from reliamq_redis.scripts import script
from reliamq_redis.settings import RedisSettings
from reliamq_redis.storage.retention import Trimming
from reliamq_redis.wire.errors import FAILURES, said
from reliamq_redis.wire.servers import Servers, open_servers, unavailable

__all__ = ["Membership"]

logger = logging.getLogger("reliamq.redis")
JOIN = script("join")
BEAT_SECONDS = 1.0
"""With up to ten members; with more, each says it less often, so that the server does not carry more for it."""
MEMBERS_PER_BEAT = 10
AWAY_SECONDS = 0.3
LEAVE_SECONDS = 10.0
LONGEST_REST_SECONDS = 5.0
"""Before a lane is taken again that cannot be had."""
SHORTEST_LEASE_SECONDS = 3.0
"""Of a lane: a shorter one would be lost to a moment's load."""


class Membership(Presence):
    """lanes: by number, those that this member has or waits for."""

    def __init__(self, settings: RedisSettings, topic: str, group: str, lease: float) -> None:
        super().__init__(f"group '{group}' on '{topic}'", logger, FAILURES)
        self._settings, self._topic, self._group = settings, topic, group
        self._lease = min(max(lease, SHORTEST_LEASE_SECONDS), max(settings.member_timeout_seconds, 1.0))
        self._member = f"{time.time():015.3f} {socket.gethostname()} {os.getpid()} {uuid.uuid4().hex[:8]}"
        self.lanes: dict[int, Lane] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._reached: dict[int, str] = {}
        self._rests: dict[int, float] = {}
        self._facts: TopicFacts | None = None
        self._groups: frozenset[str] = frozenset()
        self._beat = BEAT_SECONDS

    def unavailable(self, what: str, error: BaseException) -> BrokerUnavailable:
        """The error for callers."""
        return unavailable(self._settings, what, error)

    def handed(self) -> int:
        """How many deliveries are handed out and not settled."""
        return sum(lane.window.handed for lane in self.lanes.values() if lane.window is not None)

    # --- in the group ----------------------------------------------------------------------------------------------

    async def join(self) -> None:
        """Have a share of the lanes until nobody asks any more."""
        async with open_servers(self._settings) as servers:
            facts = await self._read_facts(servers)
            trimming = Trimming(servers, self._settings, self._topic, facts)
            try:
                await self._keep_share(servers, facts, trimming)
            finally:
                await self._leave(servers)

    async def _read_facts(self, servers: Servers) -> TopicFacts:
        """What the topic was declared with.  One that was there and is gone is declared again, loudly."""
        try:
            facts = await read_facts(servers, self._topic)
        except (ValueError, KeyError) as error:
            raise self.unavailable(f"reading how '{self._topic}' was declared", error) from error
        if facts is None and self._facts is not None:
            logger.error("topic '%s' is gone, with what was in it; it is declared again", self._topic)
            groups = sorted(self._groups | {self._group})
            facts = await declare_topic(servers, self._topic, self._facts, groups)
            for group in groups:
                await make_group(servers, self._topic, facts.lanes, GroupSpec(group))
        if facts is None:
            raise BrokerUnavailable(self._settings.url, f"{self.label} is not declared")
        self._facts, self._groups = facts, await groups_of(servers, self._topic)
        return facts

    async def _keep_share(self, servers: Servers, facts: TopicFacts, trimming: Trimming) -> None:
        """Until nobody asks.  A server that is away is waited for, as long as nobody takes this member for gone."""
        heard = time.monotonic()
        while not self.is_idle():
            began = time.monotonic()
            try:
                members = await self._say(servers)
                heard = began
            except (*FAILURES, BrokerUnavailable) as error:
                if began - heard >= self._lease:
                    raise
                logger.warning("%s: the server is away, trying again: %s", self.label, said(error))
                await self._pause(AWAY_SECONDS, time.monotonic())
                continue
            share = range(members.index(self._member), facts.lanes, len(members))
            for number, lane in self.lanes.items():
                if number not in share:
                    lane.retire()
            for number in set(share) - self.lanes.keys():
                self._take(servers, number)
            self._beat = BEAT_SECONDS * max(1.0, len(members) / MEMBERS_PER_BEAT)
            await self._trim(trimming)
            await self._pause(self._beat if len(self.lanes) == len(share) else 0.1, began)

    async def _trim(self, trimming: Trimming) -> None:
        try:
            await trimming.run([number for number, lane in self.lanes.items() if lane.window is not None])
        except (*FAILURES, BrokerUnavailable) as error:  # nothing is lost by what stays
            logger.warning("topic '%s' cannot be trimmed, trying again later: %s", self._topic, said(error))

    async def _say(self, servers: Servers) -> Sequence[str]:
        """That it is there; who is, in the order in which they came."""
        key = TopicKeys(self._topic).members(self._group)
        milliseconds = int(max(self._lease, 4 * self._beat) * 1000)
        members = await servers.run(JOIN, [key], [self._member, milliseconds])
        if await read_facts(servers, self._topic) is None:
            await self._read_facts(servers)
        return sorted(name.decode() for name in members)

    async def _pause(self, seconds: float, began: float) -> None:
        left = began + seconds - time.monotonic()
        while left > 0 and not self.is_idle():
            await asyncio.sleep(min(left, 0.2))
            left = began + seconds - time.monotonic()

    # --- lanes -----------------------------------------------------------------------------------------------------

    def _take(self, servers: Servers, number: int) -> None:
        lane = Lane(
            servers,
            self._settings,
            self._topic,
            self._group,
            number,
            self._member,
            self._lease,
            self.changed.set,
            self._reached.get(number, FIRST),
        )
        self.lanes[number] = lane
        self._tasks[number] = asyncio.create_task(self._hold(lane), name=f"lane {number} of {self.label}")

    async def _hold(self, lane: Lane) -> None:
        began = time.monotonic()
        try:
            self.had_share = await lane.hold() or self.had_share
        except LaneLost as error:
            logger.warning("%s; taking it again", error)
        except (*FAILURES, BrokerUnavailable) as error:
            if not lane.retiring:
                logger.warning("%s: lane %d is lost, taking it again: %s", self.label, lane.number, error)
                self.fail(f"lane {lane.number} of {self.label}", error)
                await self._rest(lane, began)
        except Exception as error:
            logger.exception("%s: lane %d failed, taking it again", self.label, lane.number)
            self.fail(f"lane {lane.number} of {self.label} failed", error)
            await self._rest(lane, began)
        finally:
            self._reached[lane.number] = lane.reached
            del self.lanes[lane.number], self._tasks[lane.number]
            self.changed.set()

    async def _rest(self, lane: Lane, began: float) -> None:
        """Before it is taken again: each time twice as long, unless it was had for a while."""
        went_well = time.monotonic() - began > LONGEST_REST_SECONDS
        rest = REJOIN_SECONDS if went_well else self._rests.get(lane.number, REJOIN_SECONDS)
        self._rests[lane.number] = min(2 * rest, LONGEST_REST_SECONDS)
        while rest > 0 and not lane.retiring:
            await asyncio.sleep(min(rest, 0.2))
            rest -= 0.2

    async def _leave(self, servers: Servers) -> None:
        """Hand over all lanes.  Cancelled or slow: what is not handed over is free when its lease is over."""
        for lane in self.lanes.values():
            lane.stopping = lane.stopping or self.stopping
            lane.retire()
        if tasks := list(self._tasks.values()):
            try:
                await asyncio.wait(tasks, timeout=LEAVE_SECONDS)
            finally:  # cancelled here: what is not handed over must not go on keeping its lease
                for lane in self.lanes.values():
                    lane.stopping = lane.stopping or self.stopping
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)
        with suppress(*FAILURES, BrokerUnavailable, ResponseError):
            key = TopicKeys(self._topic).members(self._group)
            await servers.call(key, "ZREM", key, self._member)
