# SPDX-License-Identifier: LGPL-2.1-or-later
"""The mounts of ours that the kernel knows, dead ones included."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qfsbackup.errors import EXIT_SYSTEM, UserError

MOUNTINFO = Path("/proc/self/mountinfo")
MNT_DETACH = 2  # umount2(2)
LINKS = 40  # symbolic links that a path is followed through, as the kernel does (path_resolution(7))


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of /proc/self/mountinfo."""

    id: int  # the kernel's; unique while the mount lasts
    source: str
    mountpoint: Path

    def status(self) -> dict[str, Any]:
        """The live status.json. Raises OSError where the mount is dead."""
        content = (self.mountpoint / ".qfsbackup" / "status.json").read_text()
        status: dict[str, Any] = json.loads(content)
        return status


def our_mounts() -> list[Mount]:
    """Every qfsbackup mount in this mount namespace, in the order they were made."""
    return [mount for line in _table() if (mount := _parse(line))]


def _table() -> list[str]:
    """The lines of mountinfo. Raises UserError where nobody can know what is mounted."""
    try:
        return MOUNTINFO.read_text().splitlines()
    except FileNotFoundError:
        raise UserError(
            "there is no /proc, so what is mounted cannot be seen", "Mount it: mount -t proc proc /proc", EXIT_SYSTEM
        ) from None


def _parse(line: str) -> Mount | None:
    """proc(5): `ID PARENT MAJOR:MINOR ROOT MOUNTPOINT OPTIONS [TAGS...] - TYPE SOURCE SUPEROPTIONS`."""
    before, _, after = line.partition(" - ")
    kind, source = after.split(" ")[:2]
    if kind != "fuse.qfsbackup":
        return None
    number, *_, mountpoint = before.split(" ")[:5]
    return Mount(int(number), _unescape(source), Path(_unescape(mountpoint)))


def mountpoints_of(devices: set[int]) -> list[Path]:
    """Where file systems on these block devices (numbers as in st_rdev) are mounted in this mount namespace."""
    found = []
    for line in _table():
        before, _, after = line.partition(" - ")
        number, mountpoint = (before.split(" ")[field] for field in (2, 4))
        if _device(number, _unescape(after.split(" ")[1])) in devices:
            found.append(Path(_unescape(mountpoint)))
    return found


def _device(number: str, source: str) -> int:
    """btrfs has numbers of its own, with major 0: only its source tells the device."""
    major, minor = map(int, number.split(":"))
    if major or not source.startswith("/dev/"):
        return os.makedev(major, minor)
    try:
        return Path(source).stat().st_rdev
    except OSError:
        return 0


def _unescape(field: str) -> str:
    """Blanks and backslashes stand there as three octal digits."""
    return os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8)]), os.fsencode(field)))


def find_mount(directory: Path) -> Mount:
    """The newest mount at `directory`. Raises UserError where there is none of ours."""
    path = resolved(directory)
    for mount in reversed(our_mounts()):
        if mount.mountpoint == path:
            return mount
    raise UserError(f"no snapshot is mounted at {directory}", "`qfsbackup status` lists the mounted ones.", EXIT_SYSTEM)


def resolved(directory: Path) -> Path:
    """Where a path leads, without a question to what is mounted there, which may hang: readlink(2) asks it nothing."""
    path = directory.absolute()
    for _ in range(LINKS):
        path = Path(os.path.realpath(path.parent)) / path.name
        try:
            path = path.parent / path.readlink()
        except OSError:
            break
    return path


def is_dead(mountpoint: Path) -> bool:
    """The kernel answers ENOTCONN for a FUSE mount whose process is gone; stat(2) it may still answer from memory."""
    try:
        os.statvfs(mountpoint)
    except OSError as error:
        return error.errno == errno.ENOTCONN
    return False


def detach_dead(mountpoint: Path) -> None:
    """Take dead mounts of ours away, or the next one could not be made at this path. Raises OSError."""
    for mount in reversed(our_mounts()):
        if mount.mountpoint == resolved(mountpoint) and is_dead(mountpoint):
            umount(mount.mountpoint, MNT_DETACH)


def umount(mountpoint: Path, flags: int = 0) -> None:
    """umount2(2). Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(os.fsencode(mountpoint), flags) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(mountpoint))
