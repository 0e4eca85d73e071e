"""A proof on the terminal: how far it is, and what came of it; as one line of JSON for programs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from reliamq.proving.plan import Plan
from reliamq.proving.proof import Progress, Result

__all__ = ["print_result", "progress_shower", "result_json"]

SAY_EVERY = 5.0


def progress_shower(live: Live, plan: Plan) -> Callable[[Progress], None]:
    """A table that changes on a terminal; where there is none, a line now and then."""
    if not live.console.is_terminal:
        return _paced(live.console)
    return lambda progress: live.update(_progress_table(progress, plan))


def _paced(console: Console) -> Callable[[Progress], None]:
    shown = -SAY_EVERY

    def show(progress: Progress) -> None:
        nonlocal shown
        if progress.seconds - shown >= SAY_EVERY:
            shown = progress.seconds
            console.print(
                f"{progress.seconds:5.0f} s  committed {progress.committed}  confirmed {progress.confirmed}"
                f"  effects {progress.effects}  kills {progress.kills}{_of_brokers(progress.broker_kills)}"
                f"  {progress.phase}",
                soft_wrap=True,
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
        ("kills", f"{progress.kills}{_of_brokers(progress.broker_kills)}"),
    ):
        table.add_row(name, f"[bold]{value}[/]")
    table.add_row(progress.phase, f"{progress.seconds:.0f} s")
    return table


def _of_brokers(kills: int) -> str:
    return f" and {kills} of brokers" if kills else ""


def print_result(result: Result, console: Console) -> None:
    """What went wrong, the counters, and the verdict as the last line."""
    verdict = result.verdict

    def say(line: str, style: str = "") -> None:
        console.print(line, style=style or None, markup=False, soft_wrap=True)  # a log's words are no markup

    for crash, times in Counter(result.crashes).items():
        say(f"a process ended by itself: {crash}{f' ({times} times)' if times > 1 else ''}", "yellow")
    for what, ids in verdict.examples.items():
        say(f"{what}: {', '.join(ids)}", "red")
    if result.unplaced:
        say(f"{result.unplaced} of {result.messages} planned orders were not placed", "red")
    say(
        f"{verdict.committed} committed · {verdict.confirmed} confirmed · {verdict.effects} effects · "
        f"{verdict.redelivered} redelivered · {len(result.kills)} kills{_of_brokers(len(result.broker_kills))} · "
        f"{result.seconds:.1f} s"
    )
    if result.interrupted:
        say(f"interrupted: this is the ledger so far; {verdict.in_flight} in flight, not judged", "yellow")
    console.print(_line(result), style="bold green" if result.holds else "bold red", highlight=False, soft_wrap=True)


def _line(result: Result) -> str:
    verdict = result.verdict
    line = f"lost {verdict.lost} · doubled {verdict.doubled} · reordered {verdict.reordered}"
    if verdict.phantom or verdict.false_confirms or verdict.unbalanced:
        line += (
            f" · phantom {verdict.phantom} · false confirms {verdict.false_confirms} · unbalanced {verdict.unbalanced}"
        )
    if result.unplaced or result.crashes:
        line += f" · not placed {result.unplaced} · crashes {len(result.crashes)}"
    return line


def result_json(result: Result) -> str:
    """One line; committed and rolled_back are all of messages, unless it was interrupted."""
    counters: dict[str, Any] = asdict(result.verdict)
    del counters["examples"]
    return json.dumps(
        {
            "messages": result.messages,
            "rolled_back": result.rolled_back,
            **counters,
            "unplaced": result.unplaced,
            "crashes": len(result.crashes),
            "kills": len(result.kills),
            "broker_kills": len(result.broker_kills),
            "seconds": round(result.seconds, 3),
            "interrupted": result.interrupted,
        }
    )
