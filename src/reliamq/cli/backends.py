"""``reliamq backends``: which plugins are installed and what each can do."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from reliamq.backends import InstalledBackend, installed_backends

__all__ = ["backends"]


def backends(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False) -> None:
    """List installed backends.  Exit code 1 if one of them is broken."""
    found = installed_backends()
    described = [_describe(one) for one in found]
    if as_json:
        typer.echo(json.dumps(described))
    else:
        Console().print(_table(described))
    raise typer.Exit(1 if any(one.fault for one in found) else 0)


def _describe(backend: InstalledBackend) -> dict[str, Any]:
    schemes = {
        scheme: asdict(capabilities) | {"durability": capabilities.durability.name.lower()}
        for scheme, capabilities in backend.schemes.items()
    }
    return {
        "name": backend.name,
        "distribution": backend.distribution,
        "fault": backend.fault,
        "schemes": schemes,
    }


def _table(described: list[dict[str, Any]]) -> Table:
    table = Table(show_lines=True)
    for column in ("backend", "from", "scheme", "what it can do"):
        table.add_column(column, overflow="fold")
    for one in described:
        if one["fault"]:
            table.add_row(one["name"], one["distribution"], "", f"[red]{one['fault']}[/]")
        for scheme, capabilities in one["schemes"].items():
            lines = "\n".join(f"{name.replace('_', ' ')}: {value}" for name, value in capabilities.items())
            table.add_row(one["name"], one["distribution"], f"{scheme}://", lines)
    return table
