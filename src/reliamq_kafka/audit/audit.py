"""The audit: every question about what keeps messages safe, put to the live cluster (S2).

It promises to change nothing, and that what could not be read is a finding of its own and never a pass.  What the
answers mean is decided in ``topic``, ``groups`` and ``cluster``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import TypeVar

from aiokafka import errors
from aiokafka.errors import KafkaError

from reliamq.spi import BrokerUnavailable, Durability, Finding, Severity, TopicSpec
from reliamq_kafka.audit import cluster, topic as topics
from reliamq_kafka.audit.commands import Commands
from reliamq_kafka.audit.groups import GroupView, group_findings, oldest_unread
from reliamq_kafka.audit.rules import Rule
from reliamq_kafka.catalog.groups import Groups
from reliamq_kafka.catalog.own_topics import GROUPS_TOPIC, POLICIES
from reliamq_kafka.settings import KafkaSettings
from reliamq_kafka.wire.admin import Admin, Broker, Partition, group_id
from reliamq_kafka.wire.log_reader import LogReader, open_log_reader

__all__ = ["audit"]

T = TypeVar("T")
PATIENCE_SECONDS, PAUSE_SECONDS = 2.0, 0.1
NOT_PERMITTED = (
    errors.TopicAuthorizationFailedError,
    errors.GroupAuthorizationFailedError,
    errors.ClusterAuthorizationFailedError,
)


async def audit(admin: Admin, settings: KafkaSettings, topics: Sequence[TopicSpec]) -> Sequence[Finding]:
    """Everything there is to say about the cluster, these topics, their groups, and this client.

    Without topics it is judged as a cluster for replicated ones.  Raises BrokerUnavailable.
    """
    async with open_log_reader(settings) as reader:
        return await _Audit(admin, settings, reader).everything(topics)


class _Audit:
    """Questions, and the findings so far."""

    def __init__(self, admin: Admin, settings: KafkaSettings, reader: LogReader) -> None:
        self._admin, self._settings, self._reader = admin, settings, reader
        self._commands = Commands(settings)
        self._findings: list[Finding] = []
        self._largest_batch = 0
        self._holders: set[int] = set()  # the numbers of brokers that have replicas, there or not
        self._patient_until = time.monotonic() + PATIENCE_SECONDS

    async def everything(self, topics: Sequence[TopicSpec]) -> list[Finding]:
        durability = max((spec.durability for spec in topics), default=Durability.REPLICATED)
        brokers = await self._admin.brokers()
        groups = await self._all_groups()
        for spec in topics:
            await self._topic(spec, brokers, groups)
        for name in POLICIES:
            await self._own_topic(name, brokers, durability)
        exist = {name: await self._kafkas_topic(name, brokers, durability) for name in cluster.KAFKAS_TOPICS}
        away = self._holders - {broker.number for broker in brokers}
        subject = f"cluster {self._settings.url}"
        self._findings += cluster.cluster_findings(subject, brokers, durability, away=away)
        await self._brokers(brokers, durability, cluster.setting_rules(self._largest_batch, exist))
        self._findings += cluster.client_findings(self._settings)
        return self._findings

    async def _all_groups(self) -> set[str]:
        """Those that Kafka knows, and those that were declared and whose offsets it may have forgotten."""
        found = await self._seen(self._admin.groups(), "cluster", "groups", ("Describe", "--group '*'")) or set()
        try:
            declared = await Groups(self._admin, self._settings).all()
        except BrokerUnavailable as error:
            why, fix = "Groups whose offsets Kafka forgot are in it alone.", f"Find out why: {error.detail}"
            subject = f"topic {GROUPS_TOPIC}"
            self._findings.append(Finding(Severity.UNSEEN, subject, "rows", "could not be read", "readable", why, fix))
            return found
        return found | {group.id for groups in declared.values() for group in groups}

    async def _seen(self, question: Awaitable[T], subject: str, setting: str, permission: tuple[str, str]) -> T | None:
        """The answer; None after a finding that there was none.

        permission: operation and resource that the question needs.
        """
        try:
            return await question
        except KafkaError as error:
            why, fix = "What cannot be read is not known to be safe.", f"The broker says: {error}."
            if isinstance(error, NOT_PERMITTED):
                fix = f"Permit it: {self._commands.allow(*permission)}"
            found = "not permitted to be read" if isinstance(error, NOT_PERMITTED) else "could not be read"
            self._findings.append(Finding(Severity.UNSEEN, subject, setting, found, "readable", why, fix))
            return None

    # --- a topic and its groups ---

    async def _topic(self, spec: TopicSpec, brokers: Sequence[Broker], groups: set[str]) -> None:
        subject, resource = f"topic {spec.name}", f"--topic {spec.name}"
        before = len(self._findings)
        question = self._partitions(spec.name)
        partitions = await self._seen(question, subject, "partitions", ("Describe", resource))
        if partitions is None:
            if len(self._findings) == before:
                self._findings.append(topics.missing_topic(spec))
            return
        values: Mapping[str, str | None] = (
            await self._seen(self._admin.topic_settings(spec.name), subject, "settings", ("DescribeConfigs", resource))
            or {}
        )
        self._largest_batch = max(self._largest_batch, int(values.get("max.message.bytes") or 0))
        least = int(values.get("min.insync.replicas") or self._settings.min_insync_replicas)
        self._findings += topics.partition_findings(
            spec.name, partitions, brokers, least, spec.durability, self._commands
        )
        self._findings += topics.setting_findings(spec, values, self._settings, self._commands)
        await self._groups(spec, partitions, values, groups)

    async def _partitions(self, topic: str) -> Sequence[Partition] | None:
        """None when there is no such topic; one that was just made is not known to every broker yet."""
        while True:
            partitions = await self._admin.partitions(topic)
            self._note_holders(partitions)
            if partitions is not None or time.monotonic() > self._patient_until:
                return partitions
            await asyncio.sleep(PAUSE_SECONDS)

    def _note_holders(self, partitions: Sequence[Partition] | None) -> None:
        self._holders.update(number for part in partitions or () for number in part.replicas)

    async def _groups(
        self, spec: TopicSpec, partitions: Sequence[Partition], values: Mapping[str, str | None], groups: set[str]
    ) -> None:
        """The groups that are asked for, and others that the topic has."""
        wanted = [group.name for group in spec.groups]
        split = (name.rpartition("@") for name in sorted(groups))
        others = [group for group, _, topic in split if topic == spec.name and group not in wanted]
        bounds = await self._seen(
            self._reader.bounds(spec.name, [part.number for part in partitions if part.leader >= 0]),
            f"topic {spec.name}",
            "offsets",
            ("Describe", f"--topic {spec.name}"),
        )
        numbers = [part.number for part in partitions]
        for group in (*wanted, *others):
            name = group_id(spec.name, group)
            commits = await self._seen(
                self._admin.commits(name, spec.name, numbers),
                f"topic {spec.name}",
                f"group {group}",
                ("Describe", f"--group '{name}'"),
            )
            if commits is not None:
                committed = {number: offset for number, (offset, _) in commits.items()}
                view = GroupView(spec.name, group, frozenset(numbers), committed, bounds or {})
                await self._group(view, values)

    async def _group(self, view: GroupView, values: Mapping[str, str | None]) -> None:
        milliseconds = int(values.get("retention.ms") or -1)
        retention = None if milliseconds < 0 else timedelta(milliseconds=milliseconds)
        has_size_limit = int(values.get("retention.bytes") or -1) >= 0
        if (has_size_limit or retention is not None) and view.unread:
            offsets = {number: offset for number, offset in oldest_unread(view).items() if number in view.unread}
            written = await self._seen(
                self._reader.written_at(view.topic, offsets),
                f"topic {view.topic}",
                f"unread messages of group {view.group}",
                ("Read", f"--topic {view.topic}"),
            )
            view = GroupView(view.topic, view.group, view.partitions, view.committed, view.bounds, written or {})
        self._findings += group_findings(
            view,
            retention=retention,
            has_size_limit=has_size_limit,
            now=datetime.now(UTC),
            commands=self._commands,
        )

    # --- the cluster ---

    async def _brokers(self, brokers: Sequence[Broker], durability: Durability, rules: Sequence[Rule]) -> None:
        values: dict[int, Mapping[str, str | None]] = {}
        for broker in brokers:
            subject = f"broker {broker.number}"
            try:
                told = await self._seen(
                    self._admin.broker_settings(broker.number), subject, "settings", ("DescribeConfigs", "--cluster")
                )
            except BrokerUnavailable as error:  # the others go on; it is this one that is silent
                why, fix = "What cannot be read is not known to be safe.", f"Find out why it is silent: {error.detail}"
                self._findings.append(Finding(Severity.UNSEEN, subject, "settings", "no answer", "readable", why, fix))
                continue
            if told is not None:
                values[broker.number] = told
        if values:
            self._findings += cluster.setting_findings(values, rules, durability, self._commands)

    async def _kafkas_topic(self, name: str, brokers: Sequence[Broker], durability: Durability) -> bool:
        """A topic of Kafka's own as it really is.  False: there is none, so nothing is wrong with it."""
        if name == cluster.TRANSACTIONS_TOPIC:
            durability = Durability.DEVELOPMENT  # reliamq uses no transactions; others may
        partitions = await self._copies(name)
        if partitions is not None:
            self._findings += topics.partition_findings(
                name, partitions, brokers, topics.IN_SYNC, durability, self._commands
            )
        return partitions is not None

    async def _own_topic(self, name: str, brokers: Sequence[Broker], durability: Durability) -> None:
        """A topic of reliamq's own, if it is there."""
        partitions = await self._copies(name)
        if partitions is None:
            return
        permission = ("DescribeConfigs", f"--topic {name}")
        values = await self._seen(self._admin.topic_settings(name), f"topic {name}", "settings", permission) or {}
        self._findings += topics.own_topic_findings(name, partitions, brokers, values, durability, self._settings)

    async def _copies(self, name: str) -> Sequence[Partition] | None:
        permission = ("Describe", f"--topic {name}")
        partitions = await self._seen(self._admin.partitions(name), f"topic {name}", "partitions", permission)
        self._note_holders(partitions)
        return partitions
