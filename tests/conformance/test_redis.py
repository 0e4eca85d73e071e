"""Redis and Valkey keep every promise: a primary with a replica, behind Sentinels, and as a Cluster."""

import pytest

from reliamq.backends import open_backend
from reliamq.testing.conformance import *  # noqa: F403  # the kit's tests
from reliamq.testing.harness import MakeBackend

KINDS = ("redis", "valkey")
DEPLOYMENTS = {"pair": "url", "sentinel": "sentinel_url", "cluster": "cluster_url"}


@pytest.fixture(
    params=[
        pytest.param((kind, deployment), marks=pytest.mark.xdist_group(kind), id=f"{kind}-{deployment}")
        for kind in KINDS
        for deployment in DEPLOYMENTS
    ]
)
def make_backend(request: pytest.FixtureRequest) -> MakeBackend:
    kind, deployment = request.param
    servers = request.getfixturevalue(kind)
    url = getattr(servers, DEPLOYMENTS[deployment])
    return lambda: open_backend(url, {"redis": {"lanes": 4}})
