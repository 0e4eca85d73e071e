"""The pages' programs and settings do what they say."""

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

from tests.cli import RELIAMQ
from tests.test_readme import quickstart

DOCS = Path(__file__).parent.parent / "docs"


def titled(page: str, title: str) -> str:
    (block,) = re.findall(rf'```\w+ title="{re.escape(title)}"\n(.*?)```', (DOCS / page).read_text("utf-8"), re.DOTALL)
    return block


def test_the_shop_of_the_handlers_page_does_its_work_with_the_settings_of_theirs(tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(titled("handlers.md", "shop.py"))
    (tmp_path / "reliamq.toml").write_text(titled("settings.md", "reliamq.toml"))
    driver = """
        from datetime import timedelta
        import anyio
        from shop import OrderCancelled, OrderPlaced, app, orders

        async def main():
            stop = anyio.Event()
            async with app:
                async with app.lock("nightly report", wait=timedelta(seconds=1)) as token:
                    print("token", token.value)
                await orders.publish(OrderPlaced(order=1, account="ada", amount=5))
                await orders.publish(OrderCancelled(order=2, account="ada"))
                await orders.publish(OrderPlaced(order=3, account="eve", amount=-1))
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(app.run_worker, stop)
                    tasks.start_soon(app.run_relay, stop)
                    await anyio.sleep(2.5)
                    stop.set()
                async with app.dead_letters() as desk:
                    print("given up:", [one.reason for one in await desk.list()])

        anyio.run(main)
    """
    (tmp_path / "driver.py").write_text(textwrap.dedent(driver))

    done = subprocess.run([sys.executable, "driver.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60)

    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == sorted(
        [
            "opening",
            "token 1",
            "OrderPlaced done, attempt 1",
            "order 2 is cancelled",
            "OrderCancelled done, attempt 1",
            "mail 1: ada: -5",
            "BalanceChanged done, attempt 1",
            "given up: ['DeadLetter: a negative amount will not get better']",
            "closing",
        ]
    )


def test_the_quickstart_goes_on_where_the_readme_ends(tmp_path: Path) -> None:
    (tmp_path / "orders.py").write_text(quickstart())
    (tmp_path / "reliamq.toml").write_text('broker = "embedded:///broker.db"\ndatabase = "sqlite:///orders.db"\n')
    for name in ("place.py", "announce.py"):
        (tmp_path / name).write_text(titled("quickstart.md", name))

    def run(*command: str) -> str:
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True).stdout

    assert run(sys.executable, "place.py") == ""
    assert run(sys.executable, "announce.py") == "stored as order-2\n"
    status = run(*RELIAMQ, "outbox", "status", "--app", "orders:app", "--json")
    assert json.loads(status)["waiting"] == 1
