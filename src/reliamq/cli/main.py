"""All commands under one name.  Each lives in a module of its own; what they have in common is in ``target``."""

from __future__ import annotations

import typer

from reliamq.cli import audit, backends, dead_letters, outbox, publish, relay, run
from reliamq.proving.command import prove

__all__ = ["main"]

app = typer.Typer(
    name="reliamq",
    help="Every message from a committed business transaction to a finished effect: none lost, none applied twice.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,  # locals hold secrets
)
app.command("run")(run.run)
app.command("relay")(relay.relay)
app.command("publish")(publish.publish)
app.command("audit")(audit.audit)
app.command("backends")(backends.backends)
app.command("prove")(prove)
app.add_typer(dead_letters.commands, name="dead-letters")
app.add_typer(outbox.commands, name="outbox")


def main() -> None:
    """The entry point ``reliamq``."""
    app()
