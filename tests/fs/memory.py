# SPDX-License-Identifier: LGPL-2.1-or-later
"""A Disk in memory: a fake for what no server can be made to show, such as the moment before an answer."""

from __future__ import annotations

import errno

import trio

from qfsbackup.contracts import Answer
from qfsbackup.errors import FsError
from qfsbackup.fs.frozen import FrozenDisk
from qfsbackup.health import Health
from qfsbackup.ranges import RangeSet
from qfsbackup.status import DiskStatus


class MemoryDisk:
    """`content` is the disk; reading a byte outside `data`, or one that was trimmed, is an error as QEMU's is."""

    def __init__(self, content: bytes, data: RangeSet | None = None, dirty: RangeSet | None = None) -> None:
        self.content = content
        self.size = len(content)
        self.data = RangeSet([(0, self.size)]) if data is None else data
        self.dirty = RangeSet([(0, self.size)]) if dirty is None else dirty
        self.can_trim = True
        self.trimmed = RangeSet()
        self.trims: list[tuple[int, int]] = []

    def read(self, start: int, length: int, answer: Answer) -> None:
        end = start + length
        if length <= 0 or not self.data.covers(start, end) or self.trimmed.overlaps(start, end):
            answer(FsError(errno.EIO, "read of what is no data"))
        else:
            answer(self.content[start:end])

    async def probe(self) -> None:
        await trio.lowlevel.checkpoint()

    async def trim(self, start: int, length: int) -> None:
        self.trims.append((start, start + length))
        self.trimmed.add(start, start + length)
        await trio.lowlevel.checkpoint()


def frozen(disk: MemoryDisk) -> FrozenDisk:
    """`disk` as the tree holds it."""
    return FrozenDisk(disk, Health(), DiskStatus(disk.size))
