"""Dead letters on real servers, besides what the kit asks (C5)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta

import anyio
import pytest

from reliamq.spi import Confirmation, InDoubt, Rejection, RejectionReason
from reliamq_redis.catalog.dead_letters import open_dead_letters
from reliamq_redis.publisher import open_publisher
from reliamq_redis.settings import RedisSettings
from tests.redis.steps import bodies, declare, drain, message, record_of, soon
from tests.servers.proxy import Proxy
from tests.servers.redis import RedisServers

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

MOST_HEADERS = 3_490  # as the documentation says

# --- what is kept -------------------------------------------------------------------------------------------------


async def test_a_dead_letter_with_as_many_headers_as_can_be_published_and_a_huge_traceback_is_kept_whole(
    settings: RedisSettings, topic: str
) -> None:
    headers = {f"header {number}": "ä" for number in range(MOST_HEADERS)}
    original = message(topic, "body", headers=headers)
    async with open_publisher(settings) as publisher:
        (outcome,) = await publisher.send([original], deadline=soon())
        assert isinstance(outcome, Confirmation)
    record = record_of(topic, "", message=original, reason="ü" * 50_000, traceback="é\n" * 500_000)
    async with open_dead_letters(settings) as dead_letters:
        (outcome,) = await dead_letters.add([record], deadline=soon())
        assert isinstance(outcome, Confirmation)
        (found,) = await dead_letters.find(topic=topic)

    assert (found.message.body, dict(found.message.headers)) == (b"body", headers)
    assert (found.reason, found.traceback) == (record.reason, record.traceback)
    (stored,) = await drain(settings, topic, 1)
    assert dict(stored.headers) == headers


async def test_bytes_and_odd_characters_come_back_and_what_is_no_character_is_spelt_out(
    settings: RedisSettings, topic: str
) -> None:
    original = message(topic, "", key=None, headers={"ü": "a\x00b", "": "", "reliamq-attempts": "9"})
    original = replace(original, body=bytes(range(256)), key=b"\xff\x00", id="id {with} %7B \x00 ☃")
    texts = {"reason": "half \ud83d a character", "traceback": "line\r\n\x00\t\x1b[31m ☃ \udcff", "handler": "h"}
    record = record_of(topic, "", message=original, **texts)
    async with open_dead_letters(settings) as dead_letters:
        (outcome,) = await dead_letters.add([record], deadline=soon())
        assert isinstance(outcome, Confirmation)
        (found,) = await dead_letters.find(topic=topic, message_id=original.id)

    assert replace(found.message, headers={}) == replace(original, headers={})
    assert dict(found.message.headers) == dict(original.headers)
    assert found.reason == "half \\ud83d a character"
    assert found.traceback == "line\r\n\x00\t\x1b[31m ☃ \\udcff"


async def test_what_nobody_of_ours_wrote_can_be_a_dead_letter(
    servers: RedisServers, settings: RedisSettings, topic: str
) -> None:
    """C5 C11: it has no type, and an id that the worker gave it."""
    with servers.client(servers.primary) as primary:
        primary.xadd(f"reliamq:{{{topic}/0}}", {"data": b"\xff", "colour": "red"})
    (foreign,) = await drain(settings, topic, 1)
    async with open_dead_letters(settings) as dead_letters:
        await dead_letters.add([record_of(topic, "", message=foreign)], deadline=soon())
        (found,) = await dead_letters.find(topic=topic)
        assert replace(found.message, headers={}) == replace(foreign, headers={})
        assert dict(found.message.headers) == dict(foreign.headers)
        assert await dead_letters.remove([found]) == 1


async def test_a_dead_letter_that_redis_cannot_hold_is_invalid_and_its_neighbours_are_kept(
    settings: RedisSettings, topic: str
) -> None:
    wrong = record_of(topic, "wrong", message=message(topic, "wrong", headers={"h": "\ud800"}))
    async with open_dead_letters(settings) as dead_letters:
        batch = [record_of(topic, "good"), wrong, record_of(topic, "also")]
        good, bad, also = await dead_letters.add(batch, deadline=soon())
        found = await dead_letters.find(topic=topic)

    assert isinstance(bad, Rejection)
    assert bad.reason is RejectionReason.INVALID
    assert [type(one) for one in (good, also)] == [Confirmation] * 2
    assert [one.message.body for one in found] == [b"good", b"also"]


async def test_one_that_dies_again_takes_its_place_anew_with_what_was_said_last(
    settings: RedisSettings, topic: str
) -> None:
    """And nothing of what was said before: it may have had more."""
    first = record_of(topic, "first", reason="first", traceback="a traceback")
    first = replace(first, message=replace(first.message, headers={"only": "at first"}))
    other = record_of(topic, "other")
    again = replace(
        first, message=replace(first.message, headers={}), reason="again", died_at=other.died_at + timedelta(seconds=1)
    )
    async with open_dead_letters(settings) as dead_letters:
        await dead_letters.add([first, other, again], deadline=soon())
        found = await dead_letters.find(topic=topic)

    assert [one.message.body for one in found] == [b"other", b"first"]
    assert (found[1].reason, dict(found[1].message.headers)) == ("again", {})


# --- many ---------------------------------------------------------------------------------------------------------


async def test_thousands_of_them_are_found_by_filters_and_removed(settings: RedisSettings, topic: str) -> None:
    other = await declare(settings, "g")
    async with open_dead_letters(settings) as dead_letters:
        for start in range(0, 2_100, 700):
            records = [
                record_of(topic if number % 10 else other, f"{number}", group="h" if number % 3 else "g")
                for number in range(start, start + 700)
            ]
            outcomes = await dead_letters.add(records, deadline=soon())
            assert {type(one) for one in outcomes} == {Confirmation}
        first = await dead_letters.find(topic=topic, limit=2)
        everything = await dead_letters.find(topic=topic, limit=10_000)
        of_group = await dead_letters.find(topic=topic, group="h", limit=10_000)
        (by_id,) = await dead_letters.find(message_id=everything[700].message.id)
        assert [one.message.body for one in first] == [b"1", b"2"]
        assert [one.message.body for one in everything] == [b"%d" % n for n in range(2_100) if n % 10]
        assert [one.message.body for one in of_group] == [b"%d" % n for n in range(2_100) if n % 10 and n % 3]
        assert by_id.message.body == everything[700].message.body
        assert await dead_letters.remove(everything) == len(everything) == 1_890
        assert list(await dead_letters.find(topic=topic)) == []
        assert await dead_letters.remove(await dead_letters.find(topic=other, limit=10_000)) == 210


async def test_who_looks_at_the_same_time_sees_all_of_it(settings: RedisSettings, topic: str) -> None:
    async with open_dead_letters(settings) as dead_letters:
        await dead_letters.add([record_of(topic, f"{number}") for number in range(20)], deadline=soon())
        found = await asyncio.gather(*[dead_letters.find(topic=topic) for _ in range(6)])

    assert [len(each) for each in found] == [20] * 6


async def test_many_groups_of_one_worker_bury_at_the_same_time(settings: RedisSettings, topic: str) -> None:
    """They share what they bury with."""
    async with open_dead_letters(settings) as dead_letters:
        await dead_letters.add([record_of(topic, "before", group="g0")], deadline=soon())
        batches = [[record_of(topic, f"{batch}-{n}", group=f"g{batch}") for n in range(5)] for batch in range(40)]
        outcomes = await asyncio.gather(*[dead_letters.add(batch, deadline=soon()) for batch in batches])
        assert {type(one) for each in outcomes for one in each} == {Confirmation}
        assert len(await dead_letters.find(topic=topic, limit=1_000)) == 201


# --- what is not confirmed ----------------------------------------------------------------------------------------


async def test_what_the_replica_does_not_have_is_not_confirmed_and_is_one_when_it_is_told_again(
    servers: RedisServers, settings: RedisSettings, topic: str
) -> None:
    record = record_of(topic, "one")
    async with open_dead_letters(settings) as dead_letters:
        servers.replica.pause()
        try:
            began = time.monotonic()
            (outcome,) = await dead_letters.add([record], deadline=soon(2))
            assert time.monotonic() - began < 3
            assert isinstance(outcome, InDoubt)
            assert "0 of 1 replicas" in outcome.detail
        finally:
            servers.replica.resume()
        (outcome,) = await dead_letters.add([record], deadline=soon())
        assert isinstance(outcome, Confirmation)
        assert await dead_letters.find(topic=topic) == [replace(record, message=record.message)]


@pytest.fixture
def proxy(servers: RedisServers) -> Iterator[Proxy]:
    """In front of the pair's primary."""
    ports = servers.ports[servers.primary]
    with Proxy(ports.proxied, ports.plain) as proxy:
        yield proxy


