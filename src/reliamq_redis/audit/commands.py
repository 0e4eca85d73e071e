"""The commands with which somebody puts a finding right, whole, so that they can be pasted."""

from __future__ import annotations

from collections.abc import Sequence
from shlex import quote

from reliamq_redis.settings import Deployment, RedisSettings
from reliamq_redis.wire.servers import Address

__all__ = ["DECLARE", "REPLAY", "Commands"]

DECLARE = "Start the application once, or call 'await app.declare()'."
REPLAY = "reliamq outbox replay --since TIME"


class Commands:
    """``redis-cli``, pointed at a server; no password is shown, it is asked for."""

    def __init__(self, settings: RedisSettings) -> None:
        self._user = settings.username or "default"
        self._options = ""
        if settings.password is not None:
            self._options += f" --user {quote(self._user)} --askpass"
        if settings.tls:
            self._options += " --tls"
            self._options += f" --cacert {quote(settings.ca_file)}" if settings.ca_file else ""
        self._database = f" -n {settings.database}" if settings.database else ""
        self._follow = " -c" if settings.deployment is Deployment.CLUSTER else ""

    def run(self, address: Address, *words: str) -> str:
        """One command on that server."""
        return f"redis-cli -h {address[0]} -p {address[1]}{self._options} {' '.join(map(quote, words))}"

    def on_key(self, address: Address, *words: str) -> str:
        """One command about a key.  address: of a server that holds data; in a Cluster, of any."""
        at = f"redis-cli{self._follow} -h {address[0]} -p {address[1]}{self._options}{self._database}"
        return f"{at} {' '.join(map(quote, words))}"

    def set(self, address: Address, *change: str) -> str:
        """A setting, now and after the next start.  change: its name and its value."""
        return f"{self.run(address, 'CONFIG', 'SET', *change)} && {self.run(address, 'CONFIG', 'REWRITE')}"

    def permit(self, address: Address, commands: Sequence[str]) -> str:
        """Let this user ask.  commands: as access control lists name them (``config|get``)."""
        return self.run(address, "ACL", "SETUSER", self._user, *(f"+{command}" for command in commands))
