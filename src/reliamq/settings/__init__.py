"""Settings: what differs between a laptop and production, and nothing that belongs in code.

Read from, highest first: arguments, environment (``RELIAMQ_BROKER``, ``RELIAMQ_WORKER__LEASE``), ``.env``,
``reliamq.toml``, the table ``[tool.reliamq]`` of ``pyproject.toml``.  A wrong value names its field and where it came
from; a name that is none of ours is refused; secrets are masked wherever they are shown.
"""

from reliamq.settings.masking import masked as masked
from reliamq.settings.model import (
    OutboxSettings as OutboxSettings,
    PublisherSettings as PublisherSettings,
    RelaySettings as RelaySettings,
    Settings as Settings,
    WorkerSettings as WorkerSettings,
    load_settings as load_settings,
)
