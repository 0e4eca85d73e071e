"""Safe arrival on RabbitMQ: one member of one group on one topic.

Receiving, starting, extending and settling are those of every backend with shares; here is what is written, and where a
long retry waits.  Being in the group, and having lanes, is the membership's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta

from reliamq.spi import Ack, Entry, Message, Retry, Settlement
from reliamq.spi.shares import ShareSubscription, present
from reliamq_rabbitmq.catalog.names import lane_queue
from reliamq_rabbitmq.consuming.lane import Lane
from reliamq_rabbitmq.consuming.ledger import NotWritten
from reliamq_rabbitmq.consuming.membership import Membership
from reliamq_rabbitmq.consuming.window import Held
from reliamq_rabbitmq.delays.ladder import Postponement
from reliamq_rabbitmq.settings import RabbitmqSettings
from reliamq_rabbitmq.wire.attempts import Attempts
from reliamq_rabbitmq.wire.connection import FAILURES, unavailable

__all__ = ["RabbitmqSubscription", "open_subscription"]

logger = logging.getLogger("reliamq.rabbitmq")
LONG = timedelta(seconds=30)
"""A message that gives way for longer leaves its lane meanwhile."""


class RabbitmqSubscription(ShareSubscription[Lane, Held]):
    """A :class:`~reliamq.spi.Subscription`."""

    def __init__(
        self, settings: RabbitmqSettings, membership: Membership, topic: str, group: str, lease: timedelta
    ) -> None:
        super().__init__(membership, membership.lanes, group, lease, logger)
        self._settings, self._membership, self._topic = settings, membership, topic

    def message(self, share: Lane, entry: Entry[Held]) -> tuple[Message, str]:
        """What is delivered, and where it is."""
        return entry.content.message, f"lane {share.number}"

    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[Settlement]:
        """End deliveries, and have the broker know; see the contract."""
        away = await self._postpone(settlements)
        told = [Ack(one.delivery) if id(one) in away else one for one in settlements]
        late = {id(one) for one in await super().settle(told)}
        return [one for one, as_told in zip(settlements, told, strict=True) if id(as_told) in late]

    async def _postpone(self, settlements: Sequence[Settlement]) -> Collection[int]:
        """Send away what gives way for long, so that it holds no room here meanwhile (C6); ids of what has gone.

        Crashed or cancelled here: it comes twice, from there and from here.
        """
        ladder = self._membership.ladder
        leaving = [(one, away) for one in settlements if ladder and (away := self._postponement(one))]
        if ladder is None or not leaving:
            return ()
        try:
            gone = await ladder.postpone([away for _, away in leaving])
        except FAILURES as error:
            logger.warning("group '%s': long retries wait in their lanes: %s", self._group, error)
            return ()
        return {id(one) for (one, _), certain in zip(leaving, gone, strict=True) if certain}

    def _postponement(self, settlement: Settlement) -> Postponement | None:
        if not isinstance(settlement, Retry) or settlement.keep_order or settlement.delay <= LONG:
            return None
        held = self._held(settlement.delivery)
        if held is None or not held[2].content.message.type:  # one that nobody of ours wrote cannot be written again
            return None
        lane, _, entry = held
        attempts = Attempts(entry.failures + settlement.counts, entry.crashes)
        queue = lane_queue(self._topic, self._group, lane.number)
        return Postponement(entry.content.message, queue, attempts, settlement.delay)

    async def write(self, shares: Collection[Lane]) -> Collection[Lane]:
        """Bring to the broker what these lanes say; see there."""
        results = await asyncio.gather(*[lane.write() for lane in shares], return_exceptions=True)
        lost, refused = list[Lane](), list[NotWritten]()
        for lane, result in zip(shares, results, strict=True):
            if isinstance(result, NotWritten):
                refused.append(result)
            elif isinstance(result, FAILURES):
                logger.warning("group '%s': lane %d is lost: %s", self._group, lane.number, result)
                lane.lose()
                lost.append(lane)
            elif isinstance(result, BaseException):
                raise result
        if refused:
            raise unavailable(self._settings, f"writing attempts of group '{self._group}'", refused[0])
        return lost


@asynccontextmanager
async def open_subscription(
    settings: RabbitmqSettings, topic: str, group: str, lease: timedelta
) -> AsyncIterator[RabbitmqSubscription]:
    """Be a member while somebody receives; leaving gives back what is held.  Raises BrokerUnavailable."""
    membership = Membership(settings, topic, group)
    subscription = RabbitmqSubscription(settings, membership, topic, group, lease)
    async with present(membership, subscription.watch(), name=f"{group}@{topic}"):
        yield subscription
