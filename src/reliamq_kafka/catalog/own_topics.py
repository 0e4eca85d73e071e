"""The topics in which reliamq keeps what is its own, and how they are made.

A topic of this kind is as safe as the settings ask for, and only on a cluster that has fewer brokers on one replica
each: what is stored there must survive what the topics of messages survive.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from aiokafka.admin import NewTopic
from aiokafka.errors import InvalidReplicationFactorError

from reliamq_kafka.settings import KafkaSettings
from reliamq_kafka.wire.admin import Admin, Partition

__all__ = [
    "DEAD_LETTERS_TOPIC",
    "DELAYS_TOPIC",
    "GROUPS_TOPIC",
    "KEPT",
    "LOG",
    "POLICIES",
    "TABLE",
    "copies",
    "create_own_topic",
]

GROUPS_TOPIC = "reliamq.groups"
DEAD_LETTERS_TOPIC = "reliamq.dead-letters"
DELAYS_TOPIC = "reliamq.delays"
TABLE, LOG = "compact", "delete"
POLICIES: Mapping[str, str] = {GROUPS_TOPIC: TABLE, DEAD_LETTERS_TOPIC: TABLE, DELAYS_TOPIC: LOG}
"""Their ``cleanup.policy``."""
KEPT: Mapping[str, str] = {"retention.ms": "-1", "retention.bytes": "-1", "message.timestamp.type": "LogAppendTime"}
"""Kafka removes nothing of such a topic by itself."""


def copies(settings: KafkaSettings, replicas: int) -> dict[str, str]:
    """The settings of a topic on so many replicas by which a confirmed record is on more than one of them."""
    return {
        "min.insync.replicas": str(min(settings.min_insync_replicas, replicas)),
        "unclean.leader.election.enable": "false",
    }


async def create_own_topic(
    admin: Admin, settings: KafkaSettings, name: str, partitions: int, configs: Mapping[str, str]
) -> Sequence[Partition]:
    """Have the topic, ready for writing; its partitions.  configs: besides its copies.

    Raises BrokerUnavailable, KafkaError.
    """

    async def create(replicas: int) -> None:
        given = {**copies(settings, replicas), **configs}
        await admin.create(NewTopic(name, partitions, replicas, topic_configs=given))

    if await admin.partitions(name) is None:
        try:
            await create(settings.replication_factor)
        except InvalidReplicationFactorError:
            await create(len(await admin.brokers()))
    return await admin.led_partitions(name)
