"""URLs without their secrets, fit for logs and errors."""

from __future__ import annotations

import re

__all__ = ["masked"]

# Rather too much than too little: whatever stands before the last at sign may be part of an unquoted password.
_PASSWORD = re.compile(r"(?P<user>://[^:@]*):.*@", re.DOTALL)
_SECRET_PARAMETER = re.compile(r"(?P<name>[?&][^=&#]*(?:password|secret|token|key)[^=&#]*=)[^&#]*", re.IGNORECASE)


def masked(url: str) -> str:
    """The URL with its password and secret-looking parameters hidden."""
    return _SECRET_PARAMETER.sub(r"\g<name>***", _PASSWORD.sub(r"\g<user>:***@", url))
