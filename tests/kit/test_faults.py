"""The conformance kit can fail: a backend broken on purpose fails the tests of exactly the promises that it breaks."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from reliamq.testing.faults import FAULTS

SUITE = """
    import uuid
    from datetime import timedelta

    import pytest

    import reliamq.testing.harness as harness

    harness.PATIENCE = timedelta(seconds=2)  # what never comes need not be waited for long

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

    pytest_plugins = ["reliamq.testing.plugin"]
    failed = set()

    def pytest_itemcollected(item):
        promises = [number for marker in item.iter_markers("promise") for number in marker.args]
        item.user_properties += [("promise", number) for number in promises]

    def pytest_runtest_logreport(report):
        if report.failed:
            failed.update(number for _, number in report.user_properties)

    def pytest_sessionfinish(session):
        if hasattr(session.config, "workerinput"):
            return  # the reports go to the process that started this one
        counts = {"failed": sorted(failed), "collected": session.testscollected}
        session.config.rootpath.joinpath("result.json").write_text(json.dumps(counts))
"""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_backend_fails_the_promise_it_breaks_and_no_other(fault: str, tmp_path: Path) -> None:
    (tmp_path / "test_suite.py").write_text(textwrap.dedent(SUITE.format(fault=fault)))
    (tmp_path / "conftest.py").write_text(textwrap.dedent(CONFTEST))
    (tmp_path / "pytest.ini").write_text("[pytest]\n")

    # Two processes, because the tests mostly wait.
    options = ["-q", "-n", "2", "-p", "no:asyncio", "-p", "no:cacheprovider", "--timeout", "60"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=110,
    )

    result = json.loads((tmp_path / "result.json").read_text())
    assert result["collected"] >= 55, done.stdout
    assert set(result["failed"]) == FAULTS[fault].breaks, done.stdout[-3000:]


def test_every_promise_of_a_backend_has_a_fault_that_breaks_it() -> None:
    wanted = {"P1", "P2", "P3", "P4", "P5", "P6", "S1", "S2", "S3"} | {f"C{n}" for n in range(1, 13)}
    broken = set().union(*(fault.breaks for fault in FAULTS.values()))

    assert wanted <= broken
