"""Place so many orders: ``python place.py 100``."""

from __future__ import annotations

import sys

import anyio
from shop import Base, OrderPlaced, app, place
from sqlalchemy.ext.asyncio import AsyncSession

from reliamq.database import open_engine


async def main(count: int) -> None:
    """Five customers, one transaction each."""
    async with app, open_engine(app.settings.database or "") as engine:
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        for number in range(count):
            async with AsyncSession(engine) as session, session.begin():
                await place(session, OrderPlaced(number=number, customer=f"customer {number % 5}", amount=number))


anyio.run(main, int(sys.argv[1]))
