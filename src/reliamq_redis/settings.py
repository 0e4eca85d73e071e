"""What may be set for Redis and Valkey, and how their URLs are read.

It promises that every wrong part of a URL or of the settings is named, and that nothing can be set which would weaken
a promise.  Nothing is connected here.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from reliamq.spi import ConfigurationError
from reliamq.spi.connecting import BrokerUrl, contradictions, described, read_url, tls_context, values_of

__all__ = ["SCHEMES", "Deployment", "RedisSettings", "read_settings"]


class Deployment(StrEnum):
    """How the servers are found that hold the data."""

    STANDALONE = "standalone"
    """One primary, at the address that the URL names."""
    SENTINEL = "sentinel"
    """The URL names Sentinels, and they say who the primary is."""
    CLUSTER = "cluster"
    """The URL names some nodes of a Cluster, and they say who holds what."""


FLAVOURS = ("redis", "valkey")
SCHEMES = {
    f"{flavour}{'s' if secure else ''}{'' if kind is Deployment.STANDALONE else f'+{kind}'}": (kind, secure)
    for flavour in FLAVOURS
    for secure in (False, True)
    for kind in Deployment
}
"""URL schemes: the deployment, and whether it is encrypted."""
FORBIDDEN = {
    "maxlen": "it removes messages that nobody has handled",
    "minid": "it removes messages that nobody has handled",
    "noack": "it acknowledges what was handed out, not what was handled",
    "retry": "the client would run a command again whose answer was lost",
    "retry_on_timeout": "the client would run a command again whose answer was lost",
    "retry_on_error": "the client would run a command again whose answer was lost",
    "decode_responses": "bodies are bytes",
    "read_from_replicas": "a replica may not have yet what the primary confirmed",
}
DEFAULT_PORT, DEFAULT_SENTINEL_PORT = 6379, 26379


class RedisSettings(BaseModel):
    """Settings of Redis, from its section of the configuration or the URL's query.

    servers: ``host:port`` of the primary, of the Sentinels, or of some nodes of the Cluster.
    primary: with Sentinels, the name by which they know it: the URL's path.
    database: its number; not with a Cluster.  Without Sentinels it is the URL's path.
    lanes: streams of a topic that ``declare`` creates; how many workers of a group can share it.
    replicas: how many replicas must have a message before it is confirmed; on their disks, where the server can tell
        (``WAITAOF``: Redis 7.2, Valkey).
    prefetch: messages of a lane that a member has at once, handled or not (C10).
    member_timeout_seconds: after how long without a word a member is gone, at the latest.
    request_timeout_seconds: how long one answer may take.
    trim_interval_seconds: how often what every group has finished is removed.
    sentinel_username, sentinel_password: where the Sentinels ask for others than the servers.
    tls: with ``ca_file`` or the system's authorities; ``cert_file`` and ``key_file`` are the client's own certificate.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    deployment: Deployment
    servers: tuple[str, ...]
    primary: str | None = None
    database: int = Field(default=0, ge=0)
    lanes: Literal[1, 2, 4, 8, 16, 32, 64] = 4
    replicas: int = Field(default=1, ge=0, le=10)
    prefetch: int = Field(default=1000, ge=1, le=10_000)
    member_timeout_seconds: float = Field(default=10.0, ge=1, le=600)
    request_timeout_seconds: float = Field(default=5.0, gt=0, le=300)
    trim_interval_seconds: float = Field(default=10.0, gt=0, le=86_400)
    username: str | None = None
    password: SecretStr | None = None
    sentinel_username: str | None = None
    sentinel_password: SecretStr | None = None
    tls: bool = False
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None

    @property
    def url(self) -> str:
        """Where it is, without secrets."""
        kind = "" if self.deployment is Deployment.STANDALONE else f"+{self.deployment}"
        place = f"/{self.primary}" if self.primary else f"/{self.database}" if self.database else ""
        return f"{'rediss' if self.tls else 'redis'}{kind}://{','.join(self.servers)}{place}"

    def ssl_context(self) -> ssl.SSLContext | None:
        """What to encrypt with.  Raises ConfigurationError for certificates that cannot be read."""
        return tls_context(self) if self.tls else None


def read_settings(url: str, section: Mapping[str, object]) -> RedisSettings:
    """Read ``redis[s][+sentinel|+cluster]://[user:password@]host[:port],…[/database or primary][?setting=value]``.

    section: the backend's own part of the configuration; the URL's query goes before it.
    Raises ConfigurationError naming the part that is wrong, never showing a password.
    """
    kind, secure = SCHEMES.get(url.partition("://")[0].lower(), (Deployment.STANDALONE, False))
    parts = read_url(url, default_port=DEFAULT_SENTINEL_PORT if kind is Deployment.SENTINEL else DEFAULT_PORT)
    values = values_of(parts, section, FORBIDDEN)
    values["deployment"] = kind
    if secure:
        values["tls"] = True
    values |= _place(kind, parts)
    return _checked(parts.plain, values)


def _place(kind: Deployment, parts: BrokerUrl) -> Mapping[str, object]:
    """What the path says."""
    if parts.path is None:
        return {}
    if kind is Deployment.SENTINEL:
        return {"primary": parts.path}
    if kind is Deployment.CLUSTER:
        raise ConfigurationError(f"{parts.plain}: a Cluster has one database, so '/{parts.path}' has no meaning there")
    if not parts.path.isdecimal():
        raise ConfigurationError(f"{parts.plain}: '/{parts.path}' must be the number of a database")
    return {"database": int(parts.path)}


def _checked(url: str, values: Mapping[str, object]) -> RedisSettings:
    lanes = values.get("lanes")
    if isinstance(lanes, str) and lanes.isdecimal():  # from the URL's query; a choice among numbers converts nothing
        values = {**values, "lanes": int(lanes)}
    if values.get("password") and not values.get("username"):
        values = {**values, "username": "default"}  # whose a password is that comes without a user
    try:
        settings = RedisSettings.model_validate(values)
    except ValidationError as error:
        faults = described(error.errors(include_input=False, include_url=False))
        raise ConfigurationError(f"{url}: settings of Redis: {faults}") from error
    for fault in _contradictions(settings):
        raise ConfigurationError(f"{url}: {fault}")
    return settings


def _contradictions(settings: RedisSettings) -> Iterator[str]:
    """Settings that are fine by themselves and not together."""
    kind = settings.deployment
    if kind is Deployment.STANDALONE and len(settings.servers) > 1:
        yield "several servers are either Sentinels (redis+sentinel://) or nodes of a Cluster (redis+cluster://)"
    if kind is Deployment.SENTINEL and not settings.primary:
        yield "say which primary the Sentinels watch: redis+sentinel://host:port/NAME"
    if kind is not Deployment.SENTINEL and settings.primary:
        yield "'primary' is a name that Sentinels know; write redis+sentinel://"
    if kind is Deployment.CLUSTER and settings.database:
        yield "a Cluster has one database; leave 'database' out"
    if settings.sentinel_username and not settings.sentinel_password:
        yield f"'sentinel_username' is '{settings.sentinel_username}' and has no 'sentinel_password'"
    yield from contradictions(settings)
