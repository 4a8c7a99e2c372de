# SPDX-License-Identifier: LGPL-2.1-or-later
"""What to say where a command of ours has a VM: which one it is, and where it shows a snapshot."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from qfsbackup.errors import UserError
from qfsbackup.mounts import Mount, mounts_seen_by


def held_by(pid: int, name: str) -> UserError:
    """What to say where this process of ours has the VM of this name: a mount, a run, or another command."""
    command = our_command(pid)
    if command == "run":
        return UserError(
            f"{name} is being backed up: `qfsbackup run` is at work (process {pid})",
            "Wait for its end; `qfsbackup status` shows how far it is.",
        )
    mount = _served(pid)
    if mount is None:
        what = f"`qfsbackup {command}` (process {pid})" if command else f"process {pid}"
        return UserError(f"{what} is at work on {name}", "Wait for its end.")
    if mount.process is not None:
        return UserError(
            f"{name} is already mounted at {mount.mountpoint} by process {pid}, in another mount namespace",
            f"Unmount it there first: nsenter --target {pid} --mount umount {mount.mountpoint}",
        )
    return UserError(
        f"{name} is already mounted at {mount.mountpoint} by process {pid}",
        f"Unmount it first: qfsbackup umount {mount.mountpoint}",
    )


def our_command(pid: int) -> str | None:
    """`mount` of `python /usr/local/bin/qfsbackup mount ...`; None of any other program's words."""
    words = _command_line(pid)
    for place, word in enumerate(words[:3]):
        if Path(word).name == "mount.qfsbackup":
            return "mount"
        if Path(word).name == "qfsbackup":
            return next((word for word in words[place + 1 :] if not word.startswith("-")), "mount")
    return None


def _served(pid: int) -> Mount | None:
    """The mount that this process was called to make; asked of the kernel only, for it may be a mount that hangs."""
    with suppress(OSError):
        folder = os.readlink(f"/proc/{pid}/cwd")  # noqa: PTH115  # a path only inside of that process's root
        words = [os.path.join(folder, word) for word in _command_line(pid)]  # noqa: PTH118  # nothing is looked at
        paths = set(map(os.path.normpath, words))
        return next((mount for mount in mounts_seen_by(pid) if os.path.normpath(mount.source) in paths), None)
    return None


def _command_line(pid: int) -> list[str]:
    with suppress(OSError):
        return [os.fsdecode(word) for word in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") if word]
    return []
