"""What can be wrong with publishing, and with what a broker says of itself."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import anyio

from reliamq.spi import (
    Capabilities,
    Confirmation,
    Durability,
    Message,
    Outcome,
    Rejection,
    RejectionReason,
)
from reliamq.testing.faults.fault import (
    Fault,
    PassingPublisher,
    breaks,
)

__all__ = ["FAULTS"]


class _OutcomesReversed(PassingPublisher):
    async def send(self, batch: Sequence[Message], *, deadline: float, chained: bool = False) -> Sequence[Outcome]:
        outcomes = list(await self.inner.send(batch, deadline=deadline, chained=chained))
        return outcomes[::-1] if len(batch) > 2 else outcomes


class _UnroutableConfirmed(PassingPublisher):
    async def send(self, batch: Sequence[Message], *, deadline: float, chained: bool = False) -> Sequence[Outcome]:
        outcomes = await self.inner.send(batch, deadline=deadline, chained=chained)
        alone = outcomes[0] if len(batch) == 1 else None
        if isinstance(alone, Rejection) and alone.reason is RejectionReason.UNROUTABLE:
            return [Confirmation(alone.message_id)]
        return outcomes


class _HeadersDropped(PassingPublisher):
    async def send(self, batch: Sequence[Message], *, deadline: float, chained: bool = False) -> Sequence[Outcome]:
        return await self.inner.send(
            [replace(message, headers={}) for message in batch], deadline=deadline, chained=chained
        )


class _MixedBatchesReversed(PassingPublisher):
    async def send(self, batch: Sequence[Message], *, deadline: float, chained: bool = False) -> Sequence[Outcome]:
        keys = {message.key for message in batch}
        if len(keys) > 1 and None not in keys and len(batch) > len(keys):
            outcomes = await self.inner.send(batch[::-1], deadline=deadline, chained=chained)
            return outcomes[::-1]
        return await self.inner.send(batch, deadline=deadline, chained=chained)


class _ChainsIgnored(PassingPublisher):
    async def send(self, batch: Sequence[Message], *, deadline: float, chained: bool = False) -> Sequence[Outcome]:
        return await self.inner.send(batch, deadline=deadline)


class _TooLargeConfirmed(PassingPublisher):
    async def send(self, batch: Sequence[Message], *, deadline: float, chained: bool = False) -> Sequence[Outcome]:
        outcomes = await self.inner.send(batch, deadline=deadline, chained=chained)
        return [
            Confirmation(one.message_id)
            if isinstance(one, Rejection) and one.reason is RejectionReason.TOO_LARGE
            else one
            for one in outcomes
        ]


class _DeadlineIgnored(PassingPublisher):
    async def send(self, batch: Sequence[Message], *, deadline: float, chained: bool = False) -> Sequence[Outcome]:
        if deadline < time.monotonic() + 1:
            await anyio.sleep(30)
        return await self.inner.send(batch, deadline=time.monotonic() + 1, chained=chained)


def _survives_restart(capabilities: Capabilities) -> Capabilities:
    return replace(capabilities, survives_restart=True)


def _shared(capabilities: Capabilities) -> Capabilities:
    return replace(capabilities, shared_between_processes=True)


def _on_the_disk(capabilities: Capabilities) -> Capabilities:
    return replace(capabilities, durability=Durability.FSYNCED)


FAULTS: dict[str, Fault] = {
    # Of a broker in memory they are not true.
    "claims to survive a restart": Fault(breaks("P1"), claims=_survives_restart),
    "claims to be shared": Fault(breaks("P1"), claims=_shared),
    "claims the disk": Fault(breaks("P1"), claims=_on_the_disk),
    "outcomes reversed": Fault(breaks("P2"), publisher=_OutcomesReversed),
    "unroutable confirmed": Fault(breaks("P3"), publisher=_UnroutableConfirmed),
    "headers dropped": Fault(breaks("P4"), publisher=_HeadersDropped),
    # The order in which a batch is stored is the order in which members get it.
    "mixed batches reversed": Fault(breaks("P5", "C3"), publisher=_MixedBatchesReversed),
    "chains ignored": Fault(breaks("P5"), publisher=_ChainsIgnored),
    # The test of outcomes in a batch uses a message that is too large.
    "too large confirmed": Fault(breaks("P2", "P6"), publisher=_TooLargeConfirmed),
    "deadline ignored": Fault(breaks("P6"), publisher=_DeadlineIgnored),
}
