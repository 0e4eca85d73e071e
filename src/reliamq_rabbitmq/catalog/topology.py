"""Makes the exchanges and queues of a topic and its groups; and finds how many lanes a group has.

Each step may be repeated, and a group receives nothing before its last one: then it is whole.
"""

from __future__ import annotations

from typing import Any

from aiormq.connection import Connection
from aiormq.exceptions import ChannelNotFoundEntity

from reliamq_rabbitmq.catalog.names import (
    DELAYS_OVER,
    LANE_COUNTS,
    WAITS_FOR,
    facts_queue,
    group_exchange,
    lane_pattern,
    lane_queue,
    ledger_queue,
    members_exchange,
    quorum_arguments,
)
from reliamq_rabbitmq.settings import RabbitmqSettings
from reliamq_rabbitmq.wire.channel import Channel
from reliamq_rabbitmq.wire.connection import answered, short_channel

__all__ = [
    "count_lanes",
    "declare_group",
    "declare_lane",
    "declare_queue",
    "declare_topic",
    "exchange_exists",
    "queue_exists",
]


async def declare_topic(channel: Channel, settings: RabbitmqSettings, topic: str) -> None:
    """The topic's exchange, and the queue of its facts."""
    await answered(
        channel.exchange_declare(topic, exchange_type="fanout", durable=True), settings.request_timeout_seconds
    )
    await declare_queue(channel, settings, facts_queue(topic))


async def declare_group(channel: Channel, settings: RabbitmqSettings, topic: str, group: str, lanes: int) -> None:
    """A group with so many lanes.  Its first lane comes last, so that who finds that one finds all."""
    exchange, seconds = group_exchange(topic, group), settings.request_timeout_seconds
    await answered(channel.exchange_declare(DELAYS_OVER, exchange_type="headers", durable=True), seconds)
    await answered(channel.exchange_declare(exchange, exchange_type="topic", durable=True), seconds)
    members = members_exchange(topic, group)
    await answered(channel.exchange_declare(members, exchange_type="fanout", durable=True), seconds)
    for lane in reversed(range(lanes)):
        await declare_lane(channel, settings, topic, group, lane, lanes)
    await answered(channel.exchange_bind(exchange, topic), seconds)


async def declare_lane(
    channel: Channel, settings: RabbitmqSettings, topic: str, group: str, lane: int, lanes: int
) -> None:
    """One lane, its ledger first."""
    queue, seconds = lane_queue(topic, group, lane), settings.request_timeout_seconds
    await declare_queue(channel, settings, ledger_queue(topic, group, lane))
    await declare_queue(channel, settings, queue)
    await answered(channel.queue_bind(queue, group_exchange(topic, group), lane_pattern(lane, lanes)), seconds)
    back: dict[str, Any] = {"x-match": "all", WAITS_FOR: queue}
    await answered(channel.queue_bind(queue, DELAYS_OVER, arguments=back), seconds)


async def declare_queue(channel: Channel, settings: RabbitmqSettings, name: str) -> None:
    """A quorum queue.  Raises ChannelPreconditionFailed where one is there that was declared otherwise."""
    arguments = dict(quorum_arguments(settings.replicas))
    await answered(channel.queue_declare(name, durable=True, arguments=arguments), 3 * settings.request_timeout_seconds)


async def exchange_exists(connection: Connection, settings: RabbitmqSettings, name: str) -> bool:
    """Whether there is such an exchange."""
    try:
        async with short_channel(connection, settings) as channel:
            await answered(channel.exchange_declare(name, passive=True), settings.request_timeout_seconds)
    except ChannelNotFoundEntity:
        return False
    return True


async def queue_exists(connection: Connection, settings: RabbitmqSettings, name: str) -> bool:
    """Whether there is such a queue."""
    try:
        async with short_channel(connection, settings) as channel:
            await answered(channel.queue_declare(name, passive=True), settings.request_timeout_seconds)
    except ChannelNotFoundEntity:
        return False
    return True


async def count_lanes(connection: Connection, settings: RabbitmqSettings, topic: str, group: str) -> int:
    """How many lanes the group has; 0: it is not declared."""
    if not await queue_exists(connection, settings, lane_queue(topic, group, 0)):
        return 0
    for count in LANE_COUNTS[:-1]:
        if not await queue_exists(connection, settings, lane_queue(topic, group, count)):
            return count
    return LANE_COUNTS[-1]
