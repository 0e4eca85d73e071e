"""What may be set for RabbitMQ, and how its URLs are read.

It promises that every wrong part of a URL or of the settings is named, and that nothing can be set which would weaken
a promise.  Nothing is connected here.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from reliamq.spi import ConfigurationError
from reliamq.spi.connecting import contradictions, described, read_url, tls_context, values_of

__all__ = ["SCHEMES", "RabbitmqSettings", "read_settings"]

SCHEMES = {"rabbitmq": False, "amqp": False, "rabbitmqs": True, "amqps": True}
"""URL schemes, and whether each is encrypted."""
FORBIDDEN = {
    "publisher_confirms": "without them nobody knows what the broker has",
    "mandatory": "without it a message that no queue receives is dropped in silence",
    "delivery_mode": "what is not persistent is lost with its broker",
    "durable": "what is not durable is lost with its broker",
    "auto_ack": "it acknowledges what was handed out, not what was handled",
    "no_ack": "it acknowledges what was handed out, not what was handled",
    "queue_type": "only quorum queues are on more than one node",
    "auto_delete": "a queue that is deleted takes its messages along",
    "exclusive": "a queue that is deleted takes its messages along",
    "message_ttl": "it removes messages that nobody has handled",
    "max_length": "it removes messages that nobody has handled",
}
DEFAULT_PORT, DEFAULT_TLS_PORT = 5672, 5671


class RabbitmqSettings(BaseModel):
    """Settings of RabbitMQ, from its section of the configuration or the URL's query.

    servers: ``host:port`` of the cluster's nodes; whichever answers is used.
    virtual_host: the URL's path.
    lanes: quorum queues of a group that ``declare`` creates; how many workers of it can share a topic.
    replicas: members of each quorum queue that ``declare`` creates.
    prefetch: messages of a lane that a member has at once, handled or not (C10).
    heartbeat_seconds: a connection that is silent for three times as long is dead.
    request_timeout_seconds: how long one answer may take.
    ack_timeout_seconds: the broker's ``consumer_timeout``: what nobody acknowledges for so long, it takes back by
        closing the channel.  reliamq renews what it holds before that.
    management_url: ``http(s)://host:port`` of the management plugin, which an audit reads.  Default: each of the
        servers, port 15672 (15671 encrypted).
    username, password: default is RabbitMQ's own, guest.
    tls: with ``ca_file`` or the system's authorities; ``cert_file`` and ``key_file`` are the client's own certificate.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    servers: tuple[str, ...]
    virtual_host: str = "/"
    lanes: Literal[1, 2, 4, 8, 16, 32, 64] = 4
    replicas: int = Field(default=3, ge=1, le=9)
    prefetch: int = Field(default=500, ge=1, le=10_000)
    heartbeat_seconds: int = Field(default=10, ge=1, le=600)
    request_timeout_seconds: float = Field(default=10.0, gt=0, le=300)
    ack_timeout_seconds: float = Field(default=1800.0, ge=2, le=10 * 86_400)
    management_url: str | None = None
    username: str | None = None
    password: SecretStr | None = None
    tls: bool = False
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None

    @property
    def url(self) -> str:
        """Where it is, without secrets."""
        host = "" if self.virtual_host == "/" else f"/{self.virtual_host}"
        return f"{'rabbitmqs' if self.tls else 'rabbitmq'}://{','.join(self.servers)}{host}"

    @cached_property
    def credentials(self) -> tuple[str, str]:
        """User and password."""
        if self.username is None:
            return "guest", "guest"
        return self.username, self.password.get_secret_value() if self.password else ""

    @property
    def management(self) -> str:
        """Where an audit asks."""
        if self.management_url is not None:
            return self.management_url.rstrip("/")
        host = self.servers[0].rpartition(":")[0]
        return f"https://{host}:15671" if self.tls else f"http://{host}:15672"

    def ssl_context(self) -> ssl.SSLContext | None:
        """What to encrypt with.  Raises ConfigurationError for certificates that cannot be read."""
        return tls_context(self) if self.tls else None


def read_settings(url: str, section: Mapping[str, object]) -> RabbitmqSettings:
    """Read ``rabbitmq://[user:password@]host[:port],host[:port]…[/virtual-host][?setting=value]``.

    section: the backend's own part of the configuration; the URL's query goes before it.
    Raises ConfigurationError naming the part that is wrong, never showing a password.
    """
    secure = SCHEMES.get(url.partition("://")[0].lower(), False)
    parts = read_url(url, default_port=DEFAULT_TLS_PORT if secure else DEFAULT_PORT)
    values = values_of(parts, section, FORBIDDEN)
    if secure:
        values["tls"] = True
    if parts.path is not None:
        values["virtual_host"] = parts.path
    return _checked(parts.plain, values)


def _checked(url: str, values: Mapping[str, object]) -> RabbitmqSettings:
    lanes = values.get("lanes")
    if isinstance(lanes, str) and lanes.isdigit():  # from the URL's query; a choice among numbers converts nothing
        values = {**values, "lanes": int(lanes)}
    try:
        settings = RabbitmqSettings.model_validate(values)
    except ValidationError as error:
        faults = described(error.errors(include_input=False, include_url=False))
        raise ConfigurationError(f"{url}: settings of RabbitMQ: {faults}") from error
    for fault in _contradictions(settings):
        raise ConfigurationError(f"{url}: {fault}")
    return settings


def _contradictions(settings: RabbitmqSettings) -> Iterator[str]:
    """Settings that are fine by themselves and not together."""
    if settings.replicas % 2 == 0:
        yield f"replicas {settings.replicas} is even: it survives no more than {settings.replicas - 1} would"
    if settings.management_url and not settings.management_url.startswith(("http://", "https://")):
        yield "'management_url' must start with http:// or https://"
    if settings.management_url and "@" in settings.management_url:
        yield "'management_url' must hold no password; the one of the connection is used"
    yield from contradictions(settings)
