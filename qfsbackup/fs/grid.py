# SPDX-License-Identifier: LGPL-2.1-or-later
"""How a disk is cut into chunks, and when each of them changed last.

    disk     |-------|-------|-------|-------|---|      5 chunks, the last one is shorter
    dirty        ##                ###                  since the base checkpoint
    times    [  T       3       7       T      1  ]     T: this mount; the others as they were committed

A chunk's time moves where a dirty extent touches it, where its own size changed, and where it is new. That array is all
that is kept of the chunks: 8 bytes each.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

from qfsbackup.facts import MOST_CHUNKS, USUAL_CHUNK, count, fitting
from qfsbackup.ranges import RangeSet

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Grid:
    """A disk of `size` bytes in chunks of `chunk` bytes; `times` are nanoseconds since the epoch, type code "q"."""

    size: int
    chunk: int
    times: array[int]

    def span(self, number: int) -> tuple[int, int]:
        """Where on the disk a chunk starts and ends."""
        start = number * self.chunk
        return start, min(start + self.chunk, self.size)

    def newest(self, first: int = 0, last: int = MOST_CHUNKS) -> int:
        """The latest time of the chunks number `first` to `last` (excluded); 0 where there are none."""
        return max(self.times[first:last], default=0)

    def changed(self, time: int) -> RangeSet:
        """The chunks with this time: for a mount's own, all that it shows as changed."""
        return RangeSet(self.span(number) for number, own in enumerate(self.times) if own == time)


def cut(size: int, dirty: RangeSet, time: int, base: Grid | None = None, chunk: int | None = None) -> Grid:
    """The grid that a mount shows, whose time is `time`.

    `base` is what was committed, None where nothing was. `dirty` is what changed since then: all of the disk where that
    is not known. `chunk` is the size that was asked for; without, it stays what it was, and is 4 MiB at first. Both
    give way where a disk would get too many chunks. With another chunk size every chunk is new.
    """
    wanted = chunk or (base.chunk if base else USUAL_CHUNK)
    actual = fitting(size, wanted)
    if actual != wanted:
        log.info("chunks of %d bytes are too many for a disk of %d bytes: they have %d", wanted, size, actual)
    times = array("q", [time]) * count(size, actual)
    grid = Grid(size, actual, times)
    if base and base.chunk == actual and len(base.times) == count(base.size, base.chunk):
        same = min(base.size, size) // actual if base.size != size else len(times)
        times[:same] = base.times[:same]
        for first, last in _touched(dirty, actual, size):
            times[first:last] = array("q", [time]) * (last - first)
    return grid


def _touched(dirty: RangeSet, chunk: int, size: int) -> Iterator[tuple[int, int]]:
    """The numbers of the chunks that each dirty extent touches: the first, and the one behind the last."""
    for start, end in dirty.clip(0, size):
        yield start // chunk, count(end, chunk)
