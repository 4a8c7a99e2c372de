# SPDX-License-Identifier: LGPL-2.1-or-later
"""An NBD server in this process: a fake, for what no real server can be told, which is when it answers.

It stands where a Connection does, so that the pool, the rule of ranges in flight, the readahead and the disk are the
real ones. It answers in any order and at any time, fails where it is told to, refuses what was trimmed as QEMU does,
and fails the test when two ranges in flight overlap.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import ParamSpec

import trio
import trio.testing

from qfsbackup.health import Health
from qfsbackup.nbd.budget import Budget
from qfsbackup.nbd.connection import Buffer, ConnectionLostError, ServerError
from qfsbackup.nbd.disk import NbdDisk
from qfsbackup.nbd.inflight import Done
from qfsbackup.nbd.pool import Pool
from qfsbackup.ranges import RangeSet
from qfsbackup.status import DiskStatus

P = ParamSpec("P")


def in_fast_time(test: Callable[P, Awaitable[None]]) -> Callable[P, None]:
    """Run `test` on a clock that jumps whenever all tasks sleep. Not for tests with real servers."""

    @wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        trio.run(partial(test, *args, **kwargs), clock=trio.testing.MockClock(autojump_threshold=0))

    return run


@dataclass
class FakeServer:
    """`content` is the disk; `delay` says how long the next answer takes, in seconds."""

    content: bytes
    nursery: trio.Nursery
    delay: Callable[[], float] = lambda: 0.001
    bad: RangeSet = field(default_factory=RangeSet)  # reads of these bytes fail with EIO
    trimmed: RangeSet = field(default_factory=RangeSet)
    in_flight: list[tuple[int, int]] = field(default_factory=list)
    reads: list[tuple[int, int]] = field(default_factory=list)
    trims: list[tuple[int, int]] = field(default_factory=list)

    def begin(self, start: int, end: int) -> None:
        for other_start, other_end in self.in_flight:
            assert end <= other_start or other_end <= start, "two ranges in flight overlap"
        self.in_flight.append((start, end))

    def failure(self, start: int, end: int) -> Exception | None:
        if self.trimmed.overlaps(start, end):
            return ServerError(errno.EINVAL, "unable to check for holes: Permission denied")
        return ServerError(errno.EIO, "a bad sector") if self.bad.overlaps(start, end) else None


class FakeConnection:
    """What Pool uses of a Connection."""

    can_multi_conn = True
    can_trim = True
    handle = object()  # none of libnbd's

    def __init__(self, server: FakeServer, minimum: int = 1) -> None:
        self.server = server
        self.size = len(server.content)
        self.minimum = minimum
        self.maximum = 1 << 20
        self.in_flight = 0

    def read(self, buffer: Buffer, offset: int, done: Done) -> None:
        end = offset + len(buffer)
        assert offset % self.minimum == 0
        assert len(buffer) <= self.maximum
        self.server.begin(offset, end)
        self.server.reads.append((offset, end))

        def answer() -> Exception | None:
            error = self.server.failure(offset, end)
            # What a failed read leaves in the buffer is undefined.
            buffer[:] = b"\xee" * len(buffer) if error else self.server.content[offset:end]
            return error

        self.in_flight += 1
        self.server.nursery.start_soon(self._answer, offset, end, answer, done)

    def send_later(self) -> None:
        """All goes out at once."""

    def trim(self, offset: int, length: int, done: Done) -> None:
        end = offset + length
        self.server.begin(offset, end)
        self.server.trims.append((offset, end))

        def answer() -> None:
            self.server.trimmed.add(offset, end)

        self.in_flight += 1
        self.server.nursery.start_soon(self._answer, offset, end, answer, done)

    async def _answer(self, start: int, end: int, answer: Callable[[], Exception | None], done: Done) -> None:
        await trio.sleep(self.server.delay())
        self.server.in_flight.remove((start, end))
        self.in_flight -= 1
        done(answer())


@dataclass
class Bed:
    """A disk on a fake server, and what its mount shares."""

    server: FakeServer
    disk: NbdDisk
    pool: Pool
    budget: Budget
    status: DiskStatus
    health: Health
    trims: RangeSet = field(default_factory=RangeSet)  # what the test asked to trim


@asynccontextmanager
async def fake_disk(
    content: bytes,
    data: RangeSet | None = None,
    *,
    budget: Budget | None = None,
    minimum: int = 1,
    wanted: RangeSet | None = None,
) -> AsyncIterator[Bed]:
    """A disk on a server of `content`, in the place of open_disk."""
    async with trio.open_nursery() as nursery:
        server = FakeServer(content, nursery)
        status, health, budget = DiskStatus(len(content)), Health(), budget or Budget()
        pool = Pool(status, None)
        one, two = FakeConnection(server, minimum), FakeConnection(server, minimum)
        pool.join(one)  # type: ignore[arg-type]  # the fake stands for a Connection
        everything = RangeSet([(0, len(content))])
        data = everything if data is None else data
        disk = NbdDisk(pool, data, everything, True, status, health, budget, wanted or RangeSet())
        pool.join(two)  # type: ignore[arg-type]  # as above; there is no lane over a fake
        yield Bed(server, disk, pool, budget, status, health)
        disk.forget()
        pool.lose(ConnectionLostError("the disk was closed"))
