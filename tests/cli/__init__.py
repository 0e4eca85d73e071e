import sys

RELIAMQ = (sys.executable, "-c", "from reliamq.cli.main import main; main()")
"""The command, wherever it is installed."""
