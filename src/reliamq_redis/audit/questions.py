"""Questions to servers.  None changes anything, and a refusal is noted and no answer: never taken for one."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from redis.exceptions import ClusterDownError, ResponseError

from reliamq.spi import BrokerUnavailable, Finding, Severity
from reliamq_redis.audit.answers import Server
from reliamq_redis.audit.commands import Commands
from reliamq_redis.settings import Deployment, RedisSettings
from reliamq_redis.wire.errors import is_elsewhere, said
from reliamq_redis.wire.servers import Address, Servers

__all__ = ["SETTINGS", "Questions", "ask_server", "sentinel_settings", "unseen"]

SETTINGS = (
    "appendonly",
    "appendfsync",
    "no-appendfsync-on-rewrite",
    "aof-load-truncated",
    "min-replicas-to-write",
    "min-replicas-max-lag",
    "cluster-require-full-coverage",
)
"""Asked one by one: before Redis 7 ``CONFIG GET`` takes one name, and all of them would show passwords."""
WORDS = {"CONFIG": 2, "COMMAND": 2, "CLUSTER": 2, "SENTINEL": 2, "XINFO": 2}
"""Of how many words the name of a command is, where it is not one."""


class Questions:
    """refused: what a server said instead of an answer, by the command's name."""

    def __init__(self, servers: Servers, settings: RedisSettings) -> None:
        self._servers, self._settings = servers, settings
        self.refused: dict[str, str] = {}

    async def of_key(self, key: str, *command: Any, **options: Any) -> Any:
        """The answer of the server that holds the key; None if it refuses, or if nobody holds it.

        options: how redis-py is to read the answer.  Raises the client's errors.
        """
        try:
            address = await self._servers.holder(key)
        except BrokerUnavailable as error:
            self.refused.setdefault(_named(command), error.detail)
            return None
        return await self.of_server(address, *command, **options)

    async def of_server(self, address: Address, *command: Any, **options: Any) -> Any:
        """The answer of one server; None if it refuses.  Raises the client's errors."""
        client: Any = self._servers.client(address)  # redis-py does not say what its method takes
        try:
            async with asyncio.timeout(self._settings.request_timeout_seconds):
                return await client.execute_command(*command, **options)
        except ResponseError as error:
            if is_elsewhere(error) and not isinstance(error, ClusterDownError):
                self._servers.forget()
                raise
            self.refused.setdefault(_named(command), said(error))
            return None


def _named(command: Sequence[Any]) -> str:
    words = " ".join(map(str, command)).split()
    return " ".join(words[: WORDS.get(words[0], 1)])


async def ask_server(servers: Servers, settings: RedisSettings, address: Address) -> Server:
    """What one server tells of itself.  Raises the client's errors."""
    questions, config = Questions(servers, settings), dict[str, str]()
    info = await questions.of_server(address, "INFO")
    # In one word, because redis-py cannot read the answer about a command that the server does not know
    known = await questions.of_server(address, "COMMAND INFO", "WAITAOF")
    for setting in SETTINGS:
        told = await questions.of_server(address, "CONFIG GET", setting)
        if told is None:
            break
        config |= told
    return Server(address, info or {}, config, None if known is None else known[0] is not None, questions.refused)


def sentinel_settings(settings: RedisSettings) -> RedisSettings:
    """With which a Sentinel is asked like a server."""
    user, password = settings.sentinel_username, settings.sentinel_password
    if password is None:
        user, password = settings.username, settings.password
    changed = {"deployment": Deployment.STANDALONE, "primary": None, "database": 0}
    return settings.model_copy(update={**changed, "username": user, "password": password})


def unseen(subject: str, questions: Questions, address: Address, commands: Commands) -> Sequence[Finding]:
    """What was refused there.  address: of a server at which the permission is given."""
    if not questions.refused:
        return []
    names = sorted(questions.refused)
    found = f"not seen ({'; '.join(f'{name}: {questions.refused[name]}' for name in names)})"
    missing = [name.lower().replace(" ", "|") for name in names if "permission" in questions.refused[name]]
    fix = f"Permit it: {commands.permit(address, missing)}" if missing else "Ask who runs the server, or look there."
    why = "What cannot be read is not known to be safe."
    return [Finding(Severity.UNSEEN, subject, ", ".join(names), found, "readable", why, fix)]
