"""Safe departure on RabbitMQ: publisher confirms, persistent, mandatory, and an outcome for each message by the
caller's deadline.

One channel, so that what is sent is stored in that order.  A publish to an exchange that is not there would close the
channel and take every other message's confirm along; so each exchange is asked for before its first message.  When the
connection ends, what was written and not confirmed is in doubt, and the next batch connects again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Hashable, Sequence
from contextlib import asynccontextmanager

from reliamq.spi import ConfigurationError, Confirmation, InDoubt, Message, Outcome, Rejection, RejectionReason
from reliamq_rabbitmq.catalog.facts import TopicFacts, read_facts
from reliamq_rabbitmq.catalog.names import check_names, group_exchange, routing_key
from reliamq_rabbitmq.catalog.topology import exchange_exists
from reliamq_rabbitmq.settings import RabbitmqSettings
from reliamq_rabbitmq.wire.channel import Channel, Fate, Outgoing
from reliamq_rabbitmq.wire.connection import FAILURES, unavailable
from reliamq_rabbitmq.wire.frames import media_type
from reliamq_rabbitmq.wire.link import Link, Linked, open_link
from reliamq_rabbitmq.wire.records import headers_of
from reliamq_rabbitmq.wire.versions import largest_message

__all__ = ["RabbitmqPublisher", "open_publisher"]

REMEMBERED = 10_000
KEPT_FREE = 32 * 1024
"""Of a message's headers, for what a dead letter says besides."""


class RabbitmqPublisher:
    """A :class:`~reliamq.spi.Publisher`."""

    def __init__(self, settings: RabbitmqSettings, link: Link) -> None:
        self._settings, self._link = settings, link
        self._facts: dict[str, TopicFacts] = {}
        self._groups: set[tuple[str, str]] = set()
        self._keys: dict[bytes, str] = {}

    def route(self, message: Message) -> Hashable:
        """All wait for one another: a batch is cheap for the broker when it is large (see :meth:`send`)."""
        return None

    async def send(self, batch: Sequence[Message], *, deadline: float) -> Sequence[Outcome]:
        """Store a batch; see the contract."""
        link = await self._link.get(deadline)
        outcomes: dict[int, Outcome] = {}
        outgoing: list[tuple[int, Outgoing]] = []
        missing: set[tuple[str, str | None]] = set()
        for index, message in enumerate(batch):
            facts = self._facts.get(message.topic)
            if facts is None or (message.only_group and (message.topic, message.only_group) not in self._groups):
                facts = await self._look_up(link, message.topic, message.only_group, missing, deadline)
            try:
                if rejection := _refusal(message, facts):
                    outcomes[index] = rejection
                else:
                    outgoing.append((index, self._outgoing(message, link.channel.header_room)))
            except ValueError as error:
                outcomes[index] = Rejection(
                    message.id, RejectionReason.INVALID, f"AMQP cannot carry it: {error}", error
                )
        # Lane by lane: what a quorum queue gets at once it writes and replicates at once, which costs the broker a
        # third less.  A key's messages have one routing key, so they stay in order.
        outgoing.sort(key=_lane_of)
        fates = await link.channel.publish([one for _, one in outgoing], deadline=deadline)
        for (index, _), fate in zip(outgoing, fates, strict=True):
            outcomes[index] = self._outcome(batch[index], fate, link.channel)
        return [outcomes[index] for index in range(len(batch))]

    def _outgoing(self, message: Message, room: int) -> Outgoing:
        """Raises ValueError for what AMQP cannot carry.  room: bytes for headers."""
        headers = headers_of(message)
        if len(headers) > room - KEPT_FREE:
            raise ValueError(f"its headers have {len(headers)} bytes, and there is room for {room - KEPT_FREE}")
        exchange = message.topic if message.only_group is None else group_exchange(message.topic, message.only_group)
        media = media_type(message.content_type)
        return Outgoing(exchange, self._routing_key(message), media, headers, message.body)

    def _routing_key(self, message: Message) -> str:
        if message.key is None:
            return routing_key(message.id.encode())
        known = self._keys.get(message.key)
        if known is None:
            if len(self._keys) > REMEMBERED:
                self._keys.clear()
            known = self._keys[message.key] = routing_key(message.key)
        return known

    # --- what is known of topics -----------------------------------------------------------------------------------

    async def _look_up(
        self, link: Linked, topic: str, group: str | None, missing: set[tuple[str, str | None]], deadline: float
    ) -> TopicFacts | None:
        """The facts, or None where there is no such topic, or no such group of it.

        missing: what was found not to be there by this batch.
        """
        if (topic, group) in missing:
            return None
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                facts = await self._ask(link, topic, group)
        except FAILURES as error:
            raise unavailable(self._settings, f"looking up topic '{topic}'", error) from error
        if facts is None:
            missing.add((topic, group))
        return facts

    async def _ask(self, link: Linked, topic: str, group: str | None) -> TopicFacts | None:
        try:
            check_names(topic, group or "")
        except (ConfigurationError, UnicodeEncodeError):  # then nobody could declare it
            return None
        facts = self._facts.get(topic) or await self._topic(link, topic)
        if facts is not None and group is not None:
            if not await exchange_exists(link.connection, self._settings, group_exchange(topic, group)):
                return None
            self._groups.add((topic, group))
        return facts

    async def _topic(self, link: Linked, topic: str) -> TopicFacts | None:
        if not await exchange_exists(link.connection, self._settings, topic):
            return None
        facts = await read_facts(link.connection, self._settings, topic)
        if facts is not None:
            largest = min(facts.max_message_bytes, largest_message(link.connection))
            facts = self._facts[topic] = TopicFacts(largest)
        return facts

    def _outcome(self, message: Message, fate: Fate, channel: Channel) -> Outcome:
        if fate is Fate.CONFIRMED:
            return Confirmation(message.id)
        if fate is Fate.RETURNED:
            self._groups.discard((message.topic, message.only_group or ""))
            return _unroutable(message)
        if fate is Fate.UNSENT:
            return Rejection(message.id, RejectionReason.UNAVAILABLE, "not sent: the broker took nothing in time")
        if channel.lost is not None:  # perhaps an exchange is gone: all is asked for again
            self._facts.clear()
            self._groups.clear()
        why = {
            Fate.REFUSED: "the broker could not store it in every queue (basic.nack); it may be in some",
            Fate.UNKNOWN: f"sent, and not confirmed: {channel.lost or 'no answer by the deadline'}",
        }
        return InDoubt(message.id, why[fate])


def _lane_of(item: tuple[int, Outgoing]) -> str:
    return item[1].routing_key


def _refusal(message: Message, facts: TopicFacts | None) -> Rejection | None:
    """Why it need not be sent."""
    if facts is None:
        return _unroutable(message)
    if message.size > facts.max_message_bytes:
        detail = f"{message.size} bytes (body, key and headers) are over the limit of {facts.max_message_bytes}"
        return Rejection(message.id, RejectionReason.TOO_LARGE, f"{detail} of topic '{message.topic}'")
    return None


def _unroutable(message: Message) -> Rejection:
    whom = f"group '{message.only_group}' of it" if message.only_group is not None else "a group of it"
    detail = f"topic '{message.topic}' or {whom} is not there, so nobody would receive it; declare it first"
    return Rejection(message.id, RejectionReason.UNROUTABLE, detail)


@asynccontextmanager
async def open_publisher(settings: RabbitmqSettings) -> AsyncIterator[RabbitmqPublisher]:
    """Connect and close.  Raises BrokerUnavailable."""
    async with open_link(settings, "publisher") as link:
        yield RabbitmqPublisher(settings, link)
