"""Safe departure on Redis: waiting callers' messages are added together, and confirmed when replicas have them.

A batch is one script for each lane, and one ``WAITAOF`` (or ``WAIT``) behind them on the same connection.  Fewer
replicas than asked by the deadline: in doubt, with how many have it.  A connection that ends leaves in doubt what was
on it; the caller repeats it with the same id, and the consumer knows it by that.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Hashable, Mapping, Sequence
from contextlib import asynccontextmanager
from itertools import chain, repeat
from typing import Any

from reliamq.spi import (
    BrokerUnavailable,
    Confirmation,
    Durability,
    InDoubt,
    Message,
    Outcome,
    Rejection,
    RejectionReason,
)
from reliamq.spi.chains import Chains, Place, fail, held_back, is_behind
from reliamq_redis.catalog.names import lane_of, slot_of, stream_of
from reliamq_redis.catalog.topics import TopicFacts, read_facts
from reliamq_redis.scripts import script
from reliamq_redis.settings import RedisSettings
from reliamq_redis.wire.errors import FAILURES, explained, is_elsewhere, is_forbidden, said, why_refused
from reliamq_redis.wire.pipe import ANSWER_SECONDS, Pipe, Unfinished, open_pipe
from reliamq_redis.wire.records import fields_of
from reliamq_redis.wire.servers import Address, Servers, open_servers

__all__ = ["RedisPublisher", "open_publisher"]

PUBLISH = script("publish")
_Sending = tuple[Message, Place | None]
"""A message, and its place in its chain."""
NOT_TRIED = 0
"""The script's answer for what is behind a message of its chain that was not stored."""
ROUTES = 2
"""How many batches are under way at once: while one waits for the replicas, another is made."""
REMEMBERED, LONGEST_REMEMBERED = 10_000, 256
MOST_FIELDS = 7_000
"""Names and values: Lua passes on 8,000 at once."""


