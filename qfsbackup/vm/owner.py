# SPDX-License-Identifier: LGPL-2.1-or-later
"""The mark that we leave in QEMU: whose snapshot this is.

All that we add to a VM begins with `qfsbackup-`. The mark is an empty `null-co` node, whose name survives whatever
kills us and is gone with QEMU. It is the first thing made and the last one removed.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

from qfsbackup.vm.node import remove_node
from qfsbackup.vm.qmp import Qmp

PREFIX = "qfsbackup-"
OWNER = PREFIX + "by-"  # + process id and its start time, hexadecimal: at most 31 characters, as QEMU wants it
NEW = PREFIX + "new-"  # + a generation: its bitmaps are not committed yet (see leftovers)


@asynccontextmanager
async def mark(qmp: Qmp, name: str) -> AsyncIterator[None]:
    """Let a node of this name exist for the length of the block."""
    try:
        await add_mark(qmp, name)
        yield
    finally:
        await remove_node(qmp, name)


async def add_mark(qmp: Qmp, name: str) -> None:
    """Let a mark of this name exist. Raises QmpError."""
    await qmp.execute("blockdev-add", {"driver": "null-co", "node-name": name, "size": 0})


def owner_name() -> str:
    """The mark of this process."""
    return f"{OWNER}{os.getpid():x}-{_start_time(os.getpid()):x}"


def living_owner(nodes: Iterable[str]) -> int | None:
    """The process id of another, living qfsbackup whose mark is among these nodes."""
    for name in nodes:
        if name.startswith(OWNER):
            pid, start = (int(part, 16) for part in name.removeprefix(OWNER).split("-"))
            if pid != os.getpid() and _start_time(pid) == start:
                return pid
    return None


def _start_time(pid: int) -> int:
    """When a process started, in clock ticks since boot (proc(5), stat, field 22); -1 where it is dead or unknown."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return -1
    return -1 if fields[0] in "ZX" else int(fields[19])
