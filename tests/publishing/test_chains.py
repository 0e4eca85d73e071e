"""Chains sent in waves, for backends that learn what became of a message after they have sent the next (P5)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime

import anyio
import pytest

from reliamq.spi import BrokerUnavailable, Confirmation, InDoubt, Message, Outcome, Rejection, RejectionReason
from reliamq.spi.chains import send_in_waves

pytestmark = pytest.mark.anyio
BEHIND = RejectionReason.BEHIND


def message(key: str | None, number: int) -> Message:
    return Message(
        topic="t",
        body=b"",
        id=f"{key}{number}",
        type="Thing",
        source="s",
        time=datetime.now(UTC),
        key=None if key is None else key.encode(),
    )


class Broker:
    """answers: by ids, in place of a confirmation."""

    def __init__(self, **answers: Outcome | Exception) -> None:
        self.answers, self.waves = answers, list[list[str]]()

    async def send(self, batch: Sequence[Message]) -> Sequence[Outcome]:
        self.waves.append([one.id for one in batch])
        await anyio.lowlevel.checkpoint()
        outcomes = []
        for one in batch:
            answer = self.answers.get(one.id, Confirmation(one.id))
            if isinstance(answer, Exception):
                raise answer
            outcomes.append(answer)
        return outcomes


def soon() -> float:
    return time.monotonic() + 10


BATCH = [message("a", 0), message("b", 0), message("a", 1), message(None, 0), message("a", 2), message("b", 1)]


async def test_each_wave_has_one_message_of_a_key() -> None:
    broker = Broker()

    outcomes = await send_in_waves(broker.send, BATCH, soon())

    assert [one.message_id for one in outcomes] == [one.id for one in BATCH]
    assert broker.waves == [["a0", "b0", "None0"], ["a1", "b1"], ["a2"]]


@pytest.mark.parametrize(
    "failure", [Rejection("a1", RejectionReason.TOO_LARGE, "no"), InDoubt("a1", "who knows")], ids=["rejected", "doubt"]
)
async def test_a_key_stops_at_what_is_not_confirmed(failure: Outcome) -> None:
    broker = Broker(a1=failure)

    outcomes = await send_in_waves(broker.send, BATCH, soon())

    assert outcomes[2] == failure
    assert [one.message_id for one in outcomes if isinstance(one, Confirmation)] == ["a0", "b0", "None0", "b1"]
    assert isinstance(outcomes[4], Rejection)
    assert outcomes[4].reason is BEHIND


async def test_a_broker_that_goes_away_between_waves_leaves_what_was_confirmed_confirmed() -> None:
    outcomes = await send_in_waves(Broker(a1=BrokerUnavailable("b", "gone")).send, BATCH, soon())

    reasons = {one.message_id: one.reason for one in outcomes if isinstance(one, Rejection)}
    assert reasons == {"a1": RejectionReason.UNAVAILABLE, "b1": RejectionReason.UNAVAILABLE, "a2": BEHIND}


async def test_a_broker_that_is_away_from_the_beginning_is_unavailable() -> None:
    with pytest.raises(BrokerUnavailable):
        await send_in_waves(Broker(a0=BrokerUnavailable("b", "gone")).send, BATCH, soon())


async def test_no_wave_but_the_first_begins_after_the_deadline() -> None:
    broker = Broker()

    outcomes = await send_in_waves(broker.send, BATCH, time.monotonic())

    assert broker.waves == [["a0", "b0", "None0"]]
    late = [one for one in outcomes if isinstance(one, Rejection)]
    assert [one.message_id for one in late] == ["a1", "a2", "b1"]
    assert all(one.reason is BEHIND for one in late)


async def test_nothing_is_sent_of_nothing() -> None:
    broker = Broker()

    assert list(await send_in_waves(broker.send, [], soon())) == []
    assert broker.waves == []
