"""The layers hold, and breaking them is caught."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINT = Path(sys.executable).parent / "lint-imports"


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [str(LINT), "--config", str(folder / "pyproject.toml"), "--no-cache"]
    environment = {"PYTHONPATH": str(folder / "src"), "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, cwd=folder / "src", env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_imports_only_go_down(copy: Path) -> None:
    done = lint_imports(copy)

    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("module", "line"),
    [
        pytest.param("app/application.py", "import aiokafka", id="core to a client"),
        pytest.param("consuming/member.py", "import redis", id="capability to a client"),
        pytest.param("publishing/publisher.py", "import reliamq.outbox", id="capability to capability"),
        pytest.param("embedded/publisher.py", "import reliamq.app", id="backend to application"),
        pytest.param("embedded/publisher.py", "import reliamq.topics", id="backend past the SPI"),
        pytest.param("spi/messages.py", "import pydantic", id="SPI to pydantic"),
        pytest.param("spi/contracts.py", "import anyio", id="SPI to anyio"),
        pytest.param("spi/stores.py", "import sqlalchemy", id="SPI to SQLAlchemy"),
        pytest.param("topics.py", "import reliamq.app", id="upwards"),
        pytest.param("consuming/retry.py", "import reliamq.cli", id="to the command line"),
        pytest.param("backends.py", "import reliamq.embedded", id="somebody imports the embedded broker"),
        pytest.param("utils.py", "", id="an unlisted module"),
        pytest.param(
            "handlers/plan.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import reliamq.app",
            id="for type checking only",
        ),
        pytest.param("idempotency/lease.py", "import reliamq.consuming", id="capability to its user"),
    ],
)
def test_a_planted_breach_is_caught(copy: Path, module: str, line: str) -> None:
    path = copy / "src" / "reliamq" / module
    text = path.read_text() if path.exists() else '"""Planted."""\n'
    path.write_text(f"{text}\n{line}\n")

    done = lint_imports(copy)

    assert done.returncode == 1, done.stdout + done.stderr


def loaded_by(statement: str, modules: tuple[str, ...]) -> list[str]:
    code = f"import sys\n{statement}\nprint([name for name in {modules!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return list(eval(done.stdout))  # noqa: S307  # our own list of names


def test_importing_the_spi_loads_nothing_heavy() -> None:
    heavy = ("pydantic", "pydantic_settings", "sqlalchemy", "anyio", "typer", "rich")

    assert loaded_by("import reliamq.spi", heavy) == []


def test_importing_reliamq_loads_no_client_and_nothing_heavy() -> None:
    clients = ("aiokafka", "aio_pika", "redis", "pydantic", "sqlalchemy")

    assert loaded_by("import reliamq", clients) == []


def test_every_public_name_can_be_had() -> None:
    import reliamq

    assert sorted(reliamq.__all__) == list(reliamq.__all__)
    for name in reliamq.__all__:
        assert getattr(reliamq, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = reliamq.no_such_name
