"""What crosses the broker: a message on its way out, a delivery on its way in.

Both are plain frozen values.  They carry the CloudEvents 1.0 attributes (id, source, type, time), so that programs in
other languages can read what reliamq wrote.  How attributes are spelt on a wire (``ce_id``, ``cloudEvents:id``) is left
to each backend: it prefixes the names that :func:`cloudevent_attributes` gives.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from contextlib import suppress
from dataclasses import field
from datetime import UTC, datetime
from functools import lru_cache
from types import MappingProxyType

from reliamq.spi.values import value

__all__ = ["Delivery", "Message", "cloudevent_attributes", "message_from_attributes", "rfc3339"]

CLOUDEVENTS_VERSION = "1.0"
NO_HEADERS: Mapping[str, str] = MappingProxyType({})


@value
class Message:
    """One message as it is published.

    topic: the named stream it goes to.
    body: the payload; no backend looks inside.
    id: the message's identity, the same for every attempt to send it (P4) and for every replay.
    type: the name of the payload's kind, by which a handler is chosen.
    source: URI-reference of the application that published it.
    time: when it was made, with a time zone.
    key: what orders: messages with one key are handled one after another (C3).  ``None``: no order asked.
    content_type: media type of the body.
    sequence: a number that grows within the key, given by the outbox (O3), so that a consumer can tell a late
        duplicate from news.  It need not be contiguous.
    only_group: deliver to this group alone.  Replaying a dead letter uses it: the other groups had the message.
    headers: the user's own, text to text.
    """

    topic: str
    body: bytes
    id: str
    type: str
    source: str
    time: datetime
    key: bytes | None = None
    content_type: str = "application/json"
    sequence: int | None = None
    only_group: str | None = None
    headers: Mapping[str, str] = field(default_factory=lambda: NO_HEADERS)

    @property
    def size(self) -> int:
        """Bytes that count against every limit: body, key and user headers."""
        size = len(self.body) + len(self.key or b"")
        if self.headers:
            size += sum(len(name) + len(value) for name, value in self.headers.items())
        return size


@value
class Delivery:
    """One hand-over of a message to one member of a group.  A redelivery is another delivery of the same message.

    message: what was published, unchanged.
    group: the named subscriber it is for.
    failures: attempts that ended in :class:`~reliamq.spi.Retry` (C4).
    crashes: attempts that :meth:`~reliamq.spi.Subscription.begin` recorded and nobody settled: the process died.
    redelivered: it was handed out before and came back unsettled, so the next start must be recorded first.
    position: where the broker keeps it, for people to read.
    receipt: the backend's own token for settling it; opaque to everybody else.
    """

    message: Message
    group: str
    position: str
    receipt: Hashable
    failures: int = 0
    crashes: int = 0
    redelivered: bool = False

    @property
    def attempt(self) -> int:
        """Which start of the handler this one is, from 1, counted over crashes and members (C4)."""
        return self.failures + self.crashes + 1


def rfc3339(time: datetime) -> str:
    """What ``time.isoformat()`` gives, at half the price: the form of a CloudEvent's time."""
    if time.tzinfo is not UTC or not time.microsecond:
        return time.isoformat()
    second = _second(time.year, time.month, time.day, time.hour, time.minute, time.second)
    return f"{second}.{str(time.microsecond).zfill(6)}+00:00"


@lru_cache(maxsize=100)
def _second(year: int, month: int, day: int, hour: int, minute: int, second: int) -> str:
    return datetime(year, month, day, hour, minute, second).isoformat()  # its zone is written by the caller


def cloudevent_attributes(message: Message) -> dict[str, str]:
    """The message's CloudEvents attributes without a prefix, extensions included (CloudEvents 1.0, binary mode).

    The key is text there (extension ``partitionkey``); one that is not UTF-8 travels as the broker's own key only.
    """
    attributes = {
        "specversion": CLOUDEVENTS_VERSION,
        "id": message.id,
        "type": message.type,
        "source": message.source,
        "time": rfc3339(message.time),
        "datacontenttype": message.content_type,
    }
    if message.key is not None:
        with suppress(UnicodeDecodeError):  # a binary key: the broker's key field carries it, text attributes cannot
            attributes["partitionkey"] = message.key.decode()
    if message.sequence is not None:
        attributes["sequence"] = str(message.sequence)
    if message.only_group is not None:
        attributes["onlygroup"] = message.only_group
    return attributes


def message_from_attributes(
    topic: str, body: bytes, key: bytes | None, attributes: Mapping[str, str], headers: Mapping[str, str]
) -> Message:
    """Read a message back from what :func:`cloudevent_attributes` wrote.

    Raises KeyError naming the attribute when a required one is missing, ValueError when one does not parse: the backend
    hands such a delivery on as undecodable (C11) instead of dropping it.
    """
    sequence = attributes.get("sequence")
    return Message(
        topic=topic,
        body=body,
        id=attributes["id"],
        type=attributes["type"],
        source=attributes["source"],
        time=datetime.fromisoformat(attributes["time"]),
        key=key,
        content_type=attributes.get("datacontenttype", "application/octet-stream"),
        sequence=None if sequence is None else int(sequence),
        only_group=attributes.get("onlygroup"),
        headers=MappingProxyType(dict(headers)) if headers else NO_HEADERS,
    )
