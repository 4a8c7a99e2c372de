# SPDX-License-Identifier: LGPL-2.1-or-later
"""`qfsbackup commit`: what this mount showed is the base of the target's next backup."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

from qfsbackup.errors import EXIT_SYSTEM, EXIT_USAGE, UserError
from qfsbackup.fs.control import COMMIT, GIVE, ON_PURPOSE, WORDS
from qfsbackup.mounts import Mount, find_mount
from qfsbackup.status import discarded

UNDONE = "The next one starts from the last commit, as if this one had not been."
AGAIN = "Take it again, mounted with ro; or, if that was given away on purpose, say --discarded-on-purpose."


def commit(directory: Path, *, discarded_on_purpose: bool = False) -> None:
    """Returns once that is on the disk. Raises UserError.

    `discarded_on_purpose`: also where something was discarded that nobody had read.
    """
    mount = find_mount(directory)
    try:
        give(mount, ON_PURPOSE if discarded_on_purpose else COMMIT)
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise UserError(
                f"{directory} was mounted without a target, so there is nothing to commit",
                "Mount it with -o target=NAME.",
                EXIT_USAGE,
            ) from None
        raise _failed(mount, error) from None


def give(mount: Mount, word: bytes) -> None:
    """Give the control file a word; returns when that is done. Raises OSError."""
    descriptor = os.open(mount.mountpoint / ".qfsbackup" / "control", os.O_RDONLY)
    try:
        fcntl.ioctl(descriptor, GIVE, word.ljust(WORDS))
    finally:
        os.close(descriptor)


def _failed(mount: Mount, error: OSError) -> UserError:
    try:
        status = mount.status()
    except OSError:
        return UserError(
            f"the mount at {mount.mountpoint} died while it committed",
            f"The next backup is right in either case. Does this one count: qfsbackup checkpoints {mount.source}",
            EXIT_SYSTEM,
        )
    reason = status["commit_error"]
    return _refused(mount.mountpoint, str(reason or error.strerror), AGAIN if reason == unread(status) else UNDONE)


def unread(status: dict[str, Any]) -> str:
    """What of a mount was discarded before anybody read it, for a person; empty: nothing."""
    return discarded({name: disk.get("discarded_unread", 0) for name, disk in status["disks"].items()})


def _refused(directory: Path, reason: str, hint: str = UNDONE) -> UserError:
    return UserError(f"the backup at {directory} was not committed: {reason}", hint, EXIT_SYSTEM)
