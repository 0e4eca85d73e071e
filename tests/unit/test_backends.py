"""From a URL to a backend, with plugins that are installed whole, in part, or wrongly."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from reliamq.backends import installed_backends, open_backend, open_leases
from reliamq.spi import BrokenPlugin, ConfigurationError, Durability, MissingExtra, UnknownScheme

Plant = Callable[..., None]
_numbers = itertools.count()

SOUND = """
    from reliamq.embedded.backend import MEMORY, EmbeddedBackend
    from reliamq.spi import hookimpl

    @hookimpl
    def reliamq_schemes():
        return {"parcel": MEMORY, "parcels": MEMORY}

    @hookimpl
    def reliamq_backend(url, settings):
        return EmbeddedBackend("memory://" + url.partition("://")[2], settings)
"""


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plant:
    """Install a distribution with one backend plugin, for the length of the test."""

    def plant(source: str, *, name: str = "parcel", distribution: str = "parcel-post", module: str = "") -> None:
        folder = tmp_path / f"site-{next(_numbers)}"
        information = folder / f"{distribution.replace('-', '_')}-1.0.dist-info"
        information.mkdir(parents=True)
        imported = f"planted_{next(_numbers)}"
        (folder / f"{imported}.py").write_text(textwrap.dedent(source))
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (information / "entry_points.txt").write_text(f"[reliamq.backends]\n{name} = {module or imported}\n")
        monkeypatch.syspath_prepend(str(folder))

    return plant


def test_an_installed_plugin_serves_its_schemes(plant: Plant) -> None:
    plant(SOUND)

    assert open_backend("parcel://a").name == "embedded"
    assert open_backend("parcels://a").url == "memory://a"
    (found,) = [one for one in installed_backends() if one.name == "parcel"]
    assert (found.distribution, set(found.schemes), found.fault) == ("parcel-post", {"parcel", "parcels"}, None)


def test_an_unknown_scheme_lists_the_known_ones(plant: Plant) -> None:
    plant(SOUND)

    with pytest.raises(UnknownScheme, match=r"kafkaa.*embedded.*memory.*parcel.*parcels"):
        open_backend("kafkaa://localhost")


def test_what_is_no_url_is_refused_with_an_example() -> None:
    with pytest.raises(ConfigurationError, match="embedded:///"):
        open_backend("localhost:9092")


@pytest.mark.parametrize(
    ("distribution", "command"),
    [("reliamq", "pip install 'reliamq[parcel]'"), ("parcel-post", "pip install 'parcel-post'")],
)
def test_a_missing_extra_names_the_module_and_the_install_command(
    plant: Plant, distribution: str, command: str
) -> None:
    plant("import parcel_client", distribution=distribution)

    with pytest.raises(MissingExtra, match="parcel_client") as caught:
        open_backend("parcel://localhost")
    assert command in str(caught.value)


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("raise RuntimeError('out of stamps')", "RuntimeError: out of stamps"),
        (SOUND.replace("def reliamq_schemes", "def reliamq_scheme"), "reliamq_scheme"),
        (SOUND.replace("(url, settings)", "(url, options)", 1), "options"),
        (SOUND.replace("@hookimpl\n    def reliamq_backend", "def make"), "does not implement reliamq_backend"),
        (SOUND.replace('{"parcel": MEMORY, "parcels": MEMORY}', '("parcel",)'), "no mapping of URL schemes"),
        (SOUND.replace('{"parcel": MEMORY, "parcels": MEMORY}', '1 / 0'), "reliamq_schemes failed: ZeroDivisionError"),
    ],
    ids=["import fails", "hook misspelt", "argument misspelt", "hook missing", "wrong schemes", "schemes fail"],
)  # fmt: skip
def test_a_broken_plugin_names_itself_and_its_fault_and_hides_no_other(plant: Plant, source: str, fault: str) -> None:
    plant(source, name="broken")

    found = {one.name: one for one in installed_backends()}
    assert fault in str(found["broken"].fault)
    assert "broken" in str(found["broken"].fault)
    assert found["embedded"].fault is None
    assert open_backend("memory://a").name == "embedded"


def test_a_plugin_whose_own_module_is_missing_is_broken_and_no_missing_extra(plant: Plant) -> None:
    plant("", module="parcel_post_that_moved")

    with pytest.raises(BrokenPlugin, match=r"parcel.*its own module is missing"):
        open_backend("parcel://localhost")


def test_a_plugin_that_makes_no_backend_is_broken(plant: Plant) -> None:
    plant(SOUND.replace("return EmbeddedBackend", "return url or EmbeddedBackend"))

    with pytest.raises(BrokenPlugin, match=r"reliamq_backend gave str, which is no Backend"):
        open_backend("parcel://localhost")


def test_a_plugin_gets_its_own_section_of_the_configuration(plant: Plant) -> None:
    plant(SOUND)

    open_backend("parcel://a", {"parcel": {"patience_seconds": 1}, "embedded": {"nonsense": True}})
    with pytest.raises(ConfigurationError, match="colour"):
        open_backend("parcel://a", {"parcel": {"colour": "red"}})


def test_a_section_of_no_installed_backend_is_refused_with_the_nearest_one(plant: Plant) -> None:
    plant(SOUND)

    with pytest.raises(
        ConfigurationError, match=r"'backends\.embeded': did you mean 'embedded'\? Installed backends are"
    ):
        open_backend("memory://a", {"embeded": {}})
    with pytest.raises(ConfigurationError, match=r"'backends\.pigeon': Installed backends are embedded, kafka, parcel"):
        open_backend("memory://a", {"pigeon": {}})


def test_the_case_of_a_scheme_does_not_matter(plant: Plant) -> None:
    plant(SOUND)

    assert open_backend("PARCEL://a").name == "embedded"
    assert open_backend("Embedded:///app.db").name == "embedded"


# --- leases -----------------------------------------------------------------------------------------------------------

KEEPING = (
    SOUND
    + """
    class Kept:
        def __init__(self, *arguments):
            self.arguments = arguments
        def idempotency_store(self, *, remember):
            raise NotImplementedError
        def lock(self):
            raise NotImplementedError

    @hookimpl
    def reliamq_leases(url, settings, durability):
        return Kept(url, settings, durability)
"""
)


def test_a_plugin_may_keep_leases_and_gets_its_section_and_what_they_must_survive(plant: Plant) -> None:
    plant(KEEPING)

    leases = open_leases("parcel://a", {"parcel": {"colour": "red"}}, durability=Durability.FSYNCED)

    assert vars(leases) == {"arguments": ("parcel://a", {"colour": "red"}, Durability.FSYNCED)}
    assert vars(open_leases("parcels://a"))["arguments"][2] is Durability.REPLICATED


def test_a_backend_that_keeps_no_leases_says_so() -> None:
    with pytest.raises(ConfigurationError, match=r"'embedded' keeps no leases; name a backend that does"):
        open_leases("memory://a")


def test_a_plugin_that_makes_no_leases_is_broken(plant: Plant) -> None:
    plant(KEEPING.replace("return Kept(url, settings, durability)", "return url"))

    with pytest.raises(BrokenPlugin, match=r"reliamq_leases gave str, which is no Leases"):
        open_leases("parcel://a")


def test_leases_at_no_url_or_one_that_nobody_serves_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"leases 'localhost' is no URL; write something like redis://host"):
        open_leases("localhost")
    with pytest.raises(UnknownScheme, match="pigeon"):
        open_leases("pigeon://a")
