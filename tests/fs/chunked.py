# SPDX-License-Identifier: LGPL-2.1-or-later
"""A disk of a few small chunks in memory, for the tests of chunks/."""

from __future__ import annotations

import errno
import random

import pytest

from qfsbackup.contracts import awaited
from qfsbackup.errors import FsError
from qfsbackup.fs.chunks import ChunkedDisk, ChunkFile
from qfsbackup.fs.grid import cut
from qfsbackup.fs.node import Handle
from qfsbackup.ranges import RangeSet
from tests.fs.memory import MemoryDisk, frozen

CHUNK = 64 << 10
SIZE = 5 * CHUNK + 1536
OLD, NEW = 1_000, 2_000
NOISE = random.Random(1).randbytes(SIZE)


def view_of(disk: MemoryDisk, *, release: bool = False) -> ChunkedDisk:
    return ChunkedDisk(frozen(disk), 7, cut(disk.size, RangeSet(), NEW, None, CHUNK), NEW, release=release)


def files(view: ChunkedDisk) -> list[tuple[str, ChunkFile]]:
    """Every chunk with its path, as a recursive listing finds them."""
    return [(f"{part}/{name}", file) for part, folder in view.entries(0) for name, file in folder.entries(0)]


def opened(view: ChunkedDisk, number: int) -> Handle:
    file = view.chunk(number)
    assert file is not None
    return file.open()


async def raises_eio(handle: Handle, offset: int = 0, length: int = 1) -> None:
    with pytest.raises(FsError) as raised:
        await awaited(handle.read, offset, length)
    assert raised.value.errno == errno.EIO
