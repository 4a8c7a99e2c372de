# SPDX-License-Identifier: LGPL-2.1-or-later
"""Is the snapshot still whole? QEMU tells nobody that it is not: one has to look at the fleecing files, and to read.

Both may hang. A store that does not answer may have lost what was written: the snapshot is broken. A server that does
not answer has told nothing wrong: those who read wait for it, but nothing is committed.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import trio

from qfsbackup.contracts import Disk
from qfsbackup.errors import FsError
from qfsbackup.patience import NoAnswerError, in_time
from qfsbackup.status import Status

log = logging.getLogger(__name__)

LOOK_TIMEOUT = 10.0  # seconds; the calls ask for metadata only
CHECK_TIMEOUT = 5.0  # seconds for a look and a read of every disk


async def look_at_files(status: Status, seconds: float = LOOK_TIMEOUT) -> None:
    """Look at the fleecing files, and note what is found."""
    if status.look_at_fleecing is None:
        return
    try:
        found = await in_time(status.look_at_fleecing, seconds)
    except NoAnswerError:
        status.health.mark_broken(f"the fleecing folder's file system has not answered for {seconds:.0f} s")
    except OSError as error:
        status.health.mark_broken(f"the fleecing files cannot be looked at: {error.strerror}")
    else:
        status.note(found)


async def check(status: Status, disks: Sequence[Disk], seconds: float = CHECK_TIMEOUT) -> bool:
    """Look, and read a little of every disk: afterwards `status.health.broken` is true for this moment.

    False where a disk has not answered in time.
    """
    if status.health.broken:
        return True
    async with trio.open_nursery() as nursery:
        nursery.start_soon(look_at_files, status, min(seconds, LOOK_TIMEOUT))
        with trio.move_on_after(seconds) as scope:
            async with trio.open_nursery() as readers:
                for disk in disks:
                    readers.start_soon(_read, disk, status)
    if scope.cancelled_caught:
        log.warning("not every disk has answered a last read within %.0f s", seconds)
    return not scope.cancelled_caught


async def _read(disk: Disk, status: Status) -> None:
    try:
        await disk.probe()
    except FsError as error:
        status.health.mark_broken(str(error))
