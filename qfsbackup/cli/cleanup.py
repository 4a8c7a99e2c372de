# SPDX-License-Identifier: LGPL-2.1-or-later
"""`qfsbackup cleanup`: undo what a dead mount left behind, in the VM and in the file system. Safe to repeat."""

from __future__ import annotations

import logging

from qfsbackup.contracts import Source
from qfsbackup.errors import UserError
from qfsbackup.mount.runtime import frozen_by_the_dead, sweep
from qfsbackup.mounts import MNT_DETACH, Mount, is_dead, our_mounts, umount
from qfsbackup.options import Options, parse_options
from qfsbackup.sources import find

log = logging.getLogger(__name__)


def cleanup(source: Source, option_texts: list[str]) -> list[str]:
    """What was undone, a line each; of the options only `agent=`, `state=` and `vm=` matter. Raises UserError."""
    from qfsbackup.cli import interruptible  # needs trio, which the supervisor must not have in it

    options = parse_options(option_texts)
    done = [_detach(mount) for mount in our_mounts() if mount.source == source.name and is_dead(mount.mountpoint)]

    async def undo() -> list[str]:
        return [*done, *await _thaw(), *await _undo(source, options)]

    return interruptible.run(undo)


def _detach(mount: Mount) -> str:
    umount(mount.mountpoint, MNT_DETACH)
    return f"detached the dead mount at {mount.mountpoint}"


async def _thaw() -> list[str]:
    """Whoever a dead mount froze, before QEMU is asked anything, for it may be stuck."""
    done = []
    for note in frozen_by_the_dead():
        try:
            if await find(note.source).thaw(note.agent):
                done.append(f"thawed the guest behind {note.agent}")
            note.path.unlink()
        except (UserError, OSError) as error:
            log.warning("cannot tell whether the guest's file systems are frozen: %s", error)
    return done


async def _undo(source: Source, options: Options) -> list[str]:
    sweep()
    return await source.clean_up(options)
