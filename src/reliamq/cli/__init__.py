"""The command line: ``reliamq run``, ``relay``, ``publish``, ``audit``, ``dead-letters``, ``outbox``, ``backends``,
``prove``.

Exit codes: 0 all is well, 1 the command found something wrong, 2 bad arguments, input, configuration or an unreachable
server, 75 (a worker process, to its supervisor) broker or database are away: try again, 130 ``prove`` was interrupted.
"""
