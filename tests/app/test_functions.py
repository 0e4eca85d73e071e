"""What may be a handler, a middleware, a lifespan, a provided value: said when it is given, not when it fails."""

from __future__ import annotations

import functools
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from reliamq import Backoff, ConfigurationError, Delivery, Reliamq, Topic
from reliamq.settings import Settings
from reliamq.spi import HandlerSignatureError
from tests.app.conftest import Order, eventually, working

pytestmark = pytest.mark.anyio
hour = timedelta(hours=1)


@pytest.fixture
def app() -> Reliamq:
    return Reliamq(Settings(broker=f"memory://{uuid.uuid4()}"))


@pytest.fixture
def orders(app: Reliamq) -> Topic[Order]:
    return app.topic("orders", Order)


# --- handlers: functions ----------------------------------------------------------------------------------------------


def plain_wrapper(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*arguments: Any, **named: Any) -> Any:
        return function(*arguments, **named)

    return wrapper


def async_wrapper(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    async def wrapper(*arguments: Any, **named: Any) -> Any:
        return await function(*arguments, **named)

    return wrapper


async def coroutine(order: Order) -> None: ...


def generator(order: Order) -> Iterator[None]:
    yield


async def async_generator(order: Order) -> AsyncIterator[None]:
    yield


@contextmanager
def managed(order: Order) -> Iterator[None]:
    yield


@pytest.mark.parametrize(
    ("function", "fault"),
    [
        (generator, "generator function"),
        (async_generator, "generator function"),
        (plain_wrapper(generator), "generator function"),
        (async_wrapper(async_generator), "generator function"),
        (managed, "generator function"),
        (plain_wrapper(coroutine), "plain function around an async def"),
        (plain_wrapper(async_wrapper(plain_wrapper(coroutine))), "plain function around an async def"),
    ],
)
def test_a_function_whose_call_runs_nothing_is_no_handler(
    app: Reliamq, orders: Topic[Order], function: Callable[..., Any], fault: str
) -> None:
    """C1"""
    with pytest.raises(HandlerSignatureError, match=fault) as caught:
        app.handler(orders, group="g", effects="repeatable")(function)

    assert caught.value.parameter is None
    assert function.__name__ in str(caught.value)


def plain(order: Order) -> None: ...


@pytest.mark.parametrize("function", [coroutine, plain, async_wrapper(coroutine), plain_wrapper(plain)])
def test_a_function_that_runs_to_its_end_is_a_handler_wrapped_or_not(
    app: Reliamq, orders: Topic[Order], function: Callable[..., Any]
) -> None:
    assert app.handler(orders, group="g", effects="repeatable")(function) is function


class Recorder:
    def __call__(self, order: Order) -> None: ...

    def method(self, order: Order) -> None: ...


@pytest.mark.parametrize("thing", [3, None, Recorder(), Recorder, functools.partial(plain)])
def test_what_is_no_function_is_no_handler(app: Reliamq, orders: Topic[Order], thing: Any) -> None:
    with pytest.raises(ConfigurationError, match="a handler must be a function, not "):
        app.handler(orders, group="g", effects="repeatable")(thing)


def test_a_method_of_an_object_is_a_handler(app: Reliamq, orders: Topic[Order]) -> None:
    app.handler(orders, group="g", effects="repeatable")(Recorder().method)


def sync_with_async_session(order: Order, session: AsyncSession) -> None: ...
async def async_with_plain_session(order: Order, session: Session) -> None: ...
def without_message(session: Session) -> None: ...
def unresolved(order: Missing) -> None: ...  # type: ignore[name-defined]  # noqa: F821


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (
            sync_with_async_session,
            "'session' is an AsyncSession, but the handler is a plain def: take a sqlalchemy.orm",
        ),
        (async_with_plain_session, "'session' is a Session, but the handler is an async def: take an AsyncSession"),
        (without_message, "it has no parameter for the message; topic 'orders' has Order"),
        (unresolved, "it has an annotation that cannot be resolved where it stands: NameError: name 'Missing'"),
    ],
)
def test_a_signature_that_cannot_be_filled_says_what_to_do(
    app: Reliamq, orders: Topic[Order], function: Callable[..., Any], said: str
) -> None:
    with pytest.raises(HandlerSignatureError) as caught:
        app.handler(orders, group="g", effects="transaction")(function)
    assert said in str(caught.value)


