"""The command line as people use it: what goes well, and what is said when it does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Run


def test_publish_confirms_every_good_line_and_names_the_bad_ones(run: Run, folder: Path) -> None:
    lines = [
        '{"number": 1}',
        '{"number": "many"}',
        "{broken",
        '{"number": 4}',
        json.dumps({"number": 5, "account": "x" * 2000}),
    ]
    (folder / "orders.ndjson").write_text("\n".join(lines))

    done = run("publish", "orders", "--app", "orders:app", "--file", "orders.ndjson")

    assert done.returncode == 1
    assert done.stdout == "2 confirmed, 3 not\n"
    assert "line 2: field 'number'" in done.stderr
    assert "line 3:" in done.stderr
    assert "line 5:" in done.stderr
    assert "over the topic's limit of 1000" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "nowhere:app"], "there is no module 'nowhere'"),
        (["run", "orders"], "is not MODULE:APP"),
        (["run", "orders:nothing"], "has no 'nothing'"),
        (["run", "orders:Order"], "not a Reliamq"),
        (["publish", "nosuch", "--app", "orders:app", "--file", "x"], "no topic 'nosuch'"),
        (["publish", "orders", "--app", "orders:app", "--file", "x"], "--file x"),
        (["audit", "--broker", "carrier-pigeon://loft"], "no backend serves 'carrier-pigeon://'"),
        (["dead-letters", "drop", "--app", "orders:app"], "--all"),
        (["prove", "--broker", "carrier-pigeon://loft"], "no backend serves 'carrier-pigeon://'"),
        (["prove", "--input", "nosuch.ndjson"], "nosuch.ndjson"),
        (["prove", "--database", "not a url"], "no SQLAlchemy URL"),
        (["prove", "--messages", "-1"], "--messages"),
    ],
)
def test_a_wrong_argument_is_one_clear_line_and_exit_code_2(run: Run, arguments: list[str], said: str) -> None:
    done = run(*arguments)

    assert done.returncode == 2, done.stdout + done.stderr
    assert said in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_an_input_with_a_broken_line_names_it_before_anything_starts(run: Run, folder: Path) -> None:
    (folder / "bodies.ndjson").write_text('{"a": 1}\n{broken\n{"a": 3}\n')

    done = run("prove", "--input", "bodies.ndjson")

    assert done.returncode == 2
    assert "line 2" in done.stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("broker = \n", "not valid TOML"),
        ('brokr = "embedded:///x.db"\n', "setting 'brokr' in reliamq.toml is unknown; did you mean broker?"),
        ('durability = "eternal"\n', "must be one of development, fsynced, replicated, not str 'eternal'"),
        ("[worker]\nlease = -1\n", "setting 'worker.lease' in reliamq.toml must be at least 100 ms"),
    ],
)
def test_bad_settings_name_the_file_or_the_field(run: Run, folder: Path, text: str, said: str) -> None:
    (folder / "reliamq.toml").write_text(text)

    done = run("audit", "orders:app")

    assert done.returncode == 2, done.stdout + done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_dead_letters_are_listed_shown_replayed_and_dropped(run: Run, folder: Path) -> None:
    (folder / "orders.ndjson").write_text('{"number": 1, "account": "broken"}\n{"number": 2, "account": "broken"}\n')
    assert run("publish", "orders", "--app", "orders:app", "--file", "orders.ndjson").returncode == 0
    _work_until(folder, lambda: len(_dead(run)) == 2)

    first, second = _dead(run)
    shown = json.loads(run("dead-letters", "show", first["message"], "--app", "orders:app").stdout)
    replayed = run("dead-letters", "replay", first["message"], "--app", "orders:app")
    dropped = run("dead-letters", "drop", second["message"], "--app", "orders:app")

    assert json.loads(shown["body"]) == {"number": 1, "account": "broken"}
    assert shown["reason"] == "ValueError: cannot"
    assert shown["attempts"] == 3
    assert (replayed.stdout, dropped.stdout) == ("1 replayed\n", "1 dropped\n")
    assert _dead(run) == []


def test_audit_exits_with_1_only_for_what_loses_messages(run: Run) -> None:
    fine = run("audit", "orders:app", "--json")
    undeclared = run("audit", "--broker", "embedded:///broker.db", "--json")

    assert fine.returncode in (0, 1), fine.stderr
    assert isinstance(json.loads(fine.stdout), list)
    assert undeclared.returncode == 0, undeclared.stdout + undeclared.stderr


def test_backends_lists_the_embedded_broker(run: Run) -> None:
    done = run("backends", "--json")

    (embedded,) = [one for one in json.loads(done.stdout) if one["name"] == "embedded"]
    assert set(embedded["schemes"]) == {"embedded", "memory"}
    assert embedded["schemes"]["embedded"]["durability"] == "fsynced"
    assert embedded["schemes"]["memory"]["survives_restart"] is False
    assert embedded["fault"] is None


def test_outbox_status_of_an_empty_outbox(run: Run) -> None:
    assert run("audit", "orders:app").returncode in (0, 1)
    run("publish", "orders", "--app", "orders:app", "--file", "orders.py")  # opens the application, so tables are there

    done = run("outbox", "status", "--app", "orders:app", "--json")

    assert json.loads(done.stdout) == {"waiting": 0, "parked": 0, "oldest_seconds": None}


def _dead(run: Run) -> list[dict[str, str]]:
    done = run("dead-letters", "list", "--app", "orders:app", "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def _work_until(folder: Path, condition) -> None:  # type: ignore[no-untyped-def]
    from tests.cli.test_run import running_worker, wait_until

    with running_worker(folder):
        wait_until(condition)
