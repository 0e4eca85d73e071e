"""What is wrong with a handler or a topic is said when it is declared, with the name of the parameter."""

import uuid

import anyio
import pytest
from pydantic import BaseModel
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from reliamq import Backoff, ConfigurationError, FencingToken, Reliamq
from reliamq.handlers import Effects
from reliamq.idempotency import MemoryLeaseStore
from reliamq.settings import Settings
from reliamq.spi import DuplicateHandler, HandlerSignatureError, InvalidMessage, TooLarge
from tests.app.conftest import Cancelled, Order


@pytest.fixture
def app() -> Reliamq:
    return Reliamq(Settings(broker=f"memory://{uuid.uuid4()}"))


class Stranger: ...


def wrong_type(order: Order, stranger: Stranger) -> None: ...
def no_annotation(order: Order, extra) -> None: ...  # type: ignore[no-untyped-def]
def no_message(session: Session) -> None: ...
def two_messages(order: Order, other: Order) -> None: ...
def async_session_in_plain(order: Order, session: AsyncSession) -> None: ...
def token_without_lease(order: Order, token: FencingToken) -> None: ...
def star(order: Order, *rest: int) -> None: ...


@pytest.mark.parametrize(
    ("function", "parameter"),
    [
        (wrong_type, "stranger"),
        (no_annotation, "extra"),
        (no_message, None),
        (two_messages, "other"),
        (async_session_in_plain, "session"),
        (token_without_lease, "token"),
        (star, "rest"),
    ],
)
def test_a_parameter_that_cannot_be_filled_is_named(app: Reliamq, function, parameter: str | None) -> None:  # type: ignore[no-untyped-def]
    orders = app.topic("orders", Order)

    with pytest.raises(HandlerSignatureError) as caught:
        app.handler(orders, group="g", effects="transaction")(function)

    assert caught.value.parameter == parameter
    assert function.__name__ in str(caught.value)


def test_two_handlers_for_one_type_in_one_group_are_refused(app: Reliamq) -> None:
    orders = app.topic("orders", Order)

    @app.handler(orders, group="g", effects="repeatable")
    def first(order: Order) -> None: ...

    with pytest.raises(DuplicateHandler, match=r"'Order' is handled by .*first and again by .*second"):

        @app.handler(orders, group="g", effects="repeatable")
        def second(order: Order) -> None: ...


def test_a_handler_stays_a_plain_function(app: Reliamq) -> None:
    orders = app.topic("orders", Order)

    @app.handler(orders, group="g", effects="repeatable")
    def double(order: Order) -> int:
        return order.number * 2

    assert double(Order(number=4)) == 8


def test_a_provided_type_fills_a_parameter(app: Reliamq) -> None:
    orders = app.topic("orders", Order)
    app.provide(Stranger, Stranger())

    app.handler(orders, group="g", effects="repeatable")(wrong_type)


def test_two_topics_of_one_name_are_refused(app: Reliamq) -> None:
    app.topic("orders", Order)

    with pytest.raises(ConfigurationError, match="two topics named 'orders'"):
        app.topic("orders", Cancelled)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [({"attempts": 0}, "attempts"), ({"factor": 0.5}, "factor"), ({"jitter": 2}, "jitter")],
)
def test_a_retry_policy_out_of_range_names_its_field(arguments: dict[str, float], name: str) -> None:
    with pytest.raises(ConfigurationError, match=name):
        Backoff(**arguments)  # type: ignore[arg-type]


def test_a_key_that_is_neither_text_nor_bytes_is_refused(app: Reliamq) -> None:
    orders = app.topic("orders", Order, key=lambda order: order.number)  # type: ignore[arg-type,return-value]

    with pytest.raises(InvalidMessage, match="key must be text or bytes, not int 5"):
        orders.message(Order(number=5))


def test_a_message_over_the_limit_is_refused_before_it_is_sent(app: Reliamq) -> None:
    """P6"""
    orders = app.topic("orders", Order, max_message_bytes=50)

    with pytest.raises(TooLarge, match="limit of 50"):
        orders.message(Order(number=1, account="x" * 50))


def test_a_model_of_another_topic_is_refused(app: Reliamq) -> None:
    orders = app.topic("orders", Order)

    with pytest.raises(InvalidMessage, match="Cancelled is not one of"):
        orders.message(Cancelled(number=1))  # type: ignore[arg-type]


@pytest.mark.parametrize("effects", ["transaction", "lease"])
def test_a_handler_that_needs_a_database_says_so_when_the_application_opens(app: Reliamq, effects: Effects) -> None:
    orders = app.topic("orders", Order)

    @app.handler(orders, group="g", effects=effects)
    async def handle(order: Order) -> None: ...

    async def run() -> None:
        async with app:
            pytest.fail("it opened")

    with pytest.raises(ConfigurationError, match=f'effects="{effects}" needs a database'):
        anyio.run(run)


def test_leases_in_a_store_of_their_own_need_no_database() -> None:
    app = Reliamq(Settings(broker=f"memory://{uuid.uuid4()}"), lease_store=MemoryLeaseStore())
    orders = app.topic("orders", Order)

    @app.handler(orders, group="g", effects="lease")
    async def handle(order: Order) -> None: ...

    async def run() -> None:
        async with app:
            pass

    anyio.run(run)


def test_leases_at_a_url_need_no_database_and_one_that_keeps_none_is_refused() -> None:
    app = Reliamq(Settings(broker=f"memory://{uuid.uuid4()}", leases="memory://leases"))
    orders = app.topic("orders", Order)

    @app.handler(orders, group="g", effects="lease")
    async def handle(order: Order) -> None: ...

    async def run() -> None:
        async with app:
            pytest.fail("it opened")

    with pytest.raises(ConfigurationError, match="'embedded' keeps no leases"):
        anyio.run(run)


def test_models_are_needed(app: Reliamq) -> None:
    with pytest.raises(ConfigurationError, match="at least one pydantic model"):
        app.topic("orders")

    with pytest.raises(ConfigurationError, match="not a pydantic model"):
        app.topic("orders", dict)  # type: ignore[type-var]


class Named(BaseModel):
    __message_type__ = "order.named"
    number: int


def test_a_model_can_name_its_messages(app: Reliamq) -> None:
    assert app.topic("named", Named).message(Named(number=1)).type == "order.named"
