"""Dead letters: C5."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import UTC, datetime

from reliamq.spi import Confirmation, DeadLetterRecord, Message
from reliamq.testing.harness import PATIENCE, Stage, bodies, for_group, promise


def record_of(message: Message, *, group: str = "g", reason: str = "ValueError: no") -> DeadLetterRecord:
    """A dead letter for ``message``."""
    return DeadLetterRecord(message, group, "module.handler", reason, "Traceback …\nline", 3, datetime.now(UTC), "17")


async def bury(stage: Stage, *records: DeadLetterRecord) -> None:
    """Add dead letters, which must be confirmed."""
    async with stage.backend.dead_letters() as dead_letters:
        outcomes = await dead_letters.add(records, deadline=time.monotonic() + PATIENCE.total_seconds())
    assert [type(one) for one in outcomes] == [Confirmation] * len(records)


@promise("C5")
async def test_a_dead_letter_keeps_the_original_and_why(stage: Stage) -> None:
    message = stage.message(b"\xff\x00", key=b"\x00k", headers={"a": "ü"}, sequence=9)
    record = record_of(message)
    await bury(stage, record)

    async with stage.make_backend().dead_letters() as dead_letters:
        (found,) = await dead_letters.find(topic=stage.topic)

    assert found == replace(record, message=found.message)
    assert replace(found.message, headers={}) == replace(message, headers={})
    assert dict(found.message.headers) == {"a": "ü"}


@promise("C5")
async def test_dead_letters_are_found_by_topic_group_and_id_oldest_first(stage: Stage) -> None:
    messages = [stage.message(b"%d" % number) for number in range(4)]
    await bury(stage, *[record_of(message, group="g" if n < 3 else "h") for n, message in enumerate(messages)])

    async with stage.backend.dead_letters() as dead_letters:
        by_group = await dead_letters.find(topic=stage.topic, group="g")
        by_id = await dead_letters.find(message_id=messages[3].id)
        two = await dead_letters.find(topic=stage.topic, limit=2)

    assert [one.message.body for one in by_group] == [b"0", b"1", b"2"]
    assert [one.group for one in by_id] == ["h"]
    assert [one.message.body for one in two] == [b"0", b"1"]


@promise("C5")
async def test_adding_one_again_replaces_it_and_removing_is_final(stage: Stage) -> None:
    message = stage.message()
    await bury(stage, record_of(message, reason="first"))
    await bury(stage, record_of(message, reason="second"))

    async with stage.backend.dead_letters() as dead_letters:
        (found,) = await dead_letters.find(topic=stage.topic)
        assert found.reason == "second"
        assert await dead_letters.remove([found]) == 1
        assert await dead_letters.remove([found]) == 0
        assert list(await dead_letters.find(topic=stage.topic)) == []


@promise("C5")
async def test_a_replay_reaches_the_group_that_gave_up_and_no_other(stage: Stage) -> None:
    await stage.declare("gave-up", "did-not")
    message = stage.message(b"again", key=b"k")
    await stage.publish(message)
    async with stage.member("gave-up") as one, stage.member("did-not") as other:
        await one.handle(1)
        await other.handle(1)

        await stage.publish(for_group(message, "gave-up"))

        (replayed,) = await one.handle(1)
        assert (replayed.message.id, replayed.attempt) == (message.id, 1)
        await other.nothing_comes()


@promise("C5")
async def test_a_replay_of_what_is_still_to_be_done_changes_nothing(stage: Stage) -> None:
    stage.require("deduplicates")
    await stage.declare()
    message = stage.message(b"pending")
    await stage.publish(message)
    await stage.publish(for_group(message, "g"))

    async with stage.member() as member:
        assert bodies(await member.handle(1)) == [b"pending"]
        await member.nothing_comes()
