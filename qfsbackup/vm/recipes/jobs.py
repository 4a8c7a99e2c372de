# SPDX-License-Identifier: LGPL-2.1-or-later
r"""A backup job that copies nothing by itself for each disk, all begun in one transaction: one instant without a pause.

    guest device --> qfsbackup-job-N (the job's own filter) --file--> the disk's root node
                                       \--target--> qfsbackup-fleecing-N

Each `blockdev-backup` holds its disk drained until the transaction's end (blockdev.c), so the jobs come first in it,
and all else happens at the same instant. What cannot be done leaves nothing of it (measured with QEMU 11.1.3, as all
here).

QEMU puts the filter above the node that is named, below whatever else stands there, and takes it away with the job:
nobody's nodes ever go out of the guest's way. Meanwhile it refuses a resize, a mirror, a commit, a stream and a backup
or snapshot of the filter; an external snapshot of the disk's node goes below it, as does another backup. A device that
is unplugged leaves it standing; two devices on one node both write through it (they are refused all the same, see
look/selection). Other than with filters:
- A store that hangs holds the guest's writes up for as long as it does: jobs have no cbw-timeout.
- The guest's trims are dropped: the job's filter has no discard=unmap.
- Somebody may cancel our job. The snapshot can be read no more then (ENOTSUP), until he begins a backup of this disk,
  whose instant it would show: so the end of a job breaks the snapshot as soon as QEMU tells of it. To pause a job, or
  to set its speed, changes nothing.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial

from qfsbackup.errors import UserError
from qfsbackup.tasks import background
from qfsbackup.vm.monitor import Events, Monitor, QmpRefusedError
from qfsbackup.vm.node import undoing
from qfsbackup.vm.ours import JOB
from qfsbackup.vm.quirks import Version, jobs_break_the_snapshot, text
from qfsbackup.vm.recipes.recipe import Bitmaps, Moment
from qfsbackup.vm.second_look import Filtered
from qfsbackup.vm.transaction import transact

CHANGE = "JOB_STATUS_CHANGE"
ENDING = frozenset(["aborting", "waiting", "pending", "concluded", "null"])  # job states on the way to its end


def check(version: Version) -> None:
    """See Recipe, as for all functions here."""
    if not jobs_break_the_snapshot(version):
        raise UserError(
            f"recipe=jobs needs QEMU 10.1 or newer, and this is {text(version)}",
            "Leave it out: the default, recipe=filters, does it with any QEMU.",
        )


def filter_name(number: int) -> str:
    """It is the job's name, too."""
    return f"{JOB}{number}"


@asynccontextmanager
async def standing(qmp: Monitor, version: Version, disks: Sequence[Filtered]) -> AsyncIterator[None]:
    """Nothing stands before the instant."""
    try:
        yield
    finally:
        await take_down(qmp, [disk.filter for disk in disks])


async def switch(qmp: Monitor, disks: Sequence[Filtered], bitmaps: Bitmaps, *, frozen: bool) -> Moment:
    """One command."""
    instant = time.time_ns()
    await transact(qmp, [_backup(disk) for disk in disks], bitmaps.begun, bitmaps.copied)
    return Moment(instant)


def _backup(disk: Filtered) -> Mapping[str, object]:
    data = {
        "job-id": disk.filter,
        "filter-node-name": disk.filter,
        "device": disk.disk.root.name,
        "target": disk.fleecing,
        "sync": "none",
        "on-cbw-error": "break-snapshot",
    }
    return {"type": "blockdev-backup", "data": data}


@asynccontextmanager
async def watched(qmp: Monitor, disks: Sequence[Filtered], lost: Callable[[str], None]) -> AsyncIterator[None]:
    """A look, and from then on QEMU's events: other than with filters a connection is kept all the time."""
    async with qmp.listen(CHANGE) as changes:
        for disk in disks:
            if await _status(qmp, disk.filter) is None:
                raise UserError(f"somebody has ended the block job {disk.filter} of qfsbackup", "Try again.")
        async with background(partial(_watch, changes, [disk.filter for disk in disks], lost)):
            yield


async def _watch(changes: Events, names: Collection[str], lost: Callable[[str], None]) -> None:
    while True:
        change = await changes()
        if change["id"] in names and change["status"] in ENDING:
            lost(f"somebody has ended the block job {change['id']}")
            return


async def free_guest(qmp: Monitor, ours: Collection[str]) -> list[str]:
    """Nothing holds it up."""
    return []


async def take_down(qmp: Monitor, ours: Collection[str]) -> None:
    """Cancel the jobs, and wait for their ends."""
    for name in sorted(name for name in ours if name.startswith(JOB)):
        with undoing(f"end the block job {name}"):
            async with qmp.listen(CHANGE) as changes:
                while await _cancel(qmp, name):
                    await changes()


async def _cancel(qmp: Monitor, name: str) -> bool:
    """Have it end unless it does already; is it still there? Raises QmpError."""
    status = await _status(qmp, name)
    if status is None or status in ENDING:
        return status is not None
    try:
        await qmp.execute("job-cancel", {"id": name})
    except QmpRefusedError:
        if await _status(qmp, name) == status:
            raise
    return True


async def _status(qmp: Monitor, name: str) -> str | None:
    """None where there is no such job. Raises QmpError."""
    return next((job["status"] for job in await qmp.execute("query-jobs") if job["id"] == name), None)
