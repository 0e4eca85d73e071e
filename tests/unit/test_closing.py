"""Clients are closed also by whoever is cancelled, and when the event loop ends."""

from __future__ import annotations

import asyncio

import pytest

from reliamq.spi import closing


class Client:
    """Starts when it may."""

    def __init__(self) -> None:
        self.may_start, self.starting, self.closed = asyncio.Event(), asyncio.Event(), False

    async def start(self) -> None:
        self.starting.set()
        await self.may_start.wait()

    async def close(self) -> None:
        await asyncio.sleep(0)
        self.closed = True


async def cancelled_while_starting(client: Client) -> None:
    opening = asyncio.ensure_future(closing.start_whole(client.start(), client.close, "the client"))
    await client.starting.wait()
    opening.cancel()
    await asyncio.wait({opening})
    assert opening.cancelled()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closing, "CLOSE_SECONDS", 0.05)


def test_a_client_whose_start_is_cancelled_is_closed_when_it_has_started() -> None:
    async def main() -> None:
        client = Client()
        await cancelled_while_starting(client)
        assert not client.closed
        client.may_start.set()
        while not client.closed:  # nobody tells
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(main(), 5))


def test_a_client_that_is_still_starting_at_the_end_of_the_event_loop_is_closed() -> None:
    clients: list[Client] = []

    async def main() -> None:
        clients.append(Client())
        await cancelled_while_starting(clients[0])

    asyncio.run(main())
    assert clients[0].closed
