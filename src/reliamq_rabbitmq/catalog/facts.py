"""What a topic was declared with: one message in a queue of its own, written once.

Whoever publishes asks for it once and keeps it: a topic's facts never change while it is there.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass

from aiormq.connection import Connection
from aiormq.exceptions import ChannelNotFoundEntity

from reliamq_rabbitmq.catalog.names import facts_queue
from reliamq_rabbitmq.settings import RabbitmqSettings
from reliamq_rabbitmq.wire.channel import ConnectionLost, Fate, Received
from reliamq_rabbitmq.wire.connection import answered
from reliamq_rabbitmq.wire.frames import header_table
from reliamq_rabbitmq.wire.journal import open_journal

__all__ = ["TopicFacts", "read_facts", "write_facts"]


@dataclass(frozen=True, slots=True)
class TopicFacts:
    """max_message_bytes: largest :attr:`~reliamq.spi.Message.size`."""

    max_message_bytes: int


async def read_facts(connection: Connection, settings: RabbitmqSettings, topic: str) -> TopicFacts | None:
    """What the topic was declared with; None where it was not.  Raises TimeoutError, the client's errors."""
    found: list[Received] = []
    try:
        async with open_journal(connection, settings, facts_queue(topic), found.append) as journal:
            await answered(journal.read_all(), settings.request_timeout_seconds)
    except ChannelNotFoundEntity:
        return None
    return _read(found)


async def write_facts(connection: Connection, settings: RabbitmqSettings, topic: str, facts: TopicFacts) -> TopicFacts:
    """Write them down unless they are; what is there then.  The queue must be there."""
    found: list[Received] = []
    async with open_journal(connection, settings, facts_queue(topic), found.append) as journal:
        await answered(journal.read_all(), settings.request_timeout_seconds)
        known = _read(found)
        if known is not None:
            return known
        record = header_table(()), json.dumps(asdict(facts)).encode()
        (fate,) = await journal.write([record], deadline=time.monotonic() + settings.request_timeout_seconds)
        if fate is not Fate.CONFIRMED:
            raise ConnectionLost(f"{facts_queue(topic)}: {fate.value}")
    return facts


def _read(found: list[Received]) -> TopicFacts | None:
    return TopicFacts(json.loads(found[0].body)["max_message_bytes"]) if found else None
