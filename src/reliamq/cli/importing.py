"""Finding the application that ``MODULE:APP`` names, and saying in one line why it cannot be had.

The line has the module, the fault and the user's own last line.  The whole traceback is shown where the environment
has ``RELIAMQ_TRACEBACK``.
"""

from __future__ import annotations

import importlib
import os
import sys
import sysconfig
import traceback
from operator import attrgetter
from pathlib import Path
from types import ModuleType

from reliamq.app import Reliamq
from reliamq.spi import ConfigurationError

__all__ = ["TRACEBACK", "import_app"]

TRACEBACK = "RELIAMQ_TRACEBACK"


def import_app(target: str) -> Reliamq:
    """Import ``module:app`` with the working directory on the path; ``app`` may have dots.

    Raises ConfigurationError, whatever it is that goes wrong in the module.
    """
    module_name, _, attribute = target.partition(":")
    _check_name(target, module_name, attribute)
    if "" not in sys.path:
        sys.path.insert(0, "")
    module = _import(module_name)
    try:
        app = attrgetter(attribute)(module)
    except AttributeError as error:
        raise ConfigurationError(f"module '{module_name}' has no '{attribute}'") from error
    if not isinstance(app, Reliamq):
        kind = type(app).__name__
        raise ConfigurationError(f"'{attribute}' in module '{module_name}' is not a Reliamq, but of type {kind}")
    return app


def _check_name(target: str, module_name: str, attribute: str) -> None:
    if _is_dotted(module_name) and _is_dotted(attribute):
        if module_name.endswith(".py"):
            raise ConfigurationError(f"'{target}' names a file; write {_as_module(module_name)}:{attribute}")
        return
    suggestion = f"{_as_module(module_name)}:{attribute or 'app'}"
    wrote_a_path = _is_dotted(_as_module(module_name)) and _is_dotted(attribute or "app")
    raise ConfigurationError(
        f"'{target}' is not MODULE:APP; write {suggestion if wrote_a_path else 'something like orders:app'}"
    )


def _is_dotted(name: str) -> bool:
    return all(part.isidentifier() for part in name.split("."))


def _as_module(path: str) -> str:
    """``pkg/main.py`` as ``pkg.main``."""
    plain = path.removesuffix(".py").replace("\\", "/").strip("./")
    return plain.replace("/", ".")


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # an import runs any code; SystemExit too must not end us in silence
        if os.environ.get(TRACEBACK):
            traceback.print_exc()
        if isinstance(error, ModuleNotFoundError) and error.name and _is_part(error.name, name):
            raise ConfigurationError(f"there is no module '{error.name}' here or among what is installed") from error
        raise ConfigurationError(f"module '{name}' cannot be imported: {_fault(error)}") from error


def _is_part(found: str, whole: str) -> bool:
    return whole == found or whole.startswith(f"{found}.")


def _fault(error: BaseException) -> str:
    more = "" if os.environ.get(TRACEBACK) else f"; set {TRACEBACK}=1 for the traceback"
    where = _where(error)
    at = f" ({where})" if where else ""
    said = " ".join(str(error.msg if isinstance(error, SyntaxError) else error).split())
    return f"{type(error).__name__}: {said}{at}{more}"


def _where(error: BaseException) -> str | None:
    """The user's own last line: not Python's, not an installed package's."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_the_users(frame.filename)]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else None


def _is_the_users(file: str) -> bool:
    if file.startswith("<"):
        return False
    paths = sysconfig.get_paths()
    others = {paths["stdlib"], paths["purelib"], paths["platlib"], str(Path(__file__).parent.parent)}
    return not any(file.startswith(f"{other}{os.sep}") for other in others)
