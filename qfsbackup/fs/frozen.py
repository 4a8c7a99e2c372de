# SPDX-License-Identifier: LGPL-2.1-or-later
"""One disk at the instant, with the holes that were punched since: what every view of that disk reads.

    allocated   . . # # # # . . # # # .     what the server says is not zero
    punched     . . . . # # . . . # . .     what a reader made a hole
    data        . . # # . . . . # . # .     what has to be read; the rest is zeros
    released    . . . . . . . . . . . #     what is given back without being a hole: reading it is EIO

What is punched and was read by nobody is lost to the backup: whoever reads it now reads zeros. It is remembered, so
that such a backup is not taken for a whole one.

What is punched or released is never read again, not even by readahead, because QEMU refuses to read what was trimmed.
QEMU trims whole clusters only (7.2 aborts on others), so a punch that completes a cluster begun by an earlier one trims
both.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from functools import partial

import trio

from qfsbackup.contracts import Answer, Disk, ShortRead
from qfsbackup.errors import FsError
from qfsbackup.facts import CLUSTER, Buffer
from qfsbackup.ranges import RangeSet
from qfsbackup.status import DiskStatus, Status

ZEROS = memoryview(bytes(1 << 20))

# How far a trim reaches back over what was punched before: a server with larger clusters than ours (Proxmox VE uses up
# to 4 MiB) ignores trims below its own size, and repeating a trim does no harm.
REACH = 4 << 20


class FrozenDisk:
    """The bytes of `disk`; `status` is the whole mount's, `figures` this disk's."""

    def __init__(self, disk: Disk, status: Status, figures: DiskStatus) -> None:
        self._disk = disk
        self._status = status
        self._figures = figures
        self._released = RangeSet()
        self._given_back = RangeSet()  # punched or released
        self._unread = RangeSet()  # punched, and data that nobody had been answered by then
        self.punched = RangeSet()
        self.allocated = disk.data
        self.data = disk.data.copy()
        self.dirty = disk.dirty
        self.changed = disk.dirty.copy()  # dirty, and not punched since
        self.size = disk.size
        self.can_trim = disk.can_trim
        figures.discarded_unread = self.discarded_unread

    @property
    def short_cut(self) -> ShortRead | None:
        """See contracts.Disk."""
        return self._disk.short_cut

    def read_soon(self, offset: int, length: int, answer: Answer) -> bool:
        """See contracts.Disk: where all is data, or all is zeros."""
        end = offset + length
        if self._status.broken or self._released.overlaps(offset, end):
            return False
        if self.data.covers(offset, end):
            return self._disk.read_soon(offset, length, partial(self._answer, offset, end, answer))
        if self.data.overlaps(offset, end):
            return False
        self._figures.read_bytes += length
        answer(zeros(length))
        return True

    def _answer(self, start: int, end: int, answer: Answer, content: Buffer | None) -> None:
        if content is not None:
            self._figures.read_bytes += end - start
            self._disk.seen.add(start, end)
        answer(content)

    async def read(self, offset: int, length: int, within: RangeSet | None = None) -> Buffer:
        """Exactly the bytes `[offset, offset + length)`, which must lie inside the disk. Raises FsError(EIO).

        With `within`, all outside of that is zeros.
        """
        end = offset + length
        wanted = [(offset, end)] if within is None else list(within.clip(offset, end))
        pieces = [piece for part in wanted for piece in self.data.clip(*part)]
        try:
            self._check_readable(wanted)
            if pieces == [(offset, end)]:
                result: Buffer = await self._disk.read(offset, length)
            elif pieces:
                result = await self._assemble(offset, length, pieces)
            else:
                result = zeros(length)
        except FsError:
            self._figures.read_errors += 1
            raise
        self._figures.read_bytes += length
        for piece in pieces:
            self._disk.seen.add(*piece)
        return result

    def _check_readable(self, wanted: list[tuple[int, int]]) -> None:
        if self._status.broken:
            raise FsError(errno.EIO, f"the snapshot is broken: {self._status.broken}")
        for start, end in wanted:
            if self._released.overlaps(start, end):
                raise FsError(errno.EIO, f"[{start}, {end}) was released, at least in part")

    async def _assemble(self, offset: int, length: int, pieces: list[tuple[int, int]]) -> bytearray:
        """Read `pieces` at once into a buffer of zeros."""
        result = bytearray(length)

        async def fill(start: int, end: int) -> None:
            result[start - offset : end - offset] = await self._disk.read(start, end - start)

        await _all_or_first_error([partial(fill, start, end) for start, end in pieces])
        return result

    async def punch(self, offset: int, length: int) -> None:
        """Make `[offset, offset + length)` a hole and give its whole clusters back. Raises FsError."""
        if not self.can_trim:
            raise FsError(errno.EOPNOTSUPP, "the server behind this disk cannot trim")
        start, end = offset, min(offset + length, self.size)
        if start >= end:
            return
        self._disk.end_short_cut()
        self._note_unread(start, end)
        self._figures.punched += (end - start) - self.punched.total_within(start, end)
        self.punched.add(start, end)
        self.data.remove(start, end)
        self.changed.remove(start, end)
        await self._give_back(start, end)

    def _note_unread(self, start: int, end: int) -> None:
        """Of what is about to be punched. What was released is an error to read, and never zeros."""
        seen = self._disk.seen.ranges()
        if not seen.covers(start, end):
            lost = (RangeSet([(start, end)]) & self.data) - seen - self._released
            self._unread = self._unread | lost

    def discarded_unread(self) -> int:
        """Bytes that were punched and that nobody has read since the mount. A read that was under way counts."""
        if self._unread:
            self._unread = self._unread - self._disk.seen.ranges()
        return self._unread.total()

    async def release(self, start: int, end: int) -> None:
        """Make `[start, end)` unreadable for good, and give its whole clusters back where the server can do that.

        It does not become a hole: what is unreadable must not look like zeros. Raises FsError(EIO).
        """
        self._disk.end_short_cut()
        self._released.add(start, end)
        if self.can_trim:
            await self._give_back(start, end)

    async def _give_back(self, start: int, end: int) -> None:
        self._given_back.add(start, end)
        for first, last in self._trimmable(start, end):
            await self._disk.trim(first, last - first)

    def _trimmable(self, start: int, end: int) -> list[tuple[int, int]]:
        """The whole clusters that are given back, around what is so from now on, `[start, end)`."""
        around = RangeSet(self._given_back.clip(max(start - REACH, 0), min(end + REACH, self.size)))
        touching = RangeSet(part for part in around if part[0] <= start < part[1])
        return list(touching.aligned_inward(CLUSTER))


def zeros(length: int) -> Buffer:
    """`length` zero bytes; without copying up to the largest request that FUSE sends."""
    return ZEROS[:length] if length <= len(ZEROS) else bytes(length)


async def _all_or_first_error(jobs: list[Callable[[], Awaitable[None]]]) -> None:
    """Run the jobs at once; the first FsError ends the others and is raised as it is."""
    errors: list[FsError] = []
    async with trio.open_nursery() as nursery:

        async def guarded(job: Callable[[], Awaitable[None]]) -> None:
            try:
                await job()
            except FsError as error:
                errors.append(error)
                nursery.cancel_scope.cancel()

        for job in jobs:
            nursery.start_soon(guarded, job)
    if errors:
        raise errors[0]
