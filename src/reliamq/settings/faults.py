"""What is said of wrong settings: which one, where it came from, what it must be.  Values are not repeated: one may be
a secret.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from reliamq.settings.durations import FORMS
from reliamq.settings.sources import nearest, variable
from reliamq.spi import ConfigurationError

__all__ = ["ENVIRONMENT", "ENV_FILE", "PYPROJECT", "SETTINGS_FILE", "Origins", "clear_faults"]

SETTINGS_FILE = Path("reliamq.toml")
PYPROJECT = Path("pyproject.toml")
ENVIRONMENT, ENV_FILE = "the environment", ".env"
Origins = Callable[[], Sequence[tuple[str, Mapping[str, Any]]]]
"""What each source says, the strongest first; asked only when something is wrong."""

_reading: ContextVar[bool] = ContextVar("reading", default=False)
_SENTENCES = {
    "extra_forbidden": "is unknown",
    "int": "must be a whole number",
    "time_delta": f"must be {FORMS}",
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "string": "must be text",
    "model": "is a section, with fields of its own",
    "dict": "is a section, with fields of its own",
    "value_error": "{error}",
}


@contextmanager
def clear_faults(model: type[BaseModel], origins: Origins) -> Iterator[None]:
    """Turn what goes wrong while settings are read into one ConfigurationError."""
    if _reading.get():  # a section inside of settings: its faults are told with the others
        yield
        return
    token = _reading.set(True)
    try:
        yield
    except ValidationError as error:
        faults = error.errors(include_url=False, include_input=False)
        raise ConfigurationError("; ".join(_sentence(model, one, origins) for one in faults)) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigurationError(_of_a_file(error)) from error
    except ValueError as error:  # pydantic-settings: a variable that is not the JSON which its field needs
        raise ConfigurationError(f"settings: {error}") from error
    finally:
        _reading.reset(token)


def _sentence(model: type[BaseModel], fault: Any, origins: Origins) -> str:
    path = tuple(str(part) for part in fault["loc"])
    kind = fault["type"]
    text = _SENTENCES.get(kind) or _SENTENCES.get(kind.rpartition("_")[0]) or _SENTENCES.get(kind.partition("_")[0])
    said = fault["msg"] if text is None else text.format(**fault.get("ctx", {}))
    said = re.sub(r"\b(\d+)000 microseconds", r"\1 ms", said)  # how pydantic writes a bound of 100 ms
    if kind == "extra_forbidden":
        said += nearest(path[-1], _fields(model, path[:-1]))
    return f"setting {_place(path, origins)} {said}" if path else said


def _fields(model: type[BaseModel], path: tuple[str, ...]) -> Sequence[str]:
    """The names that a section has."""
    for name in path:
        annotation = model.model_fields[name].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return ()
        model = annotation
    return list(model.model_fields)


def _place(path: tuple[str, ...], origins: Origins) -> str:
    """The setting and the source that its value came from."""
    for where, values in origins():
        if _has(values, path):
            return (
                f"{variable(*path)} in {where}"
                if where in (ENVIRONMENT, ENV_FILE)
                else f"'{'.'.join(path)}' in {where}"
            )
    return f"'{'.'.join(path)}'"


def _has(values: Any, path: tuple[str, ...]) -> bool:
    for name in path:
        if not isinstance(values, Mapping) or name not in values:
            return False
        values = values[name]
    return True


def _of_a_file(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}"
    return f"{_broken_file()}: {error}"


def _broken_file() -> str:
    for path in (SETTINGS_FILE, PYPROJECT, Path(ENV_FILE)):
        try:
            text = path.read_text(encoding="utf-8") if path.exists() else ""
            tomllib.loads(text if path.suffix == ".toml" else "")
        except UnicodeDecodeError:
            return f"{path}: not UTF-8"
        except tomllib.TOMLDecodeError:
            return f"{path}: not valid TOML"
    return "settings"
