"""A suspect runs alone in its process (C4)."""

from __future__ import annotations

import anyio
import pytest

from reliamq.consuming.suspects import Suspects

pytestmark = pytest.mark.anyio


async def test_a_suspect_waits_for_those_that_run_and_keeps_new_ones_out() -> None:
    suspects, log, finish = Suspects(), list[str](), anyio.Event()

    async def other(name: str) -> None:
        while suspects.gate is not None:
            await suspects.gate.wait()
        suspects.enter()
        log.append(f"{name} starts")
        await finish.wait()
        log.append(f"{name} ends")
        suspects.leave()

    async def suspect(name: str) -> None:
        async with suspects.alone():
            log.append(f"{name} starts")
            await anyio.sleep(0.01)
            log.append(f"{name} ends")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(other, "first")
        await anyio.wait_all_tasks_blocked()
        tasks.start_soon(suspect, "one")
        tasks.start_soon(suspect, "two")
        await anyio.wait_all_tasks_blocked()
        tasks.start_soon(other, "later")
        await anyio.wait_all_tasks_blocked()
        assert log == ["first starts"]
        finish.set()

    suspected = [log.index(f"{name} {what}") for name in ("one", "two") for what in ("starts", "ends")]
    assert log.index("first ends") < min(suspected)
    assert suspected[1] == suspected[0] + 1
    assert suspected[3] == suspected[2] + 1


async def test_a_suspect_that_is_cancelled_while_it_waits_lets_the_others_go_on() -> None:
    suspects = Suspects()
    suspects.enter()
    with anyio.move_on_after(0.01):
        async with suspects.alone():
            raise AssertionError("somebody else runs")

    assert suspects.gate is None
    suspects.leave()
    async with suspects.alone():
        pass
