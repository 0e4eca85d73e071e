"""What a URL of Redis says, and that what would weaken a promise cannot be set and is refused by its name (P1 C1)."""

from __future__ import annotations

import pytest

from reliamq import ConfigurationError
from reliamq_redis.backend import RedisBackend
from reliamq_redis.settings import FORBIDDEN, SCHEMES, Deployment, RedisSettings, read_settings

HIDDEN = "hidden-one"


def all_texts(error: BaseException | None) -> str:
    """Text and repr of an exception and of all that are shown with it."""
    texts = []
    while error is not None:
        texts += [str(error), repr(error)]
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return "\n".join(texts)


def secret(settings: RedisSettings) -> str | None:
    return settings.password.get_secret_value() if settings.password else None


# --- where the servers are ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("flavour", ["redis", "valkey"])
@pytest.mark.parametrize("secure", ["", "s"])
@pytest.mark.parametrize(
    ("suffix", "path", "deployment", "port"),
    [
        ("", "", Deployment.STANDALONE, 6379),
        ("+sentinel", "/orders", Deployment.SENTINEL, 26379),
        ("+cluster", "", Deployment.CLUSTER, 6379),
    ],
)
def test_a_scheme_says_how_the_servers_are_found_and_whether_the_way_to_them_is_encrypted(
    flavour: str, secure: str, suffix: str, path: str, deployment: Deployment, port: int
) -> None:
    scheme = f"{flavour}{secure}{suffix}"
    settings = read_settings(f"{scheme}://a{path}", {})

    assert scheme in SCHEMES
    assert (settings.deployment, settings.tls, settings.servers) == (deployment, bool(secure), (f"a:{port}",))
    assert settings.url == f"redis{secure}{suffix}://a:{port}{path}"


def test_there_is_no_other_scheme() -> None:
    assert len(SCHEMES) == 12


@pytest.mark.parametrize(
    ("url", "servers", "primary", "database"),
    [
        ("redis://a", ("a:6379",), None, 0),
        ("redis://a/", ("a:6379",), None, 0),
        ("redis://a:1/3", ("a:1",), None, 3),
        ("redis://a?database=3", ("a:6379",), None, 3),
        ("redis://a/2?database=3", ("a:6379",), None, 2),
        ("redis://[::1]/2", ("[::1]:6379",), None, 2),
        ("redis+sentinel://a,b:1,c/my%2Fname", ("a:26379", "b:1", "c:26379"), "my/name", 0),
        ("redis+sentinel://a/name?database=3", ("a:26379",), "name", 3),
        ("redis+cluster://a,b:1", ("a:6379", "b:1"), None, 0),
    ],
)
def test_a_url_names_servers_and_its_path_a_database_or_what_the_sentinels_watch(
    url: str, servers: tuple[str, ...], primary: str | None, database: int
) -> None:
    settings = read_settings(url, {})

    assert (settings.servers, settings.primary, settings.database) == (servers, primary, database)


@pytest.mark.parametrize(
    ("url", "fault"),
    [
        ("redis://a,b", r"several servers are either Sentinels \(redis\+sentinel://\) or nodes of a Cluster"),
        ("rediss://a,b/0", "several servers"),
        ("redis+sentinel://a,b", "say which primary the Sentinels watch"),
        ("redis+sentinel://a/", "say which primary"),
        ("redis://a?primary=orders", r"'primary' is a name that Sentinels know; write redis\+sentinel://"),
        ("redis+cluster://a/0", "a Cluster has one database, so '/0' has no meaning there"),
        ("redis+cluster://a?database=1", "leave 'database' out"),
        ("redis://a/orders", "'/orders' must be the number of a database"),
        ("redis://a/-1", "'/-1' must be the number"),
        ("redis://a/²", "'/²' must be the number"),
        ("redis://a/1/2", "'/1/2' must be the number"),
    ],
)
def test_what_does_not_go_together_is_named(url: str, fault: str) -> None:
    with pytest.raises(ConfigurationError, match=fault):
        read_settings(url, {})


@pytest.mark.parametrize("port", ["²", "0", "65536", "-1", "6379x", ""])
def test_what_is_no_port_is_named(port: str) -> None:
    with pytest.raises(ConfigurationError, match="no host:port"):
        read_settings(f"redis://host:{port}", {})


# --- what can be set ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", FORBIDDEN)
def test_a_setting_that_weakens_a_promise_is_refused_by_name_in_the_section_and_in_the_url(setting: str) -> None:
    with pytest.raises(ConfigurationError, match=f"'{setting}' cannot be set: "):
        read_settings("redis://127.0.0.1", {setting: "1"})
    with pytest.raises(ConfigurationError, match=f"'{setting}' cannot be set: "):
        read_settings(f"redis+cluster://127.0.0.1?{setting}=1", {})


