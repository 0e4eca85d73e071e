"""What a publisher must know of a topic: that it is there, whether a group of it is, and its size limit.

Asked once and kept; a publish to an exchange that is not there would close the channel.  Each topic is answered by
itself: one that cannot be looked up holds up no other.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from aiormq.connection import Connection
from aiormq.exceptions import ChannelAccessRefused

from reliamq.spi import ConfigurationError, Message, Rejection, RejectionReason
from reliamq_rabbitmq.catalog.facts import TopicFacts, read_facts
from reliamq_rabbitmq.catalog.names import check_names, group_exchange
from reliamq_rabbitmq.catalog.topology import exchange_exists
from reliamq_rabbitmq.settings import RabbitmqSettings
from reliamq_rabbitmq.wire.connection import FAILURES
from reliamq_rabbitmq.wire.versions import largest_message

__all__ = ["KnownTopics", "unroutable"]


@dataclass(frozen=True, slots=True)
class _Unknown:
    """Why a topic's messages need not be sent now."""

    reason: RejectionReason
    detail: str
    cause: BaseException | None = None


class KnownTopics:
    """State of one publisher."""

    def __init__(self, settings: RabbitmqSettings) -> None:
        self._settings = settings
        self._facts: dict[str, TopicFacts] = {}
        self._groups: set[tuple[str, str]] = set()
        self._unknown: dict[tuple[str, str | None], _Unknown] = {}

    def forget(self) -> None:
        """Everything: perhaps something is gone."""
        self._facts.clear()
        self._groups.clear()

    def ask_again(self) -> None:
        """What was not known may be by now."""
        self._unknown.clear()

    async def refusal(self, connection: Connection, message: Message, deadline: float) -> Rejection | None:
        """Why the message need not be sent; None where it may be."""
        topic, group = message.topic, message.only_group
        facts = self._facts.get(topic)
        if facts is None or (group is not None and (topic, group) not in self._groups):
            answer = self._unknown.get((topic, group)) or await self._look_up(connection, topic, group, deadline)
            if isinstance(answer, _Unknown):
                self._unknown[topic, group] = answer
                return Rejection(message.id, answer.reason, answer.detail, answer.cause)
            facts = answer  # what is kept may be forgotten by another send meanwhile
        if message.size > facts.max_message_bytes:
            detail = f"{message.size} bytes (body, key and headers) are over the limit of {facts.max_message_bytes}"
            return Rejection(message.id, RejectionReason.TOO_LARGE, f"{detail} of topic '{topic}'")
        return None

    async def _look_up(
        self, connection: Connection, topic: str, group: str | None, deadline: float
    ) -> TopicFacts | _Unknown:
        """The facts, when both the topic and the group are there."""
        try:
            check_names(topic, group or "")
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                return await self._ask(connection, topic, group)
        except (ConfigurationError, UnicodeEncodeError):  # then nobody could declare it
            return _nobody(topic, group)
        except ChannelAccessRefused as error:
            detail = f"topic '{topic}' cannot be looked up; let the user read '{topic}/facts': {error}"
            return _Unknown(RejectionReason.REFUSED, detail, error)
        except (*FAILURES, ValueError, KeyError) as error:
            detail = f"topic '{topic}' cannot be looked up: {error!r}"
            return _Unknown(RejectionReason.UNAVAILABLE, detail, error)

    async def _ask(self, connection: Connection, topic: str, group: str | None) -> TopicFacts | _Unknown:
        facts = self._facts.get(topic) or await self._ask_for_facts(connection, topic)
        if facts is None:
            return _nobody(topic, group)
        if group is not None and not await exchange_exists(connection, self._settings, group_exchange(topic, group)):
            return _nobody(topic, group)
        self._facts[topic] = facts
        if group is not None:
            self._groups.add((topic, group))
        return facts

    async def _ask_for_facts(self, connection: Connection, topic: str) -> TopicFacts | None:
        if not await exchange_exists(connection, self._settings, topic):
            return None
        facts = await read_facts(connection, self._settings, topic)
        return facts and TopicFacts(min(facts.max_message_bytes, largest_message(connection)))


def _nobody(topic: str, group: str | None) -> _Unknown:
    whom = f"group '{group}' of it" if group is not None else "a group of it"
    detail = f"topic '{topic}' or {whom} is not there, so nobody would receive it; declare it first"
    return _Unknown(RejectionReason.UNROUTABLE, detail)


def unroutable(message: Message) -> Rejection:
    """It came back: no queue is bound."""
    nobody = _nobody(message.topic, message.only_group)
    return Rejection(message.id, nobody.reason, nobody.detail)
