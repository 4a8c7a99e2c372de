# SPDX-License-Identifier: LGPL-2.1-or-later
"""The disks of a snapshot, found together: their maps, and as many connections as there are to be had.

    maps, then one connection -+- all disks at once, a few handshakes at a time
                               |
    the other connections -----+- shared out; where a server takes no more, a disk goes with fewer

A server serves a limited number (QEMU 100, if nobody asks for more; qemu-nbd as many as --shared says), so the first
connection of every disk comes before the second of any.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

import trio

from qfsbackup.contracts import Disk, Mounting
from qfsbackup.errors import UserError
from qfsbackup.facts import CONNECTIONS, USUAL_CHUNK, fitting
from qfsbackup.nbd import extents
from qfsbackup.nbd.bandwidth import Bandwidth
from qfsbackup.nbd.budget import Budget
from qfsbackup.nbd.connection import ConnectionLostError, configure
from qfsbackup.nbd.disk import NbdDisk
from qfsbackup.nbd.export import Export
from qfsbackup.nbd.handle import Handle, Handles, handles, where
from qfsbackup.nbd.pool import pool
from qfsbackup.patience import NoAnswerError, in_time
from qfsbackup.ranges import RangeSet

log = logging.getLogger(__name__)

AT_ONCE = 8  # disks that connect; fewer than wait in the queue of QEMU's socket
MORE_TIMEOUT = 5.0  # seconds for a connection that can be done without
COPIED_TIMEOUT = 30.0  # seconds

OpenDisk = Callable[[], AbstractAsyncContextManager[Disk]]


@dataclass(slots=True)
class _Found:
    """A disk whose maps are known, and its connections so far."""

    export: Export
    data: RangeSet
    dirty: RangeSet
    handles: list[Handle] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Shared:
    """What all disks of a mount have in common."""

    mounting: Mounting
    budget: Budget
    bandwidth: Bandwidth | None
    own: bool


@asynccontextmanager
async def connected_disks(exports: Sequence[Export], mounting: Mounting, *, own: bool) -> AsyncIterator[list[OpenDisk]]:
    """What opens the disks behind `exports`, in their order, each once; their maps are fetched before anything can be
    trimmed, which nothing is unless the snapshot is our `own`.

    A disk counts in `mounting.status.disks`, and breaks the mount when its server goes away. Raises UserError where a
    server cannot be reached or does not offer what an export says.
    """
    options = mounting.options
    each = min(options.connections, max(1, CONNECTIONS // max(1, len(exports))))
    shared = _Shared(mounting, Budget(), Bandwidth(options.bwlimit) if options.bwlimit else None, own)
    async with handles() as connected:
        found = await _all([partial(_find, export, connected) for export in exports])
        await _connect_more(found, each, connected)
        yield [partial(_opened, one, shared) for one in found]


async def _all(jobs: Sequence[Callable[[], Awaitable[_Found]]]) -> list[_Found]:
    """What the jobs return, in their order; the first error ends all, and is raised as it is."""
    results: dict[int, _Found] = {}
    errors: list[UserError] = []
    turn = trio.CapacityLimiter(AT_ONCE)
    async with trio.open_nursery() as nursery:

        async def run(number: int, job: Callable[[], Awaitable[_Found]]) -> None:
            try:
                async with turn:
                    results[number] = await job()
            except UserError as error:
                errors.append(error)
                nursery.cancel_scope.cancel()

        for number, job in enumerate(jobs):
            nursery.start_soon(run, number, job)
    if errors:
        raise errors[0]
    return [results[number] for number in range(len(jobs))]


async def _find(export: Export, connected: Handles) -> _Found:
    """One connection at a time: a server may take no more. And one map at a time: two block status requests for the
    same range must not be in flight."""
    dirty = RangeSet([(0, export.size)])
    if export.dirty_context:
        dirty = await extents.dirty(export.uri, export.size, export.dirty_context)
    if export.low_water is not None:
        dirty.add(export.low_water, export.size)
    found = _Found(export, await _allocation(export), dirty)
    found.handles.append(await connected.connect(export.uri, configure))
    return found


async def _allocation(export: Export) -> RangeSet:
    """What is not known to be zero."""
    if not export.allocation:
        return RangeSet([(0, export.size)])
    data = await extents.allocation(export.uri, export.size)
    if export.copied is None:
        return data
    try:
        return data | await in_time(export.copied, COPIED_TIMEOUT)
    except NoAnswerError:
        raise UserError(
            "the fleecing folder does not answer", "See whether its file system hangs, or name another: -o fleece=DIR"
        ) from None


async def _connect_more(found: Sequence[_Found], each: int, connected: Handles) -> None:
    """One more for every disk, until all have `each`, or somebody's server takes no more.

    Only where the server promises that what one connection reads is what another one does.
    """
    turn = trio.CapacityLimiter(AT_ONCE)
    refused: list[UserError] = []

    async def connect(disk: _Found) -> None:
        async with turn:
            if not refused:
                try:
                    disk.handles.append(await connected.connect(disk.export.uri, configure, MORE_TIMEOUT))
                except UserError as error:
                    refused.append(error)

    sharing = [one for one in found if one.handles[0].can_multi_conn()]
    for _ in range(each - 1):
        async with trio.open_nursery() as nursery:
            for disk in sharing:
                nursery.start_soon(connect, disk)
    if refused:
        count = sum(len(one.handles) for one in found)
        log.warning("going on with %d connections, for more cannot be had: %s", count, refused[0].what)


@asynccontextmanager
async def _opened(found: _Found, shared: _Shared) -> AsyncIterator[Disk]:
    export, status = found.export, shared.mounting.status
    figures, health = status.disks[export.disk], status.health

    def lost(error: ConnectionLostError) -> None:
        health.mark_broken(f"the connection to {where(export.uri)} is lost: {error}")

    figures.data, figures.dirty = found.data.total(), found.dirty.total()
    async with pool(
        found.handles,
        export.uri,
        export.size,
        figures,
        shared.bandwidth,
        lost,
        export.request_unit,
        shared.mounting.sockets,
    ) as connections:
        can_trim = shared.own and connections.facts.can_trim
        wanted = _wanted(found, shared.mounting.options.chunk)
        disk = NbdDisk(connections, found.data, found.dirty, can_trim, figures, health, shared.budget, wanted)
        try:
            yield disk
        finally:
            disk.forget()


def _wanted(found: _Found, chunk: int | None) -> RangeSet:
    """The chunks that changed: a tool that skips the others wants nothing behind the end of one."""
    if found.export.dirty_context is None:
        return RangeSet()
    size = found.export.size
    return found.dirty.aligned_outward(fitting(size, chunk or USUAL_CHUNK), size)
