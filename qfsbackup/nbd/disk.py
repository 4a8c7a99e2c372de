# SPDX-License-Identifier: LGPL-2.1-or-later
"""One disk of a snapshot over NBD: what of it is data, what is dirty, its bytes, and giving them back.

    read ---> zeros                        where the map says so
         \\-> a block fetched ahead         readahead.py
         \\-> a fetch of exactly the rest   fetch.py -> pool.py -> connection.py

An error belongs to the reader who asked for exactly that range. Two errors belong to all: a lost connection, and EINVAL
on a live one for a range that was not trimmed, which is how QEMU says that the snapshot is broken (EACCES inside QEMU,
EINVAL on the wire: nbd/server.c system_errno_to_nbd_errno).
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from functools import partial

import trio

from qfsbackup.contracts import Answer, ShortRead
from qfsbackup.errors import FsError
from qfsbackup.facts import CLUSTER
from qfsbackup.nbd.budget import Budget
from qfsbackup.nbd.connection import ConnectionLostError, ServerError
from qfsbackup.nbd.fetch import Fetch
from qfsbackup.nbd.pool import Pool, WithdrawnError
from qfsbackup.nbd.readahead import Block, Readahead
from qfsbackup.ranges import RangeSet
from qfsbackup.seen import Seen
from qfsbackup.status import DiskStatus, Status

ZEROS = memoryview(bytes(1 << 20))
SECTOR = 512
MAX_TRIM = 1 << 30  # bytes a request; its length has 32 bits


class NbdDisk:
    """contracts.Disk over a pool of connections. Only `open_disks` makes one."""

    def __init__(
        self,
        connections: Pool,
        data: RangeSet,
        dirty: RangeSet,
        can_trim: bool,
        status: DiskStatus,
        mount: Status,
        budget: Budget,
    ) -> None:
        self._pool = connections
        self._unit = connections.facts.minimum
        self._closed = RangeSet()  # trimmed, so not readable any more
        self._status = status
        self._mount = mount
        self.size = connections.facts.size
        self.data = data.aligned_outward(self._unit, self.size) if self._unit > 1 else data
        self.dirty = dirty
        self.can_trim = can_trim
        self.seen = Seen()
        self._readahead = Readahead(connections, self.data, self._closed, self.size, budget)

    async def read(self, offset: int, length: int) -> bytes | bytearray | memoryview:
        """Exactly the bytes `[offset, offset + length)`. Raises FsError(EIO)."""
        end = offset + length
        self._check_readable(offset, end)
        blocks = self._readahead.blocks(offset, end)
        if not blocks and not self.data.overlaps(offset, end):
            self._readahead.advance(offset, end, None)
            return ZEROS[:length] if length <= len(ZEROS) else bytes(length)
        parts = self._parts(offset, end, blocks)
        self._readahead.advance(offset, end, blocks[0] if blocks else None)
        try:
            views = [await self._arrived(part) for part in parts]
        finally:
            self._abandon(parts)
        return views[0] if len(views) == 1 else b"".join(views)

    @property
    def short_cut(self) -> ShortRead | None:
        """See contracts.Disk."""
        return self._pool.lane.read if self._pool.lane else None

    def end_short_cut(self) -> None:
        """See contracts.Disk."""
        self._pool.close_lane()

    def read_soon(self, offset: int, length: int, answer: Answer) -> bool:
        """See contracts.Disk: what one fetch holds, and nobody has to wait for but the server."""
        end = offset + length
        if self._mount.broken or self._pool.is_paced or self._closed.overlaps(offset, end):
            return False
        blocks = self._readahead.blocks(offset, end)
        hit = blocks[0] if blocks else None
        if hit and (offset < hit.fetch.start or hit.fetch.end < end):
            return False
        if hit:
            self._readahead.take(hit, offset, end)
        fetch = hit.fetch if hit else self._direct(offset, end).fetch
        self._readahead.advance(offset, end, hit)
        fetch.when_over(partial(_answer, fetch, offset, end, answer))
        return True

    def keep_to(self, ranges: RangeSet) -> None:
        """Do not read ahead over the ends of these ranges."""
        self._readahead.keep_to(ranges)

    async def probe(self) -> None:
        """Read what was not given back and stands first on the disk, past all maps. Raises FsError(EIO)."""
        start = self._closed.next_outside(0, self.size)
        end = min(start + max(SECTOR, self._unit), self.size)
        if start < end:
            self._check_readable(start, end)
            everything = RangeSet([(start, end)])
            await self._arrived(_Part(Fetch(self._pool, everything, start, end), start, end))

    async def trim(self, offset: int, length: int) -> None:
        """Give the whole clusters in the range back, once no read of them is in flight. Raises FsError.

        An unaligned trim aborts QEMU before 9.1 (util/hbitmap.c hbitmap_reset); a partial cluster at the end of the
        disk is never given back.
        """
        if not self.can_trim:
            raise FsError(errno.EOPNOTSUPP, "this NBD server cannot trim")
        unit = max(CLUSTER, self._unit)
        start, end = -(-offset // unit) * unit, (offset + length) // unit * unit
        if start >= end:
            return
        self.end_short_cut()
        fresh = RangeSet([(start, end)]) - RangeSet(self._closed.clip(start, end))
        self._closed.add(start, end)
        self._readahead.close(start, end)
        for position in range(start, end, MAX_TRIM):
            stop = min(position + MAX_TRIM, end)
            await self._trim_at_once(position, stop)
            self._status.trimmed += fresh.total_within(position, stop)  # a trim may be repeated

    async def _trim_at_once(self, start: int, end: int) -> None:
        result: list[Exception | None] = []
        over = trio.Event()

        def done(error: Exception | None) -> None:
            result.append(error)
            over.set()

        self._pool.trim(start, end - start, done)
        await over.wait()
        if result[0]:
            raise FsError(errno.EIO, f"trim of [{start}, {end}) failed: {result[0]}") from result[0]

    def forget(self) -> None:
        """Give what was fetched ahead back to the budget."""
        self._readahead.drop_all()

    def _check_readable(self, start: int, end: int) -> None:
        if self._mount.broken:
            raise FsError(errno.EIO, f"the snapshot is broken: {self._mount.broken}")
        if self._closed.overlaps(start, end):
            raise FsError(errno.EIO, f"[{start}, {end}) was given back, at least in part")

    def _parts(self, start: int, end: int, blocks: list[Block]) -> list[_Part]:
        """`[start, end)` in pieces: those that blocks hold, and fetches for the gaps between them."""
        parts = []
        for block in blocks:
            if start < block.fetch.start:
                parts.append(self._direct(start, block.fetch.start))
                start = block.fetch.start
            stop = min(end, block.fetch.end)
            self._readahead.take(block, start, stop)
            parts.append(_Part(block.fetch, start, stop, block))
            start = stop
        if start < end:
            parts.append(self._direct(start, end))
        return parts

    def _direct(self, start: int, end: int) -> _Part:
        """A fetch of just this range, widened to the server's minimum block."""
        unit = self._unit
        fetch = Fetch(self._pool, self.data, start // unit * unit, min(-(-end // unit) * unit, self.size))
        return _Part(fetch, start, end)

    async def _arrived(self, part: _Part) -> memoryview:
        try:
            await part.fetch.wait()
        except (ServerError, WithdrawnError) as error:
            if part.block is None:
                raise self._failed(part, error) from error
        except ConnectionLostError as error:
            raise FsError(errno.EIO, f"the connection to the NBD server is lost: {error}") from error
        else:
            return part.fetch.view(part.start, part.end)
        return await self._instead(part)

    async def _instead(self, part: _Part) -> memoryview:
        """A block did not come: ask for exactly what the reader wants, the error may be a neighbour's."""
        if part.block:
            self._readahead.failed(part.block)
        self._check_readable(part.start, part.end)
        direct = self._direct(part.start, part.end)
        try:
            return await self._arrived(direct)
        finally:
            self._abandon([direct])

    def _abandon(self, parts: list[_Part]) -> None:
        for part in parts:
            if part.block is None and not part.fetch.over:
                part.fetch.abandon()

    def _failed(self, part: _Part, error: Exception) -> FsError:
        trimmed = self._closed.overlaps(part.start, part.end)
        if isinstance(error, ServerError) and error.errno == errno.EINVAL and not trimmed:
            self._mount.mark_broken(f"QEMU refuses to read bytes [{part.start}, {part.end}) of a disk: {error}")
        return FsError(errno.EIO, f"read of [{part.start}, {part.end}) failed: {error}")


def _answer(fetch: Fetch, start: int, end: int, answer: Answer) -> None:
    answer(None if fetch.error else fetch.view(start, end))


@dataclass(slots=True)
class _Part:
    """Where the bytes `[start, end)` of an answer come from; `block` where they were fetched ahead."""

    fetch: Fetch
    start: int
    end: int
    block: Block | None = None
