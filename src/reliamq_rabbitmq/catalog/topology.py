"""Makes the exchanges and queues of a topic, its groups, and the ladder of long waits; and finds how many lanes a group
has.

Each step may be repeated, and a group receives nothing before its last one: then it is whole.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from aiormq.connection import Connection
from aiormq.exceptions import ChannelNotFoundEntity, ChannelPreconditionFailed

from reliamq_rabbitmq.catalog.names import (
    DELAYS_OVER,
    GROUP_SIZE,
    LANE_COUNTS,
    STEPS,
    WAITS_FOR,
    delay_step,
    facts_queue,
    group_exchange,
    lane_pattern,
    lane_queue,
    lanes_mark,
    ledger_queue,
    members_exchange,
    quorum_arguments,
    step_arguments,
)
from reliamq_rabbitmq.settings import RabbitmqSettings
from reliamq_rabbitmq.wire.channel import Channel, open_channel
from reliamq_rabbitmq.wire.connection import answered, close_channel, short_channel

__all__ = ["Topology", "count_lanes", "exchange_exists", "open_topology"]

QUEUE_SECONDS = 3.0
"""A queue takes so many times longer to make than anything else: its members start."""


class Topology:
    """Declares, on one channel; a no costs it the channel.  Raises the client's errors, TimeoutError."""

    def __init__(self, connection: Connection, settings: RabbitmqSettings, channel: Channel) -> None:
        self._connection, self._settings, self._channel = connection, settings, channel
        self._seconds = settings.request_timeout_seconds

    async def close(self) -> None:
        """The channel that took the place of the first one."""
        await close_channel(self._channel)

    async def topic(self, topic: str) -> None:
        """The topic's exchange, and the queue of its facts."""
        await self._exchange(topic, "fanout")
        await self.queue(facts_queue(topic))

    async def mark(self, topic: str, group: str, lanes: int) -> None:
        """A group will have so many lanes, unless another declaration said so first; see :func:`count_lanes`."""
        await self._exchange(lanes_mark(topic, group, lanes), "fanout")

    async def group(self, topic: str, group: str, lanes: int) -> None:
        """A group with so many lanes."""
        await self._exchange(DELAYS_OVER, "headers")
        await self._exchange(group_exchange(topic, group), "topic")
        await self._exchange(members_exchange(topic, group), "fanout")
        for lane in range(lanes):
            await self.lane(topic, group, lane, lanes)
        await answered(self._channel.exchange_bind(group_exchange(topic, group), topic), self._seconds)

    async def lane(self, topic: str, group: str, lane: int, lanes: int) -> None:
        """One lane, its ledger first."""
        queue = lane_queue(topic, group, lane)
        await self.queue(ledger_queue(topic, group, lane))
        await self.queue(queue)
        await self._bind(queue, group_exchange(topic, group), lane_pattern(lane, lanes))
        await self._bind(queue, DELAYS_OVER, arguments={"x-match": "all", WAITS_FOR: queue})

    async def ladder(self) -> None:
        """All steps of the ladder, from below."""
        await self._exchange(DELAYS_OVER, "headers")
        below = DELAYS_OVER
        for step in range(STEPS):
            name = delay_step(step)
            await self._exchange(name, "topic")
            await self.queue(name, step_arguments(step, self._settings.replicas))
            await self._bind(name, name, _digit(step, "1"))
            await answered(self._channel.exchange_bind(below, name, _digit(step, "0")), self._seconds)
            below = name

    async def queue(self, name: str, arguments: Mapping[str, Any] | None = None) -> None:
        """A quorum queue; one that is there may have another number of members, which the audit judges as it is now.

        Raises ChannelPreconditionFailed where one is there that was declared otherwise.
        """
        wanted = dict(arguments or quorum_arguments(self._settings.replicas))
        try:
            await self._queue(name, wanted)
        except ChannelPreconditionFailed as error:
            if f"'{GROUP_SIZE}'" not in str(error):
                raise
            self._channel = await answered(open_channel(self._connection), self._seconds)

    async def _queue(self, name: str, arguments: dict[str, Any]) -> None:
        declaring = self._channel.queue_declare(name, durable=True, arguments=arguments)
        await answered(declaring, QUEUE_SECONDS * self._seconds)

    async def _exchange(self, name: str, kind: str) -> None:
        await answered(self._channel.exchange_declare(name, exchange_type=kind, durable=True), self._seconds)

    async def _bind(
        self, queue: str, exchange: str, routing_key: str = "", *, arguments: dict[str, Any] | None = None
    ) -> None:
        await answered(self._channel.queue_bind(queue, exchange, routing_key, arguments=arguments), self._seconds)


def _digit(step: int, digit: str) -> str:
    """Routing keys of the ladder with that digit at that step."""
    return ".".join(["*"] * (STEPS - 1 - step) + [digit, "#"])


@asynccontextmanager
async def open_topology(connection: Connection, settings: RabbitmqSettings) -> AsyncIterator[Topology]:
    """A channel to declare on."""
    async with short_channel(connection, settings) as channel:
        topology = Topology(connection, settings, channel)
        try:
            yield topology
        finally:
            await topology.close()


async def exchange_exists(connection: Connection, settings: RabbitmqSettings, name: str) -> bool:
    """Whether there is such an exchange."""
    try:
        async with short_channel(connection, settings) as channel:
            await answered(channel.exchange_declare(name, passive=True), settings.request_timeout_seconds)
    except ChannelNotFoundEntity:
        return False
    return True


async def count_lanes(connection: Connection, settings: RabbitmqSettings, topic: str, group: str) -> int:
    """How many lanes the group was declared with; 0: it is not declared.

    Two declarations at once may each have left a mark; then the smaller one counts, for everybody.
    """
    for count in LANE_COUNTS:
        if await exchange_exists(connection, settings, lanes_mark(topic, group, count)):
            return count
    return 0
