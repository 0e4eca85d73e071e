"""One member of a group on one topic: is there while somebody asks, and has its share of the lanes.

It promises that nothing is handed out of a lane which is not this member's, and that one which it must hand over is
handed over with all that is known of it.  Which messages may go out is decided by the lanes' windows; leases and
settlements are the subscription's.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress

from aiormq.connection import Connection
from aiormq.exceptions import ChannelNotFoundEntity

from reliamq.spi import BrokerUnavailable
from reliamq.spi.presence import REJOIN_SECONDS, Presence
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
WATCH_SECONDS = 0.2
LEAVE_SECONDS = 10.0


class Membership(Presence):
    """lanes: by number, those that this member has or waits for.

    ladder: where long waits are; None while there is no connection.
    """

    def __init__(self, settings: RabbitmqSettings, topic: str, group: str) -> None:
        super().__init__(f"group '{group}' on '{topic}'", logger, FAILURES)
        self._settings, self._topic, self._group = settings, topic, group
        self.lanes: dict[int, Lane] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self.ladder: Ladder | None = None

    def unavailable(self, what: str, error: BaseException) -> BrokerUnavailable:
        """The error for callers."""
        return unavailable(self._settings, what, error)

    def handed(self) -> int:
        """How many deliveries are handed out and not settled."""
        return sum(lane.window.handed for lane in self.lanes.values() if lane.window is not None)

    # --- in the group ----------------------------------------------------------------------------------------------

    async def join(self) -> None:
        """Have a share of the lanes until nobody asks any more."""
        label = f"{self._group}@{self._topic}"
        async with (
            open_connection(self._settings, f"member of {label}") as connection,
            open_link(self._settings, f"attempts of {label}") as link,
        ):
            writer = await link.get(time.monotonic() + self._settings.request_timeout_seconds)
            count = await count_lanes(connection, self._settings, self._topic, self._group)
            if not count:
                raise BrokerUnavailable(self._settings.url, f"{self.label} is not declared")
            self.ladder = Ladder(writer, self._settings)
            async with open_roster(connection, writer, self._settings, self._topic, self._group) as roster:
                await self._be_member(connection, writer, roster, count)

    async def _be_member(self, connection: Connection, writer: Linked, roster: Roster, count: int) -> None:
        beating = asyncio.create_task(roster.run(), name=f"roster of {self.label}")
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
        while not self.is_idle():
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

    def _take(self, connection: Connection, writer: Linked, number: int, count: int) -> None:
        lane = Lane(connection, writer, self._settings, self._topic, self._group, number, self.changed.set)
        self.lanes[number] = lane
        task = asyncio.create_task(self._hold(connection, lane, count), name=f"lane {number} of {self.label}")
        self._tasks[number] = task

    async def _hold(self, connection: Connection, lane: Lane, count: int) -> None:
        try:
            await lane.hold()
            self.had_share = True
        except ChannelNotFoundEntity as error:
            logger.error(
                "%s: a queue of lane %d is gone, with what was in it; it is declared again: %s",
                *(self.label, lane.number, error),
            )
            await self._restore(connection, lane.number, count)
        except (*FAILURES, NotWritten) as error:
            if not lane.retiring:
                logger.warning("%s: lane %d is lost, taking it again: %s", self.label, lane.number, error)
                self.fail(f"lane {lane.number} of {self.label}", error)
                await asyncio.sleep(REJOIN_SECONDS)
        except Exception:
            logger.exception("%s: lane %d failed, taking it again", self.label, lane.number)
            await asyncio.sleep(REJOIN_SECONDS)
        finally:
            del self.lanes[lane.number], self._tasks[lane.number]
            self.changed.set()

    async def _restore(self, connection: Connection, number: int, count: int) -> None:
        try:
            async with open_topology(connection, self._settings) as topology:
                await topology.lane(self._topic, self._group, number, count)
        except FAILURES as error:
            logger.error("%s: lane %d cannot be declared again: %s", self.label, number, error)
            self.fail(f"declaring lane {number} of {self.label}", error)
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
