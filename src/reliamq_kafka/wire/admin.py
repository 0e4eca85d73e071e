"""The admin client, asked with patience and answers checked.

The client raises nothing for an error inside an answer, and asks a broker chosen by chance, which may be dead: here
every code is looked at, and a question that got no answer is asked again until its time is over.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, TypeVar

from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic, RecordsToDelete
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import KafkaError, TopicAlreadyExistsError, UnknownTopicOrPartitionError, for_code
from aiokafka.protocol.commit import OffsetFetchRequest
from aiokafka.protocol.metadata import MetadataRequest

from reliamq.spi import BrokerUnavailable
from reliamq.spi.closing import close_in_time, start_whole
from reliamq_kafka.settings import KafkaSettings
from reliamq_kafka.wire.connecting import UNREACHABLE, close_whole, unreachable

__all__ = ["Admin", "Broker", "Partition", "group_id", "open_admin"]

T = TypeVar("T")
PAUSE_SECONDS = 0.2
ATTEMPTS_SECONDS = 30.0


def group_id(topic: str, group: str) -> str:
    """Kafka's name for one group on one topic.

    Each topic has its own, so that a rebalance of one does not stop another, and so that declaring a topic for a group
    that is at work elsewhere may write its first offsets.  ``@`` cannot be part of a topic's name.
    """
    return f"{group}@{topic}"


@dataclass(frozen=True, slots=True)
class Partition:
    """One partition as the cluster sees it now.  Numbers of brokers; leader -1: none."""

    number: int
    leader: int
    replicas: tuple[int, ...]
    in_sync: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Broker:
    """One broker that is a member of the cluster now.  rack: None where none is configured."""

    number: int
    address: str
    rack: str | None


class Admin:
    """Questions and orders to a cluster.  All raise BrokerUnavailable when nobody answers in time."""

    def __init__(self, client: AIOKafkaAdminClient, settings: KafkaSettings) -> None:
        self._client, self._settings = client, settings

    async def partitions(self, topic: str) -> Sequence[Partition] | None:
        """The topic's partitions by number; None when there is no such topic."""

        async def ask() -> Sequence[Partition] | None:
            (found,) = await self._described([topic])
            error = for_code(found["error_code"])
            if error is UnknownTopicOrPartitionError:
                return None
            _check(found["error_code"])
            parts = [
                Partition(each["partition"], each["leader"], tuple(each["replicas"]), tuple(each["isr"]))
                for each in found["partitions"]
            ]
            return sorted(parts, key=lambda part: part.number)

        return await self._answered(ask)

    async def partition_counts(self, topics: Sequence[str]) -> dict[str, int]:
        """How many partitions each of these topics has; one that is not there is left out."""

        async def ask() -> dict[str, int]:
            found = await self._described(topics) if topics else ()
            return {each["topic"]: len(each["partitions"]) for each in found if not each["error_code"]}

        return await self._answered(ask)

    async def _described(self, topics: Sequence[str]) -> Sequence[dict[str, Any]]:
        # The client's own question would have a broker with auto.create.topics.enable make the topics.
        question = MetadataRequest(list(topics), allow_auto_topic_creation=False)
        return (await self._client._send_request(question)).to_object()["topics"]  # type: ignore[no-any-return]

    async def topic_settings(self, topic: str) -> dict[str, str]:
        """The topic's effective settings."""

        async def ask() -> dict[str, str]:
            resource = ConfigResource(ConfigResourceType.TOPIC, topic)
            (answer,) = await self._client.describe_configs([resource])
            code, _, _, _, entries = answer.resources[0]
            _check(code)
            return {entry[0]: entry[1] for entry in entries}

        return await self._answered(ask)

    async def commits(self, group: str, topic: str, partitions: Sequence[int]) -> dict[int, tuple[int, str]]:
        """The offset and metadata that a group committed, by partition; one without is left out."""

        async def ask() -> dict[int, tuple[int, str]]:
            coordinator = await self._client.find_coordinator(group)
            # The client's own method overlooks an error of the whole answer, which then looks like "no offsets".
            answer = await self._client._send_request(
                OffsetFetchRequest(group, [(topic, list(partitions))]), coordinator
            )
            _check(answer.error_code)
            found = [each for of_topic, each in answer.topics if of_topic == topic]
            for _, _, _, code in chain.from_iterable(found):
                _check(code)
            return {number: (at, note or "") for number, at, note, _ in chain.from_iterable(found) if at >= 0}

        return await self._answered(ask)

    async def led_partitions(self, topic: str) -> Sequence[Partition]:
        """The partitions of a topic that is there, or was just created, once each has a leader.

        Raises BrokerUnavailable.
        """
        deadline = time.monotonic() + ATTEMPTS_SECONDS
        while True:
            parts = await self.partitions(topic)
            if parts and all(part.leader >= 0 for part in parts):
                return parts
            if time.monotonic() > deadline:
                raise BrokerUnavailable(self._settings.url, f"a partition of topic {topic} has no leader: {parts}")
            await asyncio.sleep(PAUSE_SECONDS)

    async def brokers(self) -> Sequence[Broker]:
        """The cluster's brokers by number."""

        async def ask() -> Sequence[Broker]:
            found = (await self._client._send_request(MetadataRequest([]))).to_object()["brokers"]
            brokers = [Broker(one["node_id"], f"{one['host']}:{one['port']}", one["rack"] or None) for one in found]
            return sorted(brokers, key=lambda broker: broker.number)

        return await self._answered(ask)

    async def committed(self, group: str, topic: str, partitions: Sequence[int]) -> dict[int, int]:
        """The offsets that a group has committed, by partition; one without is left out.  group: its ``group_id``."""
        commits = await self.commits(group, topic, partitions)
        return {partition: offset for partition, (offset, _) in commits.items()}

    async def delete_before(self, topic: str, offsets: Mapping[int, int]) -> dict[int, int]:
        """Remove the records below these offsets; the first that is left, by partition.

        Raises KafkaError for what the cluster refuses; some of it may be removed.
        """
        wanted = {TopicPartition(topic, number): RecordsToDelete(offset) for number, offset in offsets.items()}

        async def ask() -> dict[int, int]:
            return {part.partition: low for part, low in (await self._client.delete_records(wanted)).items()}

        return await self._answered(ask)

    async def broker_settings(self, number: int) -> dict[str, str | None]:
        """A broker's effective settings, by itself; None where a value is secret or empty."""

        async def ask() -> dict[str, str | None]:
            (answer,) = await self._client.describe_configs([ConfigResource(ConfigResourceType.BROKER, str(number))])
            code, _, _, _, entries = answer.resources[0]
            _check(code)
            return {entry[0]: entry[1] for entry in entries}

        return await self._answered(ask)

    async def groups(self) -> set[str]:
        """The names of all groups that have offsets or members."""

        async def ask() -> set[str]:
            return {group[0] for group in await self._client.list_consumer_groups()}

        return await self._answered(ask)

    async def create(self, topic: NewTopic) -> None:
        """Create a topic unless it is there.  Raises KafkaError for what the cluster refuses."""

        async def ask() -> None:
            answer = await self._client.create_topics([topic])
            code = answer.topic_errors[0][1]
            if for_code(code) is not TopicAlreadyExistsError:
                _check(code)

        await self._answered(ask)

    def unavailable(self, detail: str) -> BrokerUnavailable:
        """An error that names the cluster."""
        return BrokerUnavailable(self._settings.url, detail)

    async def _answered(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Ask until there is an answer; what the cluster refuses for good is raised at once."""
        deadline = time.monotonic() + ATTEMPTS_SECONDS
        while True:
            try:
                return await ask()
            except (KafkaError, OSError, TimeoutError) as error:
                if isinstance(error, KafkaError) and not error.retriable:
                    raise
                if time.monotonic() > deadline:
                    raise BrokerUnavailable(self._settings.url, f"no answer: {error!r}") from error
            await asyncio.sleep(PAUSE_SECONDS)


def _check(code: int) -> None:
    if code:
        raise for_code(code)()


@asynccontextmanager
async def open_admin(settings: KafkaSettings) -> AsyncIterator[Admin]:
    """Connect.  Raises BrokerUnavailable."""
    client = AIOKafkaAdminClient(**settings.connection())
    try:
        try:
            await start_whole(client.start(), partial(_close, client), "an admin client")
        except UNREACHABLE as error:
            raise await unreachable(settings, error) from error
        yield Admin(client, settings)
    finally:
        await close_in_time(_close(client), "an admin client")


async def _close(client: AIOKafkaAdminClient) -> None:
    """Also one that started after it was closed, which its own way overlooks."""
    await close_whole(client._client.close(), client._client)
