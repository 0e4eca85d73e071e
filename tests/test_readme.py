"""The README's quickstart runs as printed."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parent.parent


def quickstart() -> str:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    return block


def test_the_quickstart_is_at_most_twenty_lines() -> None:
    lines = [line for line in quickstart().splitlines() if line.strip()]

    assert len(lines) <= 20


def test_the_quickstart_places_an_order_and_applies_it(tmp_path: Path) -> None:
    (tmp_path / "orders.py").write_text(quickstart())
    (tmp_path / "reliamq.toml").write_text(
        'broker = "embedded:///broker.db"\ndatabase = "sqlite:///orders.db"\n[relay]\npoll = 0.01\n'
    )
    driver = """
        import anyio
        from sqlalchemy.ext.asyncio import AsyncSession
        from orders import OrderPlaced, app, place_order
        from reliamq.database import open_engine

        async def main():
            stop = anyio.Event()
            async with app, open_engine("sqlite:///orders.db") as engine:
                async with AsyncSession(engine) as session, session.begin():
                    await place_order(session, OrderPlaced(order=1, account="ada", amount=5))
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(app.run_relay, stop)
                    tasks.start_soon(app.run_worker, stop)
                    async with app.outbox_store() as store:
                        while (await store.status()).waiting:
                            await anyio.sleep(0.02)
                    await anyio.sleep(0.5)
                    stop.set()

        anyio.run(main)
    """
    (tmp_path / "driver.py").write_text(textwrap.dedent(driver))

    done = subprocess.run([sys.executable, "driver.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60)

    assert done.returncode == 0, done.stderr
    assert done.stdout == "ada pays 5\n"
