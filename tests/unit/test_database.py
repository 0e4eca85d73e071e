"""Opening a database whose driver is not there."""

from __future__ import annotations

import sys

import pytest

from reliamq.database import open_sync_engine
from reliamq.spi import MissingExtra


def test_a_missing_driver_names_the_database_and_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pymysql", None)

    with pytest.raises(MissingExtra) as caught, open_sync_engine("mysql://localhost/app"):
        pass
    assert str(caught.value) == (
        "'mysql' needs the module 'pymysql', which is not installed; run: pip install 'reliamq[mysql]'"
    )
