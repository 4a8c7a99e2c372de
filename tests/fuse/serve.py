# SPDX-License-Identifier: LGPL-2.1-or-later
"""A mount without QEMU and NBD, in a process of its own: `python -m tests.fuse.serve DIRECTORY [UID GID MODE]`.

The disks are fakes in memory, each for one thing that no server can be made to do at will:

    plain    random bytes, one hole, a size that is a multiple of nothing
    even     random bytes, 1 MiB
    fixed    cannot be punched
    defect   reading raises what nobody foresaw
    pair     a read is answered once two of them wait
    slow     a read is answered after the first punch
    trap     a read makes a socket readable of which the callable raises
    ...      names that no file may have
"""

from __future__ import annotations

import os
import random
import socket
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import trio

from qfsbackup.contracts import Answer, Snapshot
from qfsbackup.fs.frozen import FrozenDisk
from qfsbackup.fs.tree import ShownDisk, build_tree
from qfsbackup.fuse.mount import mounted
from qfsbackup.fuse.operations import Permissions
from qfsbackup.mount.defects import defects_raised
from qfsbackup.ranges import RangeSet
from qfsbackup.status import DiskStatus, Status
from tests.fs.memory import MemoryDisk

KIB = 1024
MIB = 1024 * KIB
SIZE = MIB + 777
HOLE = (256 * KIB, 512 * KIB)
HOSTILE = ("", ".", "..", "../../etc/passwd", "/dev/sda", "a b\nc", "é%41", "A", "x" * 5000, "\ud800")
INSTANT = 1_700_000_000_123_456_789


def content(size: int) -> bytes:
    """The bytes of a disk of this size."""
    return random.Random(size).randbytes(size)


class Defect(MemoryDisk):
    def read(self, start: int, length: int, answer: Answer) -> None:  # noqa: ARG002  # a fake
        raise ZeroDivisionError("a defect")

    async def trim(self, start: int, length: int) -> None:  # noqa: ARG002  # a fake
        raise ZeroDivisionError("a defect")


class Pair(MemoryDisk):
    def __init__(self, size: int) -> None:
        super().__init__(content(size))
        self._first: Callable[[], None] | None = None

    def read(self, start: int, length: int, answer: Answer) -> None:
        this, first = partial(super().read, start, length, answer), self._first
        self._first = None if first else this
        if first:
            first()
            this()


class Slow(MemoryDisk):
    """`pipe` is a descriptor that gets a byte for each read."""

    def __init__(self, size: int, pipe: int) -> None:
        super().__init__(content(size))
        self._pipe = pipe
        self._waiting: list[Callable[[], None]] = []

    def read(self, start: int, length: int, answer: Answer) -> None:
        self._waiting.append(partial(super().read, start, length, answer))
        os.write(self._pipe, b"r")

    async def trim(self, start: int, length: int) -> None:
        for read in self._waiting:
            read()
        await super().trim(start, length)


class Trap(MemoryDisk):
    """Its socket is one that is looked at in C, between two reads."""

    def __init__(self, size: int) -> None:
        super().__init__(content(size))
        self._trigger, self.socket = socket.socketpair()

    def read(self, start: int, length: int, answer: Answer) -> None:
        self._trigger.send(b"now")
        super().read(start, length, answer)

    def spring(self) -> None:
        self.socket.recv(64)
        raise ZeroDivisionError("a trap")


def make_disks(pipe: int) -> dict[str, MemoryDisk]:
    plain = content(SIZE)
    plain = plain[: HOLE[0]] + bytes(HOLE[1] - HOLE[0]) + plain[HOLE[1] :]
    fixed = MemoryDisk(content(MIB))
    fixed.can_trim = False
    special = {
        "plain": MemoryDisk(plain, RangeSet([(0, HOLE[0]), (HOLE[1], SIZE)])),
        "even": MemoryDisk(content(MIB)),
        "fixed": fixed,
        "defect": Defect(content(MIB)),
        "pair": Pair(MIB),
        "slow": Slow(MIB, pipe),
        "trap": Trap(MIB),
    }
    return special | {name: MemoryDisk(name.encode(errors="surrogatepass")) for name in HOSTILE}


def reads_pipe(directory: Path) -> Path:
    """The named pipe where a byte comes for each read of `slow`."""
    return directory.with_name(f"{directory.name}-reads")


async def serve(directory: Path, permissions: Permissions) -> None:
    os.mkfifo(reads_pipe(directory))
    disks = make_disks(os.open(reads_pipe(directory), os.O_RDWR))
    status = Status(disks={name: DiskStatus(disk.size) for name, disk in disks.items()})
    shown = [
        ShownDisk(name, number, FrozenDisk(disk, status.health, status.disks[name]))
        for number, (name, disk) in enumerate(disks.items())
    ]
    status.facts["trims"] = {name: disk.trims for name, disk in disks.items()}
    snapshot = Snapshot(vm="memory", uuid=None, instant=INSTANT, disks=(), config={"../evil": b"config"})
    tree = build_tree(snapshot, shown, status, b"{}\n")
    trap = disks["trap"]
    assert isinstance(trap, Trap)
    sockets = {trap.socket.fileno(): trap.spring}
    async with defects_raised(), mounted(tree, directory, "memory, with \\ a comma", permissions, sockets) as unmounted:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.connect(os.environ["NOTIFY_SOCKET"].replace("@", "\0", 1))
            notify.send(b"READY=1")
        await unmounted.wait()


def main(directory: str, uid: str = "0", gid: str = "0", mode: str = "") -> None:
    trio.run(serve, Path(directory), Permissions(int(uid), int(gid), int(mode, 8) if mode else None))


if __name__ == "__main__":
    main(*sys.argv[1:])
