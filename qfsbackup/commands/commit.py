# SPDX-License-Identifier: LGPL-2.1-or-later
"""`qfsbackup commit`: what this mount showed is the base of the target's next backup."""

from __future__ import annotations

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
        descriptor = os.open(mount.mountpoint / ".qfsbackup" / "control", os.O_RDONLY)
    except FileNotFoundError:
        raise UserError(
            f"{directory} was mounted without a target, so there is nothing to commit",
            "Mount it with -o target=NAME.",
            EXIT_USAGE,
        ) from None
    except OSError as error:
        raise _refused(directory, error.strerror or str(error)) from None
    try:
        fcntl.ioctl(descriptor, GIVE, (ON_PURPOSE if discarded_on_purpose else COMMIT).ljust(WORDS))
    except OSError as error:
        raise _failed(mount, error) from None
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
