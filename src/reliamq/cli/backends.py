"""``reliamq backends``: which plugins are installed and what each can do."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from reliamq.backends import InstalledBackend, capabilities_of, installed_backends
from reliamq.spi import Durability, ReliamqError

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
    described: dict[str, Any] = {
        "name": backend.name,
        "distribution": backend.distribution,
        "fault": backend.fault,
        "schemes": {},
    }
    for scheme in backend.schemes:
        try:
            capabilities = asdict(capabilities_of(scheme))
        except ReliamqError:  # it needs a whole URL to tell; its plugin is sound
            capabilities = {}
        described["schemes"][scheme] = {
            name: value.name.lower() if isinstance(value, Durability) else value for name, value in capabilities.items()
        }
    return described


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
