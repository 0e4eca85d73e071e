"""A message as JSON for people: all of it, with bytes shown as text as far as they are."""

from __future__ import annotations

from reliamq.spi import Message

__all__ = ["whole_message"]


def whole_message(message: Message) -> dict[str, object]:
    """Its attributes but for id and topic, which a list shows too."""
    return {
        "type": message.type,
        "source": message.source,
        "time": message.time.isoformat(),
        "key": None if message.key is None else message.key.decode(errors="backslashreplace"),
        "sequence": message.sequence,
        "headers": dict(message.headers),
        "body": message.body.decode(errors="backslashreplace"),
    }
