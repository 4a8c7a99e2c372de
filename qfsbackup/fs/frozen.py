# SPDX-License-Identifier: LGPL-2.1-or-later
"""One disk at the instant, with the holes that were punched since: what every view of that disk reads.

    allocated   . . # # # # . . # # # .     what the server says is not zero
    punched     . . . . # # . . . # . .     what a reader made a hole
    data        . . # # . . . . # . # .     what has to be read; the rest is zeros
    released    . . . . . . . . . . . #     what is given back without being a hole: reading it is EIO

What is punched and was read by nobody is lost to the backup: whoever reads it now reads zeros. It is remembered, so
that such a backup is not taken for a whole one.

Here alone is decided what may be read: nothing once the snapshot is broken, also what the server has answered by then,
and nothing that was released. Holes are answered here. The disk below is asked for the rest, which is data that was
never given back: QEMU refuses to read what was trimmed.
"""

from __future__ import annotations

import errno
from functools import partial
from itertools import starmap

from qfsbackup.contracts import Answer, Buffer, Disk
from qfsbackup.errors import FsError
from qfsbackup.fs.seen import Seen
from qfsbackup.gather import Gather
from qfsbackup.health import Health
from qfsbackup.ranges import RangeSet
from qfsbackup.status import DiskStatus

ZEROS = memoryview(bytes(1 << 20))

Pieces = tuple[tuple[int, int], ...]


class FrozenDisk:
    """The bytes of `disk`; `health` is the whole mount's, `figures` this disk's."""

    def __init__(self, disk: Disk, health: Health, figures: DiskStatus) -> None:
        self._disk = disk
        self._health = health
        self._figures = figures
        self._seen = Seen()  # what readers were answered
        self._released = RangeSet()
        self._unread = RangeSet()  # punched, and data that nobody had been answered by then
        self.punched = RangeSet()
        self.allocated = disk.data
        self.data = disk.data.copy()
        self.dirty = disk.dirty
        self.changed = disk.dirty.copy()  # dirty, and not punched since
        self.size = disk.size
        self.can_trim = disk.can_trim
        figures.discarded_unread = self.discarded_unread

    def read(self, start: int, length: int, answer: Answer, within: RangeSet | None = None) -> None:
        """Exactly the bytes `[start, start + length)`, which must lie inside the disk, or FsError(EIO).

        With `within`, all outside of that is zeros.
        """
        end = start + length
        wanted = ((start, end),) if within is None else tuple(within.clip(start, end))
        whole = within is None and self.data.covers(start, end)
        pieces = wanted if whole else tuple(piece for part in wanted for piece in self.data.clip(*part))
        then = partial(self._answer, pieces, answer)
        if self._health.broken:
            then(b"")  # which it is not given
        elif self._released and any(starmap(self._released.overlaps, wanted)):
            then(FsError(errno.EIO, f"of [{start}, {end}) at least a part was released"))
        elif whole:
            self._disk.read(start, length, then)
        elif pieces:
            gather = Gather(length, len(pieces), then)
            for first, last in pieces:
                self._disk.read(first, last - first, gather.at(first - start))
        else:
            then(zeros(length))

    def _answer(self, pieces: Pieces, answer: Answer, content: Buffer | FsError) -> None:
        if self._health.broken:
            content = FsError(errno.EIO, f"the snapshot is broken: {self._health.broken}")
        if isinstance(content, FsError):
            self._figures.read_errors += 1
        else:
            self._figures.read_bytes += len(content)
            for start, end in pieces:
                self._seen.add(start, end)
        answer(content)

    async def punch(self, offset: int, length: int) -> None:
        """Make `[offset, offset + length)` a hole and give its whole clusters back. Raises FsError."""
        if not self.can_trim:
            raise FsError(errno.EOPNOTSUPP, "the server behind this disk cannot trim")
        start, end = offset, min(offset + length, self.size)
        if start >= end:
            return
        self._note_unread(start, end)
        self._figures.punched += (end - start) - self.punched.total_within(start, end)
        self.punched.add(start, end)
        self.data.remove(start, end)
        self.changed.remove(start, end)
        await self._disk.trim(start, end - start)

    def _note_unread(self, start: int, end: int) -> None:
        """Of what is about to be punched. What was released is an error to read, and never zeros."""
        seen = self._seen.ranges()
        if not seen.covers(start, end):
            lost = (RangeSet([(start, end)]) & self.data) - seen - self._released
            self._unread = self._unread | lost

    def discarded_unread(self) -> int:
        """Bytes that were punched and that nobody has read since the mount. A read that was under way counts."""
        if self._unread:
            self._unread = self._unread - self._seen.ranges()
        return self._unread.total()

    async def release(self, start: int, end: int) -> None:
        """Make `[start, end)` unreadable for good, and give its whole clusters back where the server can do that.

        It does not become a hole: what is unreadable must not look like zeros. Raises FsError(EIO).
        """
        self._released.add(start, end)
        await self._disk.trim(start, end - start)


def zeros(length: int) -> Buffer:
    """`length` zero bytes; without copying up to the largest request that FUSE sends."""
    return ZEROS[:length] if length <= len(ZEROS) else bytes(length)
