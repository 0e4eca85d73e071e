"""``reliamq audit``: the live settings of broker and database, checked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console

from reliamq.app import Reliamq
from reliamq.audit import audit_database, audit_durability, findings_table, loses_messages, to_json
from reliamq.cli.target import load_app, refuse, run_async
from reliamq.database import open_engine
from reliamq.settings import load_settings
from reliamq.spi import ConfigurationError, Finding

__all__ = ["audit"]


def audit(
    target: Annotated[
        str | None, typer.Argument(metavar="[MODULE:APP]", help="The application, for its topics.")
    ] = None,
    broker: Annotated[str | None, typer.Option(help="Audit this broker instead of the configured one.")] = None,
    database: Annotated[str | None, typer.Option(help="Audit this database instead of the configured one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False,
) -> None:
    """Read the live values and say what loses messages; nothing is created.  Exit code 1 if something does."""
    if target is not None and (broker or database):
        refuse("give either MODULE:APP or --broker and --database, not both")
    app = load_app(target) if target is not None else _bare(broker, database)
    findings = run_async(lambda: _findings(app))
    if as_json:
        typer.echo(json.dumps(to_json(findings)))
    elif findings:
        Console().print(findings_table(findings))
    else:
        typer.echo("nothing found: every value that was read is safe")
    raise typer.Exit(1 if loses_messages(findings) else 0)


def _bare(broker: str | None, database: str | None) -> Reliamq:
    given = {name: value for name, value in (("broker", broker), ("database", database)) if value is not None}
    try:
        return Reliamq(load_settings(**given))
    except ConfigurationError as error:
        refuse(str(error))


async def _findings(app: Reliamq) -> Sequence[Finding]:
    findings = [*audit_durability(app.backend, app.settings.durability), *await app.audit()]
    if app.settings.database is not None:
        async with open_engine(app.settings.database) as engine:
            findings += await audit_database(engine)
    return findings