@pytest.mark.parametrize("how", ["answers lost", "nothing gets through"])
async def test_the_deadline_holds_whatever_the_connection_does_and_afterwards_all_goes_on(
    settings: RedisSettings, proxied: RedisSettings, proxy: Proxy, topic: str, how: str
) -> None:
    async with open_dead_letters(proxied) as dead_letters:
        if how == "answers lost":
            await dead_letters.add([record_of(topic, "before")], deadline=soon())
            proxy.drop("down")
        else:
            proxy.blackhole()
        record = record_of(topic, "one")
        began = time.monotonic()
        (outcome,) = await dead_letters.add([record], deadline=soon(1))
        assert time.monotonic() - began < 2
        assert isinstance(outcome, InDoubt if how == "answers lost" else Rejection)
        proxy.heal()
        (outcome,) = await dead_letters.add([record], deadline=soon())
        assert isinstance(outcome, Confirmation)
    async with open_dead_letters(settings) as dead_letters:
        assert bodies([one.message for one in await dead_letters.find(topic=topic)])[b"one"] == 1


async def test_after_the_primary_has_died_dead_letters_are_stored_again_and_none_is_lost(
    whole: RedisServers, settings: RedisSettings, topic: str
) -> None:
    async with open_dead_letters(settings) as dead_letters:
        for number in range(2):
            with anyio.fail_after(60):
                while True:
                    (outcome,) = await dead_letters.add([record_of(topic, f"{number}")], deadline=soon())
                    if isinstance(outcome, Confirmation):
                        break
            await anyio.to_thread.run_sync(whole.primary.kill)
            await anyio.to_thread.run_sync(whole.start)
        found = await dead_letters.find(topic=topic)

    assert {one.message.body for one in found} == {b"0", b"1"}
