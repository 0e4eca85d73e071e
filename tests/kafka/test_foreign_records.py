"""What other programs write to a topic: transactions that came to nothing, and headers whose names are no text."""

from __future__ import annotations

import struct
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.codec import gzip_encode
from aiokafka.consumer import fetcher
from aiokafka.producer.message_accumulator import BatchBuilder
from aiokafka.record import memory_records
from aiokafka.record.default_records import _DefaultRecordBatchPy
from aiokafka.record.memory_records import _MemoryRecordsPy
from aiokafka.record.util import calc_crc32c

from reliamq import Delivery, Reliamq
from reliamq.spi import GroupSpec, TopicSpec
from reliamq_kafka.audit.audit import audit
from reliamq_kafka.catalog.dead_letters import open_dead_letters
from reliamq_kafka.settings import read_settings
from reliamq_kafka.wire.admin import group_id, open_admin
from reliamq_kafka.wire.consumers import open_consumer
from reliamq_kafka.wire.lenient import next_records
from reliamq_kafka.wire.records import headers_of
from tests.brokers.application import Broker, Order, eventually, make_app, publish, working
from tests.brokers.conftest import on_kafka
from tests.kafka.conftest import message
from tests.servers.kafka import KafkaCluster

pytestmark = [pytest.mark.anyio, pytest.mark.xdist_group("kafka"), pytest.mark.timeout(120)]


@pytest.fixture
def broker(kafka: KafkaCluster) -> Broker:
    return on_kafka(kafka)


@pytest.fixture
def topic() -> str:
    return f"foreign-{uuid.uuid4()}"


def collecting(app: Reliamq, topic: str) -> list[int]:
    """The numbers of the orders that its handler got."""
    orders = app.topic(topic, Order, key=lambda order: order.account)
    handled: list[int] = []

    @app.handler(orders, group="g", effects="repeatable")
    async def handle(order: Order) -> None:
        handled.append(order.number)

    return handled


# --- transactions -----------------------------------------------------------------------------------------------------


def order_record(topic: str, number: int, partition: int = 0) -> dict[str, object]:
    """What reliamq writes for it."""
    one = message(topic, Order(number=number, account="account 0").model_dump_json(), "account 0")
    return {"value": one.body, "key": one.key, "headers": headers_of(one), "partition": partition}


def servers_of(broker: Broker) -> list[str]:
    return list(read_settings(broker.url, {}).servers)


async def write_orders(broker: Broker, topic: str, *numbers: int, partition: int = 0) -> None:
    async with AIOKafkaProducer(bootstrap_servers=servers_of(broker), acks="all") as producer:
        for number in numbers:
            await producer.send_and_wait(topic, **order_record(topic, number, partition))


@asynccontextmanager
async def in_transaction(broker: Broker, topic: str, *numbers: int) -> AsyncIterator[AIOKafkaProducer]:
    """These orders are written, and their transaction is open."""
    async with AIOKafkaProducer(bootstrap_servers=servers_of(broker), transactional_id=str(uuid.uuid4())) as producer:
        await producer.begin_transaction()
        for number in numbers:
            await producer.send_and_wait(topic, **order_record(topic, number))
        yield producer


async def abort(broker: Broker, topic: str, *numbers: int) -> None:
    async with in_transaction(broker, topic, *numbers) as producer:
        await producer.abort_transaction()


async def commit(broker: Broker, topic: str, *numbers: int) -> None:
    async with in_transaction(broker, topic, *numbers) as producer:
        await producer.commit_transaction()


async def test_what_a_transaction_aborted_is_never_handled(broker: Broker, tmp_path: Path, topic: str) -> None:
    app = make_app(broker, tmp_path, shares=1)
    handled = collecting(app, topic)

    async with app, working(app):
        await publish(app, topic, range(1), accounts=1)
        await abort(broker, topic, 1, 2, 3)
        await commit(broker, topic, 4, 5)
        await abort(broker, topic, 6)
        await publish(app, topic, range(7, 8), accounts=1)
        await eventually(lambda: 7 in handled)

    assert handled == [0, 4, 5, 7]


