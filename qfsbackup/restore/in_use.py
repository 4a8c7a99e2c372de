# SPDX-License-Identifier: LGPL-2.1-or-later
"""Does anybody use a file or block device that is about to be replaced or overwritten? And who?

QEMU goes on with the file that it has open after another got its name: all that it writes from then on is lost at its
end. So the kernel is asked, and whoever it names is left alone: mounts, loop devices, processes with it open, locks of
any kind (QEMU's image locks are such, also of a QEMU in a container or on another host of an NFS), at last a lease,
which the kernel gives only for a file that nobody else has open.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qfsbackup.errors import EXIT_SYSTEM, UserError
from qfsbackup.mounts import kinds_of, mountpoints_of

FLOCK = struct.Struct("hhqqi4x")  # struct flock of fcntl(2): type, whence, start, length (0: up to the end), pid
NO_LEASES = {"nfs", "nfs4", "cifs", "smb3"}  # they refuse one with the same EAGAIN where the server has not given it
PROC, SYS = Path("/proc"), Path("/sys")


@dataclass(frozen=True, slots=True)
class Use:
    """By whom it is used, and how that ends."""

    who: str
    remedy: str


def check_unused(path: Path) -> None:
    """Raise UserError where anybody but this process uses the file or block device at `path`; OSError if it is gone."""
    status = path.stat()
    uses = _device_uses(path, status) if stat.S_ISBLK(status.st_mode) else _file_uses(path, status)
    use = next(uses, None)
    if use:
        raise UserError(f"{path} is in use by {use.who}", f"{use.remedy}, or name another place.", EXIT_SYSTEM)


def device_in_use(path: Path) -> UserError:
    """The error for a block device that the kernel does not give (EBUSY): who has it, as far as that can be seen."""
    use = next(_device_uses(path, path.stat()), None)
    use = use or Use("the kernel (swap, LVM, RAID or the like)", "Take it out of there")
    return UserError(f"{path} is in use by {use.who}", f"{use.remedy}, or name another device.", EXIT_SYSTEM)


def _file_uses(path: Path, status: os.stat_result) -> Iterator[Use]:
    yield from _loops(path)
    yield from _processes({(status.st_dev, status.st_ino)}, writing=False)
    yield from _holders_without_a_name(path)


def _device_uses(path: Path, status: os.stat_result) -> Iterator[Use]:
    devices = _whole_and_parts(status.st_rdev)
    for mountpoint in mountpoints_of(devices):
        yield Use(f"the mount at {mountpoint}", f"Unmount it (umount {mountpoint})")
    yield from _loops(path)
    yield from _processes({(0, device) for device in devices}, writing=True)  # udev and others just look at it
    yield from _holders_without_a_name(path)


def _whole_and_parts(device: int) -> set[int]:
    """A block device, its partitions, and what it is a partition of: who uses the one uses the other."""
    place = (SYS / "dev/block" / f"{os.major(device)}:{os.minor(device)}").resolve()
    whole = place.parent if (place / "partition").exists() else place
    parts = [part.parent for part in place.glob("*/partition")]
    return {device} | {_device_number(folder / "dev") for folder in (whole, *parts) if (folder / "dev").exists()}


def _device_number(path: Path) -> int:
    major, minor = path.read_text().split(":")
    return os.makedev(int(major), int(minor))


def _loops(path: Path) -> Iterator[Use]:
    """Loop devices over it: the kernel's own, so that no process has it open."""
    for backing in SYS.glob("block/loop*/loop/backing_file"):
        try:
            if path.samefile(backing.read_text().removesuffix("\n")):
                name = f"/dev/{backing.parent.parent.name}"
                yield Use(f"the loop device {name}", f"Detach it (losetup --detach {name})")
        except OSError:  # detached, or its file removed, meanwhile
            continue


def _processes(wanted: set[tuple[int, int]], *, writing: bool) -> Iterator[Use]:
    """Processes that have one of these open (see `_identity`). Others' can be seen by root only."""
    inodes = {inode for device, inode in wanted if device}
    for process in PROC.iterdir():
        if process.name.isdecimal() and int(process.name) != os.getpid() and _has(process, wanted, inodes, writing):
            yield Use(_process(process), "End that first")


def _has(process: Path, wanted: set[tuple[int, int]], inodes: set[int], writing: bool) -> bool:
    """Does this process have one of these open."""
    try:
        links = list((process / "fd").iterdir())
    except OSError:  # ended meanwhile, or not ours to look at
        return False
    return any(_is(link, wanted, inodes, writing) for link in links)


def _is(link: Path, wanted: set[tuple[int, int]], inodes: set[int], writing: bool) -> bool:
    try:
        flags, inode = _description(link.parent.parent / "fdinfo" / link.name)
        if writing and flags & os.O_ACCMODE == os.O_RDONLY:
            return False
        # stat(2) of a file on a server that hangs, hangs too: only what may be it is looked at.
        may_be = inode in inodes or link.readlink().is_relative_to("/dev")
        return may_be and _identity(link.stat()) in wanted
    except OSError:  # closed meanwhile
        return False


def _description(fdinfo: Path) -> tuple[int, int]:
    """Flags and inode of an open file; proc(5), the inode from Linux 5.14 on."""
    fields = dict(line.split(":", 1) for line in fdinfo.read_text().splitlines() if ":" in line)
    return int(fields["flags"], 8), int(fields["ino"])


def _identity(status: os.stat_result) -> tuple[int, int]:
    """What a file is, whatever its name: device and inode; a block device has several inodes, but one number."""
    return (0, status.st_rdev) if stat.S_ISBLK(status.st_mode) else (status.st_dev, status.st_ino)


def _process(process: Path) -> str:
    try:
        name = (process / "comm").read_bytes().decode(errors="replace").strip()
    except OSError:
        name = "?"
    shown = "".join(letter if letter.isprintable() else "?" for letter in name)
    return f"{shown} (process {process.name})"


def _holders_without_a_name(path: Path) -> list[Use]:
    """Those of another PID namespace, of another host, of the kernel, and those that we may not look at."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        # EAGAIN: another's lease. What we may not read has been looked at from outside.
        return [Use("somebody with a lease on it", "End that first")] if error.errno == errno.EAGAIN else []
    try:
        if _locked(descriptor):
            return [Use("somebody who has locked it, as QEMU locks its images", "End that first")]
        if _open_elsewhere(descriptor):
            return [Use("somebody who has it open", "End that first (`lsof` or `fuser` may know who it is)")]
        return []
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    """Does anybody else hold a lock of fcntl(2) on any byte?"""
    question = FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, question)
    except OSError:  # a file system without locks
        return False
    return bool(FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def _open_elsewhere(descriptor: int) -> bool:
    """Is the file open once more? Only then does the kernel refuse a write lease with EAGAIN (fcntl(2))."""
    if kinds_of(os.fstat(descriptor).st_dev) & NO_LEASES:
        return False
    with _no_sigio():
        try:
            fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        except OSError as error:
            return error.errno == errno.EAGAIN
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False


@contextmanager
def _no_sigio() -> Iterator[None]:
    """Who opens the file while we hold a lease makes the kernel send SIGIO, which would end us."""
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGIO, before)
