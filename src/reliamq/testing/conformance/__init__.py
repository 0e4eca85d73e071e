"""The conformance kit: every promise that a backend makes, as tests.

    from reliamq.testing.conformance import *

    @pytest.fixture
    def make_backend():
        return lambda: MyBackend("mybroker://localhost")

``make_backend`` gives a function that makes another handle on the same broker each time it is called.  Some tests start
another process, which makes its backend from a URL as an application does: the plugin must be installed, and where
``Backend.url`` leaves out what is needed to connect, a fixture ``backend_url`` gives the whole URL.
"""

from reliamq.testing.conformance.consuming import *  # noqa: F403  # the tests are meant to be collected by the importer
from reliamq.testing.conformance.dead_letters import *  # noqa: F403  # as above
from reliamq.testing.conformance.publishing import *  # noqa: F403  # as above
from reliamq.testing.conformance.retrying import *  # noqa: F403  # as above
from reliamq.testing.conformance.storage import *  # noqa: F403  # as above
from reliamq.testing.plugin import anyio_backend as anyio_backend, backend_url as backend_url, stage as stage
