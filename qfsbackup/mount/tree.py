# SPDX-License-Identifier: LGPL-2.1-or-later
"""The tree that a mount shows: a snapshot and its disks, with the times of a target's chain if there is one."""

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial

from qfsbackup.contracts import Disk, Snapshot
from qfsbackup.errors import EXIT_SYSTEM, FsError, UserError
from qfsbackup.fs.control import CHECK, COMMIT, ON_PURPOSE, Words
from qfsbackup.fs.description import Look, describe, iso_time
from qfsbackup.fs.frozen import FrozenDisk
from qfsbackup.fs.grid import Grid, cut
from qfsbackup.fs.tree import ShownDisk, Tree, build_tree
from qfsbackup.mount.chain import Chain, Numbers
from qfsbackup.mount.checking import check
from qfsbackup.options import Options
from qfsbackup.ranges import RangeSet
from qfsbackup.state.database import SECOND
from qfsbackup.status import DiskStatus, Status, discarded

log = logging.getLogger(__name__)


async def make_tree(
    snapshot: Snapshot, disks: Sequence[Disk], chain: Chain | None, options: Options, status: Status
) -> Tree:
    """Build it, and give back what `access=dirty` leaves out. Raises UserError."""
    time = await chain.begin(snapshot) if chain else snapshot.instant
    if chain:
        grids = await chain.grids(snapshot, time, disks)
    else:
        grids = {one.name: cut(one.size, RangeSet(), time, chunk=options.chunk) for one in snapshot.disks}
    numbers = await chain.numbers(snapshot) if chain else None
    shown = _shown(snapshot, disks, numbers, grids, status)
    images = options.access == "full"
    if not images:
        await _leave_out_clean(shown, grids, time if chain else None)
    look = Look(
        time=time,
        newest=max(time + SECOND, snapshot.instant // SECOND * SECOND) if chain else snapshot.instant,
        number=numbers.vm if numbers else None,
        target=options.target,
        base_instants=chain.base_instants if chain else {},
        images=images,
        release=options.discard == "release" and snapshot.own,
        words=_words(chain, snapshot, disks, status),
    )
    return build_tree(snapshot, shown, status, describe(snapshot, grids, look), look)


def _shown(
    snapshot: Snapshot,
    disks: Sequence[Disk],
    numbers: Numbers | None,
    grids: Mapping[str, Grid],
    status: Status,
) -> list[ShownDisk]:
    shown = []
    for place, (found, disk) in enumerate(zip(snapshot.disks, disks, strict=True)):
        frozen = FrozenDisk(disk, status.health, status.disks[found.name])
        number = numbers.disks[found.name] if numbers else place
        shown.append(ShownDisk(found.name, number, frozen, grids[found.name]))
    return shown


async def _leave_out_clean(shown: Sequence[ShownDisk], grids: Mapping[str, Grid], time: int | None) -> None:
    """Give every chunk back that is clean: guest writes there then cost no copying.

    Where there is a chain, what has not this mount's `time` is; it may have shown other chunks as changed before.
    """
    for disk in shown:
        grid = grids[disk.name]
        dirty = disk.frozen.dirty.aligned_outward(grid.chunk, disk.frozen.size)
        for start, end in RangeSet([(0, disk.frozen.size)]) - (dirty if time is None else grid.changed(time)):
            await disk.frozen.release(start, end)


def _words(chain: Chain | None, snapshot: Snapshot, disks: Sequence[Disk], status: Status) -> Words:
    """What the control file does."""
    words: dict[bytes, Callable[[], Awaitable[object]]] = {CHECK: partial(check, status, disks)}
    if chain:
        words[COMMIT] = partial(_commit, chain, snapshot, disks, status, discarded_on_purpose=False)
        words[ON_PURPOSE] = partial(_commit, chain, snapshot, disks, status, discarded_on_purpose=True)
    return words


async def _commit(
    chain: Chain, snapshot: Snapshot, disks: Sequence[Disk], status: Status, discarded_on_purpose: bool
) -> None:
    """What `commit` does."""
    try:
        if not (discarded_on_purpose or chain.committed):
            _check_read(status)
        await chain.commit(snapshot, disks, status)
    except UserError as error:
        log.warning("%s", error.what)
        status.facts["commit_error"] = error.what
        raise FsError(errno.EIO, error.what) from error
    status.facts |= {"committed": True, "commit_error": None}


def _check_read(status: Status) -> None:
    """Whoever read what was discarded read zeros, or nothing."""
    lost = discarded({name: disk.discarded_unread() for name, disk in status.disks.items()})
    if lost:
        raise UserError(lost, "Commit it with discarded-on-purpose, if that was meant.", EXIT_SYSTEM)


def note(status: Status, snapshot: Snapshot, options: Options) -> None:
    """What the live status repeats of the snapshot; from now on its disks can be counted in it."""
    status.fleecing_limit = options.fleece_limit
    status.facts |= {
        "vm": snapshot.vm,
        "instant": iso_time(snapshot.instant),
        "frozen": snapshot.frozen,
        "pause_ms": snapshot.pause_ms,
        "target": options.target,
        "committed": False,
        "commit_error": None,
    }
    for disk in snapshot.disks:
        status.disks[disk.name] = DiskStatus(
            disk.size,
            bitmap=disk.bitmap,
            bitmap_reason=disk.bitmap_reason,
            generation=disk.generation,
            base=disk.base,
            transient=disk.transient,
        )
