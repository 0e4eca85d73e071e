"""From a URL to a backend: scheme, entry point, plugin.

Only the plugin that is asked for is loaded, so a broken neighbour harms nobody.  An unknown scheme, a missing extra and
a broken plugin are three different errors that each say what to do.  The backend's own configuration is checked by the
backend.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points

import pluggy

from reliamq.spi import (
    ENTRY_POINT_GROUP,
    Backend,
    BackendHooks,
    BrokenPlugin,
    Capabilities,
    ConfigurationError,
    Durability,
    Leases,
    MissingExtra,
    UnknownScheme,
)

__all__ = ["InstalledBackend", "installed_backends", "open_backend", "open_leases"]

OUR_DISTRIBUTION = "reliamq"


@dataclass(frozen=True, slots=True)
class InstalledBackend:
    """One installed plugin.

    schemes: the URL schemes that it serves, with what it can do.  fault: why it cannot be used, or None.
    """

    name: str
    distribution: str
    schemes: Mapping[str, Capabilities] = field(default_factory=dict)
    fault: str | None = None


def open_backend(url: str, sections: Mapping[str, Mapping[str, object]] | None = None) -> Backend:
    """Make the backend that serves the URL's scheme; no I/O to a broker.

    sections: configuration by backend name.
    Raises UnknownScheme, MissingExtra, BrokenPlugin; ConfigurationError for a URL that the backend refuses and for a
    section of no installed backend.
    """
    point, plugins, section = _found("broker", url, sections or {}, "embedded:///app.db")
    backend = plugins.hook.reliamq_backend(url=url, settings=section)
    if not isinstance(backend, Backend):
        raise BrokenPlugin(point.name, f"reliamq_backend gave {type(backend).__name__}, which is no Backend")
    return backend


def open_leases(
    url: str,
    sections: Mapping[str, Mapping[str, object]] | None = None,
    *,
    durability: Durability = Durability.REPLICATED,
) -> Leases:
    """Make what keeps leases and locks at the URL; no I/O.

    sections: configuration by backend name.  durability: what a lease and the mark of an effect must survive.
    Raises as :func:`open_backend` does, and ConfigurationError for a URL whose backend keeps no leases.
    """
    point, plugins, section = _found("leases", url, sections or {}, "redis://host")
    if not plugins.hook.reliamq_leases.get_hookimpls():
        raise ConfigurationError(
            f"'{point.name}' keeps no leases; name a backend that does, such as redis://host, or leave 'leases' out "
            "and set 'database'"
        )
    leases = plugins.hook.reliamq_leases(url=url, settings=section, durability=durability)
    if not isinstance(leases, Leases):
        raise BrokenPlugin(point.name, f"reliamq_leases gave {type(leases).__name__}, which is no Leases")
    return leases


def _found(
    what: str, url: str, sections: Mapping[str, Mapping[str, object]], example: str
) -> tuple[EntryPoint, pluggy.PluginManager, dict[str, object]]:
    """The plugin that serves the URL, and its section."""
    scheme, separator, _ = url.partition("://")
    if not separator:
        raise ConfigurationError(f"{what} {scheme!r} is no URL; write something like {example}")
    _check_sections(sections)
    point, plugins = _plugin_for(scheme.lower())
    return point, plugins, dict(sections.get(point.name, {}))


def installed_backends() -> Sequence[InstalledBackend]:
    """All installed plugins, each with its schemes or its fault; one that is broken hides no other."""
    found = []
    for point in sorted(_entry_points(), key=lambda point: point.name):
        try:
            schemes = _schemes(point.name, _load(point))
        except ConfigurationError as error:
            found.append(InstalledBackend(point.name, _distribution(point), fault=str(error)))
        else:
            found.append(InstalledBackend(point.name, _distribution(point), schemes))
    return found


def _check_sections(sections: Mapping[str, object]) -> None:
    """A misspelt section would be missed."""
    installed = sorted(point.name for point in _entry_points())
    for name in sections:
        if name not in installed:
            close = get_close_matches(name, installed, n=1)
            hint = f"did you mean '{close[0]}'? " if close else ""
            raise ConfigurationError(f"section 'backends.{name}': {hint}Installed backends are {', '.join(installed)}")


def _plugin_for(scheme: str) -> tuple[EntryPoint, pluggy.PluginManager]:
    points = _entry_points()
    for point in points:
        if point.name == scheme:
            return point, _load(point)
    known: list[str] = []
    for point in points:
        try:
            plugins = _load(point)
            schemes = _schemes(point.name, plugins)
        except ConfigurationError:  # it cannot be the one that was asked for by name; it still is listed by its name
            known.append(point.name)
            continue
        if scheme in schemes:
            return point, plugins
        known.extend(schemes)
    raise UnknownScheme(scheme, sorted(known))


def _entry_points() -> Sequence[EntryPoint]:
    return tuple(entry_points(group=ENTRY_POINT_GROUP))


def _load(point: EntryPoint) -> pluggy.PluginManager:
    """Load one plugin into a manager of its own."""
    plugins = pluggy.PluginManager("reliamq")
    plugins.add_hookspecs(BackendHooks)
    try:
        plugins.register(point.load(), name=point.name)
        plugins.check_pending()  # pluggy accepts a misspelt hook name silently until asked
    except ModuleNotFoundError as error:
        missing = error.name or str(error)
        if missing.partition(".")[0] == point.module.partition(".")[0]:
            raise BrokenPlugin(point.name, f"its own module is missing: {error}") from error
        raise MissingExtra(point.name, missing, _install_command(point)) from error
    except pluggy.PluginValidationError as error:
        raise BrokenPlugin(point.name, f"it does not keep to the hooks: {error}") from error
    except Exception as error:  # whatever a plugin's import raises, the message must name the plugin
        raise BrokenPlugin(point.name, f"it cannot be loaded: {type(error).__name__}: {error}") from error
    for hook in ("reliamq_backend", "reliamq_schemes"):
        if not getattr(plugins.hook, hook).get_hookimpls():
            raise BrokenPlugin(point.name, f"it does not implement {hook}")
    return plugins


def _schemes(name: str, plugins: pluggy.PluginManager) -> Mapping[str, Capabilities]:
    try:
        (schemes,) = plugins.hook.reliamq_schemes()
    except Exception as error:  # as above: the plugin's code, the plugin's name
        raise BrokenPlugin(name, f"reliamq_schemes failed: {type(error).__name__}: {error}") from error
    if not isinstance(schemes, Mapping) or not all(isinstance(one, Capabilities) for one in schemes.values()):
        raise BrokenPlugin(name, "reliamq_schemes gave no mapping of URL schemes to Capabilities")
    return schemes


def _distribution(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "unknown"


def _install_command(point: EntryPoint) -> str:
    distribution = _distribution(point)
    wanted = f"{OUR_DISTRIBUTION}[{point.name}]" if distribution == OUR_DISTRIBUTION else distribution
    return f"pip install '{wanted}'"
