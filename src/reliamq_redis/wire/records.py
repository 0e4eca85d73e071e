"""Messages as entries of a stream and back.

CloudEvents has no binding for Redis; its attributes are fields of their names, the body is ``data``, the key is
``partitionkey``.  What reliamq itself notes has the prefix ``reliamq-``, a user's header the prefix ``header-``.  A
foreign field that reliamq does not know is a header like any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b

from reliamq.spi import Message, message_from_attributes, rfc3339

__all__ = ["Fields", "fields_of", "fingerprint", "message_of", "own_fields", "readable"]

Fields = Sequence[bytes]
"""Names and values, in turn."""
DATA, KEY = b"data", b"partitionkey"
HEADER, OURS = "header-", "reliamq-"
ATTRIBUTES = {
    name.encode(): name for name in ("id", "type", "source", "time", "datacontenttype", "sequence", "onlygroup")
}
ALSO_WRITTEN = frozenset({b"specversion"})
LONGEST_READABLE, MOST_READABLE = 400, 50


def fields_of(message: Message, more: Mapping[str, str] | None = None) -> list[str | bytes]:
    """The entry's fields.  more: what reliamq notes besides, without its prefix."""
    # Spelt out, and not made from cloudevent_attributes: every message pays for it.
    fields: list[str | bytes] = [
        *_fields_of_kind(message.type, message.source, message.content_type),
        b"id",
        message.id,
        b"time",
        rfc3339(message.time),
        DATA,
        message.body,
    ]
    if message.key is not None:
        fields += (KEY, message.key)
    if message.sequence is not None:
        fields += (b"sequence", str(message.sequence))
    if message.only_group is not None:
        fields += (b"onlygroup", message.only_group)
    for name, value in message.headers.items():
        fields += (HEADER + name, value)
    for name, value in (more or {}).items():
        fields += (OURS + name, value)
    return fields


@lru_cache(maxsize=1000)
def _fields_of_kind(message_type: str, source: str, content_type: str) -> tuple[str | bytes, ...]:
    """Those that an application's messages of one kind have in common."""
    return b"specversion", "1.0", b"type", message_type, b"source", source, b"datacontenttype", content_type


def message_of(topic: str, fields: Fields) -> Message:
    """Read one back.  Raises KeyError and ValueError as ``message_from_attributes`` does."""
    attributes: dict[str, str] = {}
    headers: dict[str, str] = {}
    key: bytes | None = None
    body = b""
    values = iter(fields)
    for name, value in zip(values, values, strict=False):
        attribute = ATTRIBUTES.get(name)
        if attribute is not None:
            attributes[attribute] = value.decode()
        elif name == DATA:
            body = value
        elif name == KEY:
            key = value
        elif name not in ALSO_WRITTEN and not name.startswith(b"reliamq-"):
            headers[name.decode().removeprefix(HEADER)] = value.decode()
    return message_from_attributes(topic, body, key, attributes, headers)


def own_fields(fields: Fields) -> dict[str, str]:
    """What reliamq noted, without its prefix."""
    values = iter(fields)
    return {
        name.decode(errors="backslashreplace").removeprefix(OURS): value.decode(errors="backslashreplace")
        for name, value in zip(values, values, strict=False)
        if name.startswith(b"reliamq-")
    }


def readable(fields: Fields) -> dict[str, str]:
    """All fields of one that is no message, for people; few enough for a dead letter."""
    values = iter(fields)
    texts = {
        name.decode(errors="backslashreplace"): value.decode(errors="backslashreplace")[:LONGEST_READABLE]
        for name, value in zip(values, values, strict=False)
    }
    return dict(list(texts.items())[:MOST_READABLE])


def fingerprint(fields: Fields) -> str:
    """A name for one that reliamq did not write: the same for the same bytes."""
    return blake2b(b"\0".join(fields), digest_size=16).hexdigest()
