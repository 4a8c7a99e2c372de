# SPDX-License-Identifier: LGPL-2.1-or-later
"""The dirty extents of a disk as text files, in three formats that other programs already read.

    <disk>.txt      nbdinfo --map:          `OFFSET LENGTH TYPE DESCRIPTION`, type 1 is dirty
    <disk>.json     nbdinfo --map --json:   [{ "offset": ..., "length": ..., "type": ..., "description": ...}, ...]
    <disk>.borgmap  borg 2 create --map:    `START LENGTH STATE`; data is read, zero is a hole, same need not be read

A map of a large, fragmented disk has millions of lines, so nothing is rendered but the piece that is read: the extents
are cut into pages of a fixed number, of which only the lengths are kept.
"""

from __future__ import annotations

import errno
from bisect import bisect_right
from collections.abc import Callable, Iterator
from functools import cached_property, lru_cache
from itertools import accumulate

from qfsbackup.contracts import Answer
from qfsbackup.errors import FsError
from qfsbackup.fs.node import Attributes, blocks, seek_solid
from qfsbackup.ranges import RangeSet

PAGE = 1024  # extents

Extent = tuple[int, int, str]  # offset, length, state
Line = Callable[[Extent, bool], str]  # an extent, and is it the first


def text_line(extent: Extent, first: bool) -> str:  # noqa: ARG001  # the signature is Line's
    """A line as nbdinfo 1.14 prints it (info/map.c: `%10u  %10u  %3u  %s`)."""
    offset, length, state = extent
    return f"{offset:10}  {length:10}  {int(state == 'dirty'):3}  {state}\n"


def json_line(extent: Extent, first: bool) -> str:
    """An element of the array that nbdinfo 1.14 prints; the brackets are `JSON_ENDS`."""
    offset, length, state = extent
    comma = "" if first else ",\n"
    return (
        f'{comma}{{ "offset": {offset}, "length": {length}, "type": {int(state == "dirty")}, "description": "{state}"}}'
    )


JSON_ENDS = ("[\n", "\n]\n")


def borg_line(extent: Extent, first: bool) -> str:  # noqa: ARG001  # the signature is Line's
    """A line of borg 2's map."""
    offset, length, state = extent
    return f"{offset} {length} {state}\n"


def dirty_extents(dirty: RangeSet, size: int, first: int, last: int) -> Iterator[Extent]:
    """Dirty ranges number `first` to `last` (excluded), each behind the clean stretch before it, if there is one."""
    position = end_of(dirty, first)
    for start, end in dirty.slice(first, last):
        if position < start:
            yield position, start - position, "clean"
        yield start, end - start, "dirty"
        position = end
    if last >= len(dirty) and position < size:
        yield position, size - position, "clean"


def end_of(ranges: RangeSet, number: int) -> int:
    """Where the range before `number` ends."""
    return next((end for _, end in ranges.slice(number - 1, number)), 0) if number else 0


class MapFile:
    """A map of `ranges` over a disk of `size` bytes; `extents` cuts them into states, `line` writes one extent."""

    def __init__(
        self,
        inode: int,
        time: int,
        ranges: RangeSet,
        size: int,
        line: Line,
        *,
        states: Callable[[Extent], Iterator[Extent]] = lambda extent: iter((extent,)),
        ends: tuple[str, str] = ("", ""),
    ) -> None:
        """`states` may cut an extent further; `ends` stand before the first and behind the last line."""
        self._inode = inode
        self._time = time
        self._ranges = ranges
        self._disk_size = size
        self._line = line
        self._states = states
        self._ends = ends
        self._pages = max(-(-len(ranges) // PAGE), 1)
        self._render = lru_cache(maxsize=4)(self._render_page)

    @cached_property
    def _offsets(self) -> list[int]:
        """Where each page begins in the file, and where the last one ends."""
        return list(accumulate((len(self._render_page(page)) for page in range(self._pages)), initial=0))

    def _render_page(self, page: int) -> bytes:
        extents = dirty_extents(self._ranges, self._disk_size, page * PAGE, (page + 1) * PAGE)
        states = (state for extent in extents for state in self._states(extent))
        lines = [self._line(state, page == 0 and number == 0) for number, state in enumerate(states)]
        head = self._ends[0] if page == 0 else ""
        tail = self._ends[1] if page == self._pages - 1 else ""
        return "".join((head, *lines, tail)).encode()

    @property
    def is_measured(self) -> bool:
        """Do its attributes come at once."""
        return "_offsets" in self.__dict__

    def measure(self) -> None:
        """See how long each page is: for millions of extents this takes seconds. May be called in a thread."""
        _ = self._offsets

    def attributes(self) -> Attributes:
        size = self._offsets[-1]
        return Attributes(self._inode, size, blocks(size, size), self._time)

    def open(self) -> MapFile:
        return self

    def read(self, offset: int, length: int, answer: Answer) -> None:
        end = min(offset + length, self._offsets[-1])
        if offset >= end:
            answer(b"")
            return
        first = bisect_right(self._offsets, offset) - 1
        last = bisect_right(self._offsets, end - 1) - 1
        content = b"".join(self._render(page) for page in range(first, last + 1))
        answer(content[offset - self._offsets[first] : end - self._offsets[first]])

    def seek(self, offset: int, whence: int) -> int:
        return seek_solid(self._offsets[-1], offset, whence)

    async def punch(self, offset: int, length: int) -> None:  # noqa: ARG002  # the signature is Handle's
        raise FsError(errno.EOPNOTSUPP, "only the bytes of a disk can be punched")

    async def close(self) -> None:
        """Nothing was held."""


def borg_states(data: RangeSet) -> Callable[[Extent], Iterator[Extent]]:
    """How a clean or dirty extent becomes borg's states: dirty is cut into data and zero, clean is `same`."""

    def states(extent: Extent) -> Iterator[Extent]:
        offset, length, state = extent
        if state == "clean":
            yield offset, length, "same"
            return
        position, end = offset, offset + length
        while position < end:
            is_data = position in data
            stop = data.next_outside(position, end) if is_data else data.next_inside(position, end)
            yield position, stop - position, "data" if is_data else "zero"
            position = stop

    return states
