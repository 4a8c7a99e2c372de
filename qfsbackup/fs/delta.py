# SPDX-License-Identifier: LGPL-2.1-or-later
"""delta/<disk>.raw: what changed since the base checkpoint is data, all else is a hole.

    dirty          . # # # . . # # .
    zero or not    d d z z z d d d d
    delta          h d z z h h d d h     z: zeros, and yet data, for they must overwrite what the disk held before

Written over the image of the base it gives the image of the instant. Where there is no base, all of it is data.
"""

from __future__ import annotations

import errno
import os

from qfsbackup.contracts import Answer
from qfsbackup.errors import FsError
from qfsbackup.fs.frozen import FrozenDisk
from qfsbackup.fs.node import Attributes, blocks


class Delta:
    """The file, and its own handle."""

    def __init__(self, disk: FrozenDisk, inode: int, time: int) -> None:
        self._disk = disk
        self._inode = inode
        self._time = time

    def attributes(self) -> Attributes:
        return Attributes(
            inode=self._inode,
            size=self._disk.size,
            blocks=blocks(self._disk.changed.total(), self._disk.size),
            time=self._time,
            punchable=self._disk.can_trim,
            live=self._disk.can_trim,
        )

    def open(self) -> Delta:
        return self

    def read(self, offset: int, length: int, answer: Answer) -> None:
        """Fewer bytes only at the end of the file."""
        length = min(length, self._disk.size - offset)
        if length > 0:
            self._disk.read(offset, length, answer, self._disk.dirty)
        else:
            answer(b"")

    def seek(self, offset: int, whence: int) -> int:
        """SEEK_DATA and SEEK_HOLE over what is dirty and was not punched. Raises FsError(ENXIO)."""
        size = self._disk.size
        if offset >= size:
            raise FsError(errno.ENXIO, "seek behind the end of the file")
        if whence == os.SEEK_HOLE:
            return self._disk.changed.next_outside(offset, size)
        found = self._disk.changed.next_inside(offset, size)
        if found == size:
            raise FsError(errno.ENXIO, "no data behind this offset")
        return found

    async def punch(self, offset: int, length: int) -> None:
        """Give the dirty extents of the range back; the rest is a hole here already, and other views' to read."""
        for start, end in list(self._disk.dirty.clip(offset, min(offset + length, self._disk.size))):
            await self._disk.punch(start, end - start)

    async def close(self) -> None:
        """Nothing was held."""
