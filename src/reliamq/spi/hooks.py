"""How a backend is found and made: two pluggy hooks, and a third for one that can keep leases, too.

A backend's module is named by an entry point in the group ``reliamq.backends``; the entry point's name is the
backend's.  pluggy is for finding and configuring only; the message path is plain typed calls.
"""

from __future__ import annotations

from collections.abc import Mapping

import pluggy

from reliamq.spi.capabilities import Capabilities
from reliamq.spi.contracts import Backend
from reliamq.spi.durability import Durability
from reliamq.spi.stores import Leases

__all__ = ["ENTRY_POINT_GROUP", "WORKER_NUMBER", "BackendHooks", "hookimpl", "hookspec"]

ENTRY_POINT_GROUP = "reliamq.backends"
WORKER_NUMBER = "RELIAMQ_WORKER_NUMBER"
"""The environment variable by which a worker process of ``reliamq run`` knows which one it is, from 0; it stays the
same when the process is restarted.  For a backend that gives its members names."""
hookspec = pluggy.HookspecMarker("reliamq")
hookimpl = pluggy.HookimplMarker("reliamq")


class BackendHooks:
    """What a plugin implements, as module-level functions marked with ``hookimpl``."""

    @hookspec
    def reliamq_schemes(self) -> Mapping[str, Capabilities]:  # type: ignore[empty-body]  # a specification has no body
        """The URL schemes that the backend serves (``redis``, ``rediss``), with the most that it can do there.

        A backend that was made for a URL may say less in its own ``capabilities``, never more.
        """

    @hookspec(firstresult=True)
    def reliamq_backend(self, url: str, settings: Mapping[str, object]) -> Backend:  # type: ignore[empty-body]  # as there
        """Make the backend for ``url``; no I/O.

        settings: the backend's own section of the configuration, unchecked.
        Raises ConfigurationError naming the field or the part of the URL that is wrong.
        """

    @hookspec(firstresult=True)
    def reliamq_leases(  # type: ignore[empty-body]  # as there
        self, url: str, settings: Mapping[str, object], durability: Durability
    ) -> Leases:
        """Make what keeps leases and locks at ``url``; no I/O.  Left out by a backend that cannot.

        settings: as above.  durability: what a lease and the mark of an effect must survive.
        Raises ConfigurationError as above.
        """
