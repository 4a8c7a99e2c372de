# SPDX-License-Identifier: LGPL-2.1-or-later
"""The seams with more than one real side.

sources/  --Snapshot-->  mount/  --Export-->  nbd/  --Disk-->  fs/
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from qfsbackup.facts import Buffer, Snapshot
from qfsbackup.ranges import RangeSet
from qfsbackup.seen import Seen

Answer = Callable[[Buffer | None], None]
"""Takes what was read, or None where it did not come."""

ShortRead = Callable[[Callable[[Any, Buffer | None], None], Any, int, int], bool]
"""read(answer, token, start, length): was it taken? If so, `answer(token, content)` is called once, None as above."""


class Source(Protocol):
    """Where snapshots come from. One module a scheme in `sources/`."""

    def snapshot(self) -> AbstractAsyncContextManager[Snapshot]:
        """Take a snapshot; leaving the context gives it up and undoes all that taking it did.

        Raises UserError where it cannot be had.
        """
        ...


class Disk(Protocol):
    """The bytes of one disk at the instant."""

    @property
    def size(self) -> int: ...

    @property
    def data(self) -> RangeSet:
        """What has to be read; all the rest of the disk is known to be zero."""
        ...

    @property
    def dirty(self) -> RangeSet:
        """What changed since the base checkpoint; all of the disk where there is none."""
        ...

    @property
    def can_trim(self) -> bool: ...

    @property
    def seen(self) -> Seen:
        """What readers were answered. The short cut notes its part by itself; for all else whoever answers does, who
        knows whether the whole of an answer came."""
        ...

    @property
    def short_cut(self) -> ShortRead | None:
        """Reads small pieces of what is data with little ado, and refuses all else: ask `read_soon` then."""
        ...

    def end_short_cut(self) -> None:
        """It refuses everything from now on: some of the disk is not to be read any more."""
        ...

    def read_soon(self, offset: int, length: int, answer: Answer) -> bool:
        """Read without a task of its own, where that can be done: call `answer` exactly once, now or later.

        False where it cannot: `answer` is not called. In that case, and where it gets None, `read` has to be asked,
        which also says what is wrong.
        """
        ...

    async def read(self, offset: int, length: int) -> Buffer:
        """Exactly the bytes `[offset, offset + length)`, which must lie inside the disk.

        Raises FsError(EIO) where they cannot be had; the other ranges are not affected by that.
        """
        ...

    def keep_to(self, ranges: RangeSet) -> None:
        """Whoever reads in one of these ranges will want nothing behind its end: do not read ahead over it."""
        ...

    async def probe(self) -> None:
        """Ask the server for a few bytes, whatever is known of them. Raises FsError(EIO) where nothing is to be had."""
        ...

    async def trim(self, offset: int, length: int) -> None:
        """Give the whole clusters in the range back; never while a read of them is in flight. Not readable afterwards.

        Raises FsError(EIO) where the server refuses.
        """
        ...
