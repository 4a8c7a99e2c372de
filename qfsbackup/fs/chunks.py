# SPDX-License-Identifier: LGPL-2.1-or-later
"""chunks/<disk>/NNN/NNNNNNNN: a disk in equal pieces: tools that skip unchanged files then skip what did not change.

    chunks/vda/000/00000000   first chunk
    chunks/vda/000/00000255   chunk 255: 256 a folder, of which there are at most 256
    chunks/vda/001/00000256   names are decimal and of fixed width: their order is the disk's, also when it grows

Nodes are made when they are asked for, from the number alone; nothing is kept for a chunk but its time.

With `release`, a chunk is given back once somebody has read it whole and nobody has it open any more. What seeking
tells of holes counts as read. Reading it again is EIO.

    open --- open ------------ close ------- close ---> released, if one of the two has read all of it
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from qfsbackup.backup.names import A_FOLDER
from qfsbackup.contracts import Answer, Buffer
from qfsbackup.errors import FsError
from qfsbackup.facts import count
from qfsbackup.fs.frozen import FrozenDisk
from qfsbackup.fs.grid import Grid
from qfsbackup.fs.inodes import Kind, inode
from qfsbackup.fs.node import Attributes, Handle, blocks
from qfsbackup.fs.window import Window
from qfsbackup.ranges import RangeSet


class ChunkedDisk:
    """The folder chunks/<disk>."""

    def __init__(self, disk: FrozenDisk, number: int, grid: Grid, time: int, *, release: bool = False) -> None:
        """`number` is the disk's; `time` the folder's where it has no chunks. `release`: give back what was read."""
        self.disk = disk
        self.grid = grid
        self.release = release and disk.can_trim
        self.folder_inode = inode(Kind.CHUNK_FOLDER, number, 0)
        self.chunk_inode = inode(Kind.CHUNK, number, 0)
        self.in_use: dict[int, InUse] = {}
        self._time = grid.newest() if grid.times else time

    def attributes(self) -> Attributes:
        return Attributes(self.folder_inode, size=0, blocks=0, time=self._time, directory=True)

    def lookup(self, name: str) -> ChunkFolder | None:
        number = _number(name, 3)
        return ChunkFolder(self, number) if number is not None and number < self._folders() else None

    def entries(self, start: int) -> Iterator[tuple[str, ChunkFolder]]:
        return ((f"{number:03}", ChunkFolder(self, number)) for number in range(start, self._folders()))

    def chunk(self, number: int) -> ChunkFile | None:
        """The file of a chunk."""
        return ChunkFile(self, number) if number < len(self.grid.times) else None

    def _folders(self) -> int:
        return count(len(self.grid.times), A_FOLDER)


class ChunkFolder:
    """The folder chunks/<disk>/NNN."""

    __slots__ = ("_first", "_last", "_view")

    def __init__(self, view: ChunkedDisk, number: int) -> None:
        self._view = view
        self._first = number * A_FOLDER
        self._last = min(self._first + A_FOLDER, len(view.grid.times))

    def attributes(self) -> Attributes:
        time = self._view.grid.newest(self._first, self._last)
        number = self._view.folder_inode + 1 + self._first // A_FOLDER
        return Attributes(number, size=0, blocks=0, time=time, directory=True)

    def lookup(self, name: str) -> ChunkFile | None:
        number = _number(name, 8)
        return ChunkFile(self._view, number) if number is not None and self._first <= number < self._last else None

    def entries(self, start: int) -> Iterator[tuple[str, ChunkFile]]:
        view = self._view
        return ((f"{number:08}", ChunkFile(view, number)) for number in range(self._first + start, self._last))


class ChunkFile:
    """A chunk."""

    __slots__ = ("_number", "_view")

    def __init__(self, view: ChunkedDisk, number: int) -> None:
        self._view = view
        self._number = number

    def attributes(self) -> Attributes:
        """Not live, though punching changes `blocks`: the kernel itself asks again after fallocate(2) on the file."""
        view, number = self._view, self._number
        start, end = view.grid.span(number)
        allocated = view.disk.data.total_within(start, end)
        return Attributes(
            inode=view.chunk_inode + number,
            size=end - start,
            blocks=blocks(allocated, end - start),
            time=view.grid.times[number],
            punchable=view.disk.can_trim,
        )

    def open(self) -> Handle:
        view, number = self._view, self._number
        start, end = view.grid.span(number)
        window = Window(view.disk, view.chunk_inode + number, view.grid.times[number], start, end)
        return ReleasingHandle(view, number, window) if view.release else window


@dataclass(slots=True)
class InUse:
    """A chunk that somebody has open."""

    handles: int = 0
    read: bool = False  # has one of them read all of it


class ReleasingHandle:
    """An open chunk that is given back when it was read."""

    def __init__(self, view: ChunkedDisk, number: int, window: Window) -> None:
        self._view = view
        self._number = number
        self._window = window
        self._seen = RangeSet()
        self._in_use = view.in_use.setdefault(number, InUse())
        self._in_use.handles += 1

    def read(self, offset: int, length: int, answer: Answer) -> None:
        self._window.read(offset, length, partial(self._saw, offset, answer))

    def _saw(self, offset: int, answer: Answer, content: Buffer | FsError) -> None:
        if not isinstance(content, FsError):
            self._seen.add(offset, offset + len(content))
        answer(content)

    def seek(self, offset: int, whence: int) -> int:
        try:
            found = self._window.seek(offset, whence)
        except FsError:
            self._seen.add(offset, self._size())  # ENXIO: all behind the offset is a hole, if it has not the end there
            raise
        if whence == os.SEEK_DATA:
            self._seen.add(offset, found)
        return found

    def _size(self) -> int:
        start, end = self._view.grid.span(self._number)
        return end - start

    async def punch(self, offset: int, length: int) -> None:
        await self._window.punch(offset, length)

    async def close(self) -> None:
        """Raises FsError where the server refuses."""
        self._in_use.read |= self._seen.total() == self._size()
        self._in_use.handles -= 1
        if self._in_use.handles:
            return
        del self._view.in_use[self._number]
        if self._in_use.read:
            await self._view.disk.release(*self._view.grid.span(self._number))


def _number(name: str, digits: int) -> int | None:
    """The number that a name of this many digits says; None where it is no such name."""
    return int(name) if len(name) == digits and name.isascii() and name.isdecimal() else None
