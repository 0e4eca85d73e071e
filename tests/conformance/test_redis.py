"""Redis and Valkey keep every promise: a primary with a replica, behind Sentinels, and as a Cluster."""

from collections.abc import Iterator

import pytest
from _pytest.mark.structures import ParameterSet

from reliamq.backends import open_backend
from reliamq.testing.conformance import *  # noqa: F403  # the kit's tests
from reliamq.testing.harness import MakeBackend

KINDS = ("redis", "valkey")
DEPLOYMENTS = {"pair": "url", "sentinel": "sentinel_url", "cluster": "cluster_url"}


def deployments() -> Iterator[ParameterSet]:
    """All of both kinds; those of Valkey that find their servers as Redis does are long forms."""
    for kind in KINDS:
        for deployment in DEPLOYMENTS:
            marks = [pytest.mark.xdist_group(kind)]
            if kind == "valkey" and deployment != "pair":
                marks.append(pytest.mark.slow)
            yield pytest.param((kind, deployment), marks=marks, id=f"{kind}-{deployment}")


@pytest.fixture(params=list(deployments()))
def make_backend(request: pytest.FixtureRequest) -> MakeBackend:
    kind, deployment = request.param
    servers = request.getfixturevalue(kind)
    url = getattr(servers, DEPLOYMENTS[deployment])
    return lambda: open_backend(url, {"redis": {"lanes": 4}})
