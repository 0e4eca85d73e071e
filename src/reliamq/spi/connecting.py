"""How a networked backend reads its URL and its certificates: the same words and the same faults for every broker.

It promises that each wrong part is named and that no password is shown.  Nothing is connected here.  Not imported by
``reliamq.spi`` itself, because it loads OpenSSL.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from reliamq.spi.errors import ConfigurationError

__all__ = ["BrokerUrl", "Secured", "contradictions", "described", "read_url", "tls_context", "values_of"]


@dataclass(frozen=True, slots=True)
class BrokerUrl:
    """``scheme://[user:password@]host[:port],host[:port]…[/path][?setting=value]``, taken apart.

    servers: ``host:port`` each.  path: decoded, without its first slash; None where there is none.
    query: the settings in it.  plain: the URL without user, password and settings.
    """

    scheme: str
    servers: tuple[str, ...]
    username: str | None
    password: str | None = field(repr=False)
    path: str | None
    query: Mapping[str, str]
    plain: str


class Secured(Protocol):
    """Settings of a connection that may be encrypted and may need a password."""

    @property
    def url(self) -> str: ...  # without secrets
    @property
    def tls(self) -> bool: ...  # whether to encrypt
    @property
    def username(self) -> str | None: ...  # whose password
    @property
    def password(self) -> object | None: ...  # masked
    @property
    def ca_file(self) -> str | None: ...  # authorities
    @property
    def cert_file(self) -> str | None: ...  # the client's own certificate
    @property
    def key_file(self) -> str | None: ...  # and its key


def read_url(url: str, *, default_port: int) -> BrokerUrl:
    """Take a URL apart.  Raises ConfigurationError naming the part that is wrong, never showing a password."""
    try:
        parts = urlsplit(url)
    except ValueError:  # says what it read, which may be the password
        raise _unreadable(url.partition("://")[0]) from None
    if "@" not in parts.netloc and "@" in parts.path + parts.query + parts.fragment:
        raise _unreadable(parts.scheme)
    return _read(parts, default_port)


def _unreadable(scheme: str) -> ConfigurationError:
    """Nothing of the URL is shown: its parts are not what they seem."""
    return ConfigurationError(
        f"{scheme}://: the URL cannot be read, and is not shown because it may be the password that breaks it: in user "
        "and password percent-encode '/' as %2F, '?' as %3F, '#' as %23, '[' as %5B, and elsewhere '@' as %40"
    )


def _read(parts: SplitResult, default_port: int) -> BrokerUrl:
    credentials, _, hosts = parts.netloc.rpartition("@")
    plain = f"{parts.scheme}://{hosts}"
    if parts.fragment:
        raise ConfigurationError(f"{plain}: '#' has no meaning there; in a password write '%23'")
    servers = tuple(_server(plain, host, default_port) for host in hosts.split(","))
    user, colon, password = credentials.partition(":")
    return BrokerUrl(
        scheme=parts.scheme,
        servers=servers,
        username=unquote(user) if credentials else None,
        password=unquote(password) if colon else None,
        path=unquote(parts.path[1:]) if parts.path not in ("", "/") else None,
        query=dict(parse_qsl(parts.query, keep_blank_values=True)),
        plain=plain,
    )


def _server(url: str, host: str, default_port: int) -> str:
    name, colon, port = host.rpartition(":")
    if not colon or host.endswith("]"):  # an IPv6 address has colons of its own, in brackets
        name, port = host, str(default_port)
    if not name or not port.isdecimal() or not port.isascii() or not 0 < int(port) < 65536:
        example = f"{url.partition('://')[0]}://host1:{default_port},host2:{default_port}"
        raise ConfigurationError(f"{url}: '{host}' is no host:port; write {example}")
    return f"{name}:{port}"


def values_of(parts: BrokerUrl, section: Mapping[str, object], forbidden: Mapping[str, str]) -> dict[str, object]:
    """What is set: the section of the configuration, and the URL before it.

    forbidden: settings that would weaken a promise, and which.  Raises ConfigurationError for one of these.
    """
    values: dict[str, object] = {**section, **parts.query}
    for name, why in forbidden.items():
        if name in values:
            raise ConfigurationError(f"{parts.plain}: '{name}' cannot be set: {why}")
    values["servers"] = parts.servers
    if parts.username is not None:
        values["username"] = parts.username
    if parts.password is not None:
        values["password"] = parts.password
    return values


def described(faults: Iterable[Mapping[str, Any]]) -> str:
    """pydantic's findings on settings, in one line.  faults: ``error.errors(include_input=False, include_url=False)``,
    so that no value is shown.
    """
    return "; ".join(f"{'.'.join(str(part) for part in fault['loc'])}: {fault['msg']}" for fault in faults)


def contradictions(settings: Secured) -> Iterator[str]:
    """Settings that are fine by themselves and not together, each as a sentence."""
    files = [name for name in ("ca_file", "cert_file", "key_file") if getattr(settings, name)]
    if files and not settings.tls:
        scheme = settings.url.partition("://")[0]
        yield f"'{files[0]}' is set and the connection is not encrypted; write {scheme}s://"
    if settings.key_file and not settings.cert_file:
        yield "'key_file' is set and 'cert_file' is not; a key alone proves nothing"
    if settings.username and not settings.password:
        yield f"user '{settings.username}' has no password; write user:password@ or set 'password'"
    if settings.password and not settings.username:
        yield "a password is set and no user; write user:password@ or set 'username'"


def tls_context(settings: Secured) -> ssl.SSLContext:
    """What to encrypt with.  Raises ConfigurationError for certificates that cannot be read."""
    context = ssl.create_default_context(cafile=_readable(settings, "ca_file"))
    certificate, key = _readable(settings, "cert_file"), _readable(settings, "key_file")
    if certificate is not None:
        try:
            context.load_cert_chain(certificate, key, password=lambda: "")  # without it OpenSSL would ask a person
        except OSError as error:
            raise ConfigurationError(
                f"{settings.url}: 'cert_file' ({certificate}) and 'key_file' ({key or 'the same file'}) do not hold a "
                f"certificate and its key, PEM and not encrypted: {_said(error)}"
            ) from error
    return context


def _readable(settings: Secured, name: str) -> str | None:
    """The setting, if it is none or a file that can be read (and trusted, if that is its purpose)."""
    path: str | None = getattr(settings, name)
    if path is None:
        return None
    try:
        with open(path, "rb"):
            pass
        if name == "ca_file":
            ssl.create_default_context(cafile=path)
    except OSError as error:
        what = "certificates in PEM format" if isinstance(error, ssl.SSLError) else "a file that can be read"
        raise ConfigurationError(f"{settings.url}: '{name}' must name {what}; '{path}': {_said(error)}") from error
    return path


def _said(error: OSError) -> str:
    return error.strerror or str(error)
