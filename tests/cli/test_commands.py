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

    assert done.returncode == 2
    assert done.stdout == "2 confirmed, 3 not\n"
    assert "line 2: field 'number'" in done.stderr
    assert "line 3:" in done.stderr
    assert "line 5:" in done.stderr
    assert "over the topic's limit of 1000" in done.stderr


@pytest.mark.parametrize("file", ["/dev/stdin", "-"])
def test_a_pipe_is_read_once_and_every_line_of_it_is_published(run: Run, file: str) -> None:
    lines = "\ufeff" + "".join(f'{{"number": {number}}}\n' for number in range(5))

    done = run("publish", "orders", "--app", "orders:app", "--file", file, input=lines)

    assert (done.returncode, done.stdout) == (0, "5 confirmed, 0 not\n"), done.stderr


def test_a_file_without_a_line_is_bad_input(run: Run) -> None:
    done = run("publish", "orders", "--app", "orders:app", "--file", "-", input="\n\n")

    assert done.returncode == 2
    assert "--file -: holds no line" in done.stderr


def test_what_the_broker_does_not_take_is_exit_code_1_also_beside_bad_lines(run: Run, folder: Path) -> None:
    (folder / "orders.ndjson").write_text('{"number": 1}\n{broken\n')
    (folder / "lonely.py").write_text(
        "from orders import Order\nfrom reliamq import Reliamq\napp = Reliamq()\napp.topic('lonely', Order)\n"
    )

    done = run("publish", "lonely", "--app", "lonely:app", "--file", "orders.ndjson")

    assert (done.returncode, done.stdout) == (1, "0 confirmed, 2 not\n")
    assert "line 1: message" in done.stderr
    assert "line 2: field" in done.stderr


BAD_MODULES = {
    "a syntax error": ("def f(:\n", "SyntaxError: invalid syntax"),
    "an exception": ("def f():\n    raise RuntimeError('boom')\nf()\n", "RuntimeError: boom"),
    "an exit": ("import sys\nsys.exit(3)\n", "SystemExit: 3"),
    "a circular import": ("import bad\nfrom bad import app\n", "ImportError: cannot import name 'app'"),
    "a missing library": ("import nosuchlibrary\n", "ModuleNotFoundError: No module named 'nosuchlibrary'"),
}


@pytest.mark.parametrize("fault", BAD_MODULES)
def test_a_module_that_cannot_be_imported_is_one_line_with_the_users_own_place(
    run: Run, folder: Path, fault: str
) -> None:
    source, said = BAD_MODULES[fault]
    (folder / "bad.py").write_text(source)

    done = run("run", "bad:app")

    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"reliamq: module 'bad' cannot be imported: {said}")
    assert "bad.py:" in line


def test_the_whole_traceback_is_shown_when_the_environment_asks_for_it(run: Run, folder: Path) -> None:
    (folder / "bad.py").write_text("1 / 0\n")

    done = run("run", "bad:app", env={"RELIAMQ_TRACEBACK": "1"})

    assert done.returncode == 2
    assert "Traceback" in done.stderr


