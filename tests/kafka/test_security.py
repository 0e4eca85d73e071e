"""TLS and SASL on the cluster's secure listener: what works, and how what does not is said."""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path
from urllib.parse import quote

import pytest
import trustme

from reliamq.spi import BrokerUnavailable, ConfigurationError, Confirmation, ReliamqError
from reliamq_kafka.publisher import open_publisher
from reliamq_kafka.settings import KafkaSettings, read_settings
from reliamq_kafka.wire.admin import open_admin
from tests.kafka.conftest import message
from tests.servers.kafka import PASSWORD, USER, KafkaCluster

pytestmark = [pytest.mark.anyio, pytest.mark.xdist_group("kafka")]
MECHANISMS = ["PLAIN", "SCRAM-SHA-512"]
WRONG = "wr0ng-password"


def secure(kafka: KafkaCluster, **changes: object) -> KafkaSettings:
    """Settings by URL for the secure listener; ``changes`` are settings, or the URL's scheme, password and hosts."""
    parts: dict[str, object] = {"scheme": "kafkas", "password": PASSWORD, "hosts": kafka.secure_addresses}
    query: dict[str, object] = {"ca_file": kafka.certificate_authority, "mechanism": "PLAIN"}
    for name, value in changes.items():
        (parts if name in parts else query)[name] = value
    wanted = "&".join(f"{name}={quote(str(value))}" for name, value in query.items() if value is not None)
    hosts = parts["hosts"]
    assert isinstance(hosts, list)
    user = f"{USER}:{quote(str(parts['password']), safe='')}"
    return read_settings(f"{parts['scheme']}://{user}@{','.join(hosts)}?{wanted}", {})


async def refusal(settings: KafkaSettings) -> BrokerUnavailable:
    """What both ways to connect raise, soon."""
    began = time.monotonic()
    with pytest.raises(BrokerUnavailable) as of_publisher:
        async with open_publisher(settings):
            pass
    with pytest.raises(BrokerUnavailable) as of_admin:
        async with open_admin(settings):
            pass
    assert time.monotonic() - began < 8
    assert str(of_publisher.value) == str(of_admin.value)
    return of_admin.value


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


@pytest.mark.parametrize("mechanism", MECHANISMS)
async def test_admin_and_publisher_work_and_no_log_shows_the_password(
    kafka: KafkaCluster, topic: str, mechanism: str, log: pytest.LogCaptureFixture
) -> None:
    settings = secure(kafka, mechanism=mechanism)
    async with open_admin(settings) as admin, open_publisher(settings) as publisher:
        assert len(await admin.partitions(topic) or ()) == 3
        outcomes = await publisher.send([message(topic, "secret")], deadline=time.monotonic() + 20)
    assert [type(one) for one in outcomes] == [Confirmation]
    assert "a SASL request" in log.text
    assert PASSWORD not in log.text
    assert PASSWORD not in repr(settings) + str(settings) + settings.url


@pytest.mark.parametrize("mechanism", MECHANISMS)
async def test_a_wrong_password_is_said_and_not_shown(
    kafka: KafkaCluster, mechanism: str, log: pytest.LogCaptureFixture
) -> None:
    error = await refusal(secure(kafka, mechanism=mechanism, password=WRONG))
    assert f"refuses user '{USER}' by {mechanism}: wrong user name or password" in str(error)
    assert WRONG not in all_texts(error) + log.text


async def test_an_unknown_authority_is_said_with_the_setting(kafka: KafkaCluster, tmp_path: Path) -> None:
    other = tmp_path / "other.pem"
    trustme.CA().cert_pem.write_to_path(other)
    error = await refusal(secure(kafka, ca_file=other))
    assert f"certificate is not accepted by '{other}'" in str(error)
    assert "set 'ca_file'" in str(error)
    assert PASSWORD not in all_texts(error)

    error = await refusal(secure(kafka, ca_file=None))
    assert "certificate is not accepted by the system's authorities" in str(error)


async def test_a_name_that_is_not_the_certificates_is_said(kafka: KafkaCluster) -> None:
    hosts = [address.replace("127.0.0.1", "127.0.0.2") for address in kafka.secure_addresses]
    error = await refusal(secure(kafka, hosts=hosts))
    assert "IP address mismatch" in str(error) or "nobody listens" in str(error)


