"""Chains: the messages of one key in one call, of which nothing is stored behind the first that is not confirmed.

An outbox sends a key's rows again from the first that was not confirmed, so that a later one must not be there before
it (O3).  A backend that stores in the order given tells itself what it may still write (:class:`Chains`); one that
learns the fate of a message only after it has written the next sends a key's second when the first is confirmed
(:func:`send_in_waves`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from reliamq.spi.errors import BrokerUnavailable
from reliamq.spi.messages import Message
from reliamq.spi.outcomes import Confirmation, Outcome, Rejection, RejectionReason

__all__ = ["Chain", "Chains", "Place", "fail", "held_back", "is_behind", "send_in_waves"]

Send = Callable[[Sequence[Message]], Awaitable[Sequence[Outcome]]]


@dataclass(slots=True)
class Chain:
    """The messages of one key in one call.

    number: of the chain in its call, from 1.  length: how many have joined.
    failed: the place of the first that is not confirmed, as far as is known.
    """

    number: int
    length: int = 0
    failed: float = math.inf


@dataclass(slots=True)
class Place:
    """A message's place in its chain, from 0.  Never changed; frozen, it would take three times as long to make."""

    chain: Chain
    number: int


class Chains:
    """Those of one call."""

    def __init__(self) -> None:
        self._chains: dict[tuple[str, bytes], Chain] = {}

    def join(self, message: Message) -> Place | None:
        """The next place in its chain; None where it has no key, and so nothing to be behind of."""
        if message.key is None:
            return None
        name = message.topic, message.key
        chain = self._chains.get(name)
        if chain is None:
            chain = self._chains[name] = Chain(len(self._chains) + 1)
        chain.length += 1
        return Place(chain, chain.length - 1)


def is_behind(place: Place | None) -> bool:
    """Whether one before it is not confirmed, and never will be in this call.  place: None: it is in no chain."""
    return place is not None and place.number > place.chain.failed


def fail(place: Place | None) -> None:
    """The message here is not confirmed.  place: None: it is in no chain."""
    if place is not None:
        place.chain.failed = min(place.chain.failed, place.number)


def held_back(message_id: str, why: str = "one before it with its key is not confirmed") -> Rejection:
    """The outcome of a message that was not sent because of what became of another one."""
    return Rejection(message_id, RejectionReason.BEHIND, f"not sent: {why}")


async def send_in_waves(send: Send, batch: Sequence[Message], deadline: float) -> Sequence[Outcome]:
    """Send in chains by a ``send`` that knows none: each wave has one message of a key, and waits for the one before.

    deadline: monotonic seconds; no wave but the first begins after it.
    Raises BrokerUnavailable when none could be tried.  Cancelled: as ``send``.
    """
    chains, outcomes = Chains(), dict[int, Outcome]()
    places = [chains.join(message) for message in batch]
    for wave in _waves(places):
        late = time.monotonic() >= deadline and bool(outcomes)
        for index in wave:
            if late or is_behind(places[index]):
                outcomes[index] = held_back(batch[index].id, *(["its deadline passed"] if late else []))
        if ready := [index for index in wave if index not in outcomes]:
            answers = await _answers(send, [batch[index] for index in ready], is_first=not outcomes)
            outcomes.update(zip(ready, answers, strict=True))
        for index in wave:
            if not isinstance(outcomes[index], Confirmation):
                fail(places[index])
    return [outcomes[index] for index in range(len(batch))]


async def _answers(send: Send, messages: Sequence[Message], *, is_first: bool) -> Sequence[Outcome]:
    """What was confirmed before stays so, whatever becomes of these."""
    try:
        return await send(messages)
    except BrokerUnavailable as error:
        if is_first:
            raise
        return [Rejection(one.id, RejectionReason.UNAVAILABLE, str(error), error) for one in messages]


def _waves(places: Sequence[Place | None]) -> Sequence[list[int]]:
    """By their indexes: what is at the beginning of a chain, or in none, then the second ones, and so on."""
    waves: list[list[int]] = []
    for index, place in enumerate(places):
        number = 0 if place is None else place.number
        if number == len(waves):
            waves.append([])
        waves[number].append(index)
    return waves
