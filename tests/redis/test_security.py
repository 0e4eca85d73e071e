"""TLS, passwords and permissions on the pair: what works, and how what does not is said."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from urllib.parse import quote

import anyio
import pytest
import trustme

from reliamq.spi import (
    BrokerUnavailable,
    ConfigurationError,
    Confirmation,
    Delivery,
    Outcome,
    Rejection,
    RejectionReason,
    Retry,
)
from reliamq_redis.catalog.dead_letters import open_dead_letters
from reliamq_redis.consuming.subscription import open_subscription
from reliamq_redis.publisher import open_publisher
from reliamq_redis.settings import RedisSettings, read_settings
from reliamq_redis.storage.storage import open_storage
from tests.redis.steps import LEASE, declare, drain, message, record_of, soon
from tests.servers.redis import PASSWORD, USER, RedisServers
from tests.unit.test_redis_settings import all_texts

pytestmark = pytest.mark.anyio
WRONG = "wr0ng-password"
DOCUMENTATION = Path(__file__).parents[2] / "docs" / "redis.md"


def secure(servers: RedisServers, **section: object) -> RedisSettings:
    return read_settings(servers.secure_url, {"ca_file": str(servers.certificate_authority), **section})


def plain(servers: RedisServers, *, user: str = USER, password: str = PASSWORD, rest: str = "") -> RedisSettings:
    port = servers.ports[servers.primary].plain
    return read_settings(f"redis://{user}:{quote(password, safe='')}@127.0.0.1:{port}{rest}", {})


async def refusal(settings: RedisSettings) -> BrokerUnavailable:
    """What both ways to connect raise, soon."""
    began = time.monotonic()
    with pytest.raises(BrokerUnavailable) as of_publisher:
        async with open_publisher(settings):
            pass
    with pytest.raises(BrokerUnavailable):
        async with open_storage(settings):
            pass
    assert time.monotonic() - began < 8
    return of_publisher.value


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Everything that anybody logs."""
    caplog.set_level(logging.DEBUG)
    return caplog


# --- encrypted ----------------------------------------------------------------------------------------------------


async def test_over_tls_all_works_and_no_log_shows_the_password(
    servers: RedisServers, topic: str, log: pytest.LogCaptureFixture
) -> None:
    settings = secure(servers)
    await work_through(settings, topic)
    assert PASSWORD not in log.text
    assert quote(PASSWORD, safe="") not in log.text


async def work_through(settings: RedisSettings, topic: str) -> None:
    """Everything that reliamq does."""
    async with open_publisher(settings) as publisher, open_dead_letters(settings) as dead_letters:
        batch = [message(topic, f"{number}", f"key {number}") for number in range(20)]
        assert {type(one) for one in await publisher.send(batch, deadline=soon(10))} == {Confirmation}
        async with open_subscription(settings, topic, "g", LEASE) as member:
            (first, *_) = await member.receive(1, max_bytes=1 << 20, wait=timedelta(seconds=20))
            assert not await member.settle([Retry(first, timedelta(hours=1), keep_order=False)])
        assert len(await drain(settings, topic, 19)) == 19
        await dead_letters.add([record_of(topic, "dead")], deadline=soon(10))
        assert await dead_letters.remove(await dead_letters.find(topic=topic)) == 1


async def test_an_unknown_authority_is_said_with_the_setting(servers: RedisServers, tmp_path: Path) -> None:
    other = authority(tmp_path)
    error = await refusal(secure(servers, ca_file=other))
    assert f"certificate is not accepted by '{other}'" in str(error)
    assert "set 'ca_file'" in str(error)
    assert PASSWORD not in all_texts(error)

    error = await refusal(read_settings(servers.secure_url, {}))
    assert "certificate is not accepted by the system's authorities" in str(error)


def authority(folder: Path) -> str:
    """That has signed nothing."""
    trustme.CA().cert_pem.write_to_path(folder / "other.pem")
    return str(folder / "other.pem")


