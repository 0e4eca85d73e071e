"""Commits: one request at a time writes down where a member's windows are.

It promises that what is committed is finished, that a commit which was asked for is answered, and that none is written
for a partition which is not this member's.  Many who ask at the same time share one request.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping, MutableMapping

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import CommitFailedError, IllegalStateError, KafkaError
from aiokafka.structs import OffsetAndMetadata

from reliamq.spi import BrokerUnavailable
from reliamq_kafka.consuming.window import PartitionWindow, now
from reliamq_kafka.settings import KafkaSettings
from reliamq_kafka.wire.progress import encode

__all__ = ["Commits", "NoLongerMember", "generation_of"]

logger = logging.getLogger("reliamq.kafka")
NONE = -2
"""No generation.  The client's own "none" is -1, with which anybody may write to a group that has no members."""


class NoLongerMember(Exception):  # it is news, not an error
    """The group went on without this member; what it did not commit is others' now."""


def generation_of(consumer: AIOKafkaConsumer) -> int:
    """Which generation of its group it is a member of.  The client has no public name for it."""
    coordinator = consumer._coordinator  # without a group's coordinator there is no member
    return int(coordinator.generation)


class Commits:
    """The committed state of one member on one topic.

    consumer: the client's, None while the member is out of the group.
    generation: the group's, in which the windows were found to be right; a commit in another could undo others' work.
    allowed: cleared while the group settles who has what: a commit waits for that.
    clean: nobody works on what is handed out, so it counts as never handed out.
    """

    def __init__(
        self, settings: KafkaSettings, topic: str, group: str, windows: MutableMapping[int, PartitionWindow]
    ) -> None:
        self._settings, self._topic, self._group, self._windows = settings, topic, group, windows
        self.consumer: AIOKafkaConsumer | None = None
        self.generation = NONE
        self.allowed = asyncio.Event()
        self.clean = False
        self._written: dict[int, tuple[int, str]] = {}
        self._waiting: list[asyncio.Future[None]] = []
        self._asked = asyncio.Event()

    def wrote(self, partition: int, commit: tuple[int, str] | None) -> bool:
        """Whether ``commit`` is the newest that this member wrote for the partition."""
        return commit is not None and self._written.get(partition) == commit

    def forget(self, partitions: Iterable[int]) -> None:
        """These are not this member's any more."""
        for partition in partitions:
            self._written.pop(partition, None)

    async def commit(self) -> None:
        """Write down where the windows are; when it returns the broker has it.

        Raises NoLongerMember, BrokerUnavailable.  Cancelled: it may be written, and what it says is true.
        """
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(done)
        self._asked.set()
        await done

    async def run(self) -> None:
        """Write what is asked for until cancelled; who still waits then is told."""
        try:
            while True:
                await self._asked.wait()
                await self.allowed.wait()
                self._asked.clear()
                waiting, self._waiting = self._waiting, []
                try:
                    await self._write()
                except (NoLongerMember, BrokerUnavailable) as error:
                    _tell(waiting, error)
                except Exception as error:  # a fault of ours or the client's: nobody may wait for ever
                    logger.exception("a commit of group %s failed", self._group)
                    _tell(waiting, BrokerUnavailable(self._settings.url, f"a commit failed: {error!r}"))
                except BaseException:
                    self._waiting += waiting
                    raise
                else:
                    _tell(waiting, None)
        finally:
            _tell(self._waiting, BrokerUnavailable(self._settings.url, "closed before it was committed"))

    async def _write(self) -> None:
        if self.consumer is None or self.generation != generation_of(self.consumer):
            self._lose()
            raise NoLongerMember
        windows, clean = dict(self._windows), self.clean
        progress = {number: window.progress(now(), closing=clean) for number, window in windows.items()}
        versions = {number: window.version for number, window in windows.items()}
        texts = {number: (one.offset, encode(one)) for number, one in progress.items()}
        news = {
            TopicPartition(self._topic, number): OffsetAndMetadata(*text)
            for number, text in texts.items()
            if self._written.get(number) != text
        }
        if news:
            await self._send(self.consumer, news)
        for number, window in windows.items():
            window.limit, window.written = progress[number].limit, versions[number]
            if self._windows.get(number) is window:
                self._written[number] = texts[number]

    def _lose(self) -> None:
        self._windows.clear()
        self._written.clear()

    async def _send(self, consumer: AIOKafkaConsumer, news: Mapping[TopicPartition, OffsetAndMetadata]) -> None:
        """The client repeats without a deadline; when it is stopped, what it may have written is true all the same."""
        sending = asyncio.ensure_future(consumer.commit(news))
        try:
            finished, _ = await asyncio.wait({sending}, timeout=self._settings.request_timeout_seconds)
            if not finished:
                raise BrokerUnavailable(self._settings.url, f"a commit of group {self._group} was not answered")
            sending.result()
        except (CommitFailedError, IllegalStateError) as error:
            self._lose()
            raise NoLongerMember from error
        except KafkaError as error:
            raise BrokerUnavailable(self._settings.url, f"group {self._group} cannot commit: {error!r}") from error
        finally:
            sending.cancel()


def _tell(waiting: Iterable[asyncio.Future[None]], error: Exception | None) -> None:
    for one in waiting:
        if one.done():
            continue
        if error is None:
            one.set_result(None)
        else:
            one.set_exception(error)
