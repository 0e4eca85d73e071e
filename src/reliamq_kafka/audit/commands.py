"""The commands with which somebody puts a finding right, whole, so that they can be pasted."""

from __future__ import annotations

import json
from collections.abc import Sequence

from reliamq_kafka.settings import KafkaSettings
from reliamq_kafka.wire.admin import group_id

__all__ = ["Commands"]


class Commands:
    """Kafka's own scripts, pointed at this cluster."""

    def __init__(self, settings: KafkaSettings) -> None:
        self._at = f"--bootstrap-server {','.join(settings.servers)}"
        if settings.tls or settings.username:
            self._at += " --command-config client.properties"
        self._principal = f"User:{settings.username or 'ANONYMOUS'}"

    def set_on_topic(self, topic: str, change: str) -> str:
        """change: ``name=value``."""
        return f"kafka-configs.sh {self._at} --entity-type topics --entity-name {topic} --alter --add-config {change}"

    def set_on_brokers(self, change: str) -> str:
        """For all brokers, without a restart; also where one has its own value, which then goes first."""
        return f"kafka-configs.sh {self._at} --entity-type brokers --entity-default --alter --add-config {change}"

    def reassign(self, topic: str, partition: int, replicas: Sequence[int]) -> str:
        """Other replicas for a topic's partitions, shown by one of them."""
        partitions = [{"topic": topic, "partition": partition, "replicas": list(replicas)}]
        return (
            f"kafka-reassign-partitions.sh {self._at} --reassignment-json-file moves.json --execute, with every "
            f"partition in moves.json as in {json.dumps({'version': 1, 'partitions': partitions})}"
        )

    def reset_to_earliest(self, topic: str, group: str) -> str:
        """Let a group go on with the oldest record that is left."""
        return (
            f"kafka-consumer-groups.sh {self._at} --group '{group_id(topic, group)}' --topic {topic} --reset-offsets "
            "--to-earliest --execute"
        )

    def describe_quorum(self) -> str:
        """Show the controllers."""
        return f"kafka-metadata-quorum.sh {self._at} describe --replication"

    def allow(self, operation: str, of: str) -> str:
        """of: ``--topic orders``, ``--cluster``, ``--group g``."""
        return f"kafka-acls.sh {self._at} --add --allow-principal {self._principal} --operation {operation} {of}"
