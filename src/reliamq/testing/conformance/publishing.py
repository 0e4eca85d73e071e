"""Safe departure: P1–P6."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta

import anyio
import pytest

from reliamq.spi import BrokerUnavailable, Confirmation, Durability, Outcome, Rejection, RejectionReason
from reliamq.testing.harness import MOMENT, Stage, bodies, for_group, promise

BEHIND = RejectionReason.BEHIND
PROMPT = 5.0
"""Seconds in which an answer comes that waits for nothing."""


@promise("P1")
async def test_what_was_confirmed_is_delivered_after_everything_was_closed(stage: Stage) -> None:
    await stage.declare()
    await stage.publish(*stage.numbered(20, key=b"k"))

    async with stage.member() as member:
        assert bodies(await member.handle(20)) == [str(number).encode() for number in range(20)]


@promise("P1")
async def test_what_was_confirmed_to_a_process_that_was_killed_is_delivered(stage: Stage) -> None:
    stage.require("survives_restart")
    await stage.declare()
    await stage.publish_by_a_process_that_is_killed(3)

    async with stage.member() as member:
        assert bodies(await member.handle(3)) == [b"0", b"1", b"2"]


@promise("P1")
async def test_what_another_process_publishes_reaches_a_member_of_this_one(stage: Stage) -> None:
    stage.require("shared_between_processes")
    await stage.declare()
    async with stage.member() as member:
        await member.nothing_comes()
        await stage.publish_by_a_process_that_is_killed(3)

        assert bodies(await member.handle(3)) == [b"0", b"1", b"2"]


@promise("P1")
async def test_who_promises_the_disk_promises_to_survive_a_restart(stage: Stage) -> None:
    capabilities = stage.backend.capabilities

    assert capabilities.survives_restart or capabilities.durability is Durability.DEVELOPMENT


@promise("P2")
async def test_each_message_of_a_batch_has_its_own_outcome_in_order(stage: Stage) -> None:
    await stage.declare(max_message_bytes=1000)
    good, large, other = stage.message(), stage.message(b"x" * 1001), stage.message()
    nowhere = stage.message(topic=f"{stage.topic}-nowhere")

    outcomes = await stage.send(good, large, nowhere, other)

    assert [one.message_id for one in outcomes] == [good.id, large.id, nowhere.id, other.id]
    assert [type(one) for one in outcomes] == [Confirmation, Rejection, Rejection, Confirmation]
    async with stage.member() as member:
        assert {one.message.id for one in await member.handle(2)} == {good.id, other.id}


@promise("P2")
async def test_an_empty_batch_is_fine(stage: Stage) -> None:
    assert list(await stage.send()) == []


@promise("P3")
async def test_an_undeclared_topic_is_unroutable(stage: Stage) -> None:
    (outcome,) = await stage.send(stage.message())

    assert isinstance(outcome, Rejection)
    assert outcome.reason is RejectionReason.UNROUTABLE


@promise("P3")
async def test_a_topic_that_no_group_would_receive_is_unroutable(stage: Stage) -> None:
    async with stage.backend.storage() as storage:
        spec = stage.spec()
        await storage.declare([type(spec)(spec.name, (), spec.durability)])

    (outcome,) = await stage.send(stage.message())

    assert isinstance(outcome, Rejection)
    assert outcome.reason is RejectionReason.UNROUTABLE


@promise("P4")
async def test_every_attribute_arrives_as_it_was_sent(stage: Stage) -> None:
    await stage.declare()
    sent = [
        stage.message(b"", key=b"", type="ünï", headers={"näme": "välue 🎈", "empty": ""}),
        stage.message(bytes(range(256)), key=b"\x00\xff", content_type="application/octet-stream", sequence=2**40),
        stage.message(b"{}", key=None, source="urn:a:b"),
    ]
    await stage.publish(*sent)

    async with stage.member() as member:
        came = {one.message.id: one.message for one in await member.handle(3)}

    for message in sent:
        other = came[message.id]
        for name in ("body", "key", "type", "source", "time", "content_type", "sequence"):
            assert getattr(other, name) == getattr(message, name), name
        assert dict(other.headers) == dict(message.headers)


@promise("P4")
async def test_an_id_that_is_published_twice_is_stored_once(stage: Stage) -> None:
    stage.require("deduplicates")
    await stage.declare()
    message = stage.message(b"once")

    await stage.publish(message, message)
    await stage.publish(message)

    async with stage.member() as member:
        assert bodies(await member.handle(1)) == [b"once"]
        await member.nothing_comes()


@promise("P4")
async def test_an_id_that_is_replayed_to_one_group_and_to_another_reaches_each_as_its_own(stage: Stage) -> None:
    await stage.declare("one", "two")
    message = stage.message(b"again", key=b"k")
    await stage.publish(for_group(message, "one"))
    await stage.publish(for_group(message, "two"))

    for group in ("one", "two"):
        async with stage.member(group) as member:
            (replayed,) = await member.handle(1)
            assert replayed.message.id == message.id
            assert replayed.message.only_group in (None, group)
            await member.nothing_comes()


@promise("P5")
async def test_messages_of_a_key_are_stored_in_the_order_of_sending(stage: Stage) -> None:
    await stage.declare()
    for start in range(0, 60, 6):
        batch = [stage.message(str(number).encode(), key=b"k%d" % (number % 3)) for number in range(start, start + 6)]
        await stage.publish(*batch)

    async with stage.member() as member:
        came = await member.handle(60)

    for remainder in range(3):
        numbers = [int(one.message.body) for one in came if one.message.key == b"k%d" % remainder]
        assert numbers == list(range(remainder, 60, 3))


@promise("P5")
async def test_in_a_chain_nothing_is_stored_behind_a_rejected_message_of_its_key(stage: Stage) -> None:
    """An outbox sends the rejected one again, and those behind it then (O3)."""
    await stage.declare(max_message_bytes=1000)
    first, large, behind, last = (stage.message(b"1" * size, key=b"k") for size in (1, 1001, 2, 3))
    other, free = stage.message(key=b"other"), stage.message()

    outcomes = await stage.send(first, large, other, behind, free, last, chained=True)

    assert [one.message_id for one in outcomes] == [one.id for one in (first, large, other, behind, free, last)]
    assert reasons(outcomes) == [None, RejectionReason.TOO_LARGE, None, BEHIND, None, BEHIND]
    async with stage.member() as member:
        assert {one.message.id for one in await member.handle(3)} == {first.id, other.id, free.id}
        await member.nothing_comes()


@promise("P5")
async def test_a_chain_stops_at_what_no_group_would_receive_and_goes_on_when_it_is_sent_again(stage: Stage) -> None:
    await stage.declare()
    for_nobody = for_group(stage.message(key=b"k"), "nobody")
    chain = [stage.message(b"0", key=b"k"), for_nobody, stage.message(b"1", key=b"k"), stage.message(b"2", key=b"k")]

    assert reasons(await stage.send(*chain, chained=True)) == [None, RejectionReason.UNROUTABLE, BEHIND, BEHIND]
    assert reasons(await stage.send(*chain[2:], chained=True)) == [None, None]

    async with stage.member() as member:
        assert bodies(await member.handle(3)) == [b"0", b"1", b"2"]


@promise("P5")
async def test_in_a_chain_that_nobody_would_receive_only_the_first_is_judged(stage: Stage) -> None:
    """What is behind it costs no attempt (O5)."""
    chain = stage.numbered(3, key=b"k")

    assert reasons(await stage.send(*chain, chained=True)) == [RejectionReason.UNROUTABLE, BEHIND, BEHIND]


@promise("P5")
async def test_a_long_chain_is_stored_in_its_order(stage: Stage) -> None:
    await stage.declare()
    numbered = stage.numbered(100, key=b"k")

    assert reasons(await stage.send(*numbered, chained=True)) == [None] * 100

    async with stage.member() as member:
        assert bodies(await member.handle(100)) == [str(number).encode() for number in range(100)]


def reasons(outcomes: Sequence[Outcome]) -> list[RejectionReason | None]:
    """Why each was rejected; None: it is confirmed."""
    assert all(isinstance(one, Confirmation | Rejection) for one in outcomes), outcomes
    return [one.reason if isinstance(one, Rejection) else None for one in outcomes]


@promise("P6")
async def test_a_message_at_the_limit_is_stored_and_one_over_it_is_rejected(stage: Stage) -> None:
    await stage.declare(max_message_bytes=5000)

    fits, over = await stage.send(stage.message(b"x" * 5000), stage.message(b"x" * 5001))

    assert isinstance(fits, Confirmation)
    assert isinstance(over, Rejection)
    assert over.reason is RejectionReason.TOO_LARGE


@promise("P6")
@pytest.mark.parametrize("seconds", [-1, 0.001])
async def test_a_send_whose_deadline_is_over_is_answered_and_what_it_rejects_is_not_stored(
    stage: Stage, seconds: float
) -> None:
    await stage.declare()
    messages = stage.numbered(3, key=b"k")
    rejected = {message.id for message in messages}
    started = time.monotonic()
    with anyio.move_on_after(PROMPT), suppress(BrokerUnavailable):  # none could be tried: as good as rejected
        outcomes = await stage.send(*messages, within=timedelta(seconds=seconds))
        rejected = {one.message_id for one in outcomes if isinstance(one, Rejection)}
        assert {one.message_id for one in outcomes} == {message.id for message in messages}

    assert time.monotonic() - started < PROMPT, "the deadline was not kept"
    async with stage.member() as member:
        came = await member.receive(wait=MOMENT)
        assert not rejected & {one.message.id for one in came}
