# SPDX-License-Identifier: LGPL-2.1-or-later
"""The seams with more than one real side.

sources/  --Snapshot-->  mount/  --Export-->  nbd/  --Disk-->  fs/
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from qfsbackup.errors import FsError
from qfsbackup.facts import Snapshot
from qfsbackup.ranges import RangeSet

Buffer = bytes | bytearray | memoryview

Answer = Callable[[Buffer | FsError], None]
"""Is called exactly once, now or later, in trio's thread, with the bytes or with why there are none. It neither waits
nor raises."""


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
    def can_trim(self) -> bool:
        """May what nobody reads any more be given back."""
        ...

    def read(self, start: int, length: int, answer: Answer) -> None:
        """Exactly the bytes `[start, start + length)`, of which all are `data` and none was trimmed; else FsError(EIO).

        An error of one range does not affect others.
        """
        ...

    async def trim(self, start: int, length: int) -> None:
        """From this call on nothing of exactly `[start, start + length)` is read any more.

        The whole clusters that are complete now, some of them by earlier trims beside, are given back once no read of
        them is in flight, where the disk can trim. Raises FsError(EIO) where the server refuses.
        """
        ...

    async def probe(self) -> None:
        """Ask for a few bytes, whatever is known of them. Raises FsError(EIO) where nothing is to be had."""
        ...


async def awaited(read: Callable[[int, int, Answer], None], start: int, length: int) -> Buffer:
    """What `read` answers, for whoever has a task that can wait. Raises FsError."""
    from trio import Event  # whoever has no event loop need not load one

    answers: list[Buffer | FsError] = []
    over = Event()

    def answer(content: Buffer | FsError) -> None:
        answers.append(content)
        over.set()

    read(start, length, answer)
    await over.wait()
    if isinstance(answers[0], FsError):
        raise answers[0]
    return answers[0]
