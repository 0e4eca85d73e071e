"""TLS and passwords on the cluster's listeners: what works, and how what does not is said."""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path
from urllib.parse import quote

import pytest
import trustme

from reliamq.spi import BrokerUnavailable, ConfigurationError, Confirmation, ReliamqError
from reliamq_rabbitmq.publisher import open_publisher
from reliamq_rabbitmq.settings import RabbitmqSettings, read_settings
from reliamq_rabbitmq.storage.storage import open_storage
from tests.rabbitmq.conftest import drain, message
from tests.servers.rabbitmq import PASSWORD, USER, RabbitmqCluster

pytestmark = [pytest.mark.anyio, pytest.mark.xdist_group("rabbitmq")]
WRONG = "wr0ng-password"


def secure(cluster: RabbitmqCluster, **section: object) -> RabbitmqSettings:
    return read_settings(cluster.secure_url, {"ca_file": str(cluster.certificate_authority), **section})


def plain(cluster: RabbitmqCluster, *, password: str = PASSWORD, rest: str = "") -> str:
    return f"rabbitmq://{USER}:{quote(password, safe='')}@{','.join(cluster.addresses)}{rest}"


async def refusal(settings: RabbitmqSettings) -> BrokerUnavailable:
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


def all_texts(error: BaseException | None) -> str:
    """Text and repr of an exception and of all that are behind it."""
    texts = []
    while error is not None:
        texts += [str(error), repr(error)]
        error = error.__cause__ or error.__context__
    return "\n".join(texts)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Everything that anybody logs."""
    caplog.set_level(logging.DEBUG)
    return caplog


async def test_over_tls_all_works_and_no_log_shows_the_password(
    rabbitmq: RabbitmqCluster, topic: str, log: pytest.LogCaptureFixture
) -> None:
    settings = secure(rabbitmq)
    async with open_publisher(settings) as publisher:
        outcomes = await publisher.send([message(topic, "secret")], deadline=time.monotonic() + 20)
    assert [type(one) for one in outcomes] == [Confirmation]
    assert len(await drain(settings, topic, 1)) == 1
    assert "aiormq" in log.text or "Connecting" in log.text
    assert PASSWORD not in log.text
    assert quote(PASSWORD, safe="") not in log.text
    assert PASSWORD not in repr(settings) + str(settings) + settings.url


async def test_a_wrong_password_is_said_and_not_shown(rabbitmq: RabbitmqCluster, log: pytest.LogCaptureFixture) -> None:
    error = await refusal(read_settings(plain(rabbitmq, password=WRONG), {}))
    assert f"refuses user '{USER}': wrong user name or password" in str(error)
    assert WRONG not in all_texts(error) + log.text


async def test_an_unknown_authority_is_said_with_the_setting(rabbitmq: RabbitmqCluster, tmp_path: Path) -> None:
    other = tmp_path / "other.pem"
    trustme.CA().cert_pem.write_to_path(other)
    error = await refusal(secure(rabbitmq, ca_file=str(other)))
    assert f"certificate is not accepted by '{other}'" in str(error)
    assert "set 'ca_file'" in str(error)
    assert PASSWORD not in all_texts(error)

    error = await refusal(read_settings(rabbitmq.secure_url, {}))
    assert "certificate is not accepted by the system's authorities" in str(error)


async def test_the_wrong_port_is_said(rabbitmq: RabbitmqCluster) -> None:
    tls_on_plain = read_settings(plain(rabbitmq).replace("rabbitmq://", "rabbitmqs://"), {})
    assert "no TLS could be agreed" in str(await refusal(tls_on_plain))

    plain_on_tls = read_settings(rabbitmq.secure_url.replace("rabbitmqs://", "rabbitmq://"), {})
    assert "write rabbitmqs://" in str(await refusal(plain_on_tls))


async def test_a_virtual_host_that_is_not_there_is_said(rabbitmq: RabbitmqCluster) -> None:
    error = await refusal(read_settings(plain(rabbitmq, rest="/sh%2Fop"), {}))
    assert "no virtual host 'sh/op'" in str(error)


async def test_nobody_there_and_no_such_host_are_said_and_another_server_is_taken(
    rabbitmq: RabbitmqCluster, topic: str
) -> None:
    nobody, nowhere = "127.0.0.1:1", "no-such-host.invalid:5672"
    error = await refusal(read_settings(f"rabbitmq://{nobody},{nowhere}", {}))
    assert f"{nobody}: nobody listens there" in str(error)
    assert f"{nowhere}: there is no host of that name" in str(error)

    for _ in range(5):  # whichever it asks first
        some = read_settings(plain(rabbitmq).replace(rabbitmq.addresses[0], f"{nobody},{rabbitmq.addresses[0]}"), {})
        async with open_publisher(some) as publisher:
            (outcome,) = await publisher.send([message(topic, "one")], deadline=time.monotonic() + 10)
            assert isinstance(outcome, Confirmation)


async def test_a_server_that_never_answers_is_given_up_by_the_time_that_is_set(rabbitmq: RabbitmqCluster) -> None:
    async def ignore(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(ignore, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        settings = read_settings(f"rabbitmq://127.0.0.1:{port}?request_timeout_seconds=1", {})
        assert "it does not answer within 1 s" in str(await refusal(settings))


# --- before anything is connected -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ca_file", "cert_file", "key_file"])
def test_a_missing_file_is_named_with_its_setting(rabbitmq: RabbitmqCluster, name: str, tmp_path: Path) -> None:
    files = {"cert_file": str(rabbitmq.certificate_authority), name: str(tmp_path / "missing.pem")}
    with pytest.raises(ConfigurationError, match=rf"'{name}' must name .*missing\.pem': No such file") as caught:
        secure(rabbitmq, **files).ssl_context()
    assert PASSWORD not in all_texts(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "rabbitmq://user:pass/word-of-mine@host:5672",
        "rabbitmq://user:pass?word-of-mine@host:5672",
        "rabbitmq://user:12?word-of-mine@host:5672",
        "rabbitmq://user:12/word-of-mine@host:5672",
        "amqp://user:12#word-of-mine@host:5672",
        "amqp://user:word-of-mine[1@host:5672",
        "amqp://user:word-of-mine℀x@host:5672",
    ],
)
def test_a_password_that_breaks_the_url_is_not_shown(url: str) -> None:
    with pytest.raises(ConfigurationError, match="percent-encode") as caught:
        read_settings(url, {})
    assert "word-of-mine" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "section", "fault"),
    [
        ("rabbitmq://host?ca_file=/a.pem", {}, "write rabbitmqs://"),
        ("rabbitmqs://host?key_file=k.pem", {}, "a key alone"),
        ("rabbitmq://user@host", {}, "user 'user' has no password"),
        ("rabbitmq://host", {"password": "hidden-one"}, "no user"),
        ("rabbitmq://u:hidden-one@host:port", {}, "'host:port' is no host:port"),
        ("rabbitmq://u:hidden-one@host?lanes=3", {}, "lanes: "),
        ("rabbitmq://u:hidden-one@host?replicas=2", {}, "replicas 2 is even"),
        ("rabbitmq://host?management_url=host:15672", {}, "http://"),
        ("rabbitmq://host", {"username": "u", "password": ["hidden-one"]}, "password: "),
    ],
)
def test_a_contradiction_is_named_without_the_password(url: str, section: dict[str, object], fault: str) -> None:
    with pytest.raises(ReliamqError) as caught:
        read_settings(url, section)
    assert fault in str(caught.value)
    assert "hidden-one" not in all_texts(caught.value)
