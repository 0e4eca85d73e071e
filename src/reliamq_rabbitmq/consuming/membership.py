"""One member of a group on one topic: is there while somebody asks, and has its share of the lanes.

It promises that nothing is handed out of a lane which is not this member's, and that one which it must hand over is
handed over with all that is known of it.  Which messages may go out is decided by the lanes' windows; leases and
settlements are the subscription's.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress

from aiormq.connection import Connection
from aiormq.exceptions import ChannelNotFoundEntity

from reliamq.spi import BrokerUnavailable
from reliamq_rabbitmq.catalog.topology import count_lanes, open_topology
from reliamq_rabbitmq.consuming.lane import Lane
from reliamq_rabbitmq.consuming.ledger import NotWritten
from reliamq_rabbitmq.consuming.roster import Roster, open_roster
from reliamq_rabbitmq.delays.ladder import Ladder
from reliamq_rabbitmq.settings import RabbitmqSettings
from reliamq_rabbitmq.wire.channel import ConnectionLost
from reliamq_rabbitmq.wire.connection import FAILURES, open_connection, unavailable
from reliamq_rabbitmq.wire.link import Linked, open_link

__all__ = ["Membership"]

logger = logging.getLogger("reliamq.rabbitmq")
IDLE_SECONDS = 2.0
"""Whoever asks for nothing and holds nothing for so long lets others have its lanes."""
WATCH_SECONDS = 0.2
REJOIN_SECONDS, LONGEST_REJOIN_SECONDS = 0.2, 15.0
LEAVE_SECONDS = 10.0


class Membership:
    """lanes: by number, those that this member has or waits for.

    ladder: where long waits are; None while there is no connection.
    changed: set whenever something may have become possible: messages came, lanes changed hands.
    stopping: nobody works on what is handed out any more; set before :meth:`stay` is cancelled.
    """

    def __init__(self, settings: RabbitmqSettings, topic: str, group: str) -> None:
        self._settings, self._topic, self._group = settings, topic, group
        self._label = f"group '{group}' on '{topic}'"
        self.lanes: dict[int, Lane] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self.stopping = False
        self.ladder: Ladder | None = None
        self.changed = asyncio.Event()
        self._wanted = asyncio.Event()
        self._receivers, self._asked_at = 0, time.monotonic()
        self._failure: BrokerUnavailable | None = None
        self._had_lanes = False

    # --- who asks --------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def asking(self) -> AsyncIterator[None]:
        """Somebody waits for messages: be a member meanwhile."""
        self._receivers += 1
        self._wanted.set()
        try:
            yield
        finally:
            self._receivers -= 1
            self._asked_at = time.monotonic()

    def abandon(self) -> None:
        """Leases ran out: unless somebody asks, nobody is there any more."""
        self._asked_at = time.monotonic() - IDLE_SECONDS
        self.changed.set()

    def check(self) -> None:
        """Raise what keeps this member from its lanes, once."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def open_lanes(self) -> Iterator[Lane]:
        """Those that messages may be handed out of."""
        return (lane for lane in self.lanes.values() if lane.window is not None and not lane.retiring)

    def _is_idle(self) -> bool:
        handed = sum(lane.window.handed for lane in self.lanes.values() if lane.window is not None)
        return not self._receivers and not handed and time.monotonic() - self._asked_at >= IDLE_SECONDS

    # --- in the group ----------------------------------------------------------------------------------------------

    async def stay(self) -> None:
        """Be in the group while somebody asks; until cancelled, which leaves it cleanly."""
        pause = REJOIN_SECONDS
        while True:
            await self._wanted.wait()
            began, self._had_lanes = time.monotonic(), False
            try:
                await self._join()
            except (*FAILURES, BrokerUnavailable) as error:
                logger.warning("%s: out of the group, joining again: %s", self._label, error)
                self._failure = unavailable(self._settings, self._label, error)
            except Exception as error:  # a fault of ours or the client's: whoever receives must hear of it, not wait
                logger.exception("%s: out of the group, joining again", self._label)
                self._failure = BrokerUnavailable(self._settings.url, f"the member of {self._label} failed: {error!r}")
            else:
                continue
            self.changed.set()
            went_well = self._had_lanes or time.monotonic() - began > LONGEST_REJOIN_SECONDS
            pause = REJOIN_SECONDS if went_well else min(2 * pause, LONGEST_REJOIN_SECONDS)
            await asyncio.sleep(pause)

    async def _join(self) -> None:
        label = f"{self._group}@{self._topic}"
        async with (
            open_connection(self._settings, f"member of {label}") as connection,
            open_link(self._settings, f"attempts of {label}") as link,
        ):
            writer = await link.get(time.monotonic() + self._settings.request_timeout_seconds)
            count = await count_lanes(connection, self._settings, self._topic, self._group)
            if not count:
                raise BrokerUnavailable(self._settings.url, f"{self._label} is not declared")
            self.ladder = Ladder(writer, self._settings)
            async with open_roster(connection, writer, self._settings, self._topic, self._group) as roster:
                await self._be_member(connection, writer, roster, count)

    async def _be_member(self, connection: Connection, writer: Linked, roster: Roster, count: int) -> None:
        beating = asyncio.create_task(roster.run(), name=f"roster of {self._label}")
        try:
            await self._keep_share(connection, writer, roster, beating, count)
        finally:
            beating.cancel()
            await asyncio.wait({beating})
            await self._leave()
            self.ladder = None

    async def _keep_share(
        self, connection: Connection, writer: Linked, roster: Roster, beating: asyncio.Task[None], count: int
    ) -> None:
        while not self._is_idle():
            roster.changed.clear()
            share = roster.share(count)
            for number, lane in self.lanes.items():
                if number not in share:
                    lane.retire()
            for number in share - self.lanes.keys():
                self._take(connection, writer, number, count)
            with suppress(TimeoutError):
                async with asyncio.timeout(WATCH_SECONDS):
                    await roster.changed.wait()
            if beating.done():
                beating.result()
                raise ConnectionLost("the roster ended")
        self._wanted.clear()

    def _take(self, connection: Connection, writer: Linked, number: int, count: int) -> None:
        lane = Lane(connection, writer, self._settings, self._topic, self._group, number, self.changed.set)
        self.lanes[number] = lane
        task = asyncio.create_task(self._hold(connection, lane, count), name=f"lane {number} of {self._label}")
        self._tasks[number] = task

    async def _hold(self, connection: Connection, lane: Lane, count: int) -> None:
        try:
            await lane.hold()
            self._had_lanes = True
        except ChannelNotFoundEntity as error:
            logger.error(
                "%s: a queue of lane %d is gone, with what was in it; it is declared again: %s",
                *(self._label, lane.number, error),
            )
            await self._restore(connection, lane.number, count)
        except (*FAILURES, NotWritten) as error:
            if not lane.retiring:
                logger.warning("%s: lane %d is lost, taking it again: %s", self._label, lane.number, error)
                self._failure = unavailable(self._settings, f"lane {lane.number} of {self._label}", error)
                await asyncio.sleep(REJOIN_SECONDS)
        except Exception:
            logger.exception("%s: lane %d failed, taking it again", self._label, lane.number)
            await asyncio.sleep(REJOIN_SECONDS)
        finally:
            del self.lanes[lane.number], self._tasks[lane.number]
            self.changed.set()

    async def _restore(self, connection: Connection, number: int, count: int) -> None:
        try:
            async with open_topology(connection, self._settings) as topology:
                await topology.lane(self._topic, self._group, number, count)
        except FAILURES as error:
            logger.error("%s: lane %d cannot be declared again: %s", self._label, number, error)
            self._failure = unavailable(self._settings, f"declaring lane {number} of {self._label}", error)
            await asyncio.sleep(REJOIN_SECONDS)

    async def _leave(self) -> None:
        """Hand over all lanes.  Cancelled or slow: what is not handed over is taken back from the closed connection."""
        for lane in self.lanes.values():
            lane.stopping = lane.stopping or self.stopping
            lane.retire()
        tasks = list(self._tasks.values())
        if not tasks:
            return
        await asyncio.wait(tasks, timeout=LEAVE_SECONDS)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
