# SPDX-License-Identifier: LGPL-2.1-or-later
"""The mounts of ours that the kernel knows, dead ones included."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qfsbackup.errors import EXIT_SYSTEM, UserError

MOUNTINFO = Path("/proc/self/mountinfo")
MNT_DETACH = 2  # umount2(2)
LINKS = 40  # symbolic links that a path is followed through, as the kernel does (path_resolution(7))


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of a process's /proc/PID/mountinfo."""

    id: int  # the kernel's; unique while the mount lasts
    device: str  # the file system's number; the same in every mount namespace that has a copy of the mount
    source: str
    mountpoint: Path
    process: int | None = None  # one that sees it, where it lies in another mount namespace than ours

    @property
    def path(self) -> Path:
        """Where we find it; see proc(5) for a process's `root`."""
        if self.process is None:
            return self.mountpoint
        return Path(f"/proc/{self.process}/root{self.mountpoint}")

    def status(self) -> dict[str, Any]:
        """The live status.json. Raises OSError where the mount is dead, PermissionError where we may not look."""
        content = (self.path / ".qfsbackup" / "status.json").read_text()
        status: dict[str, Any] = json.loads(content)
        return status


def our_mounts() -> list[Mount]:
    """Every qfsbackup mount in this mount namespace, in the order they were made."""
    return _parsed(_table())


def _table() -> list[str]:
    """The lines of mountinfo. Raises UserError where nobody can know what is mounted."""
    try:
        return MOUNTINFO.read_text().splitlines()
    except FileNotFoundError:
        raise UserError(
            "there is no /proc, so what is mounted cannot be seen", "Mount it: mount -t proc proc /proc", EXIT_SYSTEM
        ) from None


def mounts_elsewhere() -> list[Mount]:
    """Those which only processes in other mount namespaces see (a container's, say), as far as we may look."""
    seen = {mount.device for mount in our_mounts()}
    found = []
    for process in _other_namespaces():
        for mount in mounts_seen_by(process):
            if mount.device not in seen:
                found.append(mount)
                seen.add(mount.device)
    return found


def mounts_seen_by(process: int) -> list[Mount]:
    """Every qfsbackup mount in the mount namespace of this process, none where it is gone or hidden from us."""
    elsewhere = _namespace(str(process)) != _namespace("self")
    with suppress(OSError):
        table = Path(f"/proc/{process}/mountinfo").read_text().splitlines()
        return _parsed(table, process if elsewhere else None)
    return []


def _other_namespaces() -> Iterator[int]:
    """A process in each mount namespace but ours."""
    seen = {_namespace("self")}
    for folder in Path("/proc").glob("[0-9]*"):
        namespace = _namespace(folder.name)
        if namespace is not None and namespace not in seen:
            seen.add(namespace)
            yield int(folder.name)


def _namespace(process: str) -> str | None:
    """None where it is gone, or not ours to see."""
    try:
        return os.readlink(f"/proc/{process}/ns/mnt")  # noqa: PTH115  # it is no path
    except OSError:
        return None


def _parsed(lines: list[str], process: int | None = None) -> list[Mount]:
    return [mount for line in lines if (mount := _parse(line, process))]


def _parse(line: str, process: int | None) -> Mount | None:
    """proc(5): `ID PARENT MAJOR:MINOR ROOT MOUNTPOINT OPTIONS [TAGS...] - TYPE SOURCE SUPEROPTIONS`."""
    before, _, after = line.partition(" - ")
    kind, source = after.split(" ")[:2]
    if kind != "fuse.qfsbackup":
        return None
    number, _parent, device, _root, mountpoint = before.split(" ")[:5]
    return Mount(int(number), device, _unescape(source), Path(_unescape(mountpoint)), process)


def mountpoints_of(devices: set[int]) -> list[Path]:
    """Where file systems on these block devices (numbers as in st_rdev) are mounted in this mount namespace."""
    found = []
    for line in _table():
        before, _, after = line.partition(" - ")
        number, mountpoint = (before.split(" ")[field] for field in (2, 4))
        if _device(number, _unescape(after.split(" ")[1])) in devices:
            found.append(Path(_unescape(mountpoint)))
    return found


def kinds_of(device: int) -> set[str]:
    """The type, as mount(8) shows it, of the mounted file system with this number (st_dev); none where none has it."""
    number = f"{os.major(device)}:{os.minor(device)}"
    return {line.partition(" - ")[2].split(" ")[0] for line in _table() if line.split(" ")[2] == number}


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
    for mount in mounts_elsewhere():
        if mount.mountpoint == path:
            raise UserError(
                f"no snapshot is mounted at {directory} here, but in the mount namespace of process {mount.process}",
                f"Go there: nsenter --target {mount.process} --mount umount {mount.mountpoint}",
                EXIT_SYSTEM,
            )
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
