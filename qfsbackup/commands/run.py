# SPDX-License-Identifier: LGPL-2.1-or-later
"""`qfsbackup run`: mount, run a command in the mount, commit where there is a target and it succeeded, unmount.

The command's exit status is passed on; 125 is our own failure, also where the command succeeded but read a snapshot
that broke meanwhile.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qfsbackup.commands.commit import commit
from qfsbackup.commands.mount import MountRequest, mount_in_background
from qfsbackup.commands.progress import progress, read_bytes
from qfsbackup.commands.status import human
from qfsbackup.commands.umount import BusyError, end_and_wait, umount_and_wait
from qfsbackup.errors import EXIT_RUN, UserError
from qfsbackup.mounts import detach_dead, find_mount

log = logging.getLogger(__name__)

MOUNTPOINTS = Path("/run/qfsbackup/mnt")
TICK = 0.5  # seconds between two looks at the progress


def run(request: MountRequest, command: Sequence[str]) -> int:
    """The exit status. Raises UserError with exit code 125 where it is our own failure."""
    started = time.monotonic()
    try:
        mount_in_background(request, bound=True)
        try:
            code = _run_command(request.mountpoint, command)
            if code == 0 and request.options().target:
                commit(request.mountpoint)
        finally:
            status = _unmount(request.mountpoint)
    except UserError as error:
        error.exit_code = EXIT_RUN
        raise
    _summary(status, time.monotonic() - started)
    if status["broken"] and code == 0:
        raise UserError(
            f"the snapshot broke while the command ran: {status['broken']}",
            "Do not trust what it stored; run it again.",
            EXIT_RUN,
        )
    return code


def default_mountpoint(source: str) -> Path:
    """The same for every run of the same source: backup tools know a file by its path."""
    path = os.path.realpath(source) if os.path.exists(source) else source  # noqa: PTH110  # a URI is no Path
    return MOUNTPOINTS / re.sub(r"[^A-Za-z0-9_.-]+", "-", path).strip("-")


def make_mountpoint(mountpoint: Path) -> Path:
    """The folder, made if it is missing. Raises UserError."""
    try:
        detach_dead(mountpoint)
        mountpoint.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the mountpoint {mountpoint}: {error.strerror}", "Run as root, or name one: --mountpoint DIR"
        ) from None
    return mountpoint


def _run_command(mountpoint: Path, command: Sequence[str]) -> int:
    mount = find_mount(mountpoint)
    environment = {**os.environ, "QFSBACKUP_MOUNT": str(mountpoint)}
    with _signals() as send_to, progress(mount.status()) as show:
        try:
            process = subprocess.Popen(command, cwd=mountpoint, env=environment)
        except OSError as error:
            raise UserError(f"cannot run {command[0]}: {error.strerror}", "Is it installed, and in the PATH?") from None
        send_to(process)
        code = None
        while code is None:
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(TICK)
            with suppress(OSError):  # a broken mount is told of at the end
                show(mount.status())
    return code if code >= 0 else 128 - code


@contextmanager
def _signals() -> Iterator[Callable[[subprocess.Popen[bytes]], None]]:
    """SIGTERM and SIGHUP go to the command; SIGINT reaches it from the terminal by itself. We wait for its end.

    The handlers stand before the command starts (exec gives it the default ones): a signal that arrives before the
    function which this yields is called with the command waits for that call.
    """
    early: list[int] = []
    send = early.append

    def send_to(process: subprocess.Popen[bytes]) -> None:
        nonlocal send
        send = process.send_signal
        for number in early:
            send(number)

    old = {
        signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None),
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda number, _: send(number)),
        signal.SIGHUP: signal.signal(signal.SIGHUP, lambda number, _: send(number)),
    }
    try:
        yield send_to
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _unmount(mountpoint: Path) -> dict[str, Any]:
    try:
        return umount_and_wait(mountpoint)
    except BusyError:
        log.warning("%s is still in use by what the command left behind; ending the mount all the same", mountpoint)
        status = find_mount(mountpoint).status()
        end_and_wait(mountpoint)
        return status


def _summary(status: dict[str, Any], seconds: float) -> None:
    disks = status["disks"].values()
    log.info(
        "%d disks, %s dirty, %s read, fleecing peak %s, guest paused %.1f ms, %.0f s",
        len(disks),
        human(sum(disk["dirty"] for disk in disks)),
        human(read_bytes(status)),
        human(status["fleecing"]["peak"]),
        status["pause_ms"],
        seconds,
    )
