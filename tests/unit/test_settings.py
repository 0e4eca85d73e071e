"""Settings: where they come from, which wins, and what a wrong one says."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from reliamq.settings import Settings, load_settings, masked
from reliamq.spi import ConfigurationError, Durability


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to be in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_without_any_the_embedded_broker_is_used() -> None:
    settings = load_settings()

    assert settings.broker == "embedded:///reliamq.db"
    assert settings.database is None
    assert settings.worker.lease == timedelta(seconds=30)


def test_arguments_win_over_the_environment_over_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "pyproject.toml").write_text('[tool.reliamq]\nbroker = "memory://pyproject"\nsource = "pyproject"\n')
    assert load_settings().broker == "memory://pyproject"
    (folder / "reliamq.toml").write_text('broker = "memory://toml"\n')
    assert load_settings().broker == "memory://toml"
    (folder / ".env").write_text("RELIAMQ_BROKER=memory://dotenv\nSOMEBODY_ELSES=1\n")
    assert load_settings().broker == "memory://dotenv"
    monkeypatch.setenv("RELIAMQ_BROKER", "memory://environment")
    assert load_settings().broker == "memory://environment"
    assert load_settings(broker="memory://argument").broker == "memory://argument"
    assert load_settings().source == "pyproject"


def test_a_section_can_be_set_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELIAMQ_WORKER__LEASE", "PT12S")
    monkeypatch.setenv("RELIAMQ_DURABILITY", "replicated")

    settings = load_settings()

    assert settings.worker.lease == timedelta(seconds=12)
    assert settings.durability is Durability.REPLICATED


def test_a_backends_section_is_kept_for_the_backend(folder: Path) -> None:
    (folder / "reliamq.toml").write_text('[backends.parcel]\ncolour = "red"\n')

    assert load_settings().backends == {"parcel": {"colour": "red"}}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("broker = [", "reliamq.toml: not valid TOML"),
        ('brokr = "memory://a"', "field 'brokr'"),
        ('broker = "localhost"', "field 'broker': Value error, is no URL"),
        ("[worker]\nprefetch = 0", "field 'worker.prefetch'"),
        ("[worker]\nleese = 3", "field 'worker.leese'"),
        ('durability = "eternal"', "'eternal' is none of development, "),
        ('[relay]\npoll = "soon"', "field 'relay.poll'"),
    ],
)
def test_a_wrong_setting_names_its_field_or_file(folder: Path, text: str, said: str) -> None:
    (folder / "reliamq.toml").write_text(text)

    with pytest.raises(ConfigurationError) as caught:
        load_settings()
    assert said in str(caught.value)


def test_a_wrong_value_in_the_environment_names_its_field(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELIAMQ_WORKER", "fast")

    with pytest.raises(ConfigurationError, match="worker"):
        load_settings()


def test_a_wrong_value_is_not_repeated_because_it_may_be_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELIAMQ_WORKER__PREFETCH", "hunter2")

    with pytest.raises(ConfigurationError) as caught:
        load_settings()
    assert "hunter2" not in str(caught.value)


def test_secrets_are_masked_wherever_settings_are_shown() -> None:
    settings = Settings(
        broker="kafka://user:hunter2@host:9092?sasl_password=hunter2",
        database="postgresql://user:hunter2@host/app",
        backends={"kafka": {"password": "hunter2"}},
    )

    assert "hunter2" not in repr(settings) + str(settings)
    assert "user" in repr(settings)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://:hunter2@host/0", "redis://:***@host/0"),
        ("redis://user:p%40ss/w@host", "redis://user:***@host"),
        ("amqp://user:a@b@host", "amqp://user:***@host"),
        ("kafka://host?token=hunter2&acks=all", "kafka://host?token=***&acks=all"),
        ("embedded:///app.db", "embedded:///app.db"),
    ],
)
def test_a_url_is_masked(url: str, shown: str) -> None:
    assert masked(url) == shown
