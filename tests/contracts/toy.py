# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a new kind of source costs: `toy:FOLDER`, whose disks are the files of a folder as they are now."""

import errno
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from qfsbackup.contracts import Answer, Disk, Mounting, Snapshot, SnapshotDisk, Source
from qfsbackup.errors import FsError, UserError
from qfsbackup.ranges import RangeSet


class ToyDisk:
    can_trim = False

    def __init__(self, content: bytes) -> None:
        self._content, self.size = content, len(content)
        self.data = self.dirty = RangeSet([(0, self.size)])
        self._readable = self.data.copy()

    def read(self, start: int, length: int, answer: Answer) -> None:
        whole = self._readable.covers(start, start + length)
        answer(self._content[start : start + length] if whole else FsError(errno.EIO, "it is not there to be read"))

    async def trim(self, start: int, length: int) -> None:
        self._readable.remove(start, start + length)

    async def probe(self) -> None: ...


@asynccontextmanager
async def opened(content: bytes) -> AsyncIterator[Disk]:
    yield ToyDisk(content)


class ToySource(Source):
    kind = "a folder"

    def __init__(self, folder: Path) -> None:
        self.name, self.place, self._folder = f"toy:{folder}", f"toy-{folder}", folder

    @asynccontextmanager
    async def snapshot(self, mounting: Mounting) -> AsyncIterator[Snapshot]:
        try:
            files = [(path.stem, path.read_bytes()) for path in sorted(self._folder.iterdir())]
        except OSError as error:
            raise UserError(f"{error.filename}: {error.strerror}", "Is this the folder of the disks?") from error
        disks = tuple(SnapshotDisk(name, len(content), partial(opened, content)) for name, content in files)
        yield Snapshot(vm=mounting.options.vm or self._folder.name, uuid=None, instant=time.time_ns(), disks=disks)


def source(text: str) -> ToySource:
    return ToySource(Path(text.removeprefix("toy:")).absolute())
