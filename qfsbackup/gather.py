# SPDX-License-Identifier: LGPL-2.1-or-later
"""Several reads that are one: `answer` gets what all of them brought, or the first error, once the last is over.

|.....=part=..=part=...|     between the parts are zeros
"""

from __future__ import annotations

from functools import partial

from qfsbackup.contracts import Answer, Buffer
from qfsbackup.errors import FsError


class Gather:
    """`length` bytes, made of `parts` answers."""

    def __init__(self, length: int, parts: int, answer: Answer) -> None:
        self._content = bytearray(length)
        self._missing = parts
        self._answer = answer
        self._error: FsError | None = None

    def at(self, offset: int) -> Answer:
        """The answer for the part that stands at `offset`."""
        return partial(self._put, offset)

    def _put(self, offset: int, content: Buffer | FsError) -> None:
        if isinstance(content, FsError):
            self._error = self._error or content
        else:
            self._content[offset : offset + len(content)] = content
        self._missing -= 1
        if not self._missing:
            self._answer(self._error or self._content)
