# SPDX-License-Identifier: LGPL-2.1-or-later
"""`.qfsbackup/control` takes the word `commit`: giving it returns when that is done, or fails where it cannot be.

`commit discarded-on-purpose` commits also where data was discarded that nobody had read.

The word is written, or given with an ioctl(2), which a read-only mount lets through as well:

    descriptor = os.open(control, os.O_RDONLY)
    fcntl.ioctl(descriptor, GIVE, COMMIT.ljust(WORDS))
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable

from qfsbackup.errors import FsError
from qfsbackup.fs.node import Attributes
from qfsbackup.fs.text import Text

COMMIT = b"commit"
ON_PURPOSE = b"commit discarded-on-purpose"
WORDS = 64  # bytes that the ioctl takes
GIVE = 1 << 30 | WORDS << 16 | ord("q") << 8 | 1  # _IOW('q', 1, char[WORDS]) of asm-generic/ioctl.h

Commit = Callable[[bool], Awaitable[None]]
"""Commits; the flag: what was discarded unread was so on purpose. Raises FsError."""


class ControlFile:
    """The file; it reads as empty."""

    def __init__(self, inode: int, time: int, commit: Commit) -> None:
        self._attributes = Attributes(inode, size=0, blocks=0, time=time, writable=True)
        self._commit = commit

    def attributes(self) -> Attributes:
        return self._attributes

    def open(self) -> Control:
        return Control(self._commit)


class Control(Text):
    """The handle."""

    def __init__(self, commit: Commit) -> None:
        super().__init__(b"")
        self._commit = commit

    async def write(self, content: bytes) -> int:
        """Do what the word says; blanks behind it are allowed. Raises FsError."""
        words = content.strip()
        if words not in (COMMIT, ON_PURPOSE):
            raise FsError(errno.EINVAL, "control takes the word commit")
        await self._commit(words == ON_PURPOSE)
        return len(content)
