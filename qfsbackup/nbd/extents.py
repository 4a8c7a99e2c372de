# SPDX-License-Identifier: LGPL-2.1-or-later
"""The extents of a whole disk in one meta context, as a RangeSet.

A server may answer a block status request in any of these ways (NBD protocol, NBD_CMD_BLOCK_STATUS):

    asked     |---------------------|
    short     |---|--|                    go on behind it
    exact     |---|--|--------------|
    beyond    |---|--|------------------| cut
    nothing, or an extent of length 0     forbidden: refused here, or the walk would never end

Requests for several segments are on their way at once; they never overlap (see inflight.py). One connection negotiates
one context: QEMU's server breaks the protocol when one of two fails (nbd/server.c, seen on 7.2 and 10.0).
"""

from __future__ import annotations

import errno
import logging
from array import array
from collections.abc import Awaitable, Callable
from itertools import accumulate, chain, compress
from operator import ne

import trio

from qfsbackup.errors import UserError
from qfsbackup.nbd.connection import ConnectionLostError, ServerError, connection
from qfsbackup.nbd.handle import libnbd, where
from qfsbackup.ranges import RangeSet

log = logging.getLogger(__name__)

ALLOCATION = "base:allocation"
SEGMENT = (4 << 30) - (128 << 20)  # bytes; a request's length has 32 bits
AT_ONCE = 4  # requests on their way
MAX_RANGES = 16 << 20  # of one disk: 256 MiB of borders; 1 TiB that changes every 64 KiB has half of that
MAX_REPLIES = 1 << 20  # for one disk

SEE_SERVER = "See the log of the NBD server, or of QEMU."

BlockStatus = Callable[[int, int], Awaitable[list[int]]]
Inside = Callable[[list[int]], list[bool]]


def is_data(flags: list[int]) -> list[bool]:
    """Of `base:allocation`: all that is not known to read as zero; a hole alone may hold anything."""
    return [not flag & libnbd.STATE_ZERO for flag in flags]


def is_dirty(flags: list[int]) -> list[bool]:
    """Of a dirty bitmap: bit 0 (QEMU docs/interop/nbd.rst)."""
    return [bool(flag & 1) for flag in flags]


async def allocation(uri: str, size: int) -> RangeSet:
    """What of the disk has to be read; all of it where the server cannot tell. Raises UserError."""
    async with connection(uri, size, [ALLOCATION]) as connected:
        if size and connected.has_context(ALLOCATION):
            return await walk(connected.block_status, size, is_data, trusted=False)
    return RangeSet([(0, size)])


async def dirty(uri: str, size: int, context: str) -> RangeSet:
    """What of the disk changed, by the bitmap `context`. Raises UserError, also where the server does not have it."""
    async with connection(uri, size, [context]) as connected:
        if not connected.has_context(context):
            raise UserError(
                f"{where(uri)} does not offer the meta context {context} for this disk",
                "`nbdinfo --list` shows what it offers.",
            )
        return await walk(connected.block_status, size, is_dirty, trusted=True)


async def walk(
    block_status: BlockStatus, size: int, inside: Inside, *, trusted: bool, most: int = MAX_RANGES
) -> RangeSet:
    """Ask for all of `[0, size)`. What the server refuses is inside where the map is not `trusted`, else UserError.

    More than `most` ranges are a UserError as well.
    """
    walker = _Walker(block_status, inside, trusted, most)
    borders = array("Q")
    segments = [(start, min(start + SEGMENT, size)) for start in range(0, size, SEGMENT)]
    for index in range(0, len(segments), AT_ONCE):
        for part in await walker.segments(segments[index : index + AT_ONCE]):
            if borders and part and borders[-1] == part[0]:
                borders.pop()
                part.pop(0)
            borders.extend(part)
    return RangeSet.from_borders(borders)


class _Walker:
    """One walk: what it asks, and how much of an answer it stands."""

    def __init__(self, block_status: BlockStatus, inside: Inside, trusted: bool, most: int) -> None:
        self._block_status = block_status
        self._inside = inside
        self._trusted = trusted
        self._most = most
        self._borders = 0
        self._replies = 0

    async def segments(self, segments: list[tuple[int, int]]) -> list[array[int]]:
        """The borders in each of the segments, asked for at once."""
        results: list[array[int]] = [array("Q") for _ in segments]
        try:
            async with trio.open_nursery() as nursery:
                for (start, end), borders in zip(segments, results, strict=True):
                    nursery.start_soon(self._segment, start, end, borders)
        except ExceptionGroup as group:
            if group.split(UserError)[1]:
                raise
            raise group.exceptions[0] from None
        return results

    async def _segment(self, start: int, end: int, borders: array[int]) -> None:
        position, was = start, False
        while position < end:
            lengths, inside = await self._ask(position, end - position)
            ends = accumulate(lengths, initial=position)
            before = len(borders)
            borders.extend(compress(ends, map(ne, inside, chain((was,), inside))))
            position, was = position + sum(lengths), inside[-1]
            self._count(len(borders) - before)
        while borders and borders[-1] >= end:
            borders.pop()
        if len(borders) % 2:
            borders.append(end)

    async def _ask(self, offset: int, length: int) -> tuple[list[int], list[bool]]:
        try:
            entries = await self._block_status(offset, length)
        except ConnectionLostError as error:
            raise UserError(f"the NBD server went away while its extents were read: {error}", SEE_SERVER) from error
        except ServerError as error:
            if error.errno == errno.EPROTO:  # what libnbd 1.22 makes of no extents, of one without a length or too long
                raise _no_extent(offset) from error
            if self._trusted:
                raise UserError(f"the NBD server does not tell its extents: {error}", SEE_SERVER) from error
            log.warning(
                "extents of [%d, %d) are unknown, all of it is taken for data: %s", offset, offset + length, error
            )
            return [length], [True]
        lengths = entries[0::2]
        if not lengths or min(lengths) == 0:
            raise _no_extent(offset)
        return lengths, self._inside(entries[1::2])

    def _count(self, borders: int) -> None:
        self._borders += borders
        self._replies += 1
        if self._borders > 2 * self._most or self._replies > MAX_REPLIES:
            raise UserError("the NBD server describes the disk in too many small extents", SEE_SERVER)


def _no_extent(offset: int) -> UserError:
    return UserError(
        f"the NBD server describes no extent that can be at byte {offset}: it breaks the protocol", SEE_SERVER
    )
