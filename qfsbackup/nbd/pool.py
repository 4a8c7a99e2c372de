# SPDX-License-Identifier: LGPL-2.1-or-later
"""Several connections to one export, used as one; no two requests in flight overlap (see inflight.py)."""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import trio

from qfsbackup.contracts import Answer
from qfsbackup.facts import Sockets
from qfsbackup.nbd._lane import Lane
from qfsbackup.nbd.bandwidth import Bandwidth
from qfsbackup.nbd.connection import Buffer, Connection, ConnectionLostError, attached
from qfsbackup.nbd.handle import Handle
from qfsbackup.nbd.inflight import Done, InFlight, Job
from qfsbackup.ranges import RangeSet
from qfsbackup.status import DiskStatus
from qfsbackup.tasks import background

log = logging.getLogger(__name__)

REQUEST = 512 * 1024  # bytes a request; QEMU holds up guest writes to a range while it is read
DEPTH = 8  # requests in flight on a connection; QEMU serves 16 of one client (nbd/server.c MAX_NBD_REQUESTS)


class WithdrawnError(Exception):
    """The request was taken back before it went out."""


class Pool:
    """The connections of one disk. Only `pool()` makes one. One lost connection is the end of them all."""

    def __init__(self, status: DiskStatus, bandwidth: Bandwidth | None, request_unit: int | None = None) -> None:
        self._status = status
        self._largest = min(REQUEST, request_unit or REQUEST)
        self.lost: ConnectionLostError | None = None
        self._connections: list[Connection] = []
        self._bandwidth = bandwidth
        self._in_flight = InFlight(0, self._send)
        self._lane: Lane | None = None
        self._paying, self._to_pay = trio.open_memory_channel[Job](math.inf)

    def join(self, opened: Connection) -> None:
        """One connection more."""
        self._connections.append(opened)
        self._in_flight.depth = DEPTH * len(self._connections)

    def open_lane(self, data: RangeSet, failed: Callable[[int, int, Answer], None]) -> Lane | None:
        """Let small reads of what is `data` go a shorter way, by a connection of their own.

        What does not come is handed to `failed`. There is none where reads have to pay or there is but one connection.
        """
        if self._bandwidth or len(self._connections) < 2:
            return None
        own, jobs = self._connections[-1], self._in_flight
        others = jobs.running, jobs.waiting, jobs.advance
        try:
            lane = Lane(own.handle, own.send_later, *others, failed, own.size, own.minimum, self.limit)
        except (AttributeError, ValueError) as error:  # where it keeps its handle is libnbd's own affair
            log.warning("this libnbd does not let small random reads go the short way: %s", error)
            return None
        lane.allow(data.borders)
        del self._connections[-1]
        jobs.depth = DEPTH * len(self._connections)
        own.lend(lane.receive)
        jobs.neighbour = self._lane = lane
        return lane

    @property
    def facts(self) -> Connection:
        """Any connection: all say the same of the export."""
        return self._connections[0]

    @property
    def limit(self) -> int:
        """Bytes; no read may cross a multiple of this."""
        return min(self._largest, self.facts.maximum)

    @property
    def has_room(self) -> bool:
        """Would a read go out at once; prefetching stands back where not."""
        return self._in_flight.has_room and not self._to_pay.statistics().current_buffer_used

    def is_reading(self, start: int, end: int) -> bool:
        """Is any byte of the range in flight."""
        return self._in_flight.is_busy(start, end)

    def read(self, buffer: Buffer, offset: int, done: Done) -> Job:
        """Fill `buffer` from `offset`; the buffer belongs to the request until `done`."""
        job = Job(offset, offset + len(buffer), buffer, done)
        if self.lost:
            done(self.lost)
        elif self._bandwidth:
            self._paying.send_nowait(job)
        else:
            self._in_flight.put(job)
        return job

    def trim(self, offset: int, length: int, done: Done) -> None:
        """Discard a range, after the requests for it that came before."""
        if self.lost:
            done(self.lost)
        else:
            self._in_flight.put(Job(offset, offset + length, None, done))

    def withdraw(self, job: Job) -> None:
        """Nobody waits for this read: it ends with WithdrawnError if it has not gone out, else in its own time."""
        job.withdrawn = True
        if self._in_flight.withdraw(job):
            job.done(WithdrawnError())

    def _send(self, job: Job) -> None:
        def done(error: Exception | None) -> None:
            self._in_flight.finished(job)
            job.done(error)

        self._status.nbd_requests += 1
        chosen = min(self._connections, key=_load)
        if job.buffer is None:
            chosen.trim(job.start, job.end - job.start, done)
        else:
            self._status.nbd_bytes += job.end - job.start
            chosen.read(job.buffer, job.start, done)

    async def pay(self) -> None:
        """Task: let reads through at the pace of the bandwidth."""
        async for job in self._to_pay:
            if self._bandwidth and not job.withdrawn:
                await self._bandwidth.pay(job.end - job.start)
            if job.withdrawn:
                job.done(WithdrawnError())
            elif self.lost:
                job.done(self.lost)
            else:
                self._in_flight.put(job)

    def lose(self, error: ConnectionLostError) -> None:
        """Fail all that has not gone out; the connections fail what has."""
        if self.lost:
            return
        self.lost = error
        if self._lane:
            self._lane.close()
        for job in self._in_flight.take_waiting():
            job.done(error)
        while self._bandwidth and self._to_pay.statistics().current_buffer_used:
            self._to_pay.receive_nowait().done(error)


def _load(candidate: Connection) -> int:
    return candidate.in_flight


@asynccontextmanager
async def pool(
    handles: Sequence[Handle],
    uri: str,
    size: int,
    status: DiskStatus,
    bandwidth: Bandwidth | None,
    on_lost: Callable[[ConnectionLostError], None],
    request_unit: int | None,
    sockets: Sockets,
) -> AsyncIterator[Pool]:
    """The connections of these handles to `uri`, an export of `size` bytes.

    Requests are counted in `status`, and paced by `bandwidth`; none crosses a multiple of `request_unit`.
    `on_lost` is called once when the server goes away. Raises UserError where the export has another size.
    """
    opened = Pool(status, bandwidth, request_unit)

    def lost(error: ConnectionLostError) -> None:
        if not opened.lost:
            on_lost(error)
        opened.lose(error)

    async with AsyncExitStack() as stack:
        for handle in handles:
            opened.join(await stack.enter_async_context(attached(handle, uri, size, lost, sockets)))
        await stack.enter_async_context(background(opened.pay))
        stack.callback(opened.lose, ConnectionLostError("the disk was closed"))
        yield opened
