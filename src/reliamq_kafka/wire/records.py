"""Messages as Kafka records and back: CloudEvents 1.0, Kafka binding, binary mode.

Attributes are headers with the prefix ``ce_``; the media type is ``content-type``; the key is the record's key.  What
reliamq itself notes has the prefix ``reliamq_``.  A user's header whose name would be taken for one of these is kept
under an escaped name; a foreign attribute that reliamq does not know is a header like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import Protocol

from aiokafka.partitioner import murmur2

from reliamq.spi import Message, message_from_attributes, rfc3339

__all__ = ["Headers", "Record", "hash_of", "headers_of", "message_of", "readable", "time_of"]

Headers = list[tuple[str, bytes]]
ATTRIBUTE, OURS, ESCAPED = "ce_", "reliamq_", "reliamq_header_"
CONTENT_TYPE = "content-type"
ATTRIBUTE_OF = {
    CONTENT_TYPE: "datacontenttype",
    **{ATTRIBUTE + name: name for name in ("id", "type", "source", "time", "sequence", "onlygroup")},
}
"""What is read, by the name of its header; the key is the record's own."""
ALSO_WRITTEN = frozenset({"ce_specversion", "ce_partitionkey"})
LATEST = datetime(9999, 12, 31, tzinfo=UTC)


class Record(Protocol):
    """What is used of the client's record."""

    @property
    def offset(self) -> int: ...  # the client's
    @property
    def key(self) -> bytes | None: ...
    @property
    def value(self) -> bytes | None: ...
    @property
    def headers(self) -> Sequence[tuple[str, bytes]]: ...
    @property
    def timestamp(self) -> int: ...


def hash_of(key: bytes) -> int:
    """By which every Kafka client finds the partition of a key: the remainder of the number of partitions."""
    return int(murmur2(key)) & 0x7FFFFFFF


def headers_of(message: Message) -> Headers:
    """The record's headers."""
    # Spelt out, and not made from cloudevent_attributes: every message pays for it.
    headers = [
        *_headers_of_kind(message.type, message.source, message.content_type),
        ("ce_id", message.id.encode()),
        ("ce_time", rfc3339(message.time).encode()),
    ]
    if message.key is not None:
        try:
            message.key.decode()
        except UnicodeDecodeError:  # a binary key: the record's key carries it, text attributes cannot
            pass
        else:
            headers.append(("ce_partitionkey", message.key))
    if message.sequence is not None:
        headers.append(("ce_sequence", str(message.sequence).encode()))
    if message.only_group is not None:
        headers.append(("ce_onlygroup", message.only_group.encode()))
    if message.headers:
        headers.extend((_escaped(name), value.encode()) for name, value in message.headers.items())
    return headers


@lru_cache(maxsize=1000)
def _headers_of_kind(message_type: str, source: str, content_type: str) -> Headers:
    """Those that an application's messages of one kind have in common."""
    return [
        ("ce_specversion", b"1.0"),
        ("ce_type", message_type.encode()),
        ("ce_source", source.encode()),
        (CONTENT_TYPE, content_type.encode()),
    ]


def _escaped(name: str) -> str:
    return ESCAPED + name if name in ATTRIBUTE_OF or name in ALSO_WRITTEN or name.startswith(OURS) else name


def message_of(topic: str, key: bytes | None, value: bytes | None, headers: Sequence[tuple[str, bytes]]) -> Message:
    """Read a record back.  Raises KeyError and ValueError as ``message_from_attributes`` does, and AttributeError for a
    header without a value, which only others write.
    """
    attributes: dict[str, str] = {}
    own: dict[str, str] = {}
    for name, data in headers:
        attribute = ATTRIBUTE_OF.get(name)
        if attribute is not None:
            attributes[attribute] = data.decode()
        elif name not in ALSO_WRITTEN and (not name.startswith(OURS) or name.startswith(ESCAPED)):
            own[name.removeprefix(ESCAPED)] = data.decode()
    return message_from_attributes(topic, value or b"", key, attributes, own)


def readable(headers: Sequence[tuple[str, bytes | None]]) -> dict[str, str]:
    """All headers of a record that is no message, for people."""
    return {name: (data or b"").decode(errors="backslashreplace") for name, data in headers}


def time_of(milliseconds: int) -> datetime:
    """A record's timestamp.  Others may write anything there, microseconds for one: it is cut to what a time can be."""
    try:
        return datetime.fromtimestamp(max(0, milliseconds) / 1000, UTC)
    except (ValueError, OverflowError, OSError):
        return LATEST
