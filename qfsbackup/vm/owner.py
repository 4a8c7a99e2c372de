# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whose snapshot is in a VM, and does he live?

The owner's mark is an empty `null-co` node, whose name survives whatever kills us and is gone with QEMU. It is the
first node made and the last one removed, and it names a process. But that process may be in another PID namespace,
where the number means somebody else. So QEMU holds one end of a socket pair, as a character device, and only the owner
the other: the kernel closes it, whatever ends him, and QEMU tells.
"""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from qfsbackup.vm.monitor import Monitor, QmpRefusedError
from qfsbackup.vm.node import remove_node, undoing
from qfsbackup.vm.ours import LINE, OWNER

LOOKS, LOOK_PAUSE = 3, 0.05  # how often, and seconds in between


@dataclass(frozen=True, slots=True)
class Owner:
    """A process; `here`: in our PID namespace, else its number is that of another one (0: not known)."""

    pid: int
    here: bool


@asynccontextmanager
async def mark(qmp: Monitor, name: str) -> AsyncIterator[None]:
    """Let a node of this name exist for the length of the block."""
    try:
        await add_mark(qmp, name)
        yield
    finally:
        await remove_node(qmp, name)


async def add_mark(qmp: Monitor, name: str) -> None:
    """Let a mark of this name exist. Raises QmpError."""
    await qmp.execute("blockdev-add", {"driver": "null-co", "node-name": name, "size": 0})


def owner_name() -> str:
    """The mark of this process."""
    return f"{OWNER}{os.getpid():x}-{_start_time(os.getpid()):x}"


@asynccontextmanager
async def owned(qmp: Monitor) -> AsyncIterator[None]:
    """Be the owner for the length of the block. Raises QmpError, also where somebody else is just becoming it."""
    async with _line(qmp), mark(qmp, owner_name()):
        yield


@asynccontextmanager
async def _line(qmp: Monitor) -> AsyncIterator[None]:
    ours, theirs = socket.socketpair()
    with ours:
        async with qmp.one_connection():
            with theirs:
                await qmp.execute_with_fd("getfd", {"fdname": LINE}, theirs.fileno())
            await _add_line(qmp)
        try:
            yield
        finally:
            await remove_line(qmp)


async def _add_line(qmp: Monitor) -> None:
    data = {"addr": {"type": "fd", "data": {"str": LINE}}, "server": False}
    try:
        await qmp.execute("chardev-add", {"id": LINE, "backend": {"type": "socket", "data": data}})
    except QmpRefusedError:
        raise  # it is there, and somebody else's
    except BaseException:
        await remove_line(qmp)  # the answer is lost
        raise


async def remove_line(qmp: Monitor) -> None:
    """Remove our end of it, or what a dead owner left of it."""
    with undoing("remove the owner's line"):
        if await line_holds(qmp) is not None:
            await qmp.execute("chardev-remove", {"id": LINE})


async def line_holds(qmp: Monitor) -> bool | None:
    """Does somebody hold the other end; None where there is no line. Raises QmpError."""
    for chardev in await qmp.execute("query-chardev"):
        if chardev["label"] == LINE:
            return not chardev["filename"].startswith("disconnected")
    return None


async def living_owner(qmp: Monitor, nodes: Iterable[str]) -> Owner | None:
    """The qfsbackup whose mark or line is in the VM, if it lives. Raises QmpError."""
    holds = await line_holds(qmp)
    for _ in range(LOOKS):
        if holds:
            await trio.sleep(LOOK_PAUSE)  # QEMU sees the other end close once its main loop has turned
            holds = await line_holds(qmp)
    owner = next((_owner(name) for name in nodes if name.startswith(OWNER)), None)
    if holds:
        return owner or Owner(0, here=False)
    if holds is None and owner and owner.here and owner.pid != os.getpid():
        return owner  # of a version that had no line
    return None


def _owner(name: str) -> Owner:
    pid, start = (int(part, 16) for part in name.removeprefix(OWNER).split("-"))
    return Owner(pid, here=_start_time(pid) == start)


def _start_time(pid: int) -> int:
    """When a process started, in clock ticks since boot (proc(5), stat, field 22); -1 where it is dead or unknown."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return -1
    return -1 if fields[0] in "ZX" else int(fields[19])
