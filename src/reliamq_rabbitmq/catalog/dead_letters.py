"""Where given-up messages rest: one quorum queue, of which nothing expires.

Who looks reads it from its beginning to its end, alone for that while, and leaves everything where it is.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime

from aiormq.connection import Connection

from reliamq.spi import (
    Confirmation,
    DeadLetterRecord,
    InDoubt,
    Outcome,
    Rejection,
    RejectionReason,
)
from reliamq_rabbitmq.catalog.names import DEAD_LETTERS
from reliamq_rabbitmq.catalog.topology import open_topology
from reliamq_rabbitmq.settings import RabbitmqSettings
from reliamq_rabbitmq.wire.channel import Fate, Outgoing, Received
from reliamq_rabbitmq.wire.connection import FAILURES, answered, unavailable
from reliamq_rabbitmq.wire.frames import media_type
from reliamq_rabbitmq.wire.journal import Journal, open_journal
from reliamq_rabbitmq.wire.link import Link, Linked, open_link
from reliamq_rabbitmq.wire.records import OURS, headers_of, message_of, own_headers

__all__ = ["RabbitmqDeadLetters", "open_dead_letters"]

logger = logging.getLogger("reliamq.rabbitmq")
SHARE = 10
"""The reason and the traceback each have so much of the room for headers: AMQP has all of them in one frame."""
LOOK_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class _Name:
    """What tells dead letters apart: which message, for whom, and which of its deaths."""

    topic: str
    group: str
    message_id: str
    died_at: str

    @property
    def identity(self) -> tuple[str, str, str]:
        """Without the time of death: of these the last counts."""
        return self.topic, self.group, self.message_id


class RabbitmqDeadLetters:
    """A :class:`~reliamq.spi.DeadLetters`."""

    def __init__(self, settings: RabbitmqSettings, link: Link) -> None:
        self._settings, self._link = settings, link

    async def add(self, records: Sequence[DeadLetterRecord], *, deadline: float) -> Sequence[Outcome]:
        """Store dead letters; see the contract."""
        linked = await self._link.get(deadline)
        outcomes: dict[int, Outcome] = {}
        outgoing: dict[int, Outgoing] = {}
        for index, record in enumerate(records):
            try:
                outgoing[index] = _outgoing(record, linked.channel.header_room)
            except ValueError as error:
                detail = f"a text of it cannot be stored: {error}"
                outcomes[index] = Rejection(record.message.id, RejectionReason.INVALID, detail, error)
        fates = await linked.channel.publish(list(outgoing.values()), deadline=deadline)
        if Fate.RETURNED in fates:
            fates = await self._send_again(linked, list(outgoing.values()), fates, deadline)
        for index, fate in zip(outgoing, fates, strict=True):
            outcomes[index] = _outcome(records[index].message.id, fate)
        return [outcomes[index] for index in range(len(records))]

    async def _send_again(
        self, linked: Linked, outgoing: Sequence[Outgoing], fates: Sequence[Fate], deadline: float
    ) -> Sequence[Fate]:
        """The queue is gone, with what was in it."""
        logger.error("%s was deleted, and is declared again", DEAD_LETTERS)
        try:
            await _declare(linked.connection, self._settings)
        except FAILURES as error:
            raise unavailable(self._settings, f"declaring {DEAD_LETTERS}", error) from error
        returned = [one for one, fate in zip(outgoing, fates, strict=True) if fate is Fate.RETURNED]
        again = iter(await linked.channel.publish(returned, deadline=deadline))
        return [next(again) if fate is Fate.RETURNED else fate for fate in fates]

    async def find(
        self, *, topic: str | None = None, group: str | None = None, message_id: str | None = None, limit: int = 100
    ) -> Sequence[DeadLetterRecord]:
        """Those that match, in the order in which they were stored; see the contract."""
        found: dict[tuple[str, str, str], _Name] = {}

        def note(name: _Name, received: Received) -> None:
            if topic in (None, name.topic) and group in (None, name.group) and message_id in (None, name.message_id):
                found.pop(name.identity, None)
                found[name.identity] = name

        async with self._reading(note):
            pass
        return await self._read(list(found.values())[: max(0, limit)])

    async def _read(self, names: Sequence[_Name]) -> Sequence[DeadLetterRecord]:
        """These, in that order.  The queue is read twice, so that memory holds the messages only of those."""
        wanted, bodies = set(names), dict[_Name, Received]()

        def take(name: _Name, received: Received) -> None:
            if name in wanted:
                bodies[name] = received

        if names:
            async with self._reading(take):
                pass
        return [_record(bodies[name]) for name in names if name in bodies]

    async def remove(self, records: Sequence[DeadLetterRecord]) -> int:
        """Remove these; see the contract."""
        if not records:
            return 0
        deaths: dict[tuple[str, str, str], list[tuple[_Name, int]]] = {}

        def take(name: _Name, received: Received) -> None:
            deaths.setdefault(name.identity, []).append((name, received.tag))

        asked = {_name_of(record) for record in records}
        async with self._reading(take) as journal:
            doomed = [names for names in deaths.values() if names[-1][0] in asked]
            # The last one last: if this stops halfway, none that was replaced comes to light again
            await journal.remove([tag for names in doomed for _, tag in names])
            await answered(journal.flush(), self._settings.request_timeout_seconds)
        return len(doomed)

    @asynccontextmanager
    async def _reading(self, take: Callable[[_Name, Received], None]) -> AsyncIterator[Journal]:
        """Read it all; nobody else reads while the block runs."""
        foreign: list[Received] = []

        def came(received: Received) -> None:
            name = _name_in(received)
            if name is None:
                foreign.append(received)
            else:
                take(name, received)

        linked = await self._link.get(time.monotonic() + self._settings.request_timeout_seconds)
        try:
            async with open_journal(linked.connection, self._settings, DEAD_LETTERS, came) as journal:
                await answered(journal.read_all(), LOOK_SECONDS)
                if foreign:
                    logger.error("%s holds %d messages that reliamq did not write", DEAD_LETTERS, len(foreign))
                yield journal
        except FAILURES as error:
            raise unavailable(self._settings, f"reading {DEAD_LETTERS}", error) from error


def _outgoing(record: DeadLetterRecord, room: int) -> Outgoing:
    facts = {
        "topic": record.message.topic,
        "group": record.group,
        "died-at": record.died_at.isoformat(),
        "handler": record.handler,
        "reason": record.reason.encode()[: room // SHARE].decode(errors="ignore"),
        "traceback": record.traceback.encode()[-(room // SHARE) :].decode(errors="ignore"),
        "attempts": str(record.attempts),
        "position": record.position,
    }
    headers = headers_of(record.message, [(OURS + name, text) for name, text in facts.items()])
    if len(headers) > room:
        raise ValueError(f"its headers have {len(headers)} bytes with why it died, and there is room for {room}")
    return Outgoing("", DEAD_LETTERS, media_type(record.message.content_type), headers, record.message.body)


def _name_of(record: DeadLetterRecord) -> _Name:
    return _Name(record.message.topic, record.group, record.message.id, record.died_at.isoformat())


def _name_in(received: Received) -> _Name | None:
    facts, identity = own_headers(received.headers), received.headers.get("cloudEvents:id")
    parts = [facts.get("topic"), facts.get("group"), identity, facts.get("died-at")]
    return _Name(*[str(part) for part in parts]) if all(isinstance(part, str) for part in parts) else None


def _record(received: Received) -> DeadLetterRecord:
    facts = {name: str(value) for name, value in own_headers(received.headers).items()}
    return DeadLetterRecord(
        message=message_of(facts["topic"], received.content_type, received.body, received.headers),
        group=facts["group"],
        handler=facts["handler"],
        reason=facts["reason"],
        traceback=facts["traceback"],
        attempts=int(facts["attempts"]),
        died_at=datetime.fromisoformat(facts["died-at"]),
        position=facts["position"],
    )


def _outcome(message_id: str, fate: Fate) -> Outcome:
    if fate is Fate.CONFIRMED:
        return Confirmation(message_id)
    if fate is Fate.UNSENT:
        return Rejection(message_id, RejectionReason.UNAVAILABLE, "the broker took nothing in time")
    if fate is Fate.RETURNED:
        return Rejection(message_id, RejectionReason.UNAVAILABLE, f"the queue {DEAD_LETTERS} is gone")
    return InDoubt(message_id, f"the dead letter is not confirmed: {fate.value}")


async def _declare(connection: Connection, settings: RabbitmqSettings) -> None:
    async with open_topology(connection, settings) as topology:
        await topology.queue(DEAD_LETTERS)


@asynccontextmanager
async def open_dead_letters(settings: RabbitmqSettings) -> AsyncIterator[RabbitmqDeadLetters]:
    """Connect and close; the queue is made when it is not there.  Raises BrokerUnavailable."""
    async with open_link(settings, "dead letters") as link:
        try:
            linked = await link.get(time.monotonic() + settings.request_timeout_seconds)
            await _declare(linked.connection, settings)
        except FAILURES as error:
            raise unavailable(settings, f"declaring {DEAD_LETTERS}", error) from error
        yield RabbitmqDeadLetters(settings, link)
