# SPDX-License-Identifier: LGPL-2.1-or-later
"""`.qfsbackup/control` takes the word `commit`: writing it returns when that is done, or fails where it cannot be."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable

from qfsbackup.errors import FsError
from qfsbackup.fs.node import Attributes
from qfsbackup.fs.text import Text


class ControlFile:
    """The file; it reads as empty."""

    def __init__(self, inode: int, time: int, commit: Callable[[], Awaitable[None]]) -> None:
        self._attributes = Attributes(inode, size=0, blocks=0, time=time, writable=True)
        self._commit = commit

    def attributes(self) -> Attributes:
        return self._attributes

    def open(self) -> Control:
        return Control(self._commit)


class Control(Text):
    """The handle."""

    def __init__(self, commit: Callable[[], Awaitable[None]]) -> None:
        super().__init__(b"")
        self._commit = commit

    async def write(self, content: bytes) -> int:
        """Do what the word says; a blank line behind it is allowed. Raises FsError."""
        if content.strip() != b"commit":
            raise FsError(errno.EINVAL, "control takes the word commit")
        await self._commit()
        return len(content)
