"""A message comes back from a Kafka record as it was, whatever its headers are called (P1 C11)."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from hypothesis import given, strategies as st

from reliamq.spi import Message
from reliamq_kafka.wire.records import headers_of, message_of, readable, time_of

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
names = text | st.sampled_from(["ce_id", "ce_traceparent", "ce_partitionkey", "content-type", "reliamq_x"])
times = st.datetimes(min_value=datetime(1971, 1, 1), timezones=st.just(UTC))
messages = st.builds(
    Message,
    topic=st.just("t"),
    body=st.binary(max_size=20),
    id=text,
    type=text,
    source=text,
    time=times,
    key=st.none() | st.binary(max_size=10),
    content_type=text,
    sequence=st.none() | st.integers(0, 2**63),
    only_group=st.none() | text,
    headers=st.dictionaries(names, text, max_size=4),
)


@given(message=messages)
def test_a_message_comes_back_as_it_was(message: Message) -> None:
    assert message_of("t", message.key, message.body, headers_of(message)) == message


@given(message=messages, value=text)
def test_a_foreign_attribute_is_a_header_that_keeps_its_name(message: Message, value: str) -> None:
    """What another program wrote is sent on as it was."""
    headers = [*headers_of(message), ("ce_foreign", value.encode())]
    read = message_of("t", message.key, message.body, headers)

    assert read.headers["ce_foreign"] == value
    assert ("ce_foreign", value.encode()) in headers_of(read)


@given(headers=st.lists(st.tuples(text, st.none() | st.binary())))
def test_any_header_can_be_shown(headers: list[tuple[str, bytes | None]]) -> None:
    assert readable(headers).keys() == {name for name, _ in headers}
    "".join(readable(headers).values()).encode()


@given(milliseconds=st.integers(-(2**63), 2**63 - 1))
def test_any_timestamp_is_a_time(milliseconds: int) -> None:
    """Microseconds, say, from a producer that got it wrong."""
    assert time_of(milliseconds).tzinfo is UTC


def test_a_right_timestamp_is_its_time() -> None:
    assert time_of(1500) == datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=1.5)
