"""Rows on a terminal as a table, and into a pipe or file as one line each, its values parted by tabs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["print_rows"]


def print_rows(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """The first column is what other commands are given, so it is never folded or cut."""
    console = Console()
    if not console.is_terminal:
        for row in rows:
            typer.echo("\t".join(" ".join(value.split()) for value in row))
        return
    table = Table()
    for index, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=index == 0)
    for row in rows:
        table.add_row(*(Text(value) for value in row))  # text of others, and no markup
    console.print(table)
