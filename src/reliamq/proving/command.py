"""``reliamq prove``: the command line of the prover.

Says what it does while it does it, and ends with the verdict and an exit code: 0 when nothing is lost, doubled,
reordered or phantom and all was placed, 1 when not, 2 for bad arguments or an unreachable server, 130 when interrupted
and nothing was wrong so far.
"""

from __future__ import annotations

import os
import signal
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.live import Live
from sqlalchemy.exc import SQLAlchemyError

from reliamq.proving.bodies import copy_bodies
from reliamq.proving.brokers import BrokerCommand, BrokerKiller
from reliamq.proving.plan import Plan, Rule
from reliamq.proving.proof import Proof, Result
from reliamq.proving.report import write_report
from reliamq.proving.showing import print_result, progress_shower, result_json
from reliamq.settings import masked
from reliamq.spi import ConfigurationError, ReliamqError

__all__ = ["prove"]

WRONG = 1
BAD_ARGUMENTS = 2
INTERRUPTED = 130
DEFAULT_MESSAGES = 2000
DEFAULT_BROKER_PAUSE = 5.0


def prove(
    broker: Annotated[
        str | None, typer.Option(help="URL of the broker; default: embedded, in a temporary folder.")
    ] = None,
    database: Annotated[
        str | None, typer.Option(help="URL of the database; default: SQLite, in a temporary folder.")
    ] = None,
    messages: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Orders to place; one in twenty is rolled back on purpose.",
            show_default=str(DEFAULT_MESSAGES),
        ),
    ] = None,
    keys: Annotated[int, typer.Option(min=1, help="Accounts that they are spread over.")] = 100,
    input: Annotated[
        Path | None,
        typer.Option(help="Your own bodies instead: one JSON object a line; '-' for standard input.", allow_dash=True),
    ] = None,
    applications: Annotated[int, typer.Option(min=1, help="Processes that place orders.")] = 2,
    relays: Annotated[int, typer.Option(min=1, help="Processes that relay the outbox.")] = 2,
    workers: Annotated[int, typer.Option(min=1, help="Processes that apply effects.")] = 2,
    kill_every: Annotated[float, typer.Option(min=0, help="Seconds between two kills of processes; 0: none.")] = 0.5,
    kill_broker: Annotated[
        str | None,
        typer.Option(
            metavar="COMMAND",
            help="Kill brokers too, one at a time: 'COMMAND list' names them, 'COMMAND kill NAME' kills one, "
            "'COMMAND start NAME' starts it and returns when it has caught up.",
        ),
    ] = None,
    kill_broker_every: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            help="Seconds from when all brokers are whole to the next kill of one.",
            show_default=f"{DEFAULT_BROKER_PAUSE:.0f}",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Chooses accounts and victims.")] = 1,
    deadline: Annotated[
        float, typer.Option(min=0, help="Seconds for the rest, when all is committed and all brokers are whole.")
    ] = 60,
    report: Annotated[Path | None, typer.Option(help="Write a page about it to this HTML file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="End with one line of JSON.")] = False,
    broken: Annotated[
        Rule | None, typer.Option("--break", help="Break this rule on purpose; it must be caught.")
    ] = None,
) -> None:
    """Run orders through the whole pipeline, kill its processes, and count every message at the other end.

    Exit code 0: nothing is lost, doubled, reordered or phantom.

    1: something is, or orders were not placed, or a process ended by itself.

    2: bad arguments or an unreachable server.

    130: Ctrl-C or SIGTERM, and nothing is wrong; what was in flight is not judged.
    """
    with (
        _clear_ends(database),
        _interrupted_by_sigterm(),
        tempfile.TemporaryDirectory(prefix="reliamq-prove-") as folder,
    ):
        _check_report(report)
        pace = _Pace(kill_every, _broker_killer(kill_broker, kill_broker_every, seed), deadline)
        plan = Plan(
            broker=broker or f"embedded:///{folder}/broker.db",
            database=database or f"sqlite:///{folder}/database.db",
            folder=folder,
            topic=f"prove-{uuid.uuid4().hex[:8]}",
            messages=_how_many(messages, input, folder, keys),
            keys=keys,
            applications=applications,
            relays=relays,
            workers=workers,
            seed=seed,
            broken=broken,
            bodies=None if input is None else str(_copy_in(folder)),
        )
        _prove(plan, pace, report, as_json=as_json)


@dataclass(frozen=True, slots=True)
class _Pace:
    kill_every: float
    brokers: BrokerKiller
    deadline: float


def _prove(plan: Plan, pace: _Pace, report: Path | None, *, as_json: bool) -> NoReturn:
    """Run it and say what came of it; the verdict comes before the page, which may fail."""
    console = Console(stderr=as_json)
    result = _run(plan, pace, console)
    print_result(result, console)
    if as_json:
        typer.echo(result_json(result))
    code = _exit_code(result)
    if report is not None:
        code = _write(report, plan, result, console) or code
    raise typer.Exit(code)


def _run(plan: Plan, pace: _Pace, console: Console) -> Result:
    with Live(console=console, refresh_per_second=8, transient=True) as live:
        proof = Proof(
            plan,
            kill_every=pace.kill_every,
            brokers=pace.brokers,
            deadline=pace.deadline,
            show=progress_shower(live, plan),
        )
        proof.prepare()
        return proof.run()


def _exit_code(result: Result) -> int:
    if not result.holds:
        return WRONG
    return INTERRUPTED if result.interrupted else 0


def _write(report: Path, plan: Plan, result: Result, console: Console) -> int:
    """The exit code that a page which cannot be written has, unless the verdict has one; 0 when it is there."""
    try:
        write_report(report, plan, result)
    except OSError as error:
        typer.echo(f"reliamq prove: --report {report}: cannot be written: {error.strerror or error}", err=True)
        return _exit_code(result) or BAD_ARGUMENTS
    console.print(f"report: {report}", soft_wrap=True)
    return 0


# --- arguments --------------------------------------------------------------------------------------------------------


def _how_many(messages: int | None, input: Path | None, folder: str, keys: int) -> int:
    if input is None:
        return DEFAULT_MESSAGES if messages is None else messages
    if messages is not None:
        raise ConfigurationError("--messages and --input: give one; with --input each of its lines is an order")
    return copy_bodies(input, _copy_in(folder), keys=keys)


def _broker_killer(command: str | None, every: float | None, seed: int) -> BrokerKiller:
    if command is None and every is not None:
        raise ConfigurationError("--kill-broker-every: give --kill-broker, or there is nothing to kill brokers with")
    parsed = None if command is None else BrokerCommand(command)
    return BrokerKiller(parsed, every=DEFAULT_BROKER_PAUSE if every is None else every, seed=seed)


def _copy_in(folder: str) -> Path:
    return Path(folder) / "bodies.ndjson"


def _check_report(report: Path | None) -> None:
    """Before anything runs: a path that cannot be written must not cost the verdict."""
    if report is None:
        return
    folder = report.resolve().parent
    if report.is_dir():
        raise ConfigurationError(f"--report {report}: is a folder; name a file such as report.html")
    if not folder.is_dir():
        raise ConfigurationError(f"--report {report}: its folder does not exist")
    if not os.access(report if report.exists() else folder, os.W_OK):
        raise ConfigurationError(f"--report {report}: cannot be written there")


# --- the ends ---------------------------------------------------------------------------------------------------------


@contextmanager
def _clear_ends(database: str | None) -> Iterator[None]:
    """What goes wrong as one line and an exit code."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("reliamq prove: interrupted before there was anything to judge", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except ReliamqError as error:
        _refuse(str(error))
    except (SQLAlchemyError, OSError) as error:
        _refuse(f"{masked(database or 'the temporary folder')}: cannot be used: {str(error).splitlines()[0]}")


def _refuse(text: str) -> NoReturn:
    typer.echo(f"reliamq prove: {text}", err=True)
    raise typer.Exit(BAD_ARGUMENTS)


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """SIGTERM as Ctrl-C: processes are ended and the temporary folder goes."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
