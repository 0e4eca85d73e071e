"""The desk where people look after dead letters: list, show, replay, drop.

A replay is confirmed by the broker before the dead letter is removed (C5); it goes to the group that gave up and to no
other.  Where dead letters rest is the backend's business.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from reliamq.spi import Confirmation, DeadLetterRecord, DeadLetters, Message, PublishError

__all__ = ["DeadLetterDesk"]

TOGETHER = 100
"""Replayed ones are removed together: to find them a broker may have to read all that rest."""
Publish = Callable[[Message], Awaitable[Confirmation]]


class DeadLetterDesk:
    """dead_letters: the backend's.  publish: how a replay leaves; raises unless confirmed."""

    def __init__(self, dead_letters: DeadLetters, publish: Publish) -> None:
        self._dead_letters, self._publish = dead_letters, publish

    async def list(
        self, *, topic: str | None = None, group: str | None = None, limit: int = 100
    ) -> Sequence[DeadLetterRecord]:
        """Dead letters that match, oldest first."""
        return await self._dead_letters.find(topic=topic, group=group, limit=limit)

    async def show(self, message_id: str) -> Sequence[DeadLetterRecord]:
        """All dead letters of one message: one for each group that gave it up."""
        return await self._dead_letters.find(message_id=message_id)

    async def replay(self, records: Sequence[DeadLetterRecord]) -> int:
        """Deliver again, with the same ids, to the groups that gave up; how many.

        Raises Rejected or Unconfirmed at the first that is not confirmed; it and those after it stay dead letters.
        Cancelled: up to a hundred that were replayed stay, too.  A message replayed twice has one effect, by its id
        (I1).
        """
        for start in range(0, len(records), TOGETHER):
            await self._replay(records[start : start + TOGETHER])
        return len(records)

    async def _replay(self, records: Sequence[DeadLetterRecord]) -> None:
        confirmed: list[DeadLetterRecord] = []
        try:
            for record in records:
                await self._publish(replace(record.message, only_group=record.group))
                confirmed.append(record)
        except PublishError:
            await self._dead_letters.remove(confirmed)
            raise
        await self._dead_letters.remove(confirmed)

    async def drop(self, records: Sequence[DeadLetterRecord]) -> int:
        """Remove for good; how many there were."""
        return await self._dead_letters.remove(records)