@pytest.mark.parametrize(
    "query",
    [
        "lanes=0",
        "lanes=3",
        "lanes=128",
        "lanes=²",
        "lane=4",
        "replicas=-1",
        "replicas=11",
        "prefetch=0",
        "database=-1",
        "member_timeout_seconds=0",
        "request_timeout_seconds=0",
        "trim_interval_seconds=x",
    ],
)
def test_a_wrong_value_or_a_misspelt_name_is_named(query: str) -> None:
    name, _, value = query.partition("=")
    with pytest.raises(ConfigurationError, match=f"settings of Redis: {name}: "):
        read_settings(f"redis://127.0.0.1?{query}", {})
    with pytest.raises(ConfigurationError, match=f"settings of Redis: {name}: "):
        read_settings("redis://127.0.0.1", {name: value})


def test_what_the_url_sets_goes_before_the_section() -> None:
    settings = read_settings("redis://a?lanes=8", {"lanes": 2, "replicas": 2})

    assert (settings.lanes, settings.replicas) == (8, 2)


def test_a_message_is_confirmed_by_a_replica_unless_somebody_says_otherwise() -> None:
    """P1"""
    assert read_settings("redis://a", {}).replicas == 1


# --- whose password -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "section", "user", "password"),
    [
        ("redis://a", {}, None, None),
        ("redis://orders:p%2Fw@a", {}, "orders", "p/w"),
        ("redis://orders@a", {"password": "pw"}, "orders", "pw"),
        ("redis://a", {"username": "orders", "password": "pw"}, "orders", "pw"),
        ("redis://:pw@a", {}, "default", "pw"),
        ("redis://a", {"password": "pw"}, "default", "pw"),
        ("redis://orders:pw@a", {"username": "others", "password": "other"}, "orders", "pw"),
    ],
)
def test_a_password_without_a_user_is_the_default_users(
    url: str, section: dict[str, object], user: str | None, password: str | None
) -> None:
    settings = read_settings(url, section)

    assert (settings.username, secret(settings)) == (user, password)


@pytest.mark.parametrize(
    ("url", "section", "fault"),
    [
        ("redis://user@host", {}, "user 'user' has no password"),
        ("redis://user:@host", {}, "user 'user' has no password"),
        ("redis+sentinel://host/p", {"sentinel_username": "u"}, "'sentinel_username' is 'u' and has no 'sentinel_pass"),
        ("redis://host?ca_file=/a.pem", {}, "'ca_file' is set and the connection is not encrypted; write rediss://"),
        ("redis+cluster://host?ca_file=/a.pem", {}, "'ca_file' is set and the connection is not encrypted"),
        ("rediss://host?key_file=k.pem", {}, "a key alone"),
        (f"redis://u:{HIDDEN}@host:port", {}, "'host:port' is no host:port"),
        (f"redis://u:{HIDDEN}@a,b", {}, "several servers"),
        (f"redis://u:{HIDDEN}@host?lanes=3", {}, "lanes: "),
        (f"redis://u:{HIDDEN}@host/orders", {}, "number of a database"),
        (f"redis+cluster://u:{HIDDEN}@host/1", {}, "one database"),
        (f"redis+sentinel://u:{HIDDEN}@host", {}, "say which primary"),
        (f"redis://u:{HIDDEN}@host#x", {}, "'#' has no meaning there"),
        (f"redis://u:{HIDDEN}@host?password={HIDDEN}&noack=1", {}, "'noack' cannot be set"),
        ("redis://host", {"password": [HIDDEN]}, "password: "),
        ("redis+sentinel://host/p", {"sentinel_password": [HIDDEN]}, "sentinel_password: "),
    ],
)
def test_a_fault_is_named_without_the_password(url: str, section: dict[str, object], fault: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        read_settings(url, section)
    assert fault in str(caught.value)
    assert HIDDEN not in all_texts(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        f"redis://u:pass/{HIDDEN}@host:6379",
        f"redis://u:pass?{HIDDEN}@host:6379",
        f"rediss://u:12#{HIDDEN}@host:6379",
        f"redis+sentinel://u:{HIDDEN}[1@host:26379/p",
        f"valkey+cluster://u:{HIDDEN}℀x@host:6379",
    ],
)
def test_a_password_that_breaks_the_url_is_not_shown(url: str) -> None:
    with pytest.raises(ConfigurationError, match="percent-encode") as caught:
        read_settings(url, {})
    assert HIDDEN not in all_texts(caught.value)


@pytest.mark.parametrize("url", [f"redis://u:{HIDDEN}@a", f"redis://:{HIDDEN}@a/3", f"redis+sentinel://u:{HIDDEN}@a/p"])
def test_no_password_is_shown_by_settings_or_backend(url: str) -> None:
    settings = read_settings(url, {"sentinel_password": HIDDEN})
    backend = RedisBackend(url, {})
    shown = (repr(settings), str(settings), settings.url, str(settings.model_dump()), settings.model_dump_json())

    assert secret(settings) == HIDDEN
    assert HIDDEN not in "".join((*shown, repr(backend), str(backend), backend.url))


@pytest.mark.parametrize("name", ["ca_file", "cert_file", "key_file"])
def test_a_missing_file_is_named_with_its_setting(name: str) -> None:
    files = {"cert_file": __file__, name: "missing.pem"}
    settings = read_settings(f"rediss://u:{HIDDEN}@host", files)
    with pytest.raises(ConfigurationError, match=rf"'{name}' must name .*'missing\.pem': No such file") as caught:
        settings.ssl_context()
    assert HIDDEN not in all_texts(caught.value)
