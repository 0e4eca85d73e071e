"""For people who write a backend or an application: the conformance kit and backends that are broken on purpose.

Needs pytest, which the extra ``reliamq[testing]`` brings.
"""

try:
    import pytest  # noqa: F401  # a missing one is said here, once
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "reliamq.testing needs pytest; run: pip install 'reliamq[testing]'", name="pytest"
    ) from error
