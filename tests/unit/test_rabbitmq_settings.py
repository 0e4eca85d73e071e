"""What would weaken a promise on RabbitMQ cannot be set, and is refused by its name (P1 C1)."""

from __future__ import annotations

import pytest

from reliamq import ConfigurationError
from reliamq_rabbitmq.settings import FORBIDDEN, read_settings


@pytest.mark.parametrize("setting", FORBIDDEN)
def test_a_setting_that_weakens_a_promise_is_refused_by_name_in_the_section_and_in_the_url(setting: str) -> None:
    with pytest.raises(ConfigurationError, match=setting):
        read_settings("rabbitmq://127.0.0.1", {setting: "1"})
    with pytest.raises(ConfigurationError, match=setting):
        read_settings(f"rabbitmq://127.0.0.1?{setting}=1", {})


@pytest.mark.parametrize("query", ["replicas=0", "lanes=7", "lane=4", "heartbeat_seconds=x", "prefetch=0"])
def test_a_wrong_value_or_a_misspelt_name_is_named(query: str) -> None:
    with pytest.raises(ConfigurationError, match=query.partition("=")[0]):
        read_settings(f"rabbitmq://127.0.0.1?{query}", {})


@pytest.mark.parametrize(
    ("url", "servers", "virtual_host", "tls"),
    [
        ("rabbitmq://a", ("a:5672",), "/", False),
        ("amqp://a:1,b", ("a:1", "b:5672"), "/", False),
        ("rabbitmqs://a,b/shop", ("a:5671", "b:5671"), "shop", True),
        ("amqps://a/%2Fx", ("a:5671",), "/x", True),
    ],
)
def test_a_url_names_servers_and_a_virtual_host(
    url: str, servers: tuple[str, ...], virtual_host: str, tls: bool
) -> None:
    settings = read_settings(url, {})

    assert (settings.servers, settings.virtual_host, settings.tls) == (servers, virtual_host, tls)
    assert settings.credentials == ("guest", "guest")


def test_a_password_may_be_in_the_section_and_its_user_in_the_url() -> None:
    settings = read_settings("rabbitmq://orders@r1", {"password": "secret"})

    assert settings.credentials == ("orders", "secret")


@pytest.mark.parametrize("url", ["rabbitmq://[::1]:5672", "rabbitmq://[::1]"])
def test_an_ipv6_address_is_a_server(url: str) -> None:
    assert read_settings(url, {}).servers == ("[::1]:5672",)


@pytest.mark.parametrize("port", ["²", "0", "65536", "-1", "5672x", ""])
def test_what_is_no_port_is_named(port: str) -> None:
    with pytest.raises(ConfigurationError, match="no host:port"):
        read_settings(f"rabbitmq://host:{port}", {})
