"""Messages as AMQP messages and back: CloudEvents 1.0, binary mode, as its AMQP binding spells it.

Attributes are headers with the prefix ``cloudEvents:``; the media type is the property ``content-type``.  What reliamq
itself notes has the prefix ``reliamq-``.  A user's header whose name would be taken for one of these, or for one that
the broker acts on or writes itself, is kept under an escaped name; a foreign attribute that reliamq does not know is a
header like any other.  The AMQP ``message-id`` names an attempt to publish, not the message (a returned message is
known by it).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache

from reliamq.spi import Message, message_from_attributes, rfc3339
from reliamq_rabbitmq.wire.frames import header_table

__all__ = ["OURS", "headers_of", "message_of", "own_headers", "readable"]

ATTRIBUTE, OURS, ESCAPED = "cloudEvents:", "reliamq-", "reliamq-header-"
KEY = OURS + "key"
ATTRIBUTE_OF = {ATTRIBUTE + name: name for name in ("id", "type", "source", "time", "sequence", "onlygroup")}
ALSO_WRITTEN = frozenset({ATTRIBUTE + "specversion"})
PARTITION_KEY = ATTRIBUTE + "partitionkey"
BROKERS = ("x-death", "x-delivery-count", "x-acquired-count", "x-first-death-", "x-last-death-", "x-opt-", "x-stream-")
"""What RabbitMQ writes into a message, by how it begins."""
LONGEST_READABLE, MOST_READABLE = 400, 50
ACTED_ON = frozenset({"CC", "BCC"})
"""What RabbitMQ takes for more addresses of a message."""


def headers_of(message: Message, more: Iterable[tuple[str, str | bytes]] = ()) -> bytes:
    """The headers as they are written.  Raises ValueError for a name that is longer than 255 bytes.

    more: what reliamq notes besides, names whole.
    """
    # Spelt out, and not made from cloudevent_attributes: every message pays for it.
    parts: list[tuple[str, str | bytes]] = [
        ("cloudEvents:id", message.id),
        ("cloudEvents:time", rfc3339(message.time)),
    ]
    if message.key is not None:
        parts.append(_key_header(message.key))
    if message.sequence is not None:
        parts.append(("cloudEvents:sequence", str(message.sequence)))
    if message.only_group is not None:
        parts.append(("cloudEvents:onlygroup", message.only_group))
    if message.headers:
        parts.extend((_escaped(name), value) for name, value in message.headers.items())
    parts.extend(more)
    return _headers_of_kind(message.type, message.source) + header_table(parts)


def _key_header(key: bytes) -> tuple[str, str | bytes]:
    try:
        return PARTITION_KEY, key.decode()
    except UnicodeDecodeError:
        return KEY, key


@lru_cache(maxsize=1000)
def _headers_of_kind(message_type: str, source: str) -> bytes:
    """Those that an application's messages of one kind have in common."""
    common = [("specversion", "1.0"), ("type", message_type), ("source", source)]
    return header_table((ATTRIBUTE + name, value) for name, value in common)


def _escaped(name: str) -> str:
    taken = name in ATTRIBUTE_OF or name in ALSO_WRITTEN or name == PARTITION_KEY or name in ACTED_ON
    return ESCAPED + name if taken or name.startswith((OURS, *BROKERS)) else name


def message_of(topic: str, content_type: str | None, body: bytes, headers: Mapping[str, object]) -> Message:
    """Read one back.  Raises KeyError and ValueError as ``message_from_attributes`` does, TypeError for a header that
    is no text, which only others write.
    """
    attributes: dict[str, str] = {}
    own: dict[str, str] = {}
    key: bytes | None = None
    for name, value in headers.items():
        attribute = ATTRIBUTE_OF.get(name)
        if attribute is not None:
            attributes[attribute] = _text(name, value)
        elif name == PARTITION_KEY:
            key = _text(name, value).encode()
        elif name == KEY and isinstance(value, bytes | bytearray):
            key = bytes(value)
        elif name.startswith(ESCAPED):
            own[name.removeprefix(ESCAPED)] = _text(name, value)
        elif name not in ALSO_WRITTEN and not name.startswith((OURS, *BROKERS)):
            own[name] = _text(name, value)
    if content_type is not None:
        attributes["datacontenttype"] = content_type
    return message_from_attributes(topic, body, key, attributes, own)


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"header '{name}' is no text: {value!r}")
    return value


def own_headers(headers: Mapping[str, object]) -> dict[str, object]:
    """What reliamq noted, without its prefix."""
    return {name.removeprefix(OURS): value for name, value in headers.items() if name.startswith(OURS)}


def readable(headers: Mapping[str, object]) -> dict[str, str]:
    """All headers of one that is no message, for people; few enough for a dead letter."""
    texts = {name: value if isinstance(value, str) else repr(value) for name, value in headers.items()}
    return {name: text[:LONGEST_READABLE] for name, text in list(texts.items())[:MOST_READABLE]}
