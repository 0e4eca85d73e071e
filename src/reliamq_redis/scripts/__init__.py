"""What is done on the server in one step, so that nothing comes between (Lua; Redis documentation, "Scripting").

One file each; what it takes and returns is said at its head.
"""

from __future__ import annotations

from hashlib import sha1
from importlib.resources import files

__all__ = ["Script", "script"]


class Script:
    """name: of its file.  text: its source.  digest: by which a server knows it once it has run it."""

    __slots__ = ("digest", "name", "text")

    def __init__(self, name: str, text: str) -> None:
        self.name, self.text = name, text
        self.digest = sha1(text.encode(), usedforsecurity=False).hexdigest()

    def __repr__(self) -> str:
        return f"<Script {self.name}>"


def script(name: str) -> Script:
    """The script in ``name.lua``."""
    return Script(name, files(__name__).joinpath(f"{name}.lua").read_text())
