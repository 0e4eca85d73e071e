"""The command line: ``reliamq run``, ``relay``, ``publish``, ``audit``, ``dead-letters``, ``outbox``, ``backends``,
``prove``.

Exit codes: 0 all is well, 1 the command found something wrong, 2 bad arguments, configuration or an unreachable server.
"""

from reliamq.cli.main import main as main