async def test_behind_a_transaction_that_is_open_all_wait_in_their_order(
    broker: Broker, tmp_path: Path, topic: str
) -> None:
    app = make_app(broker, tmp_path, shares=1)
    handled = collecting(app, topic)

    async with app, working(app):
        await publish(app, topic, range(1), accounts=1)
        await eventually(lambda: handled == [0])
        async with in_transaction(broker, topic, 1, 2) as producer:
            await publish(app, topic, range(3, 4), accounts=1)
            await anyio.sleep(1)
            assert handled == [0]
            await producer.commit_transaction()
        await eventually(lambda: 3 in handled)

    assert handled == [0, 1, 2, 3]


async def test_a_group_that_had_come_further_than_an_open_transaction_stays_there(
    broker: Broker, tmp_path: Path, topic: str
) -> None:
    """Declared meanwhile, say: what may be read ends before it, and its log was not cut off."""
    app = make_app(broker, tmp_path, shares=2)
    handled = collecting(app, topic)

    async with app:
        await app.declare()
        await write_orders(broker, topic, 0, 1)
        async with in_transaction(broker, topic, 2, 3) as producer:
            await stand_at(broker, topic, 4)
            async with working(app):
                await write_orders(broker, topic, 4)
                await write_orders(broker, topic, 5, partition=1)  # once it has come, there is a member
                await eventually(lambda: 5 in handled)
                await producer.abort_transaction()
                await eventually(lambda: 4 in handled)

    assert handled == [5, 4]


async def stand_at(broker: Broker, topic: str, offset: int) -> None:
    """The group has handled what is before it."""
    async with open_consumer(read_settings(broker.url, {}), group_id(topic, "g")) as consumer:
        place = TopicPartition(topic, 0)
        consumer.assign([place])
        await consumer.commit({place: offset})


async def test_a_group_that_has_handled_all_stands_at_the_end_of_a_log_that_ends_with_a_transaction(
    broker: Broker, tmp_path: Path, topic: str
) -> None:
    app = make_app(broker, tmp_path, shares=1)
    handled = collecting(app, topic)

    async with app, working(app):
        await commit(broker, topic, 0)
        await abort(broker, topic, 1)
        await eventually(lambda: handled == [0])
        await write_orders(broker, topic, 2)
        await abort(broker, topic, 3)
        await eventually(lambda: handled == [0, 2])
        await anyio.sleep(1)  # and comes to the end

    place = TopicPartition(topic, 0)
    async with open_consumer(read_settings(broker.url, {}), group_id(topic, "g")) as consumer:
        ends = await consumer.end_offsets([place])
        assert await consumer.committed(place) == ends[place] == 7


async def test_the_end_of_a_transaction_is_no_message_that_will_expire_unread(
    broker: Broker, tmp_path: Path, topic: str
) -> None:
    """It is a record of its own, which no program sees."""
    app = make_app(broker, tmp_path, shares=1)
    handled = collecting(app, topic)
    async with app, working(app):
        await commit(broker, topic, 0)
        await abort(broker, topic, 1)
        await eventually(lambda: handled == [0])

    assert await expiring(broker, topic) == []


async def expiring(broker: Broker, topic: str) -> list[str]:
    """What the audit finds of the group when Kafka removes what is ten seconds old: soon, then."""
    await anyio.sleep(6)
    settings = read_settings(broker.url, {"request_timeout_seconds": 5})
    async with open_admin(settings) as admin:
        await admin._client.alter_configs([ConfigResource(ConfigResourceType.TOPIC, topic, {"retention.ms": "10000"})])
        found = await audit(admin, settings, [TopicSpec(topic, (GroupSpec("g"),))])
    return [finding.found for finding in found if topic in finding.subject and finding.setting == "group g"]


# --- headers ----------------------------------------------------------------------------------------------------------

NAME, BROKEN = b"name-of-a-header", b"name-\xff\xfe-a-header"


class NoText(BatchBuilder):  # type: ignore[misc]  # the client has no types
    """A batch as programs in C and Go may write it: ``NAME`` is replaced by bytes that are no text."""

    compressed = False

    def _build(self) -> bytes:
        if self._buffer is None:
            raw = bytearray(super()._build().replace(NAME, BROKEN))
            if self.compressed:
                raw = raw[:RECORDS] + gzip_encode(raw[RECORDS:])
                struct.pack_into(">i", raw, LENGTH, len(raw) - LENGTH - 4)
                struct.pack_into(">h", raw, ATTRIBUTES, GZIP)
            struct.pack_into(">I", raw, CRC, calc_crc32c(bytes(raw[ATTRIBUTES:])))
            self._buffer = bytes(raw)
        return self._buffer  # type: ignore[no-any-return]


