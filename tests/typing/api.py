"""The public names as users type them; checked by mypy, never run."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta

from pydantic import BaseModel
from sqlalchemy.ext.asyncio import AsyncSession

from reliamq import (
    Backoff,
    Confirmation,
    Delivery,
    FencingToken,
    InvalidMessage,
    Rejected,
    Reliamq,
    RetryAfter,
    StorageFull,
    TooLarge,
    Unconfirmed,
    Unroutable,
    outbox,
)


class OrderPlaced(BaseModel):
    account: str
    amount: int


class BalanceChanged(BaseModel):
    account: str


app = Reliamq()
orders = app.topic("orders", OrderPlaced, key=lambda order: order.account)
balances = app.topic("balances", BalanceChanged, key=lambda change: change.account)


async def place(session: AsyncSession, order: OrderPlaced) -> str:
    outbox.add(session, orders, BalanceChanged(account="x"))  # type: ignore[misc]  # another topic's model is an error
    return outbox.add(session, orders, order)


async def announce(order: OrderPlaced) -> Confirmation | None:
    try:
        return await orders.publish(order, deadline=timedelta(seconds=5))
    except Rejected:
        return None
    except Unconfirmed as error:
        raise RetryAfter(timedelta(seconds=1), reason=error.message_id) from error


@app.handler(orders, group="accounting", effects="transaction", retry=Backoff(attempts=3))
async def apply_order(order: OrderPlaced, session: AsyncSession, delivery: Delivery) -> None:
    outbox.add(session, balances, BalanceChanged(account=order.account), headers={"attempt": str(delivery.attempt)})


@app.handler(balances, group="mailer", effects="lease")
def mail(change: BalanceChanged, token: FencingToken) -> int:
    return token.value


unchanged: int = mail(BalanceChanged(account="x"), FencingToken("x", 1))


class Client:
    """Something that handlers use."""


async def make_client() -> Client:
    return Client()


@asynccontextmanager
async def open_client() -> AsyncIterator[Client]:
    yield Client()


@contextmanager
def open_plain_client() -> Iterator[Client]:
    yield Client()


app.provide(Client, Client())
app.provide(Client, Client)
app.provide(Client, make_client)
app.provide(Client, open_client)
app.provide(Client, open_plain_client)
app.provide(Client, open_client())
app.provide(Client, 3)  # type: ignore[arg-type]  # another type than promised is an error
app.provide(Client, lambda: 3)  # type: ignore[arg-type,return-value]  # and so is a function that makes one
app.handler(orders, group="accounting", effects="always")  # type: ignore[arg-type]  # there is no such kind
app.topic("named", OrderPlaced, durability="fsynced", key=lambda order: order.account)


async def nightly() -> int:
    async with app.lock("nightly", lease=timedelta(seconds=10), wait=timedelta(0)) as token:
        return token.value


def change(delivery: Delivery) -> None:
    delivery.failures = 0  # type: ignore[misc]  # nobody may change what others have, too
    delivery.message.topic = "elsewhere"  # type: ignore[misc]


rejections: tuple[type[Rejected], ...] = (InvalidMessage, StorageFull, TooLarge, Unroutable)
