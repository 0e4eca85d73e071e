"""reliamq: every message from a committed business transaction to a finished effect, none lost, none applied twice.

The public names are loaded when they are first used (PEP 562), so that a backend which imports ``reliamq.spi`` pays for
nothing else.
"""
