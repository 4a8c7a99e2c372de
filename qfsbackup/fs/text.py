# SPDX-License-Identifier: LGPL-2.1-or-later
"""Small files whose bytes are made here: what is fixed for the life of the mount, and what is live."""

from __future__ import annotations

import errno
from collections.abc import Callable

from qfsbackup.contracts import Answer
from qfsbackup.errors import FsError
from qfsbackup.fs.node import Attributes, blocks, seek_solid


class Text:
    """The handle of a file whose bytes stand in memory."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def read(self, offset: int, length: int, answer: Answer) -> None:
        answer(self._content[offset : offset + length])

    def seek(self, offset: int, whence: int) -> int:
        return seek_solid(len(self._content), offset, whence)

    async def punch(self, offset: int, length: int) -> None:  # noqa: ARG002  # the signature is Handle's
        raise FsError(errno.EOPNOTSUPP, "only the bytes of a disk can be punched")

    async def close(self) -> None:
        """Nothing was held."""


class FixedFile:
    """A file that never changes."""

    def __init__(self, inode: int, time: int, content: bytes) -> None:
        self._attributes = Attributes(inode, len(content), blocks(len(content), len(content)), time)
        self._content = content

    def attributes(self) -> Attributes:
        return self._attributes

    def open(self) -> Text:
        return Text(self._content)


class LiveFile:
    """A file that is rendered anew at each open and each stat."""

    def __init__(self, inode: int, time: int, render: Callable[[], bytes]) -> None:
        self._inode = inode
        self._time = time
        self._render = render

    def attributes(self) -> Attributes:
        size = len(self._render())
        return Attributes(self._inode, size, blocks(size, size), self._time, live=True)

    def open(self) -> Text:
        return Text(self._render())
