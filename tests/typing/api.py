"""The public names as users type them; checked by mypy, never run."""

from datetime import timedelta

from pydantic import BaseModel
from sqlalchemy.ext.asyncio import AsyncSession

from reliamq import Backoff, Confirmation, Delivery, FencingToken, Rejected, Reliamq, RetryAfter, Unconfirmed, outbox


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
