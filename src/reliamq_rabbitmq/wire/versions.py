"""What a broker's version says of its limits."""

from __future__ import annotations

from aiormq.connection import Connection

__all__ = ["largest_message", "version_of"]

LARGEST, LARGEST_SINCE_4 = 128 * 1024 * 1024, 16 * 1024 * 1024
"""``max_message_size`` as it comes (RabbitMQ's documentation, "Configuration"); a larger one closes the channel."""


def version_of(connection: Connection) -> tuple[int, ...]:
    """Such as (3, 10, 8); empty where the broker does not say."""
    text = connection.server_properties.get("version")
    if isinstance(text, bytes | bytearray):
        text = text.decode(errors="replace")
    numbers = str(text or "").split("-")[0].split("+")[0].split(".")
    return tuple(int(number) for number in numbers) if all(number.isdecimal() for number in numbers) else ()


def largest_message(connection: Connection) -> int:
    """Bytes of the largest body that the broker takes unless it is configured otherwise."""
    return LARGEST_SINCE_4 if version_of(connection) >= (4,) else LARGEST
