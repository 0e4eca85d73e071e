"""How what reliamq declares is named, and what each is declared with.

A topic is a fanout exchange of its name, and beside it a queue with one message that says what it was declared with.
A group is a topic exchange ``group@topic``, bound to the topic's; behind it are its lanes, quorum queues with a single
active consumer each.  A message's routing key is six binary digits of its key's hash; a lane is bound to the first few
of them, so that whoever publishes need not know how many lanes a group has.  Beside each lane is its ledger, a queue
with the attempts of the lane's messages.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

from reliamq.spi import ConfigurationError

__all__ = [
    "DEAD_LETTERS",
    "DELAYS_OVER",
    "GROUP_SIZE",
    "LANE_COUNTS",
    "STEPS",
    "WAITS_FOR",
    "check_names",
    "delay_step",
    "facts_queue",
    "group_exchange",
    "lane_pattern",
    "lane_queue",
    "lanes_mark",
    "ledger_queue",
    "members_exchange",
    "quorum_arguments",
    "routing_key",
    "step_arguments",
]

DEAD_LETTERS = "reliamq.dead-letters"
DELAYS = "reliamq.delays"
DELAYS_OVER = f"{DELAYS}/over"
"""Where a wait ends: each lane gets from there what names it in the header :data:`WAITS_FOR`."""
WAITS_FOR = "reliamq-lane"
STEPS = 23
"""Of the ladder on which long waits are: 97 days together."""
GROUP_SIZE = "x-quorum-initial-group-size"
DIGITS = 6
LANE_COUNTS = tuple(1 << bits for bits in range(DIGITS + 1))
ROUTING_KEYS = tuple(".".join(f"{number:0{DIGITS}b}") for number in range(1 << DIGITS))
CHARACTERS = re.compile(r"[a-zA-Z0-9_.:#,+-]*")
LONGEST_EXCHANGE = 127
"""Both are pamqp's, which is stricter than RabbitMQ (255 bytes of UTF-8)."""
ROOM = LONGEST_EXCHANGE - len("@/lanes/64")
NO_DELIVERY_LIMIT = 1_000_000_000
"""RabbitMQ 4 drops what was delivered 20 times, unless a limit is set; earlier versions have no word for none."""


def check_names(topic: str, group: str = "") -> None:
    """Raise ConfigurationError where AMQP, or the client, cannot carry the names that they lead to."""
    for what, name in (("topic", topic), ("group", group)):
        if not CHARACTERS.fullmatch(name):
            raise ConfigurationError(
                f"{what} '{name}': RabbitMQ's client knows names of letters, digits and -_.:#,+ only"
            )
    if len(topic) + len(group) > ROOM:
        taken = len(topic) + len(group)
        raise ConfigurationError(
            f"topic '{topic}' and group '{group}' have {taken} characters; RabbitMQ's client has room for {ROOM}"
        )


def facts_queue(topic: str) -> str:
    """What the topic was declared with."""
    return f"{topic}/facts"


def group_exchange(topic: str, group: str) -> str:
    """Where a group's messages arrive."""
    return f"{group}@{topic}"


def lane_queue(topic: str, group: str, lane: int) -> str:
    """One lane of a group."""
    return f"{group}@{topic}/{lane}"


def ledger_queue(topic: str, group: str, lane: int) -> str:
    """The attempts of a lane's messages."""
    return f"{group}@{topic}/{lane}/ledger"


def lanes_mark(topic: str, group: str, lanes: int) -> str:
    """An exchange that nothing is sent to: that it is there says how many lanes the group was declared with, whatever
    became of them.
    """
    return f"{group}@{topic}/lanes/{lanes}"


def members_exchange(topic: str, group: str) -> str:
    """Where a group's members hear of one another."""
    return f"{group}@{topic}/members"


def delay_step(step: int) -> str:
    """The exchange and the queue of one step of the ladder; a message waits there for so many powers of two seconds."""
    return f"{DELAYS}/{step}"


def step_arguments(step: int, replicas: int) -> Mapping[str, Any]:
    """What the queue of a step of the ladder is declared with."""
    return {
        **quorum_arguments(replicas, single_consumer=False),
        "x-message-ttl": 1000 << step,
        "x-dead-letter-exchange": delay_step(step - 1) if step else DELAYS_OVER,
        "x-dead-letter-strategy": "at-least-once",
    }


def lane_pattern(lane: int, lanes: int) -> str:
    """Which routing keys a lane gets."""
    bits = lanes.bit_length() - 1
    return ".".join([*f"{lane:0{bits}b}", "#"]) if bits else "#"


def routing_key(key: bytes) -> str:
    """The same for the same key, in every process and version."""
    return ROUTING_KEYS[blake2b(key, digest_size=1).digest()[0] & (len(ROUTING_KEYS) - 1)]


def quorum_arguments(replicas: int, *, single_consumer: bool = True) -> Mapping[str, Any]:
    """A queue that is on several nodes, drops nothing, and gives its messages to one consumer at a time."""
    arguments: dict[str, Any] = {
        "x-queue-type": "quorum",
        GROUP_SIZE: replicas,
        "x-delivery-limit": NO_DELIVERY_LIMIT,
        "x-overflow": "reject-publish",
    }
    if single_consumer:
        arguments["x-single-active-consumer"] = True
    return arguments
