"""How what reliamq keeps in Redis is named.

A topic is one stream for each of its lanes.  Everything of a lane has the lane in braces, so that a Cluster keeps it on
one node, and one script can change it in one step.  A message's lane follows from its key's hash.
"""

from __future__ import annotations

import json
from hashlib import blake2b

from reliamq.spi import ProcessedId

__all__ = [
    "DEAD",
    "LANE_COUNTS",
    "LaneKeys",
    "TopicKeys",
    "lane_of",
    "lease_of",
    "lock_of",
    "slot_of",
    "stream_of",
]

PREFIX = "reliamq:"
DEAD = PREFIX + "{dead-letters}"
SLOTS = 64
LANE_COUNTS = tuple(1 << bits for bits in range(7))
ESCAPES = str.maketrans({"%": "%25", "{": "%7B", "}": "%7D"})


def _tagged(name: str, prefix: str = PREFIX) -> str:
    """In braces; a Cluster looks at what is between the first two."""
    return prefix + "{" + name.translate(ESCAPES) + "}"


class TopicKeys:
    """Of a topic.  facts: what it was declared with, a hash."""

    def __init__(self, topic: str) -> None:
        self.facts = _tagged(topic)
        self.groups = f"{self.facts}:groups"
        """The names of those that were declared, a set."""

    def members(self, group: str) -> str:
        """Who is there, by when they are gone unless they say otherwise: a sorted set."""
        return f"{self.facts}:members:{group}"


class LaneKeys:
    """Of one lane of a topic, for one group.

    stream: its messages, the same for every group.
    state: who has it.  attempts: by entry.  delayed, waiting: what is away for long, by when, and itself.
    """

    def __init__(self, topic: str, lane: int, group: str) -> None:
        self.stream = stream_of(topic, lane)
        self.state = f"{self.stream}:state:{group}"
        self.attempts = f"{self.stream}:attempts:{group}"
        self.delayed = f"{self.stream}:delayed:{group}"
        self.waiting = f"{self.stream}:waiting:{group}"


def stream_of(topic: str, lane: int) -> str:
    """The stream of one lane."""
    return _tagged(f"{topic}/{lane}")


def slot_of(key: bytes) -> int:
    """The same for the same key, in every process and version."""
    return blake2b(key, digest_size=1).digest()[0] % SLOTS


def lane_of(slot: int, lanes: int) -> int:
    """Which of so many lanes, a power of two."""
    return slot % lanes


def lease_of(identity: ProcessedId) -> str:
    """The lease of an effect, and its mark when it is done: a hash.  Any two effects have two."""
    parts = [identity.topic, identity.group, identity.handler, identity.message_id]
    return _tagged(json.dumps(parts, separators=(",", ":")), f"{PREFIX}lease:")


def lock_of(name: str) -> str:
    """A lock: a hash like a lease's."""
    return _tagged(json.dumps(name), f"{PREFIX}lock:")
