# SPDX-License-Identifier: LGPL-2.1-or-later
"""`qfsbackup run`: mount, run a command in the mount, commit where there is a target and it succeeded, unmount.

The command's exit status is passed on; 125 is our own failure, also where the command succeeded but read a snapshot
that broke meanwhile.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from qfsbackup.cli.commit import AGAIN, commit, unread
from qfsbackup.cli.executable import find_executable
from qfsbackup.cli.keeper import started
from qfsbackup.cli.mount import MountRequest, mount_in_background
from qfsbackup.cli.run_signals import RunSignals
from qfsbackup.cli.summary import summarize
from qfsbackup.cli.umount import BusyError, end_and_wait, umount_and_wait
from qfsbackup.errors import EXIT_RUN, UserError
from qfsbackup.mounts import detach_dead, find_mount
from qfsbackup.progress import progress

log = logging.getLogger(__name__)

MOUNTPOINTS = Path("/run/qfsbackup/mnt")
TICK = 0.5  # seconds between two looks at the progress


def run(request: MountRequest, command: Sequence[str], *, discarded_on_purpose: bool = False) -> int:
    """The exit status. Raises UserError with exit code 125 where it is our own failure.

    `discarded_on_purpose`: it is none that something was discarded which nobody had read.
    """
    begin = time.monotonic()
    signals = RunSignals()
    try:
        executable = find_executable(command[0])
        mount_in_background(request, bound=True)
        with signals.handled():
            try:
                code = _run_command(request.mountpoint, command, executable, signals)
                if code == 0 and request.options().target:
                    commit(request.mountpoint, discarded_on_purpose=discarded_on_purpose)
            finally:
                status = _unmount(request.mountpoint)
    except UserError as error:
        error.exit_code = EXIT_RUN
        raise
    summarize(status, code, time.monotonic() - begin)
    if status["broken"] and code == 0:
        raise UserError(
            f"the snapshot broke while the command ran: {status['broken']}",
            "Do not trust what it stored; run it again.",
            EXIT_RUN,
        )
    if signals.interrupted:
        raise KeyboardInterrupt(f"the command had ended already, with status {code}")
    if code == 0 and not discarded_on_purpose and unread(status):
        raise UserError(f"the command may have stored zeros: {unread(status)}", AGAIN, EXIT_RUN)
    return code


def make_mountpoint(place: str) -> Path:
    """The folder for a source of this place, made if it is missing: backup tools know a file by its path.

    Raises UserError.
    """
    mountpoint = MOUNTPOINTS / re.sub(r"[^A-Za-z0-9_.-]+", "-", place).strip("-")
    try:
        detach_dead(mountpoint)
        mountpoint.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the mountpoint {mountpoint}: {error.strerror}", "Run as root, or name one: --mountpoint DIR"
        ) from None
    return mountpoint


def _run_command(mountpoint: Path, command: Sequence[str], executable: Path, signals: RunSignals) -> int:
    mount = find_mount(mountpoint)
    environment = {**os.environ, "QFSBACKUP_MOUNT": str(mountpoint)}
    with (
        started(command, executable, mountpoint, environment) as process,
        signals.sent_to(process),
        progress(mount.status()) as show,
    ):
        code = None
        while code is None:
            code = process.wait(TICK)
            with suppress(OSError):  # a broken mount is told of at the end
                show(mount.status())
    return code


def _unmount(mountpoint: Path) -> dict[str, Any]:
    try:
        return umount_and_wait(mountpoint)
    except BusyError:
        log.warning("%s is still in use by what the command left behind; ending the mount all the same", mountpoint)
        status = find_mount(mountpoint).status()
        end_and_wait(mountpoint)
        return status
