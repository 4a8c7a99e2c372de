# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the tree is made of: directories and files, as the kernel side sees them.

A file is opened to a handle; the handle is what gets read. The one change there is is punching a hole into a disk's
bytes; the one file that can be written is the control file.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from qfsbackup.contracts import Answer
from qfsbackup.errors import FsError


class Attributes(NamedTuple):
    """What stat(2) shows, less owner and permission bits, which are the mount's. Cheap: each chunk's stat makes one."""

    inode: int
    size: int  # bytes
    blocks: int  # of 512 bytes
    time: int  # mtime and ctime, nanoseconds since the epoch
    directory: bool = False
    punchable: bool | None = None  # can holes be punched; None where it is not the bytes of a disk
    live: bool = False  # may the next stat differ
    writable: bool = False  # is it the control file


class Handle(Protocol):
    """An open file."""

    def read(self, offset: int, length: int, answer: Answer) -> None:
        """The bytes of `[offset, offset + length)` that the file has: fewer, or none, only at its end."""
        ...

    def seek(self, offset: int, whence: int) -> int:
        """Where data or a hole begins at or behind `offset`; whence is os.SEEK_DATA or os.SEEK_HOLE.

        Raises FsError(ENXIO) as lseek(2) says.
        """
        ...

    async def punch(self, offset: int, length: int) -> None:
        """Make the range a hole. Raises FsError(EOPNOTSUPP) where that cannot be had."""
        ...

    async def close(self) -> None:
        """Nobody has it open any more."""
        ...


class File(Protocol):
    """A file in the tree."""

    def attributes(self) -> Attributes: ...

    def open(self) -> Handle: ...


class Directory(Protocol):
    """A folder in the tree."""

    def attributes(self) -> Attributes: ...

    def lookup(self, name: str) -> Node | None: ...

    def entries(self, start: int) -> Iterator[tuple[str, Node]]:
        """The entries from number `start` on; their order never changes."""
        ...


Node = File | Directory


def seek_solid(size: int, offset: int, whence: int) -> int:
    """lseek for a file that is data from its first byte to its last."""
    if offset >= size:
        raise FsError(errno.ENXIO, "seek behind the end of the file")
    return offset if whence == os.SEEK_DATA else size


def blocks(allocated: int, size: int) -> int:
    """st_blocks for `allocated` bytes of data in a file of `size` bytes.

    Never 0 for a file that is not empty: GNU tar -S archives such a file as one hole, without reading it.
    """
    return max(-(-allocated // 512), 1) if size else 0
