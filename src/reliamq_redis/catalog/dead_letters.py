"""Dead letters of all topics: a sorted set that knows their order, and a hash for each.

All have one tag, so that a Cluster keeps them on one node, and adding and removing are single steps.  They do not
expire (C5).
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from reliamq.spi import (
    BrokerUnavailable,
    Confirmation,
    DeadLetterRecord,
    Durability,
    InDoubt,
    Message,
    Outcome,
    Rejection,
    RejectionReason,
)
from reliamq_redis.catalog.names import DEAD
from reliamq_redis.catalog.topics import read_facts
from reliamq_redis.scripts import script
from reliamq_redis.settings import RedisSettings
from reliamq_redis.wire.errors import FAILURES, explained, is_forbidden, said, why_refused
from reliamq_redis.wire.pipe import ANSWER_SECONDS, Pipe, Unfinished, open_pipe
from reliamq_redis.wire.records import Fields, fields_of, message_of, own_fields
from reliamq_redis.wire.servers import Address, Servers, open_servers, unavailable

__all__ = ["RedisDeadLetters", "open_dead_letters"]

BURY, UNBURY = script("bury"), script("unbury")
ORDER = f"{DEAD}:order"
PAGE = 200
MOST_FIELDS = 7_500
"""Names and values: those of a message with as many headers as can be published, and of what is said about it.  Lua
passes on 8,000 at once.
"""
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class _Name:
    topic: str
    group: str
    message_id: str

    def __str__(self) -> str:
        return json.dumps([self.topic, self.group, self.message_id])

    @property
    def keys(self) -> Sequence[str]:
        """Of the scripts."""
        return ORDER, f"{DEAD}:{self}"


class RedisDeadLetters:
    """A :class:`~reliamq.spi.DeadLetters`."""

    def __init__(self, settings: RedisSettings, servers: Servers) -> None:
        self._settings, self._servers = settings, servers
        self._idle: dict[Address, list[Pipe]] = {}
        self._asked: dict[str, Durability] = {}

    async def add(self, records: Sequence[DeadLetterRecord], *, deadline: float) -> Sequence[Outcome]:
        """Store dead letters; see the contract."""
        outcomes: dict[int, Outcome] = {}
        calls: dict[int, tuple[Sequence[str], Sequence[Any]]] = {}
        for index, record in enumerate(records):
            try:
                calls[index] = _name_of(record).keys, _arguments(record)
            except ValueError as error:
                detail = f"Redis cannot hold the dead letter: {error}"
                outcomes[index] = Rejection(record.message.id, RejectionReason.INVALID, detail, error)
        if calls:
            outcomes |= await self._add({index: records[index].message for index in calls}, calls, deadline)
        return [outcomes[index] for index in range(len(records))]

    async def _add(
        self, messages: dict[int, Message], calls: dict[int, tuple[Sequence[str], Sequence[Any]]], deadline: float
    ) -> dict[int, Outcome]:
        written, replicas = False, None
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())), self._pipe() as pipe:
                replicas = await self._replicas({message.topic for message in messages.values()})
                written = True
                answers = await pipe.run(BURY, list(calls.values()), self._settings.request_timeout_seconds)
                left = max(0.001, deadline - time.monotonic() - ANSWER_SECONDS)
                reached = await pipe.wait(replicas, left) if replicas is not None else 0
        except (*FAILURES, BrokerUnavailable, Unfinished) as error:
            self._servers.forget()
            return {index: self._interrupted(message.id, error, written) for index, message in messages.items()}
        if any(isinstance(answer, Exception) for answer in answers):
            self._servers.forget()
        return {
            index: self._outcome(message.id, answer, reached, replicas or 0)
            for (index, message), answer in zip(messages.items(), answers, strict=True)
        }

    async def _replicas(self, topics: Collection[str]) -> int | None:
        """How many must have it: what the most careful of the topics asks of a message; None: not even the disk."""
        asked = Durability.DEVELOPMENT
        for topic in topics:
            if topic not in self._asked:
                with suppress(*FAILURES, BrokerUnavailable, ValueError, KeyError):  # then as careful as can be
                    facts = await read_facts(self._servers, topic)
                    self._asked[topic] = Durability.REPLICATED if facts is None else facts.durability
            asked = max(asked, self._asked.get(topic, Durability.REPLICATED))
        return {Durability.REPLICATED: self._settings.replicas, Durability.FSYNCED: 0}.get(asked)

    @asynccontextmanager
    async def _pipe(self) -> AsyncIterator[Pipe]:
        """A connection that nobody else uses meanwhile: the groups of a worker bury at the same time."""
        address = await self._servers.holder(ORDER)
        idle = self._idle.setdefault(address, [])
        pipe = idle.pop() if idle else await self._open(address)
        try:
            yield pipe
        finally:
            if not pipe.lost:
                idle.append(pipe)

    async def _open(self, address: Address) -> Pipe:
        async with asyncio.timeout(self._settings.request_timeout_seconds):
            return await open_pipe(self._servers.client(address))

    def _outcome(self, message_id: str, answer: Any, reached: Any, replicas: int) -> Outcome:
        if isinstance(answer, Exception):
            detail = f"the server refuses it: {explained(self._settings, answer)}"
            return Rejection(message_id, why_refused(answer), detail, answer)
        if isinstance(reached, Exception):
            return InDoubt(message_id, f"stored, and not confirmed: {said(reached)}", reached)
        if reached < replicas:
            return InDoubt(message_id, f"stored, and not confirmed: {reached} of {replicas} replicas have it")
        return Confirmation(message_id)

    def _interrupted(self, message_id: str, error: BaseException, written: bool) -> Outcome:
        if written:
            return InDoubt(message_id, f"sent, and not confirmed: {said(error)}", error)
        reason = RejectionReason.REFUSED if is_forbidden(error) else RejectionReason.UNAVAILABLE
        return Rejection(message_id, reason, f"not sent: {explained(self._settings, error)}", error)

    async def find(
        self, *, topic: str | None = None, group: str | None = None, message_id: str | None = None, limit: int = 100
    ) -> Sequence[DeadLetterRecord]:
        """Those that match, oldest first; see the contract.  Raises BrokerUnavailable."""
        found: list[DeadLetterRecord] = []
        start = 0
        try:
            while len(found) < limit:
                page: Any = await self._servers.call(ORDER, "ZRANGE", ORDER, start, start + PAGE - 1)
                for text in page:
                    name = _Name(*json.loads(text))
                    if (
                        topic in (None, name.topic)
                        and group in (None, name.group)
                        and message_id in (None, name.message_id)
                        and len(found) < limit
                    ):
                        found += await self._read(name)
                if len(page) < PAGE:
                    break
                start += PAGE
        except FAILURES as error:
            raise unavailable(self._settings, "reading dead letters", error) from error
        return found

    async def _read(self, name: _Name) -> Sequence[DeadLetterRecord]:
        """One, or none if it is gone meanwhile."""
        key = name.keys[1]
        fields: Any = await self._servers.call(key, "HGETALL", key)
        flat = [part for pair in fields.items() for part in pair] if isinstance(fields, dict) else fields
        return [_record(name, flat)] if flat else []

    async def remove(self, records: Sequence[DeadLetterRecord]) -> int:
        """Remove these; see the contract.  Raises BrokerUnavailable."""
        removed = 0
        try:
            for record in records:
                name = _name_of(record)
                removed += await self._servers.run(UNBURY, name.keys, [str(name), _microseconds(record.died_at)])
        except FAILURES as error:
            raise unavailable(self._settings, "removing dead letters", error) from error
        return removed

    async def close(self) -> None:
        """End its connections."""
        for pipe in [pipe for idle in self._idle.values() for pipe in idle]:
            await pipe.close()


def _name_of(record: DeadLetterRecord) -> _Name:
    return _Name(record.message.topic, record.group, record.message.id)


def _microseconds(moment: datetime) -> int:
    return (moment - EPOCH) // timedelta(microseconds=1)


def _arguments(record: DeadLetterRecord) -> Sequence[Any]:
    """Raises ValueError for what cannot be written."""
    facts = {
        "handler": record.handler,
        "reason": record.reason,
        "traceback": record.traceback,
        "attempts": str(record.attempts),
        "died-at": record.died_at.isoformat(),
        "position": record.position,
    }
    # What a handler raised may hold anything; the message itself must be as it was
    readable = {name: text.encode(errors="backslashreplace").decode() for name, text in facts.items()}
    fields = fields_of(record.message, readable)
    if len(fields) > MOST_FIELDS:
        raise ValueError(f"it has {len(fields) // 2} fields, and there is room for {MOST_FIELDS // 2}")
    encoded = [part.encode() if isinstance(part, str) else part for part in fields]
    return str(_name_of(record)), _microseconds(record.died_at), *encoded


def _record(name: _Name, fields: Fields) -> DeadLetterRecord:
    facts = own_fields(fields)
    return DeadLetterRecord(
        message=message_of(name.topic, fields),
        group=name.group,
        handler=facts["handler"],
        reason=facts["reason"],
        traceback=facts["traceback"],
        attempts=int(facts["attempts"]),
        died_at=datetime.fromisoformat(facts["died-at"]),
        position=facts["position"],
    )


@asynccontextmanager
async def open_dead_letters(settings: RedisSettings) -> AsyncIterator[RedisDeadLetters]:
    """Connect and close.  Raises BrokerUnavailable."""
    async with open_servers(settings) as servers:
        dead_letters = RedisDeadLetters(settings, servers)
        try:
            yield dead_letters
        finally:
            await dead_letters.close()
