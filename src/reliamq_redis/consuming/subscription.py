"""Safe arrival on Redis: one member of one group on one topic.

Receiving, starting, extending and settling are those of every backend with shares; here is what is written down, and
where a long retry waits.  Being in the group, and having lanes, is the membership's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from datetime import timedelta

from reliamq.spi import BrokerUnavailable, Entry, Message, Retry, Settlement, Window
from reliamq.spi.shares import ShareSubscription, present
from reliamq_redis.consuming.lane import Lane, LaneLost
from reliamq_redis.consuming.membership import Membership
from reliamq_redis.consuming.window import Held, LaneWindow
from reliamq_redis.settings import RedisSettings
from reliamq_redis.wire.errors import FAILURES

__all__ = ["RedisSubscription", "open_subscription"]

logger = logging.getLogger("reliamq.redis")
LONG = timedelta(seconds=30)
"""A message that gives way for longer leaves its lane meanwhile."""


class RedisSubscription(ShareSubscription[Lane, Held]):
    """A :class:`~reliamq.spi.Subscription`."""

    def __init__(self, membership: Membership, group: str, lease: timedelta) -> None:
        super().__init__(membership, membership.lanes, group, lease, logger)
        self._membership = membership

    def message(self, share: Lane, entry: Entry[Held]) -> tuple[Message, str]:
        """What is delivered, and where it is."""
        return entry.content.message, f"{share.number}/{entry.content.id}"

    def apply(self, settlement: Settlement, window: Window[Held], entry: Entry[Held]) -> None:
        """Tell the window; what gives way for long goes away."""
        long = isinstance(settlement, Retry) and not settlement.keep_order and settlement.delay > LONG
        if long and isinstance(settlement, Retry) and isinstance(window, LaneWindow) and entry.content.ours:
            window.send_away(entry, settlement)
        else:
            super().apply(settlement, window, entry)

    async def write(self, shares: Collection[Lane]) -> Collection[Lane]:
        """Bring to the server what these lanes say; see there."""
        results = await asyncio.gather(*[lane.write() for lane in shares], return_exceptions=True)
        lost, failures = list[Lane](), list[BaseException]()
        for lane, result in zip(shares, results, strict=True):
            if isinstance(result, LaneLost):
                lost.append(lane)
            elif isinstance(result, (*FAILURES, BrokerUnavailable)):
                failures.append(result)
            elif isinstance(result, BaseException):
                raise result
        if failures:
            raise self._membership.unavailable(f"settling for {self._membership.label}", failures[0])
        return lost


@asynccontextmanager
async def open_subscription(
    settings: RedisSettings, topic: str, group: str, lease: timedelta
) -> AsyncIterator[RedisSubscription]:
    """Be a member while somebody receives; leaving gives back what is held."""
    membership = Membership(settings, topic, group, lease.total_seconds())
    subscription = RedisSubscription(membership, group, lease)
    async with present(membership, subscription.watch(), name=f"{group}@{topic}"):
        yield subscription
