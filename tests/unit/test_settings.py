"""Settings: where they come from, which wins, and what a wrong one says."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from reliamq.settings import Settings, WorkerSettings, load_settings, masked
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


def test_sent_rows_are_kept_only_where_that_is_said(folder: Path) -> None:
    """O7"""
    assert not load_settings().outbox.keep
    (folder / "reliamq.toml").write_text('[outbox]\nkeep = "36h"\n')

    assert load_settings().outbox.keep == timedelta(hours=36)


def test_a_backends_section_is_kept_for_the_backend(folder: Path) -> None:
    (folder / "reliamq.toml").write_text('[backends.parcel]\ncolour = "red"\n')

    assert load_settings().backends == {"parcel": {"colour": "red"}}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("broker = [", "reliamq.toml: not valid TOML"),
        ('brokr = "memory://a"', "setting 'brokr' in reliamq.toml is unknown; did you mean broker?"),
        ('colour = "red"', "setting 'colour' in reliamq.toml is unknown; there are backends, broker, database, "),
        ('broker = "localhost"', "setting 'broker' in reliamq.toml is no URL; write something like embedded:///app.db"),
        ('leases = "localhost"', "setting 'leases' in reliamq.toml is no URL; write something like redis://host"),
        ("broker = 3", "setting 'broker' in reliamq.toml must be text"),
        ("[worker]\nprefetch = 0", "setting 'worker.prefetch' in reliamq.toml must be at least 1"),
        ('[worker]\nprefetch = "many"', "setting 'worker.prefetch' in reliamq.toml must be a whole number"),
        ("[worker]\nprefetch = 1.5", "setting 'worker.prefetch' in reliamq.toml must be a whole number"),
        ("[worker]\nleese = 3", "setting 'worker.leese' in reliamq.toml is unknown; did you mean lease?"),
        ("worker = 3", "setting 'worker' in reliamq.toml is a section, with fields of its own"),
        ("[backends]\nembedded = 3", "setting 'backends.embedded' in reliamq.toml is a section"),
        (
            'durability = "eternal"',
            "setting 'durability' in reliamq.toml must be one of development, fsynced, replicated",
        ),
        ("durability = 1", "must be one of development, fsynced, replicated, not int 1"),
        ('[relay]\npoll = "soon"', "setting 'relay.poll' in reliamq.toml must be a length of time, such as 500ms, 30s"),
        ('[worker]\nlease = "9999999999999d"', "must be a length of time"),
        ("[worker]\nlease = 0", "setting 'worker.lease' in reliamq.toml must be at least 100 ms"),
        ("[outbox]\nkeep = 1000000000", "setting 'outbox.keep' in reliamq.toml must be at most 3650 days"),
        (
            '[outbox]\nkeep = "for ever"',
            "setting 'outbox.keep' in reliamq.toml must be a length of time, such as 500ms",
        ),
        ("[outbox]\nkept = 3", "setting 'outbox.kept' in reliamq.toml is unknown; did you mean keep?"),
        ("[worker]\nlease = 30000000", "setting 'worker.lease' in reliamq.toml must be at most 1 day"),
    ],
)
def test_a_wrong_setting_names_its_field_or_file(folder: Path, text: str, said: str) -> None:
    (folder / "reliamq.toml").write_text(text)

    with pytest.raises(ConfigurationError) as caught:
        load_settings()
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("RELIAMQ_BROKR", "memory://a", "RELIAMQ_BROKR in {} is no setting; did you mean RELIAMQ_BROKER?"),
        ("RELIAMQ_WORKER_LEASE", "9s", "RELIAMQ_WORKER_LEASE in {} is no setting; did you mean RELIAMQ_WORKER__LEASE?"),
        ("reliamq_worker__leese", "9s", "RELIAMQ_WORKER__LEESE in {} is no setting; did you mean RELIAMQ_WORKER__L"),
        ("RELIAMQ_XYZ", "9", "RELIAMQ_XYZ in {} is no setting; there are RELIAMQ_BACKENDS, "),
        (
            "RELIAMQ_WORKER",
            "x",
            "RELIAMQ_WORKER in {} is a section; set its fields one by one, such as RELIAMQ_WORKER__L",
        ),
        (
            "RELIAMQ_BACKENDS",
            "x",
            "is a section; set its fields one by one, such as RELIAMQ_BACKENDS__EMBEDDED__MAX_BYTES",
        ),
        ("RELIAMQ_BACKENDS__EMBEDDED", "x", "setting RELIAMQ_BACKENDS__EMBEDDED in {} is a section"),
        ("RELIAMQ_WORKER__PREFETCH", "x", "setting RELIAMQ_WORKER__PREFETCH in {} must be a whole number"),
        ("RELIAMQ_DURABILITY", "1", "setting RELIAMQ_DURABILITY in {} must be one of development, fsynced, replicated"),
    ],
)
@pytest.mark.parametrize("where", ["the environment", ".env"])
def test_a_wrong_variable_is_named_with_where_it_is_and_what_to_do(
    folder: Path, monkeypatch: pytest.MonkeyPatch, where: str, name: str, value: str, said: str
) -> None:
    if where == ".env":
        (folder / ".env").write_text(f"{name}={value}\n")
    else:
        monkeypatch.setenv(name, value)

    with pytest.raises(ConfigurationError) as caught:
        load_settings()
    assert said.format(where) in str(caught.value)


def test_what_the_commands_read_is_no_unknown_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELIAMQ_TRACEBACK", "1")

    assert load_settings().broker == "embedded:///reliamq.db"


@pytest.mark.parametrize(
    "name", ["RELIAMQ_SERVICE_HOST", "RELIAMQ_PORT", "RELIAMQ_PORT_80_TCP_ADDR", "RELIAMQ_RELAY_SERVICE_PORT_HTTP"]
)
def test_what_a_cluster_says_of_a_service_called_reliamq_is_no_setting(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "tcp://10.0.0.1:80")

    assert load_settings().broker == "embedded:///reliamq.db"


def test_an_empty_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELIAMQ_DURABILITY", "")
    monkeypatch.setenv("RELIAMQ_WORKER__LEASE", "")

    assert load_settings() == Settings()
    assert load_settings().durability is None


@pytest.mark.parametrize(
    ("written", "seconds"),
    [('"500ms"', 0.5), ('"30s"', 30), ('"5m"', 300), ('"2 h"', 7200), ('"1d"', 86400), ('"PT30S"', 30), ("30", 30)],
)
def test_a_length_of_time_is_written_as_people_write_it(folder: Path, written: str, seconds: float) -> None:
    (folder / "reliamq.toml").write_text(f"[worker]\nstop_deadline = {written}\n")

    assert load_settings().worker.stop_deadline == timedelta(seconds=seconds)


def test_several_wrong_settings_are_told_together(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "reliamq.toml").write_text("brokr = 3\n[relay]\nbatch = 0\n")
    monkeypatch.setenv("RELIAMQ_WORKER__PREFETCH", "x")

    with pytest.raises(ConfigurationError) as caught:
        load_settings()
    for name in ("'brokr' in reliamq.toml", "'relay.batch' in reliamq.toml", "RELIAMQ_WORKER__PREFETCH in the env"):
        assert name in str(caught.value)


def test_settings_made_in_code_are_refused_in_the_same_words() -> None:
    with pytest.raises(ConfigurationError, match=r"setting 'brokr' in code is unknown; did you mean broker\?"):
        Settings(brokr="memory://a")  # type: ignore[call-arg]
    with pytest.raises(ConfigurationError, match="setting 'lease' in code must be a length of time"):
        WorkerSettings(lease="soon")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"setting 'worker\.lease' in code must be a length of time"):
        Settings(worker={"lease": "soon"})  # type: ignore[arg-type]


@pytest.mark.parametrize("file", ["reliamq.toml", "pyproject.toml", ".env"])
def test_a_file_that_is_not_utf_8_is_named(folder: Path, file: str) -> None:
    (folder / file).write_bytes(b'broker = "\xff"\n')

    with pytest.raises(ConfigurationError, match=f"^{file}: not UTF-8"):
        load_settings()


def test_a_file_that_cannot_be_read_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "reliamq.toml").write_text("")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "reliamq.toml")

    monkeypatch.setattr(Path, "open", refuse)

    with pytest.raises(ConfigurationError, match=r"reliamq\.toml: Permission denied"):
        load_settings()


@pytest.mark.parametrize(
    ("broker", "database"),
    [
        ("embedded:///app.db", "sqlite:///app.db"),
        ("embedded:///app.db?max_bytes=1000000", "sqlite+aiosqlite:///./folder/../app.db?timeout=3"),
    ],
)
def test_broker_and_database_are_not_one_file(folder: Path, broker: str, database: str) -> None:
    (folder / "folder").mkdir()

    with pytest.raises(ConfigurationError, match=r"broker and database are the same file /.*app\.db"):
        Settings(broker=broker, database=database)
    Settings(broker=broker, database="sqlite:///other.db")
    Settings(broker="memory://app.db", database=database)


def test_a_wrong_value_is_not_repeated_because_it_may_be_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELIAMQ_WORKER__PREFETCH", "hunter2")

    with pytest.raises(ConfigurationError) as caught:
        load_settings()
    assert "hunter2" not in str(caught.value)


def test_secrets_are_masked_wherever_settings_are_shown() -> None:
    settings = Settings(
        broker="kafka://user:hunter2@host:9092?sasl_password=hunter2",
        database="postgresql://user:hunter2@host/app",
        leases="redis://user:hunter2@host",
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
        ("rabbitmq://user:pa?ss#w@host/", "rabbitmq://user:***@host/"),
        ("amqp://us/er:se#cret@host/", "amqp://us/er:***@host/"),
        ("kafka://host?token=hunter2&acks=all", "kafka://host?token=***&acks=all"),
        ("embedded:///app.db", "embedded:///app.db"),
    ],
)
def test_a_url_is_masked(url: str, shown: str) -> None:
    assert masked(url) == shown
