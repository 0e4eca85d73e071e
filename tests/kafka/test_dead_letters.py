"""Given-up messages rest on a real cluster unchanged, and only on purpose they go (C5)."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from reliamq.spi import BrokerUnavailable, Confirmation, DeadLetterRecord, Message, Rejection, RejectionReason
from reliamq_kafka.catalog.dead_letters import LONGEST_TEXT, KafkaDeadLetters, open_dead_letters
from reliamq_kafka.catalog.own_topics import DEAD_LETTERS_TOPIC
from reliamq_kafka.settings import KafkaSettings, read_settings
from reliamq_kafka.wire.admin import open_admin
from tests.kafka.conftest import message

pytestmark = [pytest.mark.anyio, pytest.mark.xdist_group("kafka")]


@pytest.fixture
def topic() -> str:
    """A name is enough: dead letters outlive their topic."""
    return f"test-{uuid.uuid4()}"


def dead(message: Message, **fields: Any) -> DeadLetterRecord:
    values: dict[str, Any] = {"group": "g", "handler": "module.handler", "reason": "ValueError: no"}
    values |= {"traceback": "Traceback …\n", "attempts": 3, "died_at": datetime.now(UTC), "position": "2/17"}
    return DeadLetterRecord(message, **(values | fields))


async def add(dead_letters: KafkaDeadLetters, *records: DeadLetterRecord) -> None:
    outcomes = await dead_letters.add(records, deadline=time.monotonic() + 20)
    assert outcomes == [Confirmation(record.message.id, outcomes[n].position) for n, record in enumerate(records)]


def plain(records: Sequence[DeadLetterRecord]) -> list[DeadLetterRecord]:
    """With headers that compare."""
    return [replace(one, message=replace(one.message, headers=dict(one.message.headers))) for one in records]


async def test_a_dead_letter_is_the_original_unchanged_and_says_why(settings: KafkaSettings, topic: str) -> None:
    headers = {"plain": "ü", "ce_id": "mine", "content-type": "x", "reliamq_key": "y", "reliamq_handler": "z"}
    originals = [
        message(topic, "with everything", "k", headers=headers, sequence=9, only_group="g", content_type="text/plain"),
        replace(message(topic, ""), key=b"\xff\x00 not UTF-8", body=b"\x80\xff"),
        replace(message(topic, "empty key"), key=b""),
        message(topic, "no key", None, id='an "id" with / and @ and ü'),
    ]
    records = [dead(each, handler="", traceback="", position="") for each in originals]
    async with open_dead_letters(settings) as dead_letters:
        await add(dead_letters, *records)

    async with open_dead_letters(settings) as dead_letters:
        found = await dead_letters.find(topic=topic)
        assert plain(found) == records
        assert await dead_letters.remove(found) == len(records)


async def test_as_large_as_a_message_can_be_it_is_stored_with_why_it_died(settings: KafkaSettings, topic: str) -> None:
    large, small = message(topic, "x" * 3_000_000), message(topic, "small")
    endless = dead(large, reason="r" * 1_000_000, traceback="t" * 1_000_000 + "the end")
    async with open_dead_letters(settings) as dead_letters:
        await add(dead_letters, endless, dead(small))

        first, second = found = await dead_letters.find(topic=topic)
        assert (first.message.body, second.message.body) == (large.body, small.body)
        assert len(first.reason) == len(first.traceback) == LONGEST_TEXT
        assert first.traceback.endswith("the end")
        assert await dead_letters.remove(found) == 2


async def test_what_cannot_be_written_is_rejected_alone(settings: KafkaSettings, topic: str) -> None:
    async with open_dead_letters(settings) as dead_letters:
        records = [dead(message(topic, "a")), dead(message(topic, "b"), reason="\ud800"), dead(message(topic, "c"))]
        outcomes = await dead_letters.add(records, deadline=time.monotonic() + 20)

        assert [type(one) for one in outcomes] == [Confirmation, Rejection, Confirmation]
        assert getattr(outcomes[1], "reason", None) is RejectionReason.INVALID
        found = await dead_letters.find(topic=topic)
        assert [one.message.body for one in found] == [b"a", b"c"]
        await dead_letters.remove(found)


async def test_one_that_is_put_while_another_is_removed_stays(settings: KafkaSettings, topic: str) -> None:
    """Two processes: what the one has read before it removes, the other changes."""
    first = dead(message(topic, "m"))
    again = replace(first, died_at=first.died_at + timedelta(seconds=1), reason="again")
    async with open_dead_letters(settings) as one, open_dead_letters(settings) as other:
        await add(one, first)
        removing = one._writer.remove

        async def late(keys: Sequence[bytes]) -> None:
            await add(other, again)
            await removing(keys)

        one._writer.remove = late  # type: ignore[method-assign]
        assert await one.remove([first]) == 1
        one._writer.remove = removing  # type: ignore[method-assign]

        assert await other.find(topic=topic) == [again]
        assert await one.remove([again]) == 1


async def test_removing_the_last_of_several_deaths_brings_none_of_the_others_back(
    settings: KafkaSettings, topic: str
) -> None:
    first = dead(message(topic, "m"))
    again = replace(first, died_at=first.died_at + timedelta(seconds=1))
    async with open_dead_letters(settings) as dead_letters:
        await add(dead_letters, first, again)
        assert await dead_letters.find(topic=topic, limit=0) == []
        assert await dead_letters.find(topic=topic) == [again]
        assert await dead_letters.remove([first]) == 0
        assert await dead_letters.remove([first, again]) == 1
        assert await dead_letters.find(topic=topic) == []


async def test_by_a_deadline_that_has_passed_each_has_an_outcome_all_the_same(
    settings: KafkaSettings, topic: str
) -> None:
    async with open_dead_letters(settings) as dead_letters:
        record = dead(message(topic, "m"))
        (outcome,) = await dead_letters.add([record], deadline=time.monotonic() - 1)
        assert not isinstance(outcome, Confirmation)
        await add(dead_letters, record)
        assert await dead_letters.find(topic=topic) == [record]
        assert await dead_letters.remove([record]) == 1


async def test_they_are_on_three_brokers_and_do_not_expire(settings: KafkaSettings) -> None:
    async with open_dead_letters(settings), open_admin(settings) as admin:
        (partition,) = await admin.partitions(DEAD_LETTERS_TOPIC) or []
        live = await admin.topic_settings(DEAD_LETTERS_TOPIC)

    assert len(partition.replicas) == 3
    assert (live["cleanup.policy"], live["min.insync.replicas"]) == ("compact", "2")
    assert live["unclean.leader.election.enable"] == "false"


async def test_a_cluster_that_cannot_be_reached_is_unavailable() -> None:
    nowhere = read_settings("kafka://127.0.0.1:1", {"request_timeout_seconds": 1})
    with pytest.raises(BrokerUnavailable):
        async with open_dead_letters(nowhere):
            pass