def test_an_application_may_be_an_attribute_of_an_attribute(run: Run, folder: Path) -> None:
    (folder / "factory.py").write_text("import orders\n")

    done = run("dead-letters", "list", "--app", "factory:orders.app", "--json")

    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "orders:app"],
        ["relay", "orders:app"],
        ["publish", "orders", "--app", "orders:app", "--file", "orders.py"],
        ["dead-letters", "list", "--app", "orders:app"],
        ["prove", "--broker", "memory://"],
    ],
)
def test_a_broker_in_memory_is_refused_where_another_process_would_have_to_see_it(
    run: Run, arguments: list[str]
) -> None:
    done = run(*arguments, env={"RELIAMQ_BROKER": "memory://"})

    assert done.returncode == 2, done.stdout + done.stderr
    assert "in the memory of one process" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["dead-letters", "replay", "nope", "no", "--app", "orders:app"], "no dead letter of message nope, no"),
        (["dead-letters", "drop", "nope", "--app", "orders:app"], "no dead letter of message nope"),
        (["dead-letters", "show", "nope", "--app", "orders:app"], "no dead letter of message nope"),
        (["dead-letters", "list", "--topic", "oders", "--app", "orders:app"], "no topic 'oders'; it has orders"),
        (["dead-letters", "drop", "--all", "--group", "h", "--app", "orders:app"], "no group 'h'"),
        (["outbox", "requeue", "nope", "--app", "orders:app"], "no parked row of message nope"),
        (["outbox", "purge", "nope", "--app", "orders:app"], "no parked row of message nope"),
        (["outbox", "show", "nope", "--app", "orders:app"], "no parked row of message nope"),
        (["dead-letters", "list", "--limit", "0", "--app", "orders:app"], "--limit"),
        (["outbox", "parked", "--limit", "-1", "--app", "orders:app"], "--limit"),
    ],
)
def test_an_id_or_a_name_that_is_not_there_is_named(run: Run, folder: Path, arguments: list[str], said: str) -> None:
    (folder / "one.ndjson").write_text('{"number": 1}\n')
    run("publish", "orders", "--app", "orders:app", "--file", "one.ndjson")  # opens it, so tables are there

    done = run(*arguments)

    assert done.returncode == 2, done.stdout + done.stderr
    assert said in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "nowhere:app"], "there is no module 'nowhere'"),
        (["run", "orders"], "is not MODULE:APP"),
        (["run", "orders:nothing"], "has no 'nothing'"),
        (["run", "orders:Order"], "'Order' in module 'orders' is not a Reliamq"),
        (["run", "orders.py:app"], "write orders:app"),
        (["run", "shop/orders.py:app"], "write shop.orders:app"),
        (["run", "..orders:app"], "write orders:app"),
        (["publish", "orders", "--app", "orders:app", "--file", "x", "--type", "Nope"], "--type Nope"),
        (["publish", "nosuch", "--app", "orders:app", "--file", "x"], "no topic 'nosuch'"),
        (["publish", "orders", "--app", "orders:app", "--file", "x"], "--file x"),
        (["audit", "--broker", "carrier-pigeon://loft"], "no backend serves 'carrier-pigeon://'"),
        (["dead-letters", "drop", "--app", "orders:app"], "--all"),
        (["prove", "--broker", "carrier-pigeon://loft"], "no backend serves 'carrier-pigeon://'"),
        (["prove", "--input", "nosuch.ndjson"], "nosuch.ndjson"),
        (["prove", "--database", "not a url"], "no SQLAlchemy URL"),
        (["prove", "--messages", "-1"], "--messages"),
        (["prove", "--messages", "5", "--input", "x"], "--messages and --input"),
        (["prove", "--broker", "foo"], "setting 'broker' in code is no URL"),
        (["prove", "--report", "."], "--report .: is a folder"),
        (["prove", "--report", "nofolder/page.html"], "its folder does not exist"),
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
    listed = run("dead-letters", "list", "--app", "orders:app").stdout.splitlines()
    terminal = {"FORCE_COLOR": "1", "COLUMNS": "80"}
    on_a_terminal = run("dead-letters", "list", "--app", "orders:app", env=terminal).stdout
    shown = json.loads(run("dead-letters", "show", first["message"], "--app", "orders:app").stdout)
    replayed = run("dead-letters", "replay", first["message"], "--app", "orders:app")
    dropped = run("dead-letters", "drop", second["message"], "--app", "orders:app")

    assert first["message"] in on_a_terminal
    assert [line.split("\t")[0] for line in listed] == [first["message"], second["message"]]
    assert json.loads(shown["body"]) == {"number": 1, "account": "broken"}
    assert shown["reason"] == "ValueError: cannot"
    assert shown["attempts"] == 3
    assert (replayed.stdout, dropped.stdout) == ("1 replayed\n", "1 dropped\n")
    assert _dead(run) == []


def test_audit_exits_with_1_only_for_what_loses_messages(run: Run, folder: Path) -> None:
    (folder / "one.ndjson").write_text('{"number": 1}\n')
    run("publish", "orders", "--app", "orders:app", "--file", "one.ndjson")  # opens it, so everything is declared

    fine = run("audit", "orders:app", "--json")
    undeclared = run("audit", "--broker", "embedded:///broker.db", "--json")

    assert fine.returncode in (0, 1), fine.stderr
    assert isinstance(json.loads(fine.stdout), list)
    assert undeclared.returncode == 0, undeclared.stdout + undeclared.stderr


def test_an_audit_of_files_that_are_not_there_finds_that_and_creates_nothing(run: Run, folder: Path) -> None:
    before = set(folder.iterdir())

    done = run("audit", "--broker", "embedded:///nonexist.db", "--database", "sqlite:///new.db", "--json")

    assert done.returncode == 1
    assert [one["setting"] for one in json.loads(done.stdout)] == ["file", "file"]
    assert set(folder.iterdir()) == before


def test_an_audit_of_a_broker_in_memory_says_that_it_loses_messages_unless_that_is_asked_for(
    run: Run, folder: Path
) -> None:
    (folder / "reliamq.toml").write_text("")
    losing = run("audit", "--broker", "memory://", "--json")
    (folder / "reliamq.toml").write_text('durability = "development"\n')
    asked_for = run("audit", "--broker", "memory://", "--json")

    assert losing.returncode == 1
    assert [one["severity"] for one in json.loads(losing.stdout)] == ["loses-messages"]
    assert asked_for.returncode == 0
    assert [one["severity"] for one in json.loads(asked_for.stdout)] == ["note"]


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

    nothing = {"waiting": 0, "parked": 0, "oldest_seconds": None, "kept": 0, "kept_since": None}
    nothing |= {"retrying": 0, "attempts": 0}
    assert json.loads(done.stdout) == nothing


def _dead(run: Run) -> list[dict[str, str]]:
    done = run("dead-letters", "list", "--app", "orders:app", "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def _work_until(folder: Path, condition) -> None:  # type: ignore[no-untyped-def]
    from tests.cli.test_run import running_worker, wait_until

    with running_worker(folder):
        wait_until(condition)
