# SPDX-License-Identifier: LGPL-2.1-or-later
"""The bytes of a disk from the files of its chunks.

    read  [.....|==...|.....|....]    one piece a chunk, of 1 MiB at most; several are under way at once

What the folder below reads ahead is its own affair. An error belongs to who asked for that range, but where a file was
changed or is gone the disk is no more what it was: then the snapshot is broken.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial

from qfsbackup.backup.chunk_set import ChunkSet
from qfsbackup.backup.files import ChangedError, ChunkFiles
from qfsbackup.backup.readers import Readers
from qfsbackup.contracts import Answer, Disk, awaited
from qfsbackup.errors import FsError, UserError
from qfsbackup.gather import Gather
from qfsbackup.health import Health
from qfsbackup.patience import NoAnswerError, Patience
from qfsbackup.ranges import RangeSet
from qfsbackup.status import Status

PIECE = 1 << 20  # bytes
GONE = {errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.ENOTCONN, errno.ECONNABORTED}
OPENING, CLOSING = 30.0, 2.0  # seconds


class ChunksDisk:
    """contracts.Disk. Only `opened` makes one."""

    can_trim = False

    def __init__(self, chunks: ChunkSet, data: RangeSet, files: ChunkFiles, readers: Readers, health: Health) -> None:
        self.size = chunks.size
        self.data = data
        self.dirty = RangeSet([(0, chunks.size)])
        self._readable = data.copy()
        self._chunk = chunks.chunk
        self._files = files
        self._readers = readers
        self._health = health

    def read(self, start: int, length: int, answer: Answer) -> None:
        """See contracts.Disk."""
        if not self._readable.covers(start, start + length):
            answer(FsError(errno.EIO, f"[{start}, {start + length}) is not there to be read, at least in part"))
            return
        pieces = list(self._pieces(start, start + length))
        gather = Gather(length, len(pieces), answer) if len(pieces) > 1 else None
        for first, last in pieces:
            self._read_piece(first, last - first, gather.at(first - start) if gather else answer)

    def _read_piece(self, start: int, length: int, answer: Answer) -> None:
        """At once if it is in the page cache: a thread takes longer to begin than the copying."""
        number, offset = divmod(start, self._chunk)
        try:
            content = self._files.read_now(number, offset, length)
        except (OSError, ChangedError) as error:
            answer(self._failed(error))
            return
        if content is not None:
            answer(content)
        else:
            self._readers.ask(partial(self._files.read, number, offset, length), partial(self._arrived, answer))

    def _pieces(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """`[start, end)` cut where a chunk ends, and after each MiB."""
        while start < end:
            stop = min(end, (start // self._chunk + 1) * self._chunk, start + PIECE)
            yield start, stop
            start = stop

    def _arrived(self, answer: Answer, result: bytes | Exception) -> None:
        answer(self._failed(result) if isinstance(result, Exception) else result)

    def _failed(self, error: Exception) -> FsError:
        if not isinstance(error, OSError | ChangedError | NoAnswerError):
            raise error
        if isinstance(error, ChangedError) or (isinstance(error, OSError) and error.errno in GONE):
            self._health.mark_broken(str(error))
        return FsError(errno.EIO, str(error))

    async def trim(self, start: int, length: int) -> None:
        """See contracts.Disk. Nothing can be given back."""
        self._readable.remove(start, start + length)

    async def probe(self) -> None:
        """Look whether the first chunk is there. Raises FsError(EIO)."""

        def ask(_start: int, _length: int, answer: Answer) -> None:
            self._readers.ask(self._files.probe, partial(self._arrived, answer))

        await awaited(ask, 0, 0)


@asynccontextmanager
async def opened(name: str, chunks: ChunkSet, data: RangeSet, readers: Readers, status: Status) -> AsyncIterator[Disk]:
    """The disk `name`, which counts in `status` and breaks the mount. Raises UserError."""
    figures = status.disks[name]
    figures.data, figures.dirty = data.total(), chunks.size
    patience = Patience(OPENING, CLOSING)
    try:
        files = await patience.ask(partial(ChunkFiles, chunks))
    except (OSError, NoAnswerError) as error:
        raise UserError(f"cannot read {chunks.folder}: {error}", "Is what it is in still mounted?") from None
    try:
        yield ChunksDisk(chunks, data, files, readers, status.health)
    finally:
        await patience.let_go(files.close)