# --- handlers: options ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"timeout": 5}, r"timeout must be a timedelta, not int 5; write timedelta\(seconds=5\)"),
        ({"timeout": timedelta(0)}, "timeout must be longer than nothing"),
        ({"concurrency": "4"}, "concurrency must be a whole number, not str '4'"),
        ({"concurrency": 1.5}, "concurrency must be a whole number, not float 1.5"),
        ({"concurrency": 0}, "concurrency must be at least 1, not int 0"),
        ({"retry": 3}, r"retry must be a Backoff, such as Backoff\(attempts=3\), not int 3"),
        ({"retry": 0}, "retry must be a Backoff"),
        ({"group": 3}, "group must be 1 to 150 printable characters"),
        ({"group": "a\nb/ c"}, "group must be 1 to 150 printable characters"),
        ({"effects": "transactional"}, "effects must be one of .*, not str 'transactional'"),
        ({"effects": ["lease"]}, "effects must be one of "),
        ({"name": 3}, "name must be 1 to 200 printable characters"),
        ({"name": "x" * 201}, "name must be 1 to 200 printable characters"),
    ],
)
def test_a_wrong_option_is_named_with_what_it_must_be(
    app: Reliamq, orders: Topic[Order], options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigurationError, match=rf"^handler .*plain: {said}"):
        app.handler(orders, **{"group": "g", "effects": "repeatable", **options})(plain)


