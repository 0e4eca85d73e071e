"""Safe departure on RabbitMQ: publisher confirms, persistent, mandatory, and an outcome for each message by the
caller's deadline.

A key has one channel, so that what is sent is stored in that order.  When the connection ends, what was written and not
confirmed is in doubt, and the next batch connects again.  When the broker closes a channel because of one message, it
does not say which: then those that are in doubt are sent once more, each by itself, and the one it was is known.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Hashable, Mapping, Sequence
from contextlib import asynccontextmanager

from reliamq.spi import BrokerUnavailable, Confirmation, InDoubt, Message, Outcome, Rejection, RejectionReason
from reliamq.spi.chains import send_in_waves
from reliamq_rabbitmq.catalog.known_topics import KnownTopics, unroutable
from reliamq_rabbitmq.catalog.names import group_exchange, routing_key
from reliamq_rabbitmq.settings import RabbitmqSettings
from reliamq_rabbitmq.wire.channel import Channel, Fate, Outgoing
from reliamq_rabbitmq.wire.frames import media_type
from reliamq_rabbitmq.wire.link import Link, open_link
from reliamq_rabbitmq.wire.records import headers_of

__all__ = ["RabbitmqPublisher", "open_publisher"]

REMEMBERED, LONGEST_REMEMBERED = 10_000, 256
CHANNEL_DIGITS = len("0.0.0")
CHANNELS = {".".join(f"{number:03b}"): number for number in range(8)}
"""By how the routing key begins."""
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

    gathering_rounds = 1

    def __init__(self, settings: RabbitmqSettings, link: Link) -> None:
        self._link, self._topics = link, KnownTopics(settings)
        self._keys: dict[bytes, str] = {}

    def route(self, message: Message) -> Hashable:
        """One of eight for each topic, each with a channel of its own: a quorum queue lets a channel have 32 messages
        under way, and stores what several have under way together.
        """
        try:
            return message.topic, self._routing_key(message)[:CHANNEL_DIGITS]
        except UnicodeEncodeError:  # it will be refused
            return message.topic

    async def send(self, batch: Sequence[Message], *, deadline: float, chained: bool = False) -> Sequence[Outcome]:
        """Store a batch; see the contract.

        A confirm may come after that of the next message, so a chain's second message waits for the first one's.
        """
        if chained:
            return await send_in_waves(lambda wave: self.send(wave, deadline=deadline), batch, deadline)
        shares: dict[int, dict[int, Message]] = {}
        for index, message in enumerate(batch):
            shares.setdefault(self._channel_of(message), {})[index] = message
        outcomes: dict[int, Outcome] = {}
        self._topics.ask_again()
        if len(shares) == 1:
            ((number, messages),) = shares.items()
            await self._send_share(number, messages, outcomes, deadline)
        else:
            await self._send_shares(shares, outcomes, deadline)
        return [outcomes[index] for index in range(len(batch))]

    def _channel_of(self, message: Message) -> int:
        """Always the same one for a key, so that it keeps its order."""
        try:
            return CHANNELS[self._routing_key(message)[:CHANNEL_DIGITS]]
        except UnicodeEncodeError:
            return 0

    async def _send_shares(
        self, shares: Mapping[int, dict[int, Message]], outcomes: dict[int, Outcome], deadline: float
    ) -> None:
        """Each on its channel, side by side.  Raises BrokerUnavailable where none could be tried."""
        sending = [self._send_share(number, messages, outcomes, deadline) for number, messages in shares.items()]
        results = await asyncio.gather(*sending, return_exceptions=True)
        failures = [result for result in results if isinstance(result, BaseException)]
        if failures and not outcomes:
            raise failures[0]
        for messages, result in zip(shares.values(), results, strict=True):
            if isinstance(result, BrokerUnavailable):
                for index in messages.keys() - outcomes.keys():
                    reason = RejectionReason.UNAVAILABLE
                    outcomes[index] = Rejection(messages[index].id, reason, str(result), result)
            elif isinstance(result, BaseException):
                raise result

    async def _send_share(
        self, number: int, messages: dict[int, Message], outcomes: dict[int, Outcome], deadline: float
    ) -> None:
        code = await self._send(number, messages, outcomes, deadline)
        if code in JUDGED and len(messages) > 1:
            # In their order, so that a key keeps it
            for index in [index for index in messages if isinstance(outcomes[index], InDoubt)]:
                await self._send_alone(number, {index: messages[index]}, outcomes, deadline)

    async def _send_alone(
        self, number: int, alone: dict[int, Message], outcomes: dict[int, Outcome], deadline: float
    ) -> None:
        """What the first attempt left in doubt stays so, unless this one is confirmed."""
        (index,) = alone
        doubt = outcomes[index]
        try:
            await self._send(number, alone, outcomes, deadline)
        except BrokerUnavailable:
            return
        last = outcomes[index]
        if isinstance(last, Rejection) and not last.reason.judges_message:
            outcomes[index] = doubt

    async def _send(
        self, number: int, messages: dict[int, Message], outcomes: dict[int, Outcome], deadline: float
    ) -> int | None:
        """One attempt on one channel; for what the broker closed it, if it did."""
        link = await self._link.get(deadline, number)
        outgoing: list[tuple[int, Outgoing]] = []
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
        if link.channel.closed_for is not None:  # perhaps an exchange is gone
            self._topics.forget()
        if Fate.REFUSED in fates:
            self._link.renew(number, link.channel)
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
    return InDoubt(message.id, f"sent, and not confirmed: {channel.lost or 'no answer in time'}")


@asynccontextmanager
async def open_publisher(settings: RabbitmqSettings) -> AsyncIterator[RabbitmqPublisher]:
    """Connect and close.  Raises BrokerUnavailable."""
    async with open_link(settings, "publisher", channels=len(CHANNELS)) as link:
        yield RabbitmqPublisher(settings, link)
