"""Questions to the management HTTP API.  They change nothing, and each is answered or raises :class:`ManagementError`.

What it tells of queues is asked for without its statistics: those are seconds old, and slow to collect.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

import httpx

from reliamq_rabbitmq.audit.answers import Alarm, Binding, Exchange, Node, Policy, Queue
from reliamq_rabbitmq.audit.commands import Commands, escape
from reliamq_rabbitmq.settings import RabbitmqSettings

__all__ = ["Management", "ManagementError", "open_management"]

T = TypeVar("T")
PAGE = 500
LONGEST_PATTERN = 4000
CONNECT_SECONDS = 3.0
OK, UNAUTHORIZED, FORBIDDEN, NOT_FOUND, UNAVAILABLE = 200, 401, 403, 404, 503
NODE_COLUMNS = (
    "name,running,type,partitions,mem_used,mem_limit,disk_free,disk_free_limit,applications.name,applications.version"
)
ENABLE = (
    "Enable it on each node (rabbitmq-plugins enable rabbitmq_management) and set 'management_url' to where it listens."
)


class ManagementError(Exception):
    """It told nothing.  detail: why not; holds no password.  fix: what to do about it.  reached: it did answer."""

    def __init__(self, detail: str, fix: str, *, reached: bool = True) -> None:
        super().__init__(detail)
        self.detail, self.fix, self.reached = detail, fix, reached


class Management:
    """The API of one node, which tells of all nodes.  address: ``http(s)://host:port`` of it."""

    def __init__(self, client: httpx.AsyncClient, settings: RabbitmqSettings, address: str) -> None:
        self._client, self._address, self._commands = client, address, Commands(settings)
        self._user, self._host = settings.credentials[0], quote(settings.virtual_host, safe="")

    async def greet(self) -> None:
        """Whether it is there and lets this user in.  Raises ManagementError."""
        await self._ask("overview")

    async def nodes(self) -> list[Node]:
        """All of the cluster, running or not.  Raises ManagementError, as all of these do."""
        return _read(await self._ask("nodes", columns=NODE_COLUMNS), Node.read)

    async def alarms(self) -> list[Alarm]:
        """Those in effect now, of all nodes."""
        told = await self._ask("health/checks/alarms")
        return _read(_part(told, "alarms", ()), Alarm.read)

    async def queues(self, parts: Sequence[str]) -> list[Queue]:
        """Queues of the virtual host in whose name one of ``parts`` is."""
        return await self._named(f"queues/{self._host}", parts, Queue.read)

    async def exchanges(self, parts: Sequence[str]) -> list[Exchange]:
        """Exchanges of the virtual host in whose name one of ``parts`` is."""
        return await self._named(f"exchanges/{self._host}", parts, Exchange.read)

    async def bindings(self, exchange: str) -> list[Binding]:
        """From that exchange; none where there is no such exchange."""
        path = f"exchanges/{self._host}/{quote(exchange, safe='')}/bindings/source"
        return _read(await self._ask(path, otherwise=()), Binding.read)

    async def policies(self) -> list[Policy]:
        """Of the virtual host, the operators' included."""
        users = await self._ask(f"policies/{self._host}")
        operators = await self._ask(f"operator-policies/{self._host}")
        return [
            *_read(users, lambda told: Policy.read(told, operator=False)),
            *_read(operators, lambda told: Policy.read(told, operator=True)),
        ]

    async def feature_flags(self) -> Mapping[str, bool]:
        """Whether each is enabled.  It tells administrators only."""
        flags = await self._ask("feature-flags")
        return dict(_read(flags, lambda told: (told["name"], told["state"] == "enabled")))

    async def _named(self, path: str, parts: Sequence[str], read: Callable[[Any], T]) -> list[T]:
        """It looks at all that there are for each question, so that one asks for as many names as it can take."""
        found = list[T]()
        for pattern in _patterns(parts):
            page, pages = 1, 1
            while page <= pages:
                told = await self._ask(
                    path, name=pattern, use_regex="true", page=page, page_size=PAGE, disable_stats="true"
                )
                found += _read(_part(told, "items"), read)
                page, pages = page + 1, _part(told, "page_count")
        return found

    async def _ask(self, path: str, *, otherwise: Any = None, **query: str | int) -> Any:
        """otherwise: the answer where there is no such thing; None: that is an error."""
        try:
            response = await self._client.get(f"{self._address}/api/{path}", params=query)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            detail = f"nobody answers at {self._address}: {str(error) or type(error).__name__}"
            raise ManagementError(detail, ENABLE, reached=False) from error
        if response.status_code == NOT_FOUND and otherwise is not None:
            return otherwise
        if response.status_code not in (OK, UNAVAILABLE):  # a health check that fails is an answer
            raise self._refusal(response)
        return self._content(response)

    def _content(self, response: httpx.Response) -> Any:
        try:
            return response.json()
        except ValueError as error:
            detail = f"{self._address} answers {response.status_code} and no JSON"
            raise ManagementError(detail, "Set 'management_url' to where the management API listens.") from error

    def _refusal(self, response: httpx.Response) -> ManagementError:
        reason = _reason(response)
        detail = f"{self._address} answers {response.status_code} {reason}".rstrip()
        if response.status_code not in (UNAUTHORIZED, FORBIDDEN):
            return ManagementError(detail, "Set 'management_url' to where the management API listens.")
        detail += f" to user '{self._user}'"
        if "virtual host" in reason:
            return ManagementError(detail, f"Let the user in: {self._commands.permit_user()}")
        tag = "administrator" if "administrator" in reason else "monitoring"
        return ManagementError(detail, f"Correct user and password, or permit it: {self._commands.tag_user(tag)}")