def test_a_topic_is_given_as_a_topic(app: Reliamq) -> None:
    with pytest.raises(ConfigurationError, match=r"topic must be a Topic, .*, not str 'orders'"):
        app.handler("orders", group="g", effects="repeatable")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="topic name must be"):
        app.topic(3, Order)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"attempts": "3"}, "attempts must be a whole number, not str '3'"),
        ({"attempts": 0}, "attempts must be at least 1, not int 0"),
        ({"first": 1.5}, r"first must be a timedelta, not float 1.5; write timedelta\(seconds=1.5\)"),
        ({"first": -hour}, "first must not be negative"),
        ({"first": hour}, "ceiling must be at least first=1:00:00, not timedelta"),
        ({"ceiling": 60}, "ceiling must be a timedelta"),
        ({"keep_order_up_to": 60}, "keep_order_up_to must be a timedelta"),
        ({"factor": "2"}, "factor must be a number from 1 on, not str '2'"),
        ({"factor": float("nan")}, "factor must be a number from 1 on"),
        ({"factor": float("inf")}, "factor must be a number from 1 on"),
        ({"jitter": 1.1}, "jitter must be a number from 0 to 1"),
        ({"never": ValueError}, r"never must be a tuple of exception classes, such as \(ValueError,\), not the class"),
        ({"never": [ValueError]}, "never must be a tuple of exception classes"),
        ({"never": ("ValueError",)}, "never must be a tuple of exception classes"),
        ({"never": (KeyboardInterrupt,)}, "never must be a tuple of exception classes"),
        ({"on": ValueError}, "on must be a mapping of exception classes to Backoff"),
        ({"on": {ValueError: 3}}, "on ValueError must be a Backoff, not int 3"),
        ({"on": {"ValueError": Backoff()}}, "a key of on must be an exception class, not str 'ValueError'"),
    ],
)
def test_a_wrong_retry_policy_is_refused_when_it_is_made(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^Backoff: {said}"):
        Backoff(**options)


# --- middleware -------------------------------------------------------------------------------------------------------


def sync_middleware(delivery: Delivery, call_next: Any) -> None: ...
async def one_argument(delivery: Delivery) -> None: ...


@pytest.mark.parametrize(
    ("middleware", "said"),
    [
        (None, "middleware must be an async def .*, not None"),
        (sync_middleware, "middleware must be an async def .*, not function"),
        (one_argument, "middleware one_argument must take two arguments"),
    ],
)
def test_a_middleware_that_could_not_run_is_refused(app: Reliamq, middleware: Any, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        app.middleware(middleware)


async def with_more(delivery: Delivery, call_next: Any, more: int = 0) -> None: ...


class Middleware:
    async def __call__(self, delivery: Delivery, call_next: Any) -> None: ...

    async def method(self, delivery: Delivery, call_next: Any) -> None: ...


@pytest.mark.parametrize(
    "middleware", [with_more, Middleware(), Middleware().method, functools.partial(with_more, more=2)]
)
def test_whatever_is_called_as_an_async_def_is_a_middleware(app: Reliamq, middleware: Any) -> None:
    assert app.middleware(middleware) is middleware


# --- the application --------------------------------------------------------------------------------------------------


async def undecorated(app: Reliamq) -> AsyncIterator[None]:
    yield


async def returning(app: Reliamq) -> None: ...


@pytest.mark.parametrize(
    ("lifespan", "said"),
    [
        ("x", "lifespan must be a function decorated with @asynccontextmanager, not str 'x'"),
        (undecorated, "lifespan undecorated must be decorated with @asynccontextmanager"),
        (returning, "lifespan returning must be decorated with @asynccontextmanager"),
    ],
)
def test_a_lifespan_that_is_none_is_refused(lifespan: Any, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        Reliamq(Settings(broker=f"memory://{uuid.uuid4()}"), lifespan=lifespan)


async def test_a_lifespan_that_gives_no_context_manager_is_refused_on_opening() -> None:
    app = Reliamq(Settings(broker=f"memory://{uuid.uuid4()}"), lifespan=lambda _: 3)  # type: ignore[arg-type,return-value]

    with pytest.raises(ConfigurationError, match=r"lambda.* must be decorated with @asynccontextmanager .*, not int 3"):
        async with app:
            pass


@pytest.mark.parametrize("settings", ["embedded:///x.db", 0, {}])
def test_settings_are_given_as_settings(settings: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"Reliamq: settings must be Settings, such as Settings\(broker="):
        Reliamq(settings)


# --- provided values --------------------------------------------------------------------------------------------------


class Client: ...


def test_what_cannot_be_provided_is_refused(app: Reliamq) -> None:
    with pytest.raises(ConfigurationError, match="the type of the parameter must be a class, not str 'Client'"):
        app.provide("Client", Client())  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"the value for Client must be a Client, .*, not int 3"):
        app.provide(Client, 3)  # type: ignore[arg-type]


async def make_async() -> Client:
    return Client()


@asynccontextmanager
async def open_async() -> AsyncIterator[Client]:
    yield Client()


@contextmanager
def open_plain() -> Iterator[Client]:
    yield Client()


@pytest.mark.parametrize(
    "value", [Client(), Client, lambda: Client(), make_async, open_async, open_plain, open_async(), open_plain()]
)
async def test_a_value_is_provided_ready_made_made_or_entered(app: Reliamq, orders: Topic[Order], value: Any) -> None:
    app.provide(Client, value)
    given: list[object] = []

    @app.handler(orders, group="g", effects="repeatable")
    async def handle(order: Order, client: Client) -> None:
        given.append(client)

    async with working(app):
        await orders.publish(Order(number=1))
        await eventually(lambda: bool(given))

    assert isinstance(given[0], Client)


@asynccontextmanager
async def open_wrong() -> AsyncIterator[int]:
    yield 3


async def test_a_value_of_another_type_than_promised_stops_the_worker(app: Reliamq, orders: Topic[Order]) -> None:
    app.provide(Client, open_wrong)  # type: ignore[arg-type]
    app.handler(orders, group="g", effects="repeatable")(coroutine)

    with pytest.raises(ExceptionGroup) as caught:
        async with working(app):
            pass
    assert "what is provided for Client must be a Client, not int 3" in repr(caught.value.exceptions)
