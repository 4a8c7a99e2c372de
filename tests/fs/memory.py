# SPDX-License-Identifier: LGPL-2.1-or-later
"""A Disk in memory: a fake for what no server can be made to show, such as the moment between two awaits."""

from __future__ import annotations

import errno

import trio

from qfsbackup.contracts import Answer
from qfsbackup.errors import FsError
from qfsbackup.fs.frozen import FrozenDisk
from qfsbackup.ranges import RangeSet
from qfsbackup.seen import Seen
from qfsbackup.status import DiskStatus, Status


class MemoryDisk:
    """`content` is the disk; reading a byte outside `data`, or one that was trimmed, is an error as QEMU's is."""

    def __init__(self, content: bytes, data: RangeSet | None = None, dirty: RangeSet | None = None) -> None:
        self.content = content
        self.size = len(content)
        self.data = RangeSet([(0, self.size)]) if data is None else data
        self.dirty = RangeSet([(0, self.size)]) if dirty is None else dirty
        self.can_trim = True
        self.seen = Seen()
        self.trimmed = RangeSet()
        self.trims: list[tuple[int, int]] = []

    short_cut = None

    def end_short_cut(self) -> None:
        """There is none."""

    def read_soon(self, offset: int, length: int, answer: Answer) -> bool:  # noqa: ARG002  # a fake
        return False

    async def read(self, offset: int, length: int) -> bytes:
        await trio.lowlevel.checkpoint()
        end = offset + length
        assert length > 0
        assert end <= self.size
        assert list(self.data.clip(offset, end)) == [(offset, end)], "what is known to be zero is not read"
        if self.trimmed.overlaps(offset, end):
            raise FsError(errno.EIO, "read of a trimmed range")
        return self.content[offset:end]

    def keep_to(self, ranges: RangeSet) -> None:
        """There is no readahead."""

    async def probe(self) -> None:
        await trio.lowlevel.checkpoint()

    async def trim(self, offset: int, length: int) -> None:
        await trio.lowlevel.checkpoint()
        self.trims.append((offset, offset + length))
        self.trimmed.add(offset, offset + length)


def frozen(disk: MemoryDisk) -> FrozenDisk:
    """`disk` as the tree holds it."""
    figures = DiskStatus(disk.size)
    return FrozenDisk(disk, Status(disks={"disk": figures}), figures)