LENGTH, CRC, ATTRIBUTES, RECORDS = 8, 17, 21, 61
"""Where they are in a batch (Kafka protocol guide, record batch)."""
GZIP = 1
LARGE = 3 * 1024 * 1024


class Compressed(NoText):
    compressed = True


async def write(
    broker: Broker, topic: str, batch: NoText, value: bytes, headers: list[tuple[str, bytes]], partition: int = 0
) -> None:
    """One record, with a header whose name is no text."""
    batch.append(timestamp=None, key=b"a", value=value, headers=[*headers, (NAME.decode(), b"value")])
    async with AIOKafkaProducer(bootstrap_servers=servers_of(broker), acks="all", max_request_size=LARGE) as producer:
        await (await producer.send_batch(batch, topic, partition=partition))


@pytest.mark.parametrize("form", [NoText, Compressed])
async def test_a_record_with_a_header_whose_name_is_no_text_rests_as_a_dead_letter_and_the_others_are_handled(
    broker: Broker, tmp_path: Path, topic: str, form: type[NoText]
) -> None:
    """C5 C11: byte for byte what it was but for the name, which is shown."""
    app = make_app(broker, tmp_path, shares=2)
    handled = collecting(app, topic)
    settings = read_settings(broker.url, {})

    async with app:
        await app.declare()
        await publish(app, topic, range(100), accounts=20)
        await write(broker, topic, form(1 << 20, 0), b"\x80 no order", [("plain", b"text")])
        await publish(app, topic, range(100, 200), accounts=20)
        async with working(app), open_dead_letters(settings) as dead_letters:
            await eventually(lambda: len(handled) >= 200)
            await publish(app, topic, range(200, 220), accounts=20)
            await eventually(lambda: len(handled) >= 220)
            while not (found := await dead_letters.find(topic=topic)):
                await anyio.sleep(0.1)
            await dead_letters.remove(found)

    assert sorted(handled) == list(range(220))
    assert [(one.message.key, one.message.body) for one in found] == [(b"a", b"\x80 no order")]
    assert found[0].message.headers == {"plain": "text", "name-\\xff\\xfe-a-header": "value"}


async def test_a_message_with_such_a_header_is_one_with_its_name_shown(
    broker: Broker, tmp_path: Path, topic: str
) -> None:
    app = make_app(broker, tmp_path, shares=1)
    orders = app.topic(topic, Order)
    handled: list[tuple[int, dict[str, str]]] = []

    @app.handler(orders, group="g", effects="repeatable")
    async def handle(order: Order, delivery: Delivery) -> None:
        handled.append((order.number, dict(delivery.message.headers)))

    one = message(topic, Order(number=7, account="a").model_dump_json())
    batch = NoText(1 << 20, 0)
    async with app:
        await app.declare()
        await write(broker, topic, batch, one.body, [*headers_of(one), ("plain", b"text")])
        async with working(app):
            await eventually(lambda: bool(handled))

    assert handled == [(7, {"plain": "text", "name-\\xff\\xfe-a-header": "value"})]


async def test_the_audit_dates_a_lag_that_begins_with_such_a_record(broker: Broker, tmp_path: Path, topic: str) -> None:
    app = make_app(broker, tmp_path, shares=1)
    collecting(app, topic)
    async with app:
        await app.declare()
    await write(broker, topic, NoText(1 << 20, 0), b"no order", [])

    (found,) = await expiring(broker, topic)
    assert found.startswith("behind by 1 messages, the oldest of which expires from")


async def test_the_audit_dates_one_that_comes_after_much_that_was_aborted(
    broker: Broker, tmp_path: Path, topic: str
) -> None:
    app = make_app(broker, tmp_path, shares=1)
    collecting(app, topic)
    async with app:
        await app.declare()
    async with in_transaction(broker, topic) as producer:
        for _ in range(16):
            await producer.send_and_wait(topic, value=bytes(200 * 1024), partition=0)
        await producer.abort_transaction()
    await write(broker, topic, NoText(1 << 20, 0), b"no order", [])

    (found,) = await expiring(broker, topic)
    assert found.startswith("behind by 18 messages, the oldest of which expires from")


