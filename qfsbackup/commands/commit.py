# SPDX-License-Identifier: LGPL-2.1-or-later
"""`qfsbackup commit`: what this mount showed is the base of the target's next backup."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from qfsbackup.errors import EXIT_SYSTEM, EXIT_USAGE, UserError
from qfsbackup.fs.control import GIVE, WORDS
from qfsbackup.mounts import Mount, find_mount


def commit(directory: Path) -> None:
    """Returns once that is on the disk. Raises UserError."""
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
        fcntl.ioctl(descriptor, GIVE, b"commit".ljust(WORDS))
    except OSError as error:
        raise _failed(mount, error) from None
    finally:
        os.close(descriptor)


def _failed(mount: Mount, error: OSError) -> UserError:
    try:
        reason = mount.status()["commit_error"]
    except OSError:
        return UserError(
            f"the mount at {mount.mountpoint} died while it committed",
            f"The next backup is right in either case. Does this one count: qfsbackup checkpoints {mount.source}",
            EXIT_SYSTEM,
        )
    return _refused(mount.mountpoint, str(reason or error.strerror))


def _refused(directory: Path, reason: str) -> UserError:
    return UserError(
        f"the backup at {directory} was not committed: {reason}",
        "The next one starts from the last commit, as if this one had not been.",
        EXIT_SYSTEM,
    )
