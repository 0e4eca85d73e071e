"""What would weaken a promise on Kafka cannot be set, and is refused by its name (P1 C1)."""

from __future__ import annotations

import pytest

from reliamq import ConfigurationError
from reliamq_kafka.settings import FORBIDDEN, read_settings


@pytest.mark.parametrize("setting", FORBIDDEN)
def test_a_setting_that_weakens_a_promise_is_refused_by_name_in_the_section_and_in_the_url(setting: str) -> None:
    with pytest.raises(ConfigurationError, match=setting):
        read_settings("kafka://127.0.0.1", {setting: "1"})
    with pytest.raises(ConfigurationError, match=setting):
        read_settings(f"kafka://127.0.0.1?{setting}=1", {})


@pytest.mark.parametrize("query", ["min_insync_replicas=4", "partitions=0", "partition=3", "session_timeout_seconds=x"])
def test_a_wrong_value_or_a_misspelt_name_is_named(query: str) -> None:
    with pytest.raises(ConfigurationError, match=query.partition("=")[0]):
        read_settings(f"kafka://127.0.0.1?{query}", {})
