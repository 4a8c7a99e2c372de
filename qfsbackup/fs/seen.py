# SPDX-License-Identifier: LGPL-2.1-or-later
"""What of a disk readers were answered; see _seen.c for what it costs, and what it may forget."""

from __future__ import annotations

from array import array

from qfsbackup.fs import _seen
from qfsbackup.ranges import RangeSet


class Seen(_seen.Seen):
    """`add` notes a range that was answered."""

    __slots__ = ()

    def ranges(self) -> RangeSet:
        """All that was noted, and not forgotten."""
        return RangeSet.from_borders(array("Q", self.borders()))
