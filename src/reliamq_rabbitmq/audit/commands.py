"""The commands with which somebody puts a finding right, whole, so that they can be pasted."""

from __future__ import annotations

import re
from collections.abc import Sequence
from shlex import quote

from reliamq_rabbitmq.settings import RabbitmqSettings

__all__ = ["DECLARE", "Commands", "escape", "pattern_of"]

DECLARE = "Start the application once, or call 'await app.declare()'."


def pattern_of(name: str, end: str = "$") -> str:
    """The regular expression of that name alone; end: of all names that begin with it, when empty."""
    return f"^{escape(name)}{end}"


def escape(name: str) -> str:
    """The name in a regular expression of RabbitMQ's."""
    return re.sub(r"([.^$*+?()\[\]{}|\\])", r"\\\1", name)


class Commands:
    """RabbitMQ's own scripts, for this virtual host and this user."""

    def __init__(self, settings: RabbitmqSettings) -> None:
        self._host = f"-p {quote(settings.virtual_host)}"
        self._pattern = f"--vhost-pattern {quote(pattern_of(settings.virtual_host))}"
        self._user = quote(settings.credentials[0])

    def clear_policy(self, name: str, *, operator: bool) -> str:
        """Take a policy away, from everything that it is for."""
        return f"rabbitmqctl {'clear_operator_policy' if operator else 'clear_policy'} {self._host} {quote(name)}"

    def replace_queue(self, name: str, *, quorum: bool) -> str:
        """What a queue was declared with cannot be changed."""
        # RabbitMQ checks that a queue is empty for the other kinds only.
        delete = f"rabbitmqctl delete_queue {self._host} {quote(name)}{'' if quorum else ' --if-empty'}"
        return f"Have its messages handled, then: {delete}; then call 'await app.declare()'."

    def replace_exchange(self, name: str) -> str:
        """Deleting an exchange takes its bindings along, and no message."""
        return f"Stop the publishers, delete the exchange '{name}', then call 'await app.declare()'."

    def grow(self, nodes: Sequence[str], pattern: str) -> str:
        """Members on these nodes for queues that have none there.  nodes: none where they are not known."""
        queues = f"{self._pattern} --queue-pattern {quote(pattern)}"
        return " && ".join(f"rabbitmq-queues grow {node} all {queues}" for node in nodes or ["NODE"])

    def rebalance(self, pattern: str) -> str:
        """Spread leaders over the nodes."""
        return f"rabbitmq-queues rebalance quorum {self._pattern} --queue-pattern {quote(pattern)}"

    def limit_disk(self, node: str, limit: str) -> str:
        """Until the node restarts."""
        return f"rabbitmqctl -n {node} set_disk_free_limit {limit}"

    def tag_user(self, tag: str) -> str:
        """Let this user ask the management API."""
        return f"rabbitmqctl set_user_tags {self._user} {tag}"

    def permit_user(self) -> str:
        """Let this user into the virtual host."""
        return f"rabbitmqctl set_permissions {self._host} {self._user} '.*' '.*' '.*'"
