"""``reliamq prove``: the command line of the prover.

Says what it does while it does it, and ends with one line and an exit code: 0 when nothing is lost, doubled, reordered
or phantom, 1 when something is, 2 for bad arguments or an unreachable server.
"""

from __future__ import annotations

import json
import tempfile
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table
from sqlalchemy.exc import SQLAlchemyError

from reliamq.proving.plan import Plan, Rule
from reliamq.proving.proof import Progress, Proof, Result
from reliamq.proving.report import write_report
from reliamq.settings import masked
from reliamq.spi import ReliamqError

__all__ = ["prove"]

BAD_ARGUMENTS = 2


def prove(
    broker: Annotated[
        str | None, typer.Option(help="URL of the broker; default: embedded, in a temporary folder.")
    ] = None,
    database: Annotated[
        str | None, typer.Option(help="URL of the database; default: SQLite, in a temporary folder.")
    ] = None,
    messages: Annotated[
        int, typer.Option(min=1, help="Orders to place; one in twenty is rolled back on purpose.")
    ] = 2000,
    keys: Annotated[int, typer.Option(min=1, help="Accounts that they are spread over.")] = 100,
    input: Annotated[Path | None, typer.Option(help="Your own bodies instead: one JSON object a line.")] = None,
    applications: Annotated[int, typer.Option(min=1, help="Processes that place orders.")] = 2,
    relays: Annotated[int, typer.Option(min=1, help="Processes that relay the outbox.")] = 2,
    workers: Annotated[int, typer.Option(min=1, help="Processes that apply effects.")] = 2,
    kill_every: Annotated[float, typer.Option(min=0, help="Seconds between two kills; 0: none.")] = 0.5,
    seed: Annotated[int, typer.Option(help="Chooses accounts and victims.")] = 1,
    deadline: Annotated[float, typer.Option(min=0, help="Seconds for the rest after the last commit.")] = 60,
    report: Annotated[Path | None, typer.Option(help="Write a page about it to this HTML file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="End with one line of JSON.")] = False,
    broken: Annotated[
        Rule | None, typer.Option("--break", help="Break this rule on purpose; it must be caught.")
    ] = None,
) -> None:
    """Run orders through the whole pipeline, kill its processes, and count every message at the other end."""
    console = Console(stderr=as_json)
    try:
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="reliamq-prove-"))
            plan = Plan(
                broker=broker or f"embedded:///{folder}/broker.db",
                database=database or f"sqlite:///{folder}/database.db",
                folder=folder,
                topic=f"prove-{uuid.uuid4().hex[:8]}",
                messages=messages if input is None else _check_bodies(input),
                keys=keys,
                applications=applications,
                relays=relays,
                workers=workers,
                seed=seed,
                broken=broken,
                bodies=None if input is None else str(input.resolve()),
            )
            if report is not None and not report.resolve().parent.is_dir():
                raise _Refused(f"--report {report}: its folder does not exist")
            result = _run(plan, console, kill_every=kill_every, deadline=deadline)
            if report is not None:
                write_report(report, plan, result)
                console.print(f"report: {report}")
            _conclude(result, console, as_json=as_json)
    except (_Refused, ReliamqError) as error:
        _refuse(str(error))
    except (SQLAlchemyError, OSError) as error:
        _refuse(f"{masked(database or 'the temporary folder')}: cannot be used: {str(error).splitlines()[0]}")


class _Refused(Exception):
    """The arguments are wrong."""


def _refuse(text: str) -> None:
    typer.echo(f"reliamq prove: {text}", err=True)
    raise typer.Exit(BAD_ARGUMENTS)


def _check_bodies(path: Path) -> int:
    """How many bodies there are.  All are read before anything starts, so that nothing is half done."""
    count = 0
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    _check_body(path, number, line)
                    count += 1
    except (OSError, UnicodeDecodeError) as error:
        raise _Refused(f"--input {path}: cannot be read: {error}") from error
    if not count:
        raise _Refused(f"--input {path}: holds no line")
    return count


def _check_body(path: Path, number: int, line: str) -> None:
    try:
        body = json.loads(line)
    except ValueError as error:
        raise _Refused(f"--input {path}, line {number}: not valid JSON: {error}") from error
    if not isinstance(body, dict):
        raise _Refused(f"--input {path}, line {number}: must be a JSON object, not {type(body).__name__}")


def _run(plan: Plan, console: Console, *, kill_every: float, deadline: float) -> Result:
    with Live(console=console, refresh_per_second=8, transient=True) as live:

        def show(progress: Progress) -> None:
            live.update(_progress_table(progress, plan))

        proof = Proof(
            plan, kill_every=kill_every, deadline=deadline, show=show if console.is_terminal else _paced(console)
        )
        proof.prepare()
        return proof.run()


def _paced(console: Console) -> Callable[[Progress], None]:
    """Where there is no terminal, a line now and then."""
    shown = -5.0

    def show(progress: Progress) -> None:
        nonlocal shown
        if progress.seconds - shown >= 5:
            shown = progress.seconds
            console.print(
                f"{progress.seconds:5.0f} s  committed {progress.committed}  confirmed {progress.confirmed}"
                f"  effects {progress.effects}  kills {progress.kills}  {progress.phase}"
            )

    return show


def _progress_table(progress: Progress, plan: Plan) -> Table:
    table = Table.grid(padding=(0, 2))
    orders = plan.messages - plan.messages // 20
    for name, value in (
        ("committed", f"{progress.committed}/{orders}"),
        ("confirmed", str(progress.confirmed)),
        ("delivered", str(progress.delivered)),
        ("effects", f"{progress.effects}/{orders}"),
        ("kills", str(progress.kills)),
    ):
        table.add_row(name, f"[bold]{value}[/]")
    table.add_row(progress.phase, f"{progress.seconds:.0f} s")
    return table


def _conclude(result: Result, console: Console, *, as_json: bool) -> None:
    verdict = result.verdict
    for crash in result.crashes:
        console.print(f"[yellow]a process ended by itself: {crash}[/]")
    for what, ids in verdict.examples.items():
        console.print(f"[red]{what}[/]: {', '.join(ids)}")
    console.print(
        f"{verdict.committed} committed · {verdict.confirmed} confirmed · {verdict.effects} effects · "
        f"{verdict.redelivered} redelivered · {len(result.kills)} kills · {result.seconds:.1f} s"
    )
    if result.interrupted:
        console.print("[yellow]interrupted: this is the ledger so far[/]")
    good = verdict.holds
    line = f"lost {verdict.lost} · doubled {verdict.doubled} · reordered {verdict.reordered}"
    if verdict.phantom or verdict.false_confirms or verdict.unbalanced:
        line += (
            f" · phantom {verdict.phantom} · false confirms {verdict.false_confirms} · unbalanced {verdict.unbalanced}"
        )
    console.print(f"[bold {'green' if good else 'red'}]{line}[/]", highlight=False)
    if as_json:
        counters = asdict(verdict)
        del counters["examples"]
        typer.echo(
            json.dumps(
                {
                    "messages": verdict.committed,
                    **counters,
                    "kills": len(result.kills),
                    "seconds": round(result.seconds, 3),
                    "interrupted": result.interrupted,
                }
            )
        )
    raise typer.Exit(0 if good else 1)
