"""How things end: what became of a message that was sent, and what to do with one that was delivered.

Outcomes are values, one for each message, in the order given (P2).  The three outcomes of sending are three classes
because only a rejection may be forgotten.  The settlements of a delivery are values too; a dead letter is not among
them: the core stores it first and then acknowledges (C5), so that one rule holds for every broker.
"""

from __future__ import annotations

from datetime import timedelta
from enum import StrEnum

from reliamq.spi.messages import Delivery
from reliamq.spi.values import value

__all__ = [
    "Ack",
    "Confirmation",
    "InDoubt",
    "Outcome",
    "Rejection",
    "RejectionReason",
    "Release",
    "Retry",
    "Settlement",
]


@value
class Confirmation:
    """Stored to the durability that the topic declares (P1).

    position: where, if the broker has such a thing.
    duplicate: the broker knew the id already and stored nothing new; just as good (P4).
    """

    message_id: str
    position: str | None = None
    duplicate: bool = False


class RejectionReason(StrEnum):
    """Why a message was certainly not stored."""

    UNROUTABLE = "unroutable"
    """No topic, or no group that would receive it (P3)."""
    TOO_LARGE = "too-large"
    """Over the topic's or the broker's limit (P6)."""
    INVALID = "invalid"
    """The broker or its client refuses the message as malformed."""
    REFUSED = "refused"
    """Not permitted, or against a policy of the broker."""
    STORAGE_FULL = "storage-full"
    """No room; the message itself is fine."""
    UNAVAILABLE = "unavailable"
    """The broker could not take it now (no connection, too few replicas) and certainly did not."""
    BEHIND = "behind"
    """Nobody tried: one before it with its key was not confirmed, and the call was to stop there."""

    @property
    def judges_message(self) -> bool:
        """True where the broker judged *this message*: only then does an outbox attempt count (O5)."""
        return self not in (RejectionReason.STORAGE_FULL, RejectionReason.UNAVAILABLE, RejectionReason.BEHIND)


@value
class Rejection:
    """Certainly not stored.

    detail: one sentence for people: what, why, what to do.
    cause: the client's own exception, if there was one.
    """

    message_id: str
    reason: RejectionReason
    detail: str
    cause: BaseException | None = None


@value
class InDoubt:
    """May or may not be stored; whoever sent it repeats it with the same id."""

    message_id: str
    detail: str
    cause: BaseException | None = None


Outcome = Confirmation | Rejection | InDoubt


@value
class Ack:
    """The handler finished and its effect is durable (C1): do not deliver again to this group."""

    delivery: Delivery


@value
class Retry:
    """The attempt failed: deliver again after a delay that survives crashes (C6); ``failures`` grows by one.

    delay: from now, by the broker's clock; a delay and not a date, so that no two clocks must agree (O8).
    keep_order: True: the key waits for this message.  False: it comes back behind its key's others.
    counts: False leaves ``failures`` as it is (somebody else holds the message's lease; nobody failed).
    reason: one sentence for people, kept where the broker has a place for it.
    """

    delivery: Delivery
    delay: timedelta
    keep_order: bool = True
    counts: bool = True
    reason: str = ""


@value
class Release:
    """Given back unhandled, at once available to other members, in its old place, no attempt counted (C8)."""

    delivery: Delivery


Settlement = Ack | Retry | Release
