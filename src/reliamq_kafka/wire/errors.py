"""What the client's exceptions mean for a batch that was sent.

A table, tried top to bottom, the most specific first.  Three meanings: not stored, and the broker has judged it; not
stored, and another attempt may do; unknown.  Which messages of a batch are to blame is found out by the partition's
queue.
"""

from __future__ import annotations

from enum import Enum, auto

from aiokafka import errors
from aiokafka.errors import BrokerResponseError, KafkaError

from reliamq.spi import RejectionReason

__all__ = ["Fate", "InvalidRecordError", "fate_of"]


class InvalidRecordError(BrokerResponseError):
    """The broker's own validation refused a record (a message without a key on a compacted topic, say)."""

    errno = 87
    message = "INVALID_RECORD"
    description = "the broker refused the record as invalid"


# The client does not know its number and would say "unknown error", which leaves open whether a batch was stored.
errors.kafka_errors.setdefault(InvalidRecordError.errno, InvalidRecordError)


class Fate(Enum):
    """What became of a batch whose sending raised."""

    AGAIN = auto()
    """Not stored by this attempt, and through no fault of its own: send it once more, by a new producer."""
    UNKNOWN = auto()
    """May be stored."""


_FATES: tuple[tuple[type[BaseException], RejectionReason | Fate], ...] = (
    (errors.MessageSizeTooLargeError, RejectionReason.TOO_LARGE),
    (errors.RecordListTooLargeError, RejectionReason.TOO_LARGE),
    (InvalidRecordError, RejectionReason.INVALID),
    (errors.InvalidTimestampError, RejectionReason.INVALID),
    (errors.InvalidTopicError, RejectionReason.UNROUTABLE),
    (errors.TopicAuthorizationFailedError, RejectionReason.REFUSED),
    (errors.ClusterAuthorizationFailedError, RejectionReason.REFUSED),
    (errors.PolicyViolationError, RejectionReason.REFUSED),
    (errors.UnsupportedForMessageFormatError, RejectionReason.REFUSED),
    # The producer's numbering is broken by an earlier failure: this batch was refused unseen (facts: aiokafka#1017).
    (errors.OutOfOrderSequenceNumber, Fate.AGAIN),
    (errors.UnknownProducerId, Fate.AGAIN),
    (errors.InvalidProducerEpoch, Fate.AGAIN),
    (errors.ProducerFenced, Fate.AGAIN),
    (errors.InvalidProducerIdMapping, Fate.AGAIN),
    (errors.ProducerClosed, Fate.AGAIN),
    (errors.KafkaTimeoutError, Fate.AGAIN),  # no room in the client's buffer
    (errors.CorruptRecordException, Fate.AGAIN),  # damaged on its way: the broker checked and did not store
    (KafkaError, Fate.UNKNOWN),
)


def fate_of(error: BaseException) -> RejectionReason | Fate:
    """A reason: the broker judged the batch and stored none of it."""
    for kind, fate in _FATES:
        if isinstance(error, kind):
            return fate
    return Fate.UNKNOWN