# --- one answer of each leader ----------------------------------------------------------------------------------------

PARTITIONS = 6


@pytest.fixture
async def wide(broker: Broker, topic: str) -> str:
    """A topic of six partitions, two for each leader."""
    async with open_admin(read_settings(broker.url, {})) as admin:
        await admin.create(NewTopic(topic, PARTITIONS, 3, topic_configs={"max.message.bytes": str(LARGE)}))
        await admin.led_partitions(topic)
    return topic


@asynccontextmanager
async def reader_of(broker: Broker, topic: str) -> AsyncIterator[tuple[AIOKafkaConsumer, dict[TopicPartition, int]]]:
    """A consumer, and where it is in each partition."""
    positions = {TopicPartition(topic, number): 0 for number in range(PARTITIONS)}
    async with open_consumer(read_settings(broker.url, {}), isolation_level="read_committed") as consumer:
        consumer.assign(list(positions))
        for place in positions:
            consumer.seek(place, 0)
        yield consumer, positions


async def read_on(
    consumer: AIOKafkaConsumer, positions: dict[TopicPartition, int], count: int
) -> dict[int, list[bytes]]:
    """So many more values, by partition."""
    values: dict[int, list[bytes]] = {}
    with anyio.fail_after(30):
        while sum(map(len, values.values())) < count:
            for place, records in (await next_records(consumer, positions, milliseconds=100)).items():
                for record in records:
                    assert record.offset == positions[place], "left out, or twice"
                    positions[place] += 1
                    values.setdefault(place.partition, []).append(record.value)
    return values


@pytest.fixture(params=["in C", "in Python"])
def records_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways in which the client is installed; each has errors of its own for such a record."""
    if request.param == "in Python":
        monkeypatch.setattr(memory_records, "DefaultRecordBatch", _DefaultRecordBatchPy)
        monkeypatch.setattr(fetcher, "MemoryRecords", _MemoryRecordsPy)


@pytest.mark.usefixtures("records_in")
async def test_where_one_partition_cannot_be_read_all_go_on_and_one_that_is_paused_waits(
    broker: Broker, wide: str
) -> None:
    for number in range(PARTITIONS):
        await write_orders(broker, wide, number, partition=number)
        if number % 2:
            await write(broker, wide, NoText(1 << 20, 0), b"no text", [], partition=number)
        await write_orders(broker, wide, number + 10, partition=number)

    async with reader_of(broker, wide) as (consumer, positions):
        waits = TopicPartition(wide, 1)
        consumer.pause(waits)
        values = await read_on(consumer, positions, 12)
        assert waits.partition not in values
        assert values[3][1] == b"no text"
        await anyio.sleep(0.1)
        assert consumer._subscription.fetcher_idle_time >= 0.1, "the group's watch over members that hang is off"

        consumer.resume(waits)
        assert (await read_on(consumer, positions, 3))[1][1] == b"no text"


async def test_batches_larger_than_a_share_take_turns(broker: Broker, wide: str) -> None:
    for number in range(PARTITIONS):
        await write(broker, wide, NoText(LARGE, 0), bytes(2 * 1024 * 1024), [], partition=number)

    async with reader_of(broker, wide) as (consumer, positions):
        values = await read_on(consumer, positions, PARTITIONS)

    assert {number: len(those) for number, those in values.items()} == dict.fromkeys(range(PARTITIONS), 1)


async def test_a_leader_that_does_not_answer_holds_up_nobody_but_its_own(
    whole: KafkaCluster, broker: Broker, wide: str
) -> None:
    for number in range(PARTITIONS):
        await write(broker, wide, NoText(1 << 20, 0), b"no text", [], partition=number)

    async with reader_of(broker, wide) as (consumer, positions):
        whole.brokers[0].kill()
        values = await read_on(consumer, positions, PARTITIONS)

    assert {number: len(those) for number, those in values.items()} == dict.fromkeys(range(PARTITIONS), 1)
