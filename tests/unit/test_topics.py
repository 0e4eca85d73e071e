"""What a topic refuses: when it is made, and when a model becomes a message."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Annotated, Any

import pytest
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from reliamq import ConfigurationError, Durability, GroupSpec, InvalidMessage, Topic


class Order(BaseModel):
    number: int
    account: str = "ada"


# --- as it is declared ------------------------------------------------------------------------------------------------

WRONG_NAMES = [3, None, b"orders", "", "a b", "a/b", "a@b", "a\nb", "\udcff", "x" * 151]


@pytest.mark.parametrize("name", WRONG_NAMES)
def test_a_name_that_no_broker_could_hold_is_refused(name: Any) -> None:
    with pytest.raises(ConfigurationError, match="topic name must be 1 to 150 printable characters"):
        Topic(name, Order)
    with pytest.raises(ConfigurationError, match=r"^group name must be 1 to 150 printable characters"):
        GroupSpec(name)
    with pytest.raises(ConfigurationError, match="topic 'orders': group name must be 1 to 150"):
        Topic("orders", Order, groups=[name])


def test_names_may_be_as_long_as_the_columns_that_hold_them() -> None:
    name = "ü.-:" + "x" * 146

    assert Topic(name, Order, groups=[name]).spec(durability=Durability.FSYNCED).groups == (GroupSpec(name),)


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ("accounting", r"groups must be a list of names, such as \['accounting'\], not str 'accounting'"),
        (3, "groups must be a list, not int 3"),
        (["a", "b", "a"], "groups must be named once each"),
        ([GroupSpec("a", "latest"), "a"], "groups must be named once each"),
    ],
)
def test_groups_are_a_list_of_names_once_each(groups: Any, said: str) -> None:
    with pytest.raises(ConfigurationError, match=f"topic 'orders': {said}"):
        Topic("orders", Order, groups=groups)


def test_a_group_that_starts_nowhere_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"group 'a': start must be .*, not str 'lattest'"):
        GroupSpec("a", start="lattest")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"retention": 5}, r"retention must be a timedelta, not int 5; write timedelta\(seconds=5\)"),
        ({"retention": timedelta(-1)}, "retention must not be negative"),
        ({"durability": "eternal"}, "durability must be one of development, fsynced, replicated, not str 'eternal'"),
        ({"durability": 1}, "durability must be one of development, fsynced, replicated, not int 1"),
        ({"key": "account"}, "key must be a plain function of the model, .*, not str 'account'"),
        ({"max_message_bytes": -1}, "max_message_bytes must be at least 1, not int -1"),
        ({"max_message_bytes": "1"}, "max_message_bytes must be a whole number, not str '1'"),
        ({"max_message_bytes": True}, "max_message_bytes must be a whole number, not bool True"),
        ({"source": ""}, "source must be 1 to 255 printable characters"),
    ],
)
def test_a_wrong_parameter_is_named_with_what_it_must_be(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=f"topic 'orders': {said}"):
        Topic("orders", Order, **arguments)


def test_a_coroutine_function_is_no_key() -> None:
    async def key(order: Order) -> str:
        return order.account

    with pytest.raises(ConfigurationError, match="key must be a plain function"):
        Topic("orders", Order, key=key)  # type: ignore[arg-type]


def test_a_durability_can_be_named_as_in_a_file() -> None:
    assert Topic("orders", Order, durability="fsynced").durability is Durability.FSYNCED


@pytest.mark.parametrize("name", ["", "a\nb", 3, "x" * 256])
def test_a_message_type_that_could_not_be_stored_is_refused(name: Any) -> None:
    model = type("Odd", (Order,), {"__message_type__": name})

    with pytest.raises(ConfigurationError, match="Odd: __message_type__ must be 1 to 255 printable characters"):
        Topic("orders", model)


# --- what it could not decode itself ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("order", "said"),
    [
        (Order.model_construct(number="three"), "field 'number': Input should be a valid integer"),  # type: ignore[arg-type]
        (Order.model_construct(account="bob"), "field 'number': Field required"),
        (Order(number=1).model_copy(update={"account": None}), "field 'account': Input should be a valid string"),
        (Order(number=1).model_copy(update={"account": "\udcff"}), "it is no valid Order"),
    ],
)
def test_a_model_that_the_topic_could_not_decode_is_not_written(order: Order, said: str) -> None:
    topic = Topic("orders", Order)
    for _ in range(2):
        with pytest.raises(InvalidMessage, match=said):
            topic.message(order)
        topic.message(Order(number=1))  # what is remembered of a sound one helps none that is not


class Padded(BaseModel):
    number: Annotated[int, AfterValidator(str)]


def test_a_value_of_another_type_than_declared_is_written_where_the_topic_can_decode_it() -> None:
    topic = Topic("padded", Padded)

    assert topic.decode(topic.message(Padded(number=7))) == Padded(number=7)


class Aliased(BaseModel):
    number: int = Field(alias="orderNumber")


class WrittenOtherwise(BaseModel):
    number: int = Field(serialization_alias="orderNumber")


class ByName(BaseModel):
    model_config = ConfigDict(populate_by_name=True)
    number: int = Field(validation_alias="order-number")


@pytest.mark.parametrize(
    ("model", "body"),
    [
        (Aliased(orderNumber=1), b'{"orderNumber":1}'),
        (WrittenOtherwise(number=1), b'{"number":1}'),
        (ByName(number=1), b'{"number":1}'),
    ],
)
def test_a_field_is_written_under_a_name_under_which_it_is_read(model: BaseModel, body: bytes) -> None:
    topic = Topic("aliased", type(model))
    message = topic.message(model)

    assert message.body == body
    assert topic.decode(message) == model


class Incompatible(BaseModel):
    number: int = Field(validation_alias="in", serialization_alias="out")


def test_a_model_that_never_reads_what_it_writes_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="Incompatible: its field 'number' is read under another name"):
        Topic("incompatible", Incompatible)


# --- id, key, headers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("id", [3, "", "a\n", "a\x00b", "x" * 201, "x" * 100_000, b"a"])
def test_an_id_that_could_not_be_kept_is_refused(id: Any) -> None:
    with pytest.raises(InvalidMessage, match="its id must be 1 to 200 printable characters") as caught:
        Topic("orders", Order).message(Order(number=1), id=id)
    assert len(str(caught.value)) < 400


def test_an_id_that_can_be_kept_is_kept() -> None:
    assert Topic("orders", Order).message(Order(number=1), id="ü" * 200).id == "ü" * 200


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        (["a"], r"headers must be a mapping, not list \['a'\]"),
        ({"a": 1}, "header 'a' must be text, not int 1"),
        ({1: "a"}, "header 1 must be text, not int 1"),
        ({"a": "\udcff"}, "header 'a' must be text, not str"),
        ({"\udcff": "a"}, "must be text, not str"),
    ],
)
def test_headers_are_text_to_text(headers: Any, said: str) -> None:
    with pytest.raises(InvalidMessage, match=said):
        Topic("orders", Order).message(Order(number=1), headers=headers)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (lambda order: order.number, "key must be text or bytes, not int 1"),
        (lambda order: "\udcff", "key is no text that UTF-8 can hold"),
        (lambda order: order.colour, "the topic's key function failed: AttributeError: .*colour"),
        (lambda: "no parameter", "the topic's key function failed: TypeError"),
    ],
)
def test_a_key_that_orders_nothing_is_refused(key: Callable[..., Any], said: str) -> None:
    with pytest.raises(InvalidMessage, match=said):
        Topic("orders", Order, key=key).message(Order(number=1))


def test_a_topic_is_declared_before_what_its_model_refers_to() -> None:
    class Basket(BaseModel):
        lines: list[Line]

    topic = Topic("baskets", Basket)

    class Line(BaseModel):
        article: int

    message = topic.message(Basket(lines=[Line(article=1)]))
    assert topic.decode(message) == Basket(lines=[Line(article=1)])
