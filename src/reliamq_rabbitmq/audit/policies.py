"""Which policies are in effect on a queue or an exchange.

Of those that users set the broker itself says which; of the operators' it says so seconds later only, so that these are
matched here as the broker does it: the pattern, what it is for, and of several the one with the highest priority.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from reliamq_rabbitmq.audit.answers import Exchange, Policy, Queue

__all__ = ["Policies"]

FOR_QUEUES = frozenset({"all", "queues"})
FOR_KIND = {"quorum": "quorum_queues", "classic": "classic_queues", "stream": "streams"}


class Policies:
    """Of one virtual host."""

    def __init__(self, policies: Sequence[Policy]) -> None:
        self._users = {one.name: one for one in policies if not one.operator}
        self._operators = [one for one in policies if one.operator]

    def on_queue(self, queue: Queue) -> list[Policy]:
        """What is in effect on it."""
        users = self._users.get(queue.policy or "")
        return [*([users] if users is not None else []), *self._operators_on(queue)]

    def on_exchange(self, exchange: Exchange) -> Policy | None:
        """What is in effect on it; operators have none for exchanges."""
        return self._users.get(exchange.policy or "")

    def unreadable(self) -> list[Policy]:
        """Those of the operators' whose pattern means nothing in Python's regular expressions."""
        return [one for one in self._operators if _compiled(one) is None]

    def _operators_on(self, queue: Queue) -> list[Policy]:
        """Of several with one priority the broker takes any: then all are in effect."""
        fitting = [one for one in self._operators if _is_for(one, queue)]
        highest = max((one.priority for one in fitting), default=0)
        return [one for one in fitting if one.priority == highest]


def _is_for(policy: Policy, queue: Queue) -> bool:
    pattern = _compiled(policy)
    kinds = FOR_QUEUES | {FOR_KIND.get(queue.kind, "")}
    return policy.applies_to in kinds and pattern is not None and pattern.search(queue.name) is not None


def _compiled(policy: Policy) -> re.Pattern[str] | None:
    try:
        return re.compile(policy.pattern)
    except re.error:
        return None
