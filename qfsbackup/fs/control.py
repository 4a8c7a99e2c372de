# SPDX-License-Identifier: LGPL-2.1-or-later
"""`.qfsbackup/control` takes words: `check` looks whether the snapshot is whole (status.json then says it), `commit`
commits, where there is a target. Giving one returns when that is done, or fails where it cannot be.

`commit discarded-on-purpose` commits also where data was discarded that nobody had read.

The word is written, or given with an ioctl(2), which a read-only mount lets through as well:

    descriptor = os.open(control, os.O_RDONLY)
    fcntl.ioctl(descriptor, GIVE, COMMIT.ljust(WORDS))
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Mapping

from qfsbackup.errors import FsError
from qfsbackup.fs.node import Attributes
from qfsbackup.fs.text import Text

CHECK = b"check"
COMMIT = b"commit"
ON_PURPOSE = b"commit discarded-on-purpose"
WORDS = 64  # bytes that the ioctl takes
GIVE = 1 << 30 | WORDS << 16 | ord("q") << 8 | 1  # _IOW('q', 1, char[WORDS]) of asm-generic/ioctl.h

Words = Mapping[bytes, Callable[[], Awaitable[object]]]
"""What each word does. Raises FsError."""


class ControlFile:
    """The file; it reads as empty."""

    def __init__(self, inode: int, time: int, words: Words) -> None:
        self._attributes = Attributes(inode, size=0, blocks=0, time=time, writable=True)
        self._words = words

    def attributes(self) -> Attributes:
        return self._attributes

    def open(self) -> Control:
        return Control(self._words)


class Control(Text):
    """The handle."""

    def __init__(self, words: Words) -> None:
        super().__init__(b"")
        self._words = words

    async def write(self, content: bytes) -> int:
        """Do what the word says; blanks behind it are allowed. Raises FsError."""
        do = self._words.get(content.strip())
        if do is None:
            raise FsError(errno.EINVAL, f"control takes {b', '.join(self._words).decode()}")
        await do()
        return len(content)
