# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the figures were measured on."""

import os
import platform
import subprocess
from pathlib import Path

from tests.harness.qemu import selected

from .scale import GIB

PROGRAMS = {
    "nbdfuse": ["nbdfuse", "--version"],
    "nbdcopy": ["nbdcopy", "--version"],
    "libfuse": ["pkg-config", "--modversion", "fuse3"],
    "fio": ["fio", "--version"],
    "restic": ["restic", "version"],
}


def describe(directory: Path) -> dict[str, str]:
    """Cores, memory, kernel, versions, and where the images are."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    versions = {name: _first_line(words) for name, words in PROGRAMS.items()}
    return {
        "processor": f"{len(os.sched_getaffinity(0))} cores, {_model()}",
        "memory": f"{memory:.0f} GiB",
        "kernel": platform.release(),
        "QEMU": ".".join(map(str, selected()[-1].version)),
        "Python": platform.python_version(),
        **versions,
        "images": f"raw, on {_first_line(['stat', '--file-system', '--format=%T', str(directory)])}",
    }


def _model() -> str:
    names = (line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    return next(names, platform.machine()).rpartition(": ")[2]


def _first_line(words: list[str]) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.splitlines()[0]
