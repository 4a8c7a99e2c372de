# SPDX-License-Identifier: LGPL-2.1-or-later
"""The QEMU builds on this machine that tests run against.

The environment variable QEMU chooses: `all` (the default), a version prefix (`7.2`, `10`), `newest` (Debian's newest,
where `./run setup` could fetch it), or a path to a qemu-system-x86_64 (its companions are taken from the same
folder, else from PATH).
"""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import trio

CACHE = Path(__file__).resolve().parents[2] / ".cache"
NEWEST = CACHE / "qemu-newest/bin/qemu-system-x86_64"


@dataclass(frozen=True)
class Qemu:
    """One build of QEMU: its programs and its version, as (major, minor, micro)."""

    system: Path
    img: Path
    nbd: Path
    storage_daemon: Path
    version: tuple[int, int, int]

    def __str__(self) -> str:
        return f"qemu-{self.version[0]}.{self.version[1]}"


def available() -> list[Qemu]:
    """The distribution's QEMU and the newer one that `run setup` unpacks beside it, oldest first."""
    systems = [shutil.which("qemu-system-x86_64"), str(CACHE / "qemu-10/bin/qemu-system-x86_64")]
    found = [_at(Path(system)) for system in systems if system and Path(system).exists()]
    return sorted(found, key=lambda qemu: qemu.version)


def selected() -> list[Qemu]:
    """What QEMU (the environment variable) leaves of `available()`; LookupError if that is nothing."""
    choice = os.environ.get("QEMU", "all")
    if "/" in choice:
        return [_at(Path(choice))]
    if choice == "newest" and NEWEST.exists():
        return [_at(NEWEST)]
    found = [
        qemu
        for qemu in available()
        if choice == "all" or (".".join(map(str, qemu.version)) + ".").startswith(choice.rstrip(".") + ".")
    ]
    if not found:
        raise LookupError(f"no QEMU {choice} on this machine: QEMU={choice} ./run setup installs what the tests need")
    return found


def newest() -> list[Qemu]:
    """Debian's newest, where it is here and `selected()` means all."""
    return [_at(NEWEST)] if NEWEST.exists() and os.environ.get("QEMU", "all") == "all" else []


async def run_img(qemu: Qemu, *arguments: str | Path) -> str:
    """Run this build's qemu-img; returns stdout, raises subprocess.CalledProcessError on failure."""
    result = await trio.run_process([qemu.img, *arguments], capture_stdout=True)
    return result.stdout.decode()


def _at(system: Path) -> Qemu:
    output = subprocess.run([system, "--version"], check=True, capture_output=True, text=True).stdout
    match = re.search(r"version (\d+)\.(\d+)\.(\d+)", output)
    if match is None:
        raise LookupError(f"{system} tells no version: {output}")
    version = (int(match[1]), int(match[2]), int(match[3]))
    return Qemu(
        system=system,
        img=_companion(system, "qemu-img"),
        nbd=_companion(system, "qemu-nbd"),
        storage_daemon=_companion(system, "qemu-storage-daemon"),
        version=version,
    )


def _companion(system: Path, name: str) -> Path:
    beside = system.parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        raise LookupError(f"{name} is missing: ./run setup installs what the tests need")
    return Path(found)
