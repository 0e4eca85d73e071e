"""Long waits: a ladder of quorum queues, each of which holds a message twice as long as the one below it.

A queue whose messages have different times to live lets one that is over wait behind one that is not; here all messages
of a queue wait equally long, so that none waits for another.  A wait is the sum of some steps: its seconds in binary
are the routing key, and each step either keeps a message or passes it on.  The broker does the waiting, and hands on
what is over when the next queue has it (dead-letter strategy at-least-once).

It promises that what was postponed and confirmed comes back to its lane, no earlier than asked, with its attempts.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from reliamq.spi import Message
from reliamq_rabbitmq.catalog.names import STEPS, WAITS_FOR, delay_step
from reliamq_rabbitmq.catalog.topology import open_topology
from reliamq_rabbitmq.settings import RabbitmqSettings
from reliamq_rabbitmq.wire.attempts import Attempts
from reliamq_rabbitmq.wire.channel import Fate, Outgoing
from reliamq_rabbitmq.wire.frames import media_type
from reliamq_rabbitmq.wire.link import Linked
from reliamq_rabbitmq.wire.records import headers_of

__all__ = ["LONGEST", "Ladder", "Postponement"]

LONGEST = timedelta(seconds=(1 << STEPS) - 1)
"""97 days.  What must wait longer waits for the rest in its lane."""
POSTPONE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Postponement:
    """lane: the queue to come back to."""

    message: Message
    lane: str
    attempts: Attempts
    delay: timedelta


class Ladder:
    """One member's way to it.  Its queues are made when they are needed first."""

    def __init__(self, writer: Linked, settings: RabbitmqSettings) -> None:
        self._writer, self._settings = writer, settings
        self._declared = False

    async def postpone(self, postponements: Sequence[Postponement]) -> Sequence[bool]:
        """Have these wait; whether each is certain to come back.

        Raises ConnectionLost, TimeoutError, the client's errors.  Cancelled: some may come back besides.
        """
        if not self._declared:
            async with open_topology(self._writer.connection, self._settings) as topology:
                await topology.ladder()
            self._declared = True
        outgoing = [_outgoing(one) for one in postponements]
        fitting = [one for one in outgoing if len(one.headers) <= self._writer.channel.header_room]
        fates = await self._writer.channel.publish(fitting, deadline=time.monotonic() + POSTPONE_SECONDS)
        gone = {id(one) for one, fate in zip(fitting, fates, strict=True) if fate is Fate.CONFIRMED}
        return [id(one) in gone for one in outgoing]


def _outgoing(one: Postponement) -> Outgoing:
    seconds = min(int(one.delay.total_seconds()), int(LONGEST.total_seconds()))  # a part of one waits in its lane
    due = time.time() + one.delay.total_seconds()
    headers = headers_of(one.message, [(WAITS_FOR, one.lane), *one.attempts.headers(due).items()])
    routing_key = ".".join(f"{seconds:0{STEPS}b}")
    return Outgoing(delay_step(STEPS - 1), routing_key, media_type(one.message.content_type), headers, one.message.body)
