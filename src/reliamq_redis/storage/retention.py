"""Removing what every group has finished, once it is as old as its topic keeps it (C9).

Below the oldest entry that any group has not finished nothing is removed, whatever the topic's retention: a group that
stands still keeps everything, and that is said.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection

from reliamq_redis.catalog.names import stream_of
from reliamq_redis.catalog.topics import TopicFacts, groups_of
from reliamq_redis.scripts import script
from reliamq_redis.settings import RedisSettings
from reliamq_redis.wire.servers import Servers

__all__ = ["Trimming"]

logger = logging.getLogger("reliamq.redis")
TRIM = script("trim")
AT_ONCE, MOST_ROUNDS = 10_000, 100
STANDS_STILL_SECONDS = 86_400.0
"""A group whose oldest unfinished entry is so much older than the topic keeps is told of, once a day."""


class Trimming:
    """What one member removes, of the lanes that it has."""

    def __init__(self, servers: Servers, settings: RedisSettings, topic: str, facts: TopicFacts) -> None:
        self._servers, self._topic = servers, topic
        self._kept = facts.retention_seconds
        self._every = settings.trim_interval_seconds
        self._next = time.monotonic() + self._every
        self._told: dict[str, float] = {}

    async def run(self, lanes: Collection[int]) -> None:
        """Remove what may go, if it is time.  Raises the client's errors."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + self._every
        groups = sorted(await groups_of(self._servers, self._topic))
        for lane in lanes:
            await self._trim(lane, groups)

    async def _trim(self, lane: int, groups: Collection[str]) -> None:
        stream = stream_of(self._topic, lane)
        removed, rounds = 1, 0
        while removed > 0 and rounds < MOST_ROUNDS:
            rounds += 1
            arguments = [int(self._kept * 1000), AT_ONCE, *groups]
            removed, oldest, group = await self._servers.run(TRIM, [stream], arguments)
        if removed < 0:
            logger.error("%s: group '%s' is gone; nothing is removed", stream, group.decode())
            return
        if removed:
            logger.debug("%s: removed %d finished entries", stream, removed)
        if oldest:
            self._say_who_stands_still(group.decode(), int(oldest.split(b"-")[0]) / 1000)

    def _say_who_stands_still(self, group: str, oldest: float) -> None:
        now = time.time()
        if oldest + self._kept + STANDS_STILL_SECONDS > now or self._told.get(group, 0.0) > now - STANDS_STILL_SECONDS:
            return
        self._told[group] = now
        logger.warning(
            "topic '%s': group '%s' has not finished an entry of %s; everything since is kept for it",
            *(self._topic, group, time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(oldest))),
        )
