# SPDX-License-Identifier: LGPL-2.1-or-later
"""`qfsbackup cleanup`: undo what a dead mount left behind, in the VM and in the file system. Safe to repeat."""

from __future__ import annotations

import logging

from qfsbackup.contracts import Source
from qfsbackup.errors import UserError
from qfsbackup.mount.runtime import frozen_by_the_dead, sweep
from qfsbackup.mounts import MNT_DETACH, is_dead, our_mounts, umount
from qfsbackup.options import Options
from qfsbackup.sources import find

log = logging.getLogger(__name__)


async def cleanup(source: Source, options: Options) -> list[str]:
    """What was undone, a line each. Raises UserError."""
    done = []
    for mount in our_mounts():
        if mount.source == source.name and is_dead(mount.mountpoint):
            umount(mount.mountpoint, MNT_DETACH)
            done.append(f"detached the dead mount at {mount.mountpoint}")
    done += await _thaw()  # before QEMU is asked anything, for it may be stuck
    sweep()
    return done + await source.clean_up(options)


async def _thaw() -> list[str]:
    """Whoever a dead mount froze."""
    done = []
    for note, name, agent in frozen_by_the_dead():
        try:
            done += [f"thawed the guest behind {agent}"] if await find(name).thaw(agent) else []
            note.unlink()
        except (UserError, OSError) as error:
            log.warning("cannot tell whether the guest's file systems are frozen: %s", error)
    return done
