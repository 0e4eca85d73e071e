"""Gets the servers' programs onto the machine: what is there already is used, the rest is fetched once.

Programs of the system come by apt (needs root, once); Kafka by Maven into ``build/servers``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

__all__ = ["HOME", "kafka_jars", "program"]

HOME = Path(__file__).parents[2] / "build" / "servers"
POLICY = Path("/usr/sbin/policy-rc.d")
POM = Path(__file__).parent / "kafka-pom.xml"


def program(name: str, package: str) -> str:
    """The path of a program, installed from ``package`` if it is missing.  Raises RuntimeError saying what to do."""
    found = shutil.which(name)
    if found is None:
        _apt_install(package)
        found = shutil.which(name)
    if found is None:
        raise RuntimeError(f"'{name}' is still missing after installing the package '{package}'")
    return found


def kafka_jars() -> Path:
    """The folder with Kafka's jars, downloaded if it is missing."""
    jars = HOME / "kafka-jars"
    if not jars.exists():
        maven = program("mvn", "maven")
        partial = jars.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        command = [maven, "-q", "-B", "-f", str(POM), "dependency:copy-dependencies", f"-DoutputDirectory={partial}"]
        subprocess.run(command, check=True, timeout=600)
        partial.rename(jars)  # whole or not at all
    return jars


def _apt_install(package: str) -> None:
    apt = shutil.which("apt-get")
    if os.geteuid() != 0 or apt is None:
        raise RuntimeError(f"install the package '{package}' first, or run as root where apt-get is")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    HOME.mkdir(parents=True, exist_ok=True)
    with FileLock(HOME / "apt.lock"), _no_service_starts():  # two clusters may be on their way up
        for arguments in (["update", "-qq"], ["install", "-y", "-qq", package]):
            subprocess.run([apt, *arguments], check=True, env=environment, stdout=subprocess.DEVNULL, timeout=900)


@contextmanager
def _no_service_starts() -> Iterator[None]:
    """What a package brings does not run at once, on its usual port: the tests start their own.

    Packages ask the policy; where the machine has one already, it stands.
    """
    if POLICY.exists():
        yield
        return
    POLICY.write_text("#!/bin/sh\nexit 101\n")  # nothing is allowed
    try:
        POLICY.chmod(0o755)
        yield
    finally:
        POLICY.unlink()
