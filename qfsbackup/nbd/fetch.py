# SPDX-License-Identifier: LGPL-2.1-or-later
"""Bytes on their way from the server: one buffer, filled by as many requests as its data needs."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator

from qfsbackup.nbd.inflight import Job
from qfsbackup.nbd.pool import Pool
from qfsbackup.ranges import RangeSet

# Zeroing what is overwritten anyway took a tenth of the time. libnbd's own Buffer is made in the same way.
_uninitialised = ctypes.pythonapi.PyByteArray_FromStringAndSize
_uninitialised.argtypes = (ctypes.c_char_p, ctypes.c_ssize_t)
_uninitialised.restype = ctypes.py_object


class Fetch:
    """The bytes `[start, end)` of a disk. Of what is not in `data` nothing is asked for; without `data` all is."""

    __slots__ = ("_jobs", "_pending", "_pool", "_then", "_view", "end", "error", "start")

    def __init__(self, pool: Pool, start: int, end: int, data: RangeSet | None = None) -> None:
        self._pool = pool
        self.start = start
        self.end = end
        self.error: Exception | None = None
        self._then: list[Callable[[], None]] = []
        pieces = list(_pieces([(start, end)] if data is None else data.clip(start, end), pool.limit))
        is_full = sum(stop - begin for begin, stop in pieces) == end - start
        self._view = memoryview(_uninitialised(None, end - start) if is_full else bytearray(end - start))
        self._pending = len(pieces)
        self._jobs: list[Job] = []
        for begin, stop in pieces:
            job = pool.read(self.view(begin, stop), begin, self._done)
            if self._pending:
                self._jobs.append(job)

    def view(self, start: int, end: int) -> memoryview:
        """The bytes `[start, end)`, without a copy; defined once this is over without an error."""
        return self._view[start - self.start : end - self.start]

    def abandon(self) -> None:
        """Nobody waits any more: take back what has not gone out."""
        for job in self._jobs:
            self._pool.withdraw(job)

    def when_over(self, then: Callable[[], None]) -> None:
        """Call `then` once nothing is on its way any more."""
        if self._pending:
            self._then.append(then)
        else:
            then()

    def _done(self, error: Exception | None) -> None:
        self._pending -= 1
        self.error = self.error or error
        if self._pending:
            return
        self._jobs = []  # they know this fetch: a cycle would keep the buffer until the garbage collector comes
        callbacks, self._then = self._then, []
        for then in callbacks:
            then()


def _pieces(parts: Iterable[tuple[int, int]], limit: int) -> Iterator[tuple[int, int]]:
    """The parts, cut so that none crosses a multiple of `limit`."""
    for begin, stop in parts:
        while begin < stop:
            border = min((begin // limit + 1) * limit, stop)
            yield begin, border
            begin = border
