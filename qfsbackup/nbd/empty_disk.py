# SPDX-License-Identifier: LGPL-2.1-or-later
"""A disk of no bytes: contracts.Disk without a server, for none can export it."""

from __future__ import annotations

import errno

from qfsbackup.contracts import Answer
from qfsbackup.errors import FsError
from qfsbackup.ranges import RangeSet
from qfsbackup.seen import Seen


class EmptyDisk:
    """There is nothing to read."""

    size = 0
    can_trim = False
    short_cut = None

    def __init__(self) -> None:
        self.data = RangeSet()
        self.dirty = RangeSet()
        self.seen = Seen()

    def read_soon(self, offset: int, length: int, answer: Answer) -> bool:  # noqa: ARG002  # the signature is Disk's
        """Never."""
        return False

    async def read(self, offset: int, length: int) -> bytes:
        """Nothing."""
        raise FsError(errno.EIO, f"[{offset}, {offset + length}) is outside an empty disk")

    def end_short_cut(self) -> None:
        """There is none."""

    def keep_to(self, ranges: RangeSet) -> None:
        """Nothing is read."""

    async def probe(self) -> None:
        """It answers."""

    async def trim(self, offset: int, length: int) -> None:
        """Nothing to give back."""