async def test_a_mechanism_that_is_not_offered_is_said(kafka: KafkaCluster) -> None:
    error = await refusal(secure(kafka, mechanism="SCRAM-SHA-256"))
    assert "does not offer SCRAM-SHA-256; set 'mechanism'" in str(error)


async def test_the_wrong_listener_is_said(kafka: KafkaCluster) -> None:
    plain_listener = await refusal(secure(kafka, hosts=kafka.addresses))
    assert "no TLS could be agreed" in str(plain_listener)
    assert "kafka://" in str(plain_listener)

    without_tls = await refusal(secure(kafka, scheme="kafka", ca_file=None))
    assert "write kafkas://" in str(without_tls)

    without_sasl = await refusal(secure(kafka, scheme="kafka", ca_file=None, hosts=kafka.addresses))
    assert "it asks for no user here" in str(without_sasl)


async def test_nobody_there_and_no_such_host_are_said(kafka: KafkaCluster) -> None:
    assert "nobody listens there" in str(await refusal(secure(kafka, hosts=["127.0.0.1:1"])))
    assert "no host of that name" in str(await refusal(secure(kafka, hosts=["no-such-host.invalid:9092"])))


async def test_a_server_that_never_answers_is_given_up_by_the_time_that_is_set(kafka: KafkaCluster) -> None:
    async def ignore(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(ignore, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        settings = read_settings(f"kafka://127.0.0.1:{port}?request_timeout_seconds=1", {})
        assert "it does not answer" in str(await refusal(settings))


# --- before anything is connected -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ca_file", "cert_file", "key_file"])
async def test_a_missing_file_is_named_with_its_setting(kafka: KafkaCluster, name: str, tmp_path: Path) -> None:
    settings = secure(kafka, **{"cert_file": kafka.certificate_authority, name: tmp_path / "missing.pem"})
    with pytest.raises(ConfigurationError, match=rf"'{name}' must name .*missing\.pem': No such file") as caught:
        async with open_admin(settings):
            pass
    assert PASSWORD not in all_texts(caught.value)


async def test_a_file_with_something_else_in_it_is_named_with_its_setting(kafka: KafkaCluster, tmp_path: Path) -> None:
    other = tmp_path / "other.pem"
    other.write_text("no certificate")
    with pytest.raises(ConfigurationError, match=r"'ca_file' must name certificates in PEM format"):
        secure(kafka, ca_file=other).connection()
    with pytest.raises(ConfigurationError, match=r"'cert_file' .*other\.pem.* do not hold a certificate and its key"):
        secure(kafka, cert_file=other).connection()


@pytest.mark.parametrize(
    "url",
    [
        "kafka://user:pass/word-of-mine@host:9092",
        "kafka://user:pass?word-of-mine@host:9092",
        "kafka://user:pass#word-of-mine@host:9092",
        "kafka://user:12#word-of-mine@host:9092",
        "kafka://user:12?word-of-mine@host:9092",
        "kafka://user:12/word-of-mine@host:9092",
    ],
)
async def test_a_password_that_breaks_the_url_is_not_shown(url: str) -> None:
    with pytest.raises(ConfigurationError, match="percent-encode") as caught:
        read_settings(url, {})
    assert "word-of-mine" not in str(caught.value)
    assert "pass" not in str(caught.value).replace("password", "")


@pytest.mark.parametrize(
    ("url", "section", "fault"),
    [
        ("kafka://host?ca_file=/a.pem", {}, "write kafkas://"),
        ("kafkas://host?key_file=k.pem", {}, "a key alone"),
        ("kafka://user@host", {}, "user 'user' has no password"),
        ("kafka://host", {"password": "hidden-one"}, "no user"),
        ("kafka://u:hidden-one@host:port", {}, "'host:port' is no host:port"),
        ("kafka://u:hidden-one@host/topic", {}, "'/topic' has no meaning"),
        ("kafka://u:hidden-one@host?partitions=none", {}, "partitions: "),
        ("kafka://host", {"username": "u", "password": ["hidden-one"]}, "password: "),
    ],
)
async def test_a_contradiction_is_named_without_the_password(url: str, section: dict[str, object], fault: str) -> None:
    with pytest.raises(ReliamqError) as caught:
        read_settings(url, section)
    assert fault in str(caught.value)
    assert "hidden-one" not in all_texts(caught.value)
