"""The queues that reliamq has for all topics: dead letters, and the ladder of long waits."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from reliamq_rabbitmq.catalog.names import DEAD_LETTERS, STEPS, delay_step, quorum_arguments, step_arguments

__all__ = ["OWN", "OWN_QUEUES", "arguments_of", "own_arguments"]

OWN = "reliamq."
"""Their names begin so."""
OWN_QUEUES = "reliamq's own queues"
STEP = re.compile(re.escape(delay_step(0)).removesuffix("0") + r"(\d+)")


def own_arguments(replicas: int) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each that there may be, and what it is declared with."""
    for name in (DEAD_LETTERS, *map(delay_step, range(STEPS))):
        arguments = arguments_of(name, replicas)
        if arguments is not None:
            yield name, arguments


def arguments_of(name: str, replicas: int) -> Mapping[str, Any] | None:
    """What a queue of that name is declared with; None where it is no queue of reliamq's own."""
    if name == DEAD_LETTERS:
        return quorum_arguments(replicas)
    found = STEP.fullmatch(name)
    if found is None:
        return None
    return step_arguments(int(found[1]), replicas)
