"""How a broker is named, and that two names for one broker are one."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from datetime import timedelta
from importlib.metadata import entry_points
from pathlib import Path

import pluggy
import pytest

from reliamq.embedded.backend import EmbeddedBackend
from reliamq.embedded.settings import locate
from reliamq.spi import ENTRY_POINT_GROUP, Backend, BackendHooks, ConfigurationError, Durability

from .conftest import LEASE, declare, message, publish, receive, texts

pytestmark = pytest.mark.anyio


async def test_the_plugin_is_found_by_its_entry_point_and_makes_backends_without_io(tmp_path: Path) -> None:
    (entry,) = entry_points(group=ENTRY_POINT_GROUP, name="embedded")
    plugins = pluggy.PluginManager("reliamq")
    plugins.add_hookspecs(BackendHooks)
    plugins.register(entry.load())
    (schemes,) = plugins.hook.reliamq_schemes()
    assert set(schemes) == {"embedded", "memory"}
    backend = plugins.hook.reliamq_backend(url=f"embedded:///{tmp_path}/new.db", settings={})
    assert isinstance(backend, Backend)
    assert backend.capabilities == schemes["embedded"]
    assert backend.capabilities.durability is Durability.FSYNCED
    assert list(tmp_path.iterdir()) == []


async def test_three_slashes_are_relative_and_four_are_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate("embedded:///folder/my%20orders.db", {}).path == str(tmp_path / "folder/my orders.db")
    assert locate("embedded:////var/lib/orders.db", {}).path == "/var/lib/orders.db"
    assert locate("memory://", {}).path is None


@pytest.mark.parametrize(
    ("url", "settings", "named"),
    [
        ("embedded://orders.db", {}, r"embedded:///orders\.db"),
        ("embedded:///", {}, "names no file"),
        ("embedded:///folder/", {}, "names no file"),
        ("memory://name/path", {}, "memory://name"),
        ("embedded:///a.db?max_bytes=many", {}, "max_bytes"),
        ("embedded:///a.db?max_bytes=7", {}, "max_bytes"),
        ("embedded:///a.db?max_byte=7", {}, "max_byte"),
        ("embedded:///a.db", {"patience_seconds": -1}, "patience_seconds"),
    ],
)
async def test_what_is_wrong_with_a_url_is_named(url: str, settings: Mapping[str, object], named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        EmbeddedBackend(url, settings)


async def test_a_url_says_more_than_the_settings() -> None:
    location = locate("embedded:///a.db?patience_seconds=2", {"patience_seconds": 9, "max_bytes": 5_000_000})
    assert (location.settings.patience_seconds, location.settings.max_bytes) == (2.0, 5_000_000)
    assert location.url == "embedded:///a.db"


async def test_brokers_in_memory_are_one_by_name_while_anybody_has_them() -> None:
    first, second, other = (EmbeddedBackend(url) for url in ("memory://one", "memory://one", "memory://two"))
    await declare(first)
    async with second.publisher() as publisher:
        await publish(publisher, message("m"))
    async with first.subscription("orders", "g", lease=LEASE) as member:
        assert texts(await receive(member)) == ["m"]
    await declare(other)
    async with other.subscription("orders", "g", lease=LEASE) as member:
        assert texts(await receive(member)) == []
    del first, second, publisher, member
    gc.collect()
    again = EmbeddedBackend("memory://one")
    await declare(again)
    async with again.subscription("orders", "g", lease=LEASE) as member:
        assert texts(await receive(member, wait=timedelta(0).total_seconds())) == []


async def test_a_closed_file_leaves_no_log_behind(tmp_path: Path) -> None:
    backend = EmbeddedBackend(f"embedded:///{tmp_path}/broker.db")
    await declare(backend)
    async with backend.publisher() as publisher:
        await publish(publisher, message("m"))
    assert {path.name for path in tmp_path.iterdir()} == {"broker.db", "broker.db-lock"}