class RedisPublisher:
    """A :class:`~reliamq.spi.Publisher`."""

    gathering_rounds = 1

    def __init__(self, settings: RedisSettings, servers: Servers) -> None:
        self._settings, self._servers = settings, servers
        self._facts: dict[str, TopicFacts] = {}
        self._known: dict[str, TopicFacts] = {}  # also what is asked anew at the next message
        self._pipes: dict[tuple[int, Address], Pipe] = {}
        self._locks: dict[tuple[int, Address], asyncio.Lock] = {}
        self._slots: dict[bytes, int] = {}

    def route(self, message: Message) -> Hashable:
        """One of two for all topics: a batch costs less when it is large."""
        return self._slot(message) % ROUTES

    def _slot(self, message: Message) -> int:
        key = message.key
        if key is None:
            return slot_of(message.id.encode(errors="surrogatepass"))
        known = self._slots.get(key)
        if known is None:
            known = slot_of(key)
            if len(self._slots) > REMEMBERED:
                self._slots.clear()
            if len(key) <= LONGEST_REMEMBERED:
                self._slots[key] = known
        return known

    async def send(self, batch: Sequence[Message], *, deadline: float, chained: bool = False) -> Sequence[Outcome]:
        """Store a batch; see the contract."""
        outcomes: dict[int, Outcome] = {}
        chains = Chains() if chained else None
        holders: dict[str, Address] = {}  # one for the whole call, though a failover may come: so a key keeps its order
        shares: dict[tuple[int, Address], dict[int, _Sending]] = {}
        for index, message in enumerate(batch):
            place = None if chains is None else chains.join(message)
            if is_behind(place):
                outcomes[index] = held_back(message.id)
                continue
            way = await self._way(message, outcomes, index, deadline, holders)
            if way is not None:
                shares.setdefault(way, {})[index] = message, place
            else:
                fail(place)
        sending = [self._send_share(*way, messages, outcomes, deadline) for way, messages in shares.items()]
        if len(sending) == 1:
            await sending[0]
        else:
            await asyncio.gather(*sending)
        return [outcomes[index] for index in range(len(batch))]

    # --- where to --------------------------------------------------------------------------------------------------

    async def _way(
        self,
        message: Message,
        outcomes: dict[int, Outcome],
        index: int,
        deadline: float,
        holders: dict[str, Address],
    ) -> tuple[int, Address] | None:
        """Its route and server; None with an outcome, where it is not sent."""
        facts = self._facts.get(message.topic)
        if facts is None or message.size > facts.max_message_bytes:  # the limit may have been raised since
            answer = await self._look_up(message, deadline)
            if isinstance(answer, Rejection):
                outcomes[index] = answer
                return None
            facts = answer
        if message.size > facts.max_message_bytes:
            detail = f"{message.size} bytes (body, key and headers) are over the limit of {facts.max_message_bytes}"
            outcomes[index] = Rejection(message.id, RejectionReason.TOO_LARGE, f"{detail} of topic '{message.topic}'")
            return None
        stream = self._stream(message, facts)
        if stream in holders:
            return self._slot(message) % ROUTES, holders[stream]
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                holder = holders[stream] = await self._servers.holder(stream)
        except (*FAILURES, BrokerUnavailable) as error:
            outcomes[index] = _not_sent(self._settings, message, "nobody is known who holds its stream", error)
            return None
        return self._slot(message) % ROUTES, holder

    def _stream(self, message: Message, facts: TopicFacts) -> str:
        return stream_of(message.topic, lane_of(self._slot(message), facts.lanes))

    async def _look_up(self, message: Message, deadline: float) -> TopicFacts | Rejection:
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                facts = await read_facts(self._servers, message.topic)
        except (*FAILURES, BrokerUnavailable, ValueError, KeyError) as error:
            return _not_sent(self._settings, message, f"topic '{message.topic}' cannot be looked up", error)
        if facts is None:
            self._facts.pop(message.topic, None)
            return _unroutable(message)
        self._facts[message.topic] = self._known[message.topic] = facts
        return facts

    def _lock(self, route: int, address: Address) -> asyncio.Lock:
        return self._locks.setdefault((route, address), asyncio.Lock())

    async def _pipe(self, route: int, address: Address) -> Pipe:
        """The route's connection to that server, made again if it has ended."""
        pipe = self._pipes.get((route, address))
        if pipe is None or pipe.lost:
            async with asyncio.timeout(self._settings.request_timeout_seconds):
                pipe = self._pipes[route, address] = await open_pipe(self._servers.client(address))
        return pipe

    # --- sending ---------------------------------------------------------------------------------------------------

    async def _send_share(
        self,
        route: int,
        address: Address,
        messages: Mapping[int, _Sending],
        outcomes: dict[int, Outcome],
        deadline: float,
    ) -> None:
        """What goes over one connection.  Cancelled: it is in doubt."""
        lanes, written = self._lanes(messages, outcomes), False
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())), self._lock(route, address):
                pipe = await self._pipe(route, address)
                written = True
                calls = [((lane.stream,), lane.arguments) for lane in lanes]
                answers = await pipe.run(PUBLISH, calls, self._settings.request_timeout_seconds)
                for lane, answer in zip(lanes, answers, strict=True):
                    lane.take(answer)
                unsafe = await self._why_unsafe(pipe, lanes, deadline)
        except (*FAILURES, BrokerUnavailable, Unfinished) as error:
            self._servers.forget()
            for lane in lanes:
                outcomes |= lane.interrupted(error, written=written)
            return
        for lane in lanes:
            outcomes |= lane.outcomes(unsafe if lane.durability is not Durability.DEVELOPMENT else "")
            self._learn(lane)

    def _lanes(self, messages: Mapping[int, _Sending], outcomes: dict[int, Outcome]) -> Sequence[_Lane]:
        """What goes to each stream; what no stream can hold has its outcome at once."""
        lanes: dict[str, _Lane] = {}
        for index, (message, place) in messages.items():
            facts = self._known[message.topic]
            stream = self._stream(message, facts)
            lane = lanes.get(stream) or lanes.setdefault(
                stream, _Lane(self._settings, message.topic, stream, facts.durability)
            )
            if is_behind(place):
                outcomes[index] = held_back(message.id)
                continue
            try:
                lane.add(index, message, place)
            except ValueError as error:
                detail = f"Redis cannot hold it: {error}"
                outcomes[index] = Rejection(message.id, RejectionReason.INVALID, detail, error)
                fail(place)
        return [lane for lane in lanes.values() if lane.messages]

    async def _why_unsafe(self, pipe: Pipe, lanes: Sequence[_Lane], deadline: float) -> str:
        """Wait until what was stored is as safe as its topics ask; why it is not, or empty.  Raises Unfinished.

        It waits for as long as there is time: whoever repeats a message stores it twice.
        """
        asked = max((lane.durability for lane in lanes if lane.stored), default=Durability.DEVELOPMENT)
        if asked is Durability.DEVELOPMENT:
            return ""
        replicas = self._settings.replicas if asked is Durability.REPLICATED else 0
        while True:
            left = deadline - time.monotonic() - ANSWER_SECONDS
            reached = await pipe.wait(replicas, max(0.001, min(left, self._settings.request_timeout_seconds)))
            if isinstance(reached, Exception):
                await asyncio.sleep(max(0.0, left))  # it is stored; whoever repeats it now stores it again
                return said(reached)
            if reached >= replicas:
                return ""
            if left <= self._settings.request_timeout_seconds:
                where = "on their disks" if pipe.to_disk else "in memory"
                return f"the primary has it, and {reached} of {replicas} replicas {where}"

    def _learn(self, lane: _Lane) -> None:
        """From what was refused: what was known may be wrong by now."""
        refused = [one for one in lane.answers if not isinstance(one, bytes)]
        if None in refused:
            self._facts.pop(lane.topic, None)
        if any(isinstance(one, Exception) and is_elsewhere(one) for one in refused):
            self._servers.forget()

    async def close(self) -> None:
        """End its connections."""
        for pipe in self._pipes.values():
            await pipe.close()


