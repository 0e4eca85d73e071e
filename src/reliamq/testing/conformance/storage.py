"""Safe shelter: S1–S3, and who receives what was published when: C9."""

from __future__ import annotations

from datetime import timedelta

import anyio

from reliamq.spi import Durability, GroupSpec, Release, Severity
from reliamq.testing.harness import Stage, bodies, promise


@promise("S1")
async def test_declaring_again_and_at_the_same_time_changes_nothing(stage: Stage) -> None:
    await stage.declare()
    await stage.publish(stage.message(b"kept"))
    async with anyio.create_task_group() as tasks:
        for _ in range(5):
            tasks.start_soon(stage.declare)

    async with stage.member() as member:
        assert bodies(await member.handle(1)) == [b"kept"]


@promise("S1")
async def test_declaring_otherwise_is_a_finding_and_weakens_nothing(stage: Stage) -> None:
    await stage.declare("g", max_message_bytes=2000)

    findings = await stage.declare("g", max_message_bytes=10)

    assert any(finding.setting == "max_message_bytes" for finding in findings), findings
    await stage.publish(stage.message(b"x" * 1500))


@promise("S2")
async def test_an_audit_says_what_is_missing_and_creates_nothing(stage: Stage) -> None:
    async with stage.backend.storage() as storage:
        first = await storage.audit([stage.spec("g")])
        second = await storage.audit([stage.spec("g")])

    for findings in (first, second):
        missing = [finding for finding in findings if finding.severity in (Severity.LOSES, Severity.RISKS)]
        assert any(stage.topic in finding.subject for finding in missing), findings
        assert all(finding.why and finding.fix and finding.required for finding in missing)


@promise("S3")
async def test_asking_for_more_durability_than_there_is_is_a_finding_that_loses_messages(stage: Stage) -> None:
    best = stage.backend.capabilities.durability
    stronger = [one for one in Durability if one > best]
    await stage.declare(durability=best)
    async with stage.backend.storage() as storage:
        for asked in stronger:
            findings = await storage.audit([stage.spec(durability=asked)])
            assert any(one.severity is Severity.LOSES for one in findings), asked


@promise("C9")
async def test_each_group_gets_every_message_and_members_share_them(stage: Stage) -> None:
    await stage.declare("one", "two")
    await stage.publish(*stage.numbered(30))

    async with stage.member("one") as first, stage.member("one") as second, stage.member("two") as other:
        shared = bodies(await first.handle(10)) + bodies(await second.handle(20))
        assert sorted(map(int, shared)) == list(range(30))
        assert sorted(int(one) for one in bodies(await other.handle(30))) == list(range(30))


@promise("C9")
async def test_a_new_group_starts_at_the_earliest_message_that_is_kept(stage: Stage) -> None:
    stage.require("keeps_finished")
    await stage.declare("old", retention=timedelta(hours=1))
    await stage.publish(*stage.numbered(5, key=b"k"))
    async with stage.member("old") as member:
        await member.handle(5)

    await stage.declare("old", "new", retention=timedelta(hours=1))

    async with stage.member("new") as member:
        assert bodies(await member.handle(5)) == [b"0", b"1", b"2", b"3", b"4"]


@promise("C9")
async def test_a_group_that_starts_at_the_latest_gets_only_what_comes_after_it(stage: Stage) -> None:
    await stage.declare("old")
    await stage.publish(stage.message(b"before"))

    await stage.declare("old", GroupSpec("new", "latest"))
    await stage.publish(stage.message(b"after"))

    async with stage.member("new") as member:
        assert bodies(await member.handle(1)) == [b"after"]
        await member.nothing_comes()


@promise("C9")
async def test_retention_removes_nothing_that_a_group_has_not_finished(stage: Stage) -> None:
    await stage.declare("slow", "quick", retention=timedelta(seconds=0.1))
    await stage.publish(*stage.numbered(6))
    async with stage.member("slow") as slow, stage.member("quick") as quick:
        held = await slow.take(2)
        await quick.handle(6)
        for number in range(6, 10):  # a broker may look at what it keeps only when something happens
            await anyio.sleep(0.3)
            await stage.publish(stage.message(b"%d" % number))
            await quick.handle(1)

        await slow.settle(*[Release(delivery) for delivery in held])
        assert sorted(int(one) for one in bodies(await slow.handle(10))) == list(range(10))
