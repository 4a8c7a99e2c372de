# SPDX-License-Identifier: LGPL-2.1-or-later
"""One disk of a snapshot over NBD: what of it is data, what is dirty, its bytes, and giving them back.

    read ---> the lane                     small ones here and there: _lane.c
         \\-> a block fetched ahead         readahead.py
         \\-> a fetch of exactly the rest   fetch.py -> pool.py -> connection.py

An error belongs to the reader who asked for exactly that range. Two errors belong to all: a lost connection, and EINVAL
on a live one for a range that was not trimmed, which is how QEMU says that the snapshot is broken (EACCES inside QEMU,
EINVAL on the wire: nbd/server.c system_errno_to_nbd_errno).
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from qfsbackup.contracts import Answer, awaited
from qfsbackup.errors import FsError
from qfsbackup.facts import CLUSTER
from qfsbackup.gather import Gather
from qfsbackup.health import Health
from qfsbackup.nbd.budget import Budget
from qfsbackup.nbd.connection import ConnectionLostError, ServerError
from qfsbackup.nbd.fetch import Fetch
from qfsbackup.nbd.pool import Pool
from qfsbackup.nbd.readahead import Block, Readahead
from qfsbackup.ranges import RangeSet
from qfsbackup.status import DiskStatus
from qfsbackup.tasks import finished

SECTOR = 512
MAX_TRIM = 1 << 30  # bytes a request; its length has 32 bits

# How far a trim reaches back over what was given back before: a server with larger clusters than ours (Proxmox VE uses
# up to 4 MiB) ignores trims below its own size, and repeating a trim does no harm.
REACH = 4 << 20


class NbdDisk:
    """contracts.Disk over a pool of connections. Only `open_disks` makes one."""

    def __init__(
        self,
        connections: Pool,
        data: RangeSet,
        dirty: RangeSet,
        can_trim: bool,
        figures: DiskStatus,
        health: Health,
        budget: Budget,
        wanted: RangeSet,
    ) -> None:
        """Whoever reads in one of the ranges that are `wanted` wants nothing behind its end; there may be none."""
        self._pool = connections
        self._unit = connections.facts.minimum
        self._figures = figures
        self._health = health
        self.size = connections.facts.size
        self.data = data.aligned_outward(self._unit, self.size) if self._unit > 1 else data
        self.dirty = dirty
        self.can_trim = can_trim
        self._readable = self.data.copy()  # less what was trimmed, in whole blocks of the server
        self._trimmed = RangeSet()
        self._lane = connections.open_lane(self._readable, self._ask_again)
        self._readahead = Readahead(connections, self._readable, self.size, budget, wanted)

    def read(self, start: int, length: int, answer: Answer) -> None:
        """See contracts.Disk."""
        if self._lane and (asked := self._lane.read(start, length, answer)):
            self._figures.nbd_requests += 1
            self._figures.nbd_bytes += asked
            return
        end = start + length
        if not self._readable.covers(start, end):
            answer(FsError(errno.EIO, f"[{start}, {end}) is not there to be read, at least in part"))
            return
        blocks = self._readahead.blocks(start, end)
        parts = self._parts(start, end, blocks)
        self._readahead.advance(start, end, blocks[0] if blocks else None)
        if len(parts) == 1:
            self._deliver(parts[0], answer)
        else:
            gather = Gather(length, len(parts), answer)
            for part in parts:
                self._deliver(part, gather.at(part.start - start))

    async def probe(self) -> None:
        """Read what was not given back and stands first on the disk, past all maps. Raises FsError(EIO)."""
        unit = max(SECTOR, self._unit)
        start = self._trimmed.next_outside(0, self.size) // unit * unit
        if start < self.size:
            await awaited(self._ask, start, min(unit, self.size - start))

    async def trim(self, start: int, length: int) -> None:
        """See contracts.Disk. What shares a minimum block of the server with something readable may go on being read.

        An unaligned trim aborts QEMU before 9.1 (util/hbitmap.c hbitmap_reset); a partial cluster at the end of the
        disk is never given back.
        """
        end = min(start + length, self.size)
        before = self._complete(start, end)
        self._trimmed.add(start, end)
        self._forbid(start, end)
        for first, last in self._complete(start, end) if self.can_trim else ():
            for position in range(first, last, MAX_TRIM):
                stop = min(position + MAX_TRIM, last)
                await self._give_back(position, stop)
                self._figures.trimmed += stop - position - before.total_within(position, stop)

    def _complete(self, start: int, end: int) -> RangeSet:
        """The whole clusters that were trimmed, of what lies around `[start, end)` and touches it."""
        around = RangeSet(self._trimmed.clip(max(start - REACH, 0), min(end + REACH, self.size)))
        return RangeSet(part for part in around if part[0] <= end and start <= part[1]).aligned_inward(CLUSTER)

    def _forbid(self, start: int, end: int) -> None:
        """Do not read it any more."""
        unit = self._unit
        around = self._trimmed.clip(max(start - unit, 0), min(end + unit, self.size))
        if self._lane:
            self._lane.allow(None)  # the array cannot change while it is looked at
        for first, last in RangeSet(around).aligned_inward(unit):
            self._readable.remove(first, last)
        if self._lane:
            self._lane.allow(self._readable.borders)
        self._readahead.close(start, end)

    async def _give_back(self, start: int, end: int) -> None:
        try:
            await finished(partial(self._pool.trim, start, end - start))
        except (ConnectionLostError, ServerError) as error:
            raise FsError(errno.EIO, f"trim of [{start}, {end}) failed: {error}") from error

    def forget(self) -> None:
        """Give what was fetched ahead back to the budget."""
        self._readahead.drop_all()

    def _parts(self, start: int, end: int, blocks: Sequence[Block]) -> list[_Part]:
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
        return _Part(Fetch(self._pool, start // unit * unit, min(-(-end // unit) * unit, self.size)), start, end)

    def _deliver(self, part: _Part, answer: Answer) -> None:
        part.fetch.when_over(partial(self._arrived, part, answer))

    def _arrived(self, part: _Part, answer: Answer) -> None:
        if part.fetch.error is None:
            answer(part.fetch.view(part.start, part.end))
        elif part.block:
            self._readahead.failed(part.block)
            self._ask_again(part.start, part.end - part.start, answer)
        else:
            answer(self._failed(part, part.fetch.error))

    def _ask_again(self, start: int, length: int, answer: Answer) -> None:
        """It did not come by the lane or with a block: the error may be a neighbour's, or have gone by."""
        if self._readable.covers(start, start + length):
            self._ask(start, length, answer)
        else:
            answer(FsError(errno.EIO, f"[{start}, {start + length}) was trimmed meanwhile"))

    def _ask(self, start: int, length: int, answer: Answer) -> None:
        """Ask the server for exactly this."""
        self._deliver(self._direct(start, start + length), answer)

    def _failed(self, part: _Part, error: Exception) -> FsError:
        trimmed = self._trimmed.overlaps(part.start, part.end)
        if isinstance(error, ServerError) and error.errno == errno.EINVAL and not trimmed:
            self._health.mark_broken(f"QEMU refuses to read bytes [{part.start}, {part.end}) of a disk: {error}")
        return FsError(errno.EIO, f"read of [{part.start}, {part.end}) failed: {error}")


@dataclass(slots=True)
class _Part:
    """Where the bytes `[start, end)` of an answer come from; `block` where they were fetched ahead."""

    fetch: Fetch
    start: int
    end: int
    block: Block | None = None