class _Lane:
    """What one batch has for one stream.

    messages: by their places in the batch, in the order of ``arguments``, the script's.
    answers: for each an entry's id, None where nobody would receive it, 0 where one before it in its chain was not
    stored, or the server's error.
    """

    def __init__(self, settings: RedisSettings, topic: str, stream: str, durability: Durability) -> None:
        self._settings = settings
        self.topic, self.stream, self.durability = topic, stream, durability
        self.messages: dict[int, _Sending] = {}
        self.arguments: list[Any] = []
        self.answers: list[Any] = []

    def add(self, index: int, message: Message, place: Place | None) -> None:
        """Raises ValueError for one that cannot be written."""
        fields = fields_of(message)
        if len(fields) > MOST_FIELDS:
            raise ValueError(
                f"with its headers it has {len(fields) // 2} fields, and there is room for {MOST_FIELDS // 2}"
            )
        encoded = [part.encode() if isinstance(part, str) else part for part in fields]
        chain = 0 if place is None else place.chain.number
        self.arguments += ((message.only_group or "").encode(), chain, len(encoded), *encoded)
        self.messages[index] = message, place

    def take(self, answer: Any) -> None:
        """What the script said; an error in place of a list: it did nothing."""
        self.answers = [answer] * len(self.messages) if isinstance(answer, Exception) else answer

    @property
    def stored(self) -> bool:
        """Whether any of it is."""
        return any(isinstance(one, bytes) for one in self.answers)

    def outcomes(self, unsafe: str) -> Mapping[int, Outcome]:
        """unsafe: why what is stored is not confirmed; empty: it is."""
        return {
            index: self._outcome(*sending, answer, unsafe)
            for (index, sending), answer in zip(self.messages.items(), self.answers, strict=True)
        }

    def interrupted(self, error: BaseException, *, written: bool) -> Mapping[int, Outcome]:
        """written: they may be stored, unless the server said before that they are not."""
        return {
            index: self._interrupted(*sending, answer, error) if written else self._not_sent(sending[0], error)
            for (index, sending), answer in zip(self.messages.items(), chain(self.answers, repeat(b"")), strict=False)
        }

    def _outcome(self, message: Message, place: Place | None, answer: Any, unsafe: str) -> Outcome:
        if answer is None:
            return _unroutable(message)
        if answer == NOT_TRIED:
            return held_back(message.id)
        if isinstance(answer, Exception) and is_behind(place):  # the server refuses all, and judges the first
            return held_back(message.id)
        if isinstance(answer, Exception):
            fail(place)
            detail = f"the server refuses it: {explained(self._settings, answer)}"
            return Rejection(message.id, why_refused(answer), detail, answer)
        if unsafe:
            return InDoubt(message.id, f"stored, and not confirmed: {unsafe}")
        return Confirmation(message.id, _said(answer))

    def _interrupted(self, message: Message, place: Place | None, answer: Any, error: BaseException) -> Outcome:
        if isinstance(answer, bytes):
            return InDoubt(message.id, f"sent, and not confirmed: {said(error)}", error)
        return self._outcome(message, place, answer, "")

    def _not_sent(self, message: Message, error: BaseException) -> Rejection:
        return _not_sent(self._settings, message, "not sent", error)


def _not_sent(settings: RedisSettings, message: Message, what: str, error: BaseException) -> Rejection:
    """Before anything could be stored."""
    reason = RejectionReason.REFUSED if is_forbidden(error) else RejectionReason.UNAVAILABLE
    return Rejection(message.id, reason, f"{what}: {explained(settings, error)}", error)


def _said(answer: bytes) -> str:
    return answer.decode()


def _unroutable(message: Message) -> Rejection:
    whom = f"group '{message.only_group}' of it" if message.only_group is not None else "a group of it"
    detail = f"topic '{message.topic}' or {whom} is not there, so nobody would receive it; declare it first"
    return Rejection(message.id, RejectionReason.UNROUTABLE, detail)


@asynccontextmanager
async def open_publisher(settings: RedisSettings) -> AsyncIterator[RedisPublisher]:
    """Connect and close.  Raises BrokerUnavailable."""
    async with open_servers(settings) as servers:
        publisher = RedisPublisher(settings, servers)
        try:
            yield publisher
        finally:
            await publisher.close()
