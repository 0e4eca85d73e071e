"""The conformance kit can fail: a backend broken on purpose fails the promises that it breaks, and no others."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from reliamq.testing.faults import FAULTS

SUITE = """
    import uuid
    from datetime import timedelta

    import pytest

    import reliamq.testing.harness as harness

    harness.PATIENCE = timedelta(seconds=3)  # what never comes need not be waited for long

    from reliamq.backends import open_backend
    from reliamq.testing.conformance import *
    from reliamq.testing.faults import FAULTS

    @pytest.fixture
    def make_backend():
        name = uuid.uuid4()
        return lambda: FAULTS[{fault!r}].wrap(open_backend(f"memory://{{name}}"))
"""

CONFTEST = """
    import json

    import pytest

    from reliamq.testing.faults import FAULTS

    pytest_plugins = ["reliamq.testing.plugin"]
    wanted = FAULTS[{fault!r}].breaks
    failed = set()

    def promises(item):
        return {{number for marker in item.iter_markers("promise") for number in marker.args}}

    def pytest_itemcollected(item):
        item.user_properties += [("promise", number) for number in promises(item)]

    def pytest_collection_modifyitems(items):
        if {only_wanted!r}:
            items[:] = [item for item in items if promises(item) & wanted]

    def pytest_runtest_setup(item):
        if {only_wanted!r} and promises(item) & wanted <= failed:
            pytest.skip("broken, as was seen already")

    def pytest_runtest_logreport(report):
        if report.failed:
            failed.update(number for _, number in report.user_properties)

    def pytest_sessionfinish(session):
        if hasattr(session.config, "workerinput"):
            return  # the reports go to the process that started this one
        counts = {{"failed": sorted(failed), "collected": session.testscollected}}
        session.config.rootpath.joinpath("result.json").write_text(json.dumps(counts))
"""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_backend_fails_the_promises_that_it_breaks(fault: str, tmp_path: Path) -> None:
    result, output = run(fault, tmp_path, "-n", "0", only_wanted=True)

    assert set(result["failed"]) == FAULTS[fault].breaks, output


@pytest.mark.slow  # the whole kit for each fault
@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_backend_fails_no_other_promise(fault: str, tmp_path: Path) -> None:
    result, output = run(fault, tmp_path, "-n", "4", only_wanted=False)  # which mostly wait

    assert result["collected"] >= 55, output
    assert set(result["failed"]) == FAULTS[fault].breaks, output


def run(fault: str, folder: Path, *options: str, only_wanted: bool) -> tuple[dict[str, Any], str]:
    """The kit on the broken backend: what it found, and what it printed."""
    (folder / "test_suite.py").write_text(textwrap.dedent(SUITE.format(fault=fault)))
    (folder / "conftest.py").write_text(textwrap.dedent(CONFTEST.format(fault=fault, only_wanted=only_wanted)))
    (folder / "pytest.ini").write_text("[pytest]\n")
    options = ("-q", *options, "-p", "no:asyncio", "-p", "no:cacheprovider", "--timeout", "60")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options], cwd=folder, capture_output=True, text=True, timeout=110
    )
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result, done.stdout[-3000:]


def test_every_promise_of_a_backend_has_a_fault_that_breaks_it() -> None:
    wanted = {"P1", "P2", "P3", "P4", "P5", "P6", "S1", "S2", "S3"} | {f"C{n}" for n in range(1, 13)}
    broken = set().union(*(fault.breaks for fault in FAULTS.values()))

    assert wanted <= broken
