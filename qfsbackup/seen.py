# SPDX-License-Identifier: LGPL-2.1-or-later
"""What of a disk readers were answered: needed where something is discarded, to tell whether anybody had read it.

Noting costs a list's append; sets are joined once in a while. Memory is bounded: where readers jump about so much that
there are more than MOST pieces, those that fill no whole unit are forgotten, so what was read can count as unread, and
never the other way round.
"""

from __future__ import annotations

from array import array

from qfsbackup.ranges import RangeSet

BATCH = 256  # ranges that are noted before they are joined
MOST = 16384  # ranges: 256 KiB
UNIT = 64 * 1024  # bytes: what is forgotten at first is smaller


class Seen:
    """The ranges that were answered."""

    def __init__(self) -> None:
        self._new: list[tuple[int, int]] = []
        self._joined = RangeSet()

    def add(self, start: int, end: int) -> None:
        """`[start, end)` was answered."""
        self._new.append((start, end))
        if len(self._new) >= BATCH:
            self._join()

    def add_borders(self, borders: bytes) -> None:
        """Ranges in any order were: start, end, start, end, ... as unsigned 64-bit integers of this machine."""
        numbers = iter(array("Q", borders))
        self._new.extend(zip(numbers, numbers, strict=True))
        self._join()

    def ranges(self) -> RangeSet:
        """All of them; not a copy."""
        if self._new:
            self._join()
        return self._joined

    def _join(self) -> None:
        self._joined = self._joined | RangeSet(sorted(self._new))
        self._new.clear()
        unit = UNIT
        while len(self._joined) > MOST:
            self._joined = self._joined.aligned_inward(unit)
            unit *= 2
