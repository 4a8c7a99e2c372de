# SPDX-License-Identifier: LGPL-2.1-or-later
"""`qfsbackup umount`: unmount and return when the VM is restored and the mount's processes are gone."""

from __future__ import annotations

import errno
import os
import select
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qfsbackup.cli.commit import give
from qfsbackup.errors import EXIT_SYSTEM, EXIT_USAGE, UserError
from qfsbackup.fs.control import CHECK
from qfsbackup.mount.runtime import left_note
from qfsbackup.mounts import MNT_DETACH, Mount, find_mount, mountpoints_of, our_mounts, umount

LOOK = 0.2  # seconds between two looks whether something is left in the VM
DEADLINE = 60.0  # seconds; tearing down waits for QEMU, which may be busy


class BusyError(UserError):
    """A program still has a file open, or its working directory, in the mount; or a loop device shows a file of it."""

    def __init__(self, mountpoint: Path) -> None:
        loops = _loops_on(mountpoint)
        if loops:
            names = " ".join(f"/dev/{loop.name}" for loop in loops)
            places = " ".join(str(place) for place in mountpoints_of(set().union(*map(_numbers, loops))))
            super().__init__(
                f"{mountpoint} is busy: {names} shows a file of it",
                f"Give it back, then unmount again: {f'umount {places}; ' if places else ''}losetup -d {names}",
            )
        else:
            super().__init__(
                f"{mountpoint} is busy: a program still uses it",
                f"End it (fuser -vm {mountpoint} names it), then unmount again.",
            )


def _loops_on(mountpoint: Path) -> list[Path]:
    """The loop devices, as folders below /sys/block, that show a file of the mount; fuser(1) cannot name them."""
    found = []
    for file in sorted(Path("/sys/block").glob("loop*/loop/backing_file")):
        with suppress(OSError):
            if file.read_text().startswith(f"{mountpoint}/"):
                found.append(file.parent.parent)
    return found


def _numbers(loop: Path) -> set[int]:
    """Of the device and its partitions, as in st_rdev."""
    texts = [file.read_text() for file in (loop / "dev", *loop.glob("loop*p*/dev"))]
    return {os.makedev(*map(int, text.split(":"))) for text in texts}


def umount_and_wait(directory: Path) -> dict[str, Any]:
    """The mount's last status, from just before. Raises UserError."""
    mount = find_mount(directory)
    status = _last_status(mount)
    with _process(status["ppid"]) as supervisor:
        try:
            _umount(mount)
            _wait(supervisor, status["ppid"], status["pid"])
        except KeyboardInterrupt:
            if mount in our_mounts():
                raise
            text = f"unmounted; process {status['ppid']} goes on putting the VM back as it was"
            raise KeyboardInterrupt(text) from None
    return status


def end_and_wait(directory: Path) -> None:
    """The same for a mount that somebody still uses: their files turn into errors. Raises UserError."""
    status = _last_status(find_mount(directory))
    with _process(status["ppid"]) as supervisor:
        if supervisor is not None:
            signal.pidfd_send_signal(supervisor, signal.SIGTERM)
        _wait(supervisor, status["ppid"], status["pid"])


def _last_status(mount: Mount) -> dict[str, Any]:
    """After one more look at the snapshot: what broke a moment ago is broken, too."""
    with suppress(OSError):  # a dead mount, or a signal
        give(mount, CHECK)
    try:
        return mount.status()
    except PermissionError:
        raise UserError(
            f"the mount at {mount.mountpoint} is not yours", "Unmounting takes root, or who mounted it.", EXIT_USAGE
        ) from None
    except OSError:
        umount(mount.mountpoint, MNT_DETACH)
        raise UserError(
            f"the mount at {mount.mountpoint} was dead; it is detached now",
            f"Put its VM back as it was: qfsbackup cleanup {mount.source}",
            EXIT_SYSTEM,
        ) from None


@contextmanager
def _process(pid: int) -> Iterator[int | None]:
    """A pidfd of the process, or None where it is gone already."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _umount(mount: Mount) -> None:
    try:
        umount(mount.mountpoint)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise BusyError(mount.mountpoint) from None
        raise UserError(f"cannot unmount {mount.mountpoint}: {error.strerror}", "Unmounting takes root.") from None


def _wait(supervisor: int | None, pid: int, worker: int) -> None:
    if supervisor is None:
        return
    poll = select.poll()
    poll.register(supervisor, select.POLLIN)
    give_up = time.monotonic() + DEADLINE
    while not poll.poll(LOOK * 1000):
        with suppress(OSError):
            if left := left_note(pid).read_text():
                raise UserError(f"unmounted, but {left}", f"Process {pid} takes it out as soon as it can.", EXIT_SYSTEM)
        if time.monotonic() > give_up:
            with _process(worker) as stands_still:  # the supervisor kills it then
                if stands_still is not None:
                    signal.pidfd_send_signal(supervisor, signal.SIGTERM)
            raise UserError(
                f"unmounted, but process {pid} still restores the VM after {DEADLINE:.0f} s",
                "QEMU may hang. The system's log says which step it waits for.",
                EXIT_SYSTEM,
            )
