"""The databases that the SQL stores' tests run on: each kind once, and each driver where it matters."""

from __future__ import annotations

from pathlib import Path

import pytest
from _pytest.mark.structures import ParameterSet

__all__ = ["DRIVERS", "KINDS", "MARIADB", "database_url"]

MARIADB = pytest.param("aiomysql", marks=pytest.mark.xdist_group("mariadb"), id="mariadb")  # one server for the run
KINDS: list[str | ParameterSet] = [
    "sqlite",
    "psycopg",
    MARIADB,
    pytest.param("psycopg-15", marks=pytest.mark.slow, id="postgresql-15"),
]
DRIVERS: list[str | ParameterSet] = ["sqlite", "psycopg", "asyncpg", MARIADB]


def database_url(request: pytest.FixtureRequest, driver: str, folder: Path) -> str:
    """The URL of an empty database."""
    if driver == "sqlite":
        return f"sqlite:///{folder}/app.db"
    if driver == "aiomysql":
        return str(request.getfixturevalue("mariadb_url"))
    fixture = "postgresql_15_url" if driver.endswith("-15") else "postgresql_url"
    url: str = request.getfixturevalue(fixture)
    return url.replace("postgresql:", f"postgresql+{driver.removesuffix('-15')}:")
