# SPDX-License-Identifier: LGPL-2.1-or-later
"""A file that shows a stretch of a frozen disk: the whole disk under images/, a piece of it elsewhere."""

from __future__ import annotations

import errno
import os

from qfsbackup.contracts import Answer
from qfsbackup.errors import FsError
from qfsbackup.fs.frozen import FrozenDisk
from qfsbackup.fs.node import Attributes, blocks


class Window:
    """The bytes `[start, end)` of `disk` as a file; it is its own handle."""

    def __init__(self, disk: FrozenDisk, inode: int, time: int, start: int, end: int) -> None:
        self._disk = disk
        self._inode = inode
        self._time = time
        self._start = start
        self._end = end

    def attributes(self) -> Attributes:
        size = self._end - self._start
        return Attributes(
            inode=self._inode,
            size=size,
            blocks=blocks(self._disk.data.total_within(self._start, self._end), size),
            time=self._time,
            punchable=self._disk.can_trim,
            live=self._disk.can_trim,
        )

    def open(self) -> Window:
        return self

    def read(self, offset: int, length: int, answer: Answer) -> None:
        """Fewer bytes only at the end of the file."""
        start = self._start + offset
        if start + length > self._end:
            length = self._end - start
        if length > 0:
            self._disk.read(start, length, answer)
        else:
            answer(b"")

    def seek(self, offset: int, whence: int) -> int:
        """SEEK_DATA and SEEK_HOLE; the end of the file counts as a hole. Raises FsError(ENXIO)."""
        position = self._start + offset
        if position >= self._end:
            raise FsError(errno.ENXIO, "seek behind the end of the file")
        data = self._disk.data
        if whence == os.SEEK_HOLE:
            return data.next_outside(position, self._end) - self._start
        found = data.next_inside(position, self._end)
        if found == self._end:
            raise FsError(errno.ENXIO, "no data behind this offset")
        return found - self._start

    async def punch(self, offset: int, length: int) -> None:
        """Make the range a hole of the disk. Raises FsError."""
        start = self._start + offset
        await self._disk.punch(start, min(length, self._end - start))

    async def close(self) -> None:
        """Nothing was held."""