def _patterns(parts: Sequence[str]) -> Iterator[str]:
    """Regular expressions of names in which one of ``parts`` is, none too long for a URL."""
    escaped, length = list[str](), 0
    for part in map(escape, parts):
        size = len(quote(part, safe=""))
        if escaped and length + size > LONGEST_PATTERN:
            yield "|".join(escaped)
            escaped, length = [], 0
        escaped, length = [*escaped, part], length + size
    if escaped:
        yield "|".join(escaped)


def _read(told: Any, read: Callable[[Any], T]) -> list[T]:
    try:
        return [read(one) for one in told]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise _unknown(error) from error


def _part(told: Any, name: str, otherwise: Any = None) -> Any:
    try:
        return told[name] if otherwise is None else told.get(name, otherwise)
    except (KeyError, TypeError, AttributeError) as error:
        raise _unknown(error) from error


def _unknown(error: Exception) -> ManagementError:
    detail = f"the management API answers otherwise than reliamq knows it: {error!r}"
    return ManagementError(detail, "Look yourself, and tell reliamq's developers.")


def _reason(response: httpx.Response) -> str:
    try:
        return str(response.json()["reason"])
    except (ValueError, KeyError, TypeError):
        return response.reason_phrase


@asynccontextmanager
async def open_management(settings: RabbitmqSettings) -> AsyncIterator[Management]:
    """Ask whichever node answers; all of them are tried where no ``management_url`` is set.

    Raises ManagementError on entry.
    """
    seconds = settings.request_timeout_seconds
    async with httpx.AsyncClient(
        auth=settings.credentials,
        verify=settings.ssl_context() or ssl.create_default_context(),
        timeout=httpx.Timeout(seconds, connect=min(seconds, CONNECT_SECONDS)),
        trust_env=False,  # no proxy of the environment gets to see the password
    ) as client:
        yield await _answering([Management(client, settings, address) for address in _addresses(settings)])


async def _answering(candidates: Sequence[Management]) -> Management:
    """All at once: where a firewall swallows what is sent, each would take its time."""
    answers = await asyncio.gather(*[one.greet() for one in candidates], return_exceptions=True)
    refusal: BaseException | None = None
    for candidate, answer in zip(candidates, answers, strict=True):
        if answer is None:
            return candidate
        if refusal is None or (isinstance(answer, ManagementError) and answer.reached):
            refusal = answer
    raise refusal or AssertionError("there is always a server")


def _addresses(settings: RabbitmqSettings) -> list[str]:
    first = settings.management
    if settings.management_url is not None:
        return [first]
    scheme, port = urlsplit(first).scheme, urlsplit(first).port
    hosts = dict.fromkeys(server.rpartition(":")[0] for server in settings.servers)
    return [f"{scheme}://{host}:{port}" for host in hosts]
