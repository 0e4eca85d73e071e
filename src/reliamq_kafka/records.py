"""Messages as Kafka records and back: CloudEvents 1.0, Kafka binding, binary mode.

Attributes are headers with the prefix ``ce_``; the media type is ``content-type``; the key is the record's key.  What
reliamq itself notes has the prefix ``reliamq_``.  A user's header whose name would be taken for one of these is kept
under an escaped name.
"""

from __future__ import annotations

from collections.abc import Sequence

from reliamq.spi import Message, cloudevent_attributes, message_from_attributes

__all__ = ["Headers", "headers_of", "message_of"]

Headers = list[tuple[str, bytes]]
ATTRIBUTE, OURS, ESCAPED = "ce_", "reliamq_", "reliamq_header_"
CONTENT_TYPE = "content-type"


def headers_of(message: Message) -> Headers:
    """The record's headers."""
    attributes = cloudevent_attributes(message)
    content_type = attributes.pop("datacontenttype")
    headers = [(ATTRIBUTE + name, value.encode()) for name, value in attributes.items()]
    headers.append((CONTENT_TYPE, content_type.encode()))
    headers.extend((_escaped(name), value.encode()) for name, value in message.headers.items())
    return headers


def _escaped(name: str) -> str:
    return ESCAPED + name if name.startswith((ATTRIBUTE, OURS)) or name == CONTENT_TYPE else name


def message_of(topic: str, key: bytes | None, value: bytes | None, headers: Sequence[tuple[str, bytes]]) -> Message:
    """Read a record back.  Raises KeyError and ValueError as ``message_from_attributes`` does."""
    attributes: dict[str, str] = {}
    own: dict[str, str] = {}
    for name, data in headers:
        if name.startswith(ATTRIBUTE):
            attributes[name.removeprefix(ATTRIBUTE)] = data.decode()
        elif name == CONTENT_TYPE:
            attributes["datacontenttype"] = data.decode()
        elif name.startswith(ESCAPED):
            own[name.removeprefix(ESCAPED)] = data.decode()
        elif not name.startswith(OURS):
            own[name] = data.decode()
    return message_from_attributes(topic, value or b"", key, attributes, own)
