# SPDX-License-Identifier: LGPL-2.1-or-later
"""What `run` says at its end: how much of each disk was read, whether that was committed, and what the next run will
read."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from qfsbackup.log import printable
from qfsbackup.progress import read_bytes
from qfsbackup.sizes import human

log = logging.getLogger(__name__)


def summarize(status: dict[str, Any], code: int, seconds: float) -> None:
    """Log it. `status` is the mount's last one, `code` the command's exit status."""
    disks = status["disks"]
    for name, disk in disks.items():
        log.info(
            "%s: %s of %s dirty (%s), %s read",
            printable(name), human(disk["dirty"]), human(disk["size"]), disk["bitmap"], human(disk["read_bytes"]),
        )  # fmt: skip
    log.info(
        "%d disks, %s dirty, %s read, fleecing peak %s, guest paused %.1f ms, %.0f s",
        len(disks),
        human(sum(disk["dirty"] for disk in disks.values())),
        human(read_bytes(status)),
        human(status["fleecing"]["peak"]),
        status["pause_ms"],
        seconds,
    )
    unread = [printable(name) for name, disk in disks.items() if _is_missing(disk)]
    if code == 0 and unread:
        log.warning("the command succeeded, but read nothing of %s: does it back up what you mean?", ", ".join(unread))
    for line in outcome(status, code):
        log.info("%s", line)


def _is_missing(disk: dict[str, Any]) -> bool:
    """Was nothing read of what a backup should have? Tools that skip holes read nothing of an empty disk."""
    return bool(disk["dirty"] and disk["data"] and not disk["read_bytes"])


def outcome(status: dict[str, Any], code: int) -> Iterator[str]:
    """Whether the backup counts, and what the next one will be."""
    if code:
        yield f"the command ended with status {code}{_signal(code)}"
    if status["committed"]:
        yield f"committed to target {status['target']}"
        yield from _next(status["disks"])
    elif status["target"]:
        yield f"not committed to target {status['target']}: the next backup starts from the last commit again"
    else:
        yield "there is no target=, so the next backup reads everything again"


def _next(disks: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Sorted by what the next backup of a disk depends on."""
    kinds: dict[str, list[str]] = {}
    for name, disk in disks.items():
        if not disk["generation"]:
            kind = f"full: {disk['bitmap_reason']}"
        elif disk["bitmap_transient"]:
            kind = f"incremental, unless QEMU is restarted before it ({disk['bitmap_transient']})"
        else:
            kind = "incremental"
        kinds.setdefault(kind, []).append(printable(name))
    for kind, names in kinds.items():
        yield f"the next backup of {', '.join(names)} is {kind}"


def _signal(code: int) -> str:
    with suppress(ValueError):
        return f" ({signal.Signals(code - 128).name})"
    return ""
