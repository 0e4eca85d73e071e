"""Safe departure on RabbitMQ: publisher confirms, persistent, mandatory, and an outcome for each message by the
caller's deadline.

One channel, so that what is sent is stored in that order.  When the connection ends, what was written and not confirmed
is in doubt, and the next batch connects again.  When the broker closes the channel because of one message, it does not
say which: then those that are in doubt are sent once more, each by itself, and the one it was is known.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Hashable, Sequence
from contextlib import asynccontextmanager

from reliamq.spi import BrokerUnavailable, Confirmation, InDoubt, Message, Outcome, Rejection, RejectionReason
from reliamq_rabbitmq.catalog.known_topics import KnownTopics, unroutable
from reliamq_rabbitmq.catalog.names import group_exchange, routing_key
from reliamq_rabbitmq.settings import RabbitmqSettings
from reliamq_rabbitmq.wire.channel import Channel, Fate, Outgoing
from reliamq_rabbitmq.wire.frames import media_type
from reliamq_rabbitmq.wire.link import Link, open_link
from reliamq_rabbitmq.wire.records import headers_of

__all__ = ["RabbitmqPublisher", "open_publisher"]

REMEMBERED, LONGEST_REMEMBERED = 10_000, 256
ROUTE_DIGITS = len("0.0")
KEPT_FREE = 32 * 1024
"""Of a message's headers, for what a dead letter says besides; a quarter where frames are small."""
JUDGED = {
    403: RejectionReason.REFUSED,
    404: RejectionReason.UNROUTABLE,
    406: RejectionReason.TOO_LARGE,
}
"""For what the broker closes a channel, and what it says of the message that was the only one on it: no permission, no
exchange, over ``max_message_size`` (AMQP 0-9-1, section 1.5; RabbitMQ's documentation, "Channels")."""


class RabbitmqPublisher:
    """A :class:`~reliamq.spi.Publisher`."""

    def __init__(self, settings: RabbitmqSettings, link: Link) -> None:
        self._link, self._topics = link, KnownTopics(settings)
        self._keys: dict[bytes, str] = {}

    def route(self, message: Message) -> Hashable:
        """One of four for each topic, which with four lanes are the lanes: few, because a batch costs the broker less
        when it is large, and more than one, so that the client works while the broker does.
        """
        try:
            return message.topic, self._routing_key(message)[:ROUTE_DIGITS]
        except UnicodeEncodeError:  # it will be refused
            return message.topic

    async def send(self, batch: Sequence[Message], *, deadline: float) -> Sequence[Outcome]:
        """Store a batch; see the contract."""
        outcomes: dict[int, Outcome] = {}
        code = await self._send(dict(enumerate(batch)), outcomes, deadline)
        if code in JUDGED and len(batch) > 1:
            # In their order, so that a key keeps it
            for index in [index for index in range(len(batch)) if isinstance(outcomes[index], InDoubt)]:
                await self._send_alone(index, batch[index], outcomes, deadline)
        return [outcomes[index] for index in range(len(batch))]

    async def _send_alone(self, index: int, message: Message, outcomes: dict[int, Outcome], deadline: float) -> None:
        """What the first attempt left in doubt stays so, unless this one is confirmed."""
        doubt = outcomes[index]
        try:
            await self._send({index: message}, outcomes, deadline)
        except BrokerUnavailable:
            return
        last = outcomes[index]
        if isinstance(last, Rejection) and not last.reason.judges_message:
            outcomes[index] = doubt

    async def _send(self, messages: dict[int, Message], outcomes: dict[int, Outcome], deadline: float) -> int | None:
        """One attempt; for what the broker closed the channel, if it did."""
        link = await self._link.get(deadline)
        outgoing: list[tuple[int, Outgoing]] = []
        self._topics.ask_again()
        for index, message in messages.items():
            try:
                if rejection := await self._topics.refusal(link.connection, message, deadline):
                    outcomes[index] = rejection
                else:
                    outgoing.append((index, self._outgoing(message, link.channel.header_room)))
            except ValueError as error:
                detail = f"AMQP cannot carry it: {error}"
                outcomes[index] = Rejection(message.id, RejectionReason.INVALID, detail, error)
        # Lane by lane: what a quorum queue gets at once it writes and replicates at once, which costs the broker a
        # third less.  A key's messages have one routing key, so they stay in order.
        outgoing.sort(key=_lane_of)
        fates = await link.channel.publish([one for _, one in outgoing], deadline=deadline)
        if link.channel.lost is not None:  # perhaps an exchange is gone
            self._topics.forget()
        alone = len(messages) == 1
        for (index, _), fate in zip(outgoing, fates, strict=True):
            outcomes[index] = _outcome(messages[index], fate, link.channel, alone=alone)
        return link.channel.closed_for

    def _outgoing(self, message: Message, room: int) -> Outgoing:
        """Raises ValueError for what AMQP cannot carry.  room: bytes for headers."""
        headers, room = headers_of(message), room - min(KEPT_FREE, room // 4)
        if len(headers) > room:
            raise ValueError(f"its headers have {len(headers)} bytes, and there is room for {room}")
        exchange = message.topic if message.only_group is None else group_exchange(message.topic, message.only_group)
        media = media_type(message.content_type)
        return Outgoing(exchange, self._routing_key(message), media, headers, message.body)

    def _routing_key(self, message: Message) -> str:
        key = message.key
        if key is None:
            return routing_key(message.id.encode())
        known = self._keys.get(key)
        if known is None:
            known = routing_key(key)
            if len(self._keys) > REMEMBERED:
                self._keys.clear()
            if len(key) <= LONGEST_REMEMBERED:
                self._keys[key] = known
        return known


def _lane_of(item: tuple[int, Outgoing]) -> str:
    return item[1].routing_key


def _outcome(message: Message, fate: Fate, channel: Channel, *, alone: bool) -> Outcome:
    """alone: it was the only one on the way, so that a channel which was closed was closed because of it."""
    if fate is Fate.CONFIRMED:
        return Confirmation(message.id)
    if fate is Fate.RETURNED:
        return unroutable(message)
    if fate is Fate.UNSENT:
        return Rejection(message.id, RejectionReason.UNAVAILABLE, "not sent: the broker took nothing in time")
    if fate is Fate.REFUSED:
        why = "the broker could not store it in every queue (basic.nack); it may be in some"
        return InDoubt(message.id, why)
    reason = JUDGED.get(channel.closed_for or 0)
    if alone and reason is not None:
        return Rejection(message.id, reason, f"the broker refuses it: {channel.lost}")
    return InDoubt(message.id, f"sent, and not confirmed: {channel.lost or 'no answer by the deadline'}")


@asynccontextmanager
async def open_publisher(settings: RabbitmqSettings) -> AsyncIterator[RabbitmqPublisher]:
    """Connect and close.  Raises BrokerUnavailable."""
    async with open_link(settings, "publisher") as link:
        yield RabbitmqPublisher(settings, link)
