# SPDX-License-Identifier: LGPL-2.1-or-later
"""`qfsbackup cleanup`: undo what a dead mount left behind, in the VM and in the file system. Safe to repeat."""

from __future__ import annotations

from qfsbackup.mounts import MNT_DETACH, Mount, is_dead, our_mounts, umount
from qfsbackup.options import parse_options


def cleanup(source: str, option_texts: list[str]) -> list[str]:
    """What was undone, a line each; of the options only `agent=` matters. Raises UserError."""
    from qfsbackup.cli.upkeep import clean_up  # needs all the heavy modules

    options = parse_options(option_texts)
    done = [_detach(mount) for mount in our_mounts() if mount.source == source and is_dead(mount.mountpoint)]
    return done + clean_up(source, options)


def _detach(mount: Mount) -> str:
    umount(mount.mountpoint, MNT_DETACH)
    return f"detached the dead mount at {mount.mountpoint}"
