# SPDX-License-Identifier: LGPL-2.1-or-later
"""A disk of no bytes: contracts.Disk without a server, for none can export it."""

from __future__ import annotations

import errno

from qfsbackup.contracts import Answer
from qfsbackup.errors import FsError
from qfsbackup.ranges import RangeSet


class EmptyDisk:
    """There is nothing to read."""

    size = 0
    can_trim = False

    def __init__(self) -> None:
        self.data = RangeSet()
        self.dirty = RangeSet()

    def read(self, start: int, length: int, answer: Answer) -> None:
        """Nothing."""
        answer(FsError(errno.EIO, f"[{start}, {start + length}) is outside an empty disk"))

    async def trim(self, start: int, length: int) -> None:
        """Nothing to give back."""

    async def probe(self) -> None:
        """It answers."""
