"""What a failed attempt leads to: another one later, or a dead letter.

Pure decisions on values; nothing here awaits or talks to a broker.  Carrying the decision out is left to
``settlement``.
"""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from datetime import UTC, datetime

from reliamq.handlers import Backoff, DeadLetter, RetryAfter
from reliamq.spi import Ack, DeadLetterRecord, Delivery, EffectBusy, Release, Retry, Undecodable

__all__ = ["Conclusion", "GivenUp", "after_crashes", "after_failure", "describe", "give_up"]

MAX_REASON_CHARACTERS = 2_000
MAX_TRACEBACK_CHARACTERS = 100_000  # its end says most
LEAST_CRASHES = 2
"""A message is blamed for killing its process only after it ran alone, which is from its second recorded start on (C4).
"""


@dataclass(frozen=True, slots=True)
class GivenUp:
    """The delivery becomes a dead letter: ``record`` is stored first, then the original is acknowledged (C5)."""

    delivery: Delivery
    record: DeadLetterRecord


Conclusion = Ack | Retry | Release | GivenUp


def after_failure(delivery: Delivery, error: Exception, policy: Backoff, *, handler: str) -> Conclusion:
    """Decide what follows when an attempt ended with ``error``."""
    if isinstance(error, EffectBusy):
        return Retry(delivery, error.retry_after, keep_order=True, counts=False, reason=str(error))
    counting = policy.policy_for(error)
    hopeless = isinstance(error, (DeadLetter, Undecodable, *policy.never))
    if hopeless or delivery.attempt >= counting.attempts:
        return give_up(delivery, describe(error), _traceback(error), handler=handler)
    if isinstance(error, RetryAfter):
        keep = policy.keeps_order(error.delay) if error.keep_order is None else error.keep_order
        return Retry(delivery, error.delay, keep_order=keep, reason=describe(error))
    delay = counting.delay(delivery.attempt)
    return Retry(delivery, delay, keep_order=policy.keeps_order(delay), reason=describe(error))


def after_crashes(delivery: Delivery, policy: Backoff, *, handler: str) -> GivenUp | None:
    """A dead letter for a message that killed its process as often as its policy allows; None if it may try again."""
    if delivery.crashes < max(LEAST_CRASHES, policy.attempts - delivery.failures):
        return None
    starts = delivery.attempt - 1
    reason = f"its handler was started {starts} times and the process died {delivery.crashes} times in it"
    return give_up(delivery, reason, "", handler=handler, starts=starts)


def give_up(delivery: Delivery, reason: str, trace: str, *, handler: str, starts: int | None = None) -> GivenUp:
    """Make the dead letter: the original, and why, where, when, how often (C5).

    starts: of the handler; by default this delivery's attempt is the last of them.
    """
    record = DeadLetterRecord(
        message=delivery.message,
        group=delivery.group,
        handler=handler,
        reason=reason[:MAX_REASON_CHARACTERS],
        traceback=_storable(trace[-MAX_TRACEBACK_CHARACTERS:]),
        attempts=delivery.attempt if starts is None else starts,
        died_at=datetime.now(UTC),
        position=delivery.position,
    )
    return GivenUp(delivery, record)


def describe(error: Exception) -> str:
    """Its class and text, as every log and every broker can keep them."""
    return _storable(f"{type(error).__qualname__}: {error}" if str(error) else type(error).__qualname__)


def _storable(text: str) -> str:
    """Text that every broker can keep: file names in exceptions may have half characters, or a NUL."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")


def _traceback(error: Exception) -> str:
    return "".join(traceback.format_exception(error))
