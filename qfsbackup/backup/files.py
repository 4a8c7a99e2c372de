# SPDX-License-Identifier: LGPL-2.1-or-later
"""The files of one disk's chunks, of which some are open: the last ones that were read. For several threads at once.

They are found from the folder as it was when it was opened, so that nothing that is mounted over it, this very mount
too, gets in between.
"""

from __future__ import annotations

import errno
import os
import threading
from dataclasses import dataclass

from qfsbackup.backup.chunk_set import ChunkSet
from qfsbackup.backup.names import chunk_path

MOST_OPEN = 256  # files of a disk, and those that are being read


class ChangedError(Exception):
    """The file is not, or not any more, the one that was looked at."""


@dataclass(slots=True, eq=False)
class _Open:
    descriptor: int
    readers: int = 0


class ChunkFiles:
    """Opened with the first read of each."""

    def __init__(self, chunks: ChunkSet) -> None:
        """Raises OSError."""
        self._chunks = chunks
        self._open: dict[int, _Open] = {}  # the one that was not read for longest comes first
        self._lock = threading.Lock()  # never held while a file system is asked
        self._now = True  # may be asked what is in the page cache: the kernel can do that with most local file systems
        self._folder = os.open(chunks.folder, os.O_RDONLY | os.O_DIRECTORY)

    def read(self, number: int, offset: int, length: int) -> bytes:
        """Exactly these bytes of a chunk. Raises OSError, ChangedError."""
        file = self._take(number)
        try:
            content = os.pread(file.descriptor, length, offset)
            self._check(number, file.descriptor)
        except BaseException:
            self._forget(number, file)
            raise
        finally:
            self._give_back(number, file)
        if len(content) != length:
            raise self._changed(number)
        return content

    def read_now(self, number: int, offset: int, length: int) -> bytearray | None:
        """The same where it costs no waiting (preadv2(2), RWF_NOWAIT), else None. Raises OSError, ChangedError."""
        file = self._take_open(number) if self._now else None
        if file is None:
            return None
        content = bytearray(length)
        try:
            if os.preadv(file.descriptor, [content], offset, os.RWF_NOWAIT) != length:
                return None
            self._check(number, file.descriptor)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            self._now = False
            return None
        finally:
            self._give_back(number, file)
        return content

    def probe(self) -> bytes:
        """The beginning of the first one, opened anew. Raises OSError, ChangedError."""
        if not self._chunks.chunks:
            return b""
        descriptor = self._opened(0)
        try:
            content = os.pread(descriptor, 512, 0)
            self._check(0, descriptor)
        finally:
            os.close(descriptor)
        return content

    def close(self) -> None:
        """What is being read is closed once that is over."""
        with self._lock:
            idle = [file.descriptor for file in self._open.values() if not file.readers]
            self._open.clear()
            folder, self._folder = self._folder, -1
        for descriptor in (*idle, folder):
            os.close(descriptor)

    def _opened(self, number: int) -> int:
        return os.open(chunk_path(number), os.O_RDONLY, dir_fd=self._folder)

    def _take_open(self, number: int) -> _Open | None:
        with self._lock:
            file = self._open.pop(number, None)
            if file:
                self._open[number] = file
                file.readers += 1
        return file

    def _take(self, number: int) -> _Open:
        if file := self._take_open(number):
            return file
        file = _Open(self._opened(number), readers=1)
        with self._lock:
            if self._folder >= 0:
                self._open.setdefault(number, file)  # another thread may have been as fast: then it is closed after use
        return file

    def _forget(self, number: int, file: _Open) -> None:
        with self._lock:
            if self._open.get(number) is file:
                del self._open[number]

    def _give_back(self, number: int, file: _Open) -> None:
        with self._lock:
            file.readers -= 1
            over = [file] if not file.readers and self._open.get(number) is not file else []
            over += self._surplus()
        for one in over:
            os.close(one.descriptor)

    def _surplus(self) -> list[_Open]:
        count = len(self._open) - MOST_OPEN
        idle = [number for number, file in self._open.items() if not file.readers] if count > 0 else []
        return [self._open.pop(number) for number in idle[:count]]

    def _check(self, number: int, descriptor: int) -> None:
        status, size = os.fstat(descriptor), self._chunks.size - number * self._chunks.chunk
        if (status.st_size, status.st_mtime_ns) != (min(size, self._chunks.chunk), self._chunks.times[number]):
            raise self._changed(number)

    def _changed(self, number: int) -> ChangedError:
        return ChangedError(f"{self._chunks.folder / chunk_path(number)} was changed meanwhile")