async def test_who_names_an_authority_trusts_no_other(
    servers: RedisServers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the system's besides."""
    monkeypatch.setenv("SSL_CERT_FILE", str(servers.certificate_authority))  # this is the system's
    async with open_storage(read_settings(servers.secure_url, {})):
        pass
    assert "certificate is not accepted by" in str(await refusal(secure(servers, ca_file=authority(tmp_path))))


async def test_a_certificate_for_another_host_is_said(servers: RedisServers) -> None:
    url = servers.secure_url.replace("127.0.0.1", "127.1")  # the same, and not a name that the certificate has
    error = await refusal(read_settings(url, {"ca_file": str(servers.certificate_authority)}))
    assert "its certificate is not accepted" in str(error)
    assert "not valid for '127.1'" in str(error)


async def test_the_wrong_port_is_said(servers: RedisServers) -> None:
    tls_on_plain = read_settings(servers.url.replace("://", "s://"), {"request_timeout_seconds": 1})
    assert "write redis://" in str(await refusal(tls_on_plain))

    plain_on_tls = read_settings(servers.secure_url.replace("s://", "://"), {"request_timeout_seconds": 1})
    assert "write rediss://" in str(await refusal(plain_on_tls))


async def test_a_missing_file_is_named_before_anything_is_connected(servers: RedisServers, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"'ca_file' must name .*missing\.pem': No such file") as caught:
        async with open_publisher(secure(servers, ca_file=str(tmp_path / "missing.pem"))):
            pass
    assert PASSWORD not in all_texts(caught.value)


# --- who is there -------------------------------------------------------------------------------------------------


async def test_a_wrong_password_is_said_and_not_shown(servers: RedisServers, log: pytest.LogCaptureFixture) -> None:
    encrypted = read_settings(
        servers.secure_url.replace(quote(PASSWORD, safe=""), WRONG), {"ca_file": str(servers.certificate_authority)}
    )
    for settings in (plain(servers, password=WRONG), encrypted):
        error = await refusal(settings)
        assert f"refuses user '{USER}': wrong user name or password" in str(error)
        assert WRONG not in all_texts(error) + log.text


async def test_sentinels_and_nodes_of_a_cluster_that_refuse_a_password_say_so_each(
    servers: RedisServers, log: pytest.LogCaptureFixture
) -> None:
    wrong = quote(PASSWORD, safe=""), WRONG
    error = await refusal(read_settings(servers.cluster_url.replace(*wrong), {}))
    assert str(error).count(f"refuses user '{USER}': wrong user name or password") == 3
    for settings in (
        read_settings(servers.sentinel_url.replace(*wrong), {}),
        read_settings(servers.sentinel_url, {"sentinel_username": USER, "sentinel_password": WRONG}),
    ):
        error = await refusal(settings)
        assert str(error).count("set 'sentinel_username' and 'sentinel_password'") == 3
    assert WRONG not in all_texts(error) + log.text
    assert PASSWORD not in all_texts(error) + log.text


async def test_sentinels_may_ask_for_another_password_than_the_servers(servers: RedisServers) -> None:
    wrong = servers.sentinel_url.replace(quote(PASSWORD, safe=""), WRONG)
    error = await refusal(read_settings(wrong, {"sentinel_username": USER, "sentinel_password": PASSWORD}))
    assert f"refuses user '{USER}': wrong user name or password" in str(error), "the primary, which they have told"


async def test_nobody_there_and_no_such_host_are_said() -> None:
    assert "127.0.0.1:1: nobody listens there" in str(await refusal(read_settings("redis://127.0.0.1:1", {})))
    error = await refusal(read_settings("redis+cluster://127.0.0.1:1,no-such-host.invalid:2", {}))
    assert "127.0.0.1:1: nobody listens there" in str(error)
    assert "no-such-host.invalid:2: there is no host of that name" in str(error)


async def test_a_url_that_takes_a_server_for_another_kind_is_said(servers: RedisServers) -> None:
    cases = {
        plain(servers, rest="/99").url: "it has no database 99",
        servers.url.replace("://", "+cluster://"): "it is no node of a Cluster; write redis://",
        servers.url.replace("://", "+sentinel://") + "/x": "it is no Sentinel; write redis://",
        servers.sentinel_url + "x": "it watches no primary of the name 'reliamqx'",
    }
    for url, fault in cases.items():
        assert fault in str(await refusal(read_settings(url, {})))


async def test_a_node_of_a_cluster_that_is_asked_for_anothers_key_says_how_to_write_the_url(
    servers: RedisServers,
) -> None:
    ports = [servers.ports[node].plain for node in servers.cluster_nodes[:2]]
    for port in ports:
        settings = read_settings(servers.url.replace(str(servers.ports[servers.primary].plain), str(port)), {})
        with pytest.raises(BrokerUnavailable, match=r"it is a node of a Cluster; write redis\+cluster://"):
            for _ in range(50):
                await declare(settings, "g")


async def test_a_server_that_never_answers_is_given_up_by_the_time_that_is_set() -> None:
    async def ignore(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(ignore, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        settings = read_settings(f"redis://127.0.0.1:{port}?request_timeout_seconds=1", {})
        assert "it does not answer in time" in str(await refusal(settings))


# --- what a user may do -------------------------------------------------------------------------------------------

Permit = Callable[..., None]


@contextmanager
def limited(servers: RedisServers, *rules: str) -> Iterator[tuple[RedisSettings, Permit]]:
    """A user of the pair with these permissions, and how to give it others."""
    name, password = f"limited-{uuid.uuid4().hex}", uuid.uuid4().hex
    with servers.client(servers.primary) as primary:

        def permit(*more: str) -> None:
            primary.execute_command("ACL SETUSER", name, *more)

        permit("on", f">{password}", *rules)
        try:
            yield plain(servers, user=name, password=password), permit
        finally:
            primary.execute_command("ACL DELUSER", name)


def documented(servers: RedisServers) -> Sequence[str]:
    """The permissions that the documentation asks for, as far as this kind of server knows them."""
    text = DOCUMENTATION.read_text()
    start = text.index("`+@stream")
    rules = text[start + 1 : text.index("`", start + 1)].split()
    return rules if servers.name == "valkey" else [rule for rule in rules if rule != "+waitaof"]


async def test_what_the_documentation_asks_for_is_enough(
    servers: RedisServers, topic: str, log: pytest.LogCaptureFixture
) -> None:
    with limited(servers, "~reliamq:*", *documented(servers)) as (settings, _):
        await declare(settings, "g")
        await work_through(settings, topic)
        assert settings.password is not None
        assert settings.password.get_secret_value() not in log.text


def refused(settings: RedisSettings, outcome: Outcome) -> None:
    assert isinstance(outcome, Rejection)
    assert outcome.reason is RejectionReason.REFUSED
    assert f"user '{settings.username}' may not do that: " in outcome.detail
    assert "ACL SETUSER" in outcome.detail


@pytest.mark.parametrize("which", ["nothing of it", "its facts alone"])
async def test_a_topic_that_the_user_may_not_write_to_is_refused_and_takes_no_caller_along(
    servers: RedisServers, settings: RedisSettings, topic: str, which: str, log: pytest.LogCaptureFixture
) -> None:
    """P2"""
    closed = await declare(settings, "g")
    facts = [f"~reliamq:{{{closed}}}*"] if which == "its facts alone" else []
    with limited(servers, "+@all", f"~reliamq:{{{topic}*", *facts) as (theirs, permit):
        async with open_publisher(theirs) as publisher:
            batch = [message(closed, "no"), message(topic, "yes"), message(closed, "no", "another key")]
            first, second, third = await publisher.send(batch, deadline=soon(10))
            refused(theirs, first)
            refused(theirs, third)
            assert isinstance(second, Confirmation)

            permit("~*")
            (after,) = await publisher.send([message(closed, "after")], deadline=soon(10))
            assert isinstance(after, Confirmation)
        assert theirs.password is not None
        assert theirs.password.get_secret_value() not in log.text

    assert [one.body for one in await drain(settings, closed, 1)] == [b"after"]


async def test_a_user_who_may_add_to_no_stream_is_refused(servers: RedisServers, topic: str) -> None:
    """P2: it is the script that may not."""
    with limited(servers, "+@all", "~*", "-xadd") as (theirs, _):
        async with open_publisher(theirs) as publisher:
            (outcome,) = await publisher.send([message(topic, "no")], deadline=soon(10))
    refused(theirs, outcome)


async def test_who_may_not_wait_for_replicas_is_refused_before_anything_is_stored(
    servers: RedisServers, settings: RedisSettings, topic: str
) -> None:
    """P2: else it would be stored again and again, in doubt each time."""
    wait = "-waitaof" if servers.name == "valkey" else "-wait"
    with limited(servers, "+@all", "~*", wait) as (theirs, _):
        async with open_publisher(theirs) as publisher, open_dead_letters(theirs) as dead_letters:
            (outcome,) = await publisher.send([message(topic, "no")], deadline=soon(10))
            refused(theirs, outcome)
            (outcome,) = await dead_letters.add([record_of(topic, "no")], deadline=soon(10))
            refused(theirs, outcome)

    assert not await drain(settings, topic, 0)
    async with open_dead_letters(settings) as dead_letters:
        assert list(await dead_letters.find(topic=topic)) == []


@pytest.mark.parametrize("which", ["nothing of it", "all but its lanes"])
async def test_a_worker_that_may_not_read_a_topic_says_so_and_does_not_spin(
    servers: RedisServers, settings: RedisSettings, topic: str, which: str, log: pytest.LogCaptureFixture
) -> None:
    async with open_publisher(settings) as publisher:
        await publisher.send([message(topic, "one")], deadline=soon(10))
    keys = f"~reliamq:{{{topic}}}*" if which == "all but its lanes" else "~nothing"
    with limited(servers, "+@all", keys) as (theirs, permit):
        async with open_subscription(theirs, topic, "g", LEASE) as member:
            told = await ask_for(3, lambda: member.receive(1, max_bytes=1, wait=timedelta(seconds=1)))
            assert all(f"user '{theirs.username}' may not do that: " in str(error) for error in told)
            warnings = [one for one in log.records if one.levelno >= logging.WARNING]
            assert 0 < len(told) <= len(warnings) < 30

            permit("~*")
            came: Sequence[Delivery] = ()
            with anyio.fail_after(20):
                while not came:
                    with suppress(BrokerUnavailable):
                        came = await member.receive(1, max_bytes=1 << 20, wait=timedelta(seconds=1))
            assert [one.message.body for one in came] == [b"one"]


async def ask_for(seconds: float, ask: Callable[[], Awaitable[object]]) -> list[BrokerUnavailable]:
    """As often as it may be asked; what is raised."""
    told: list[BrokerUnavailable] = []
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        try:
            await ask()
        except BrokerUnavailable as error:
            told.append(error)
    return told
