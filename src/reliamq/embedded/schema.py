"""The numbers that ``schema.sql`` explains, by name."""

from __future__ import annotations

__all__ = ["APART", "BEHIND", "LEASED", "READY", "TOPIC_SHIFT", "WAITING", "number_in_topic"]

WAITING, READY, LEASED, APART, BEHIND = range(5)
TOPIC_SHIFT = 40


def number_in_topic(seq: int) -> int:
    """The part of a seq or position that counts within its topic, for people to read."""
    return seq & ((1 << TOPIC_SHIFT) - 1)
