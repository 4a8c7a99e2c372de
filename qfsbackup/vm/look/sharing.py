# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether others may write to a disk as well: then no bitmap of QEMU's holds every change, and nothing is frozen.

QEMU locks a local image file, as OFD locks on single bytes (block/file-posix.c, RAW_LOCK_SHARED_BASE): byte 200 + 1 is
locked where others must not write. It is not for share-rw=on, locking=off and libvirt's <shareable/> (seen with QEMU
7.2 and 10.0). Of images behind a network and of those that we cannot open, only the device's share-rw tells.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

from qfsbackup.patience import NoAnswerError, in_time
from qfsbackup.vm.look.content import LOOK_TIMEOUT, image_path
from qfsbackup.vm.look.graph import Device, Node, device_property
from qfsbackup.vm.monitor import Monitor

OTHERS_MUST_NOT_WRITE = 201  # RAW_LOCK_SHARED_BASE + BLK_PERM_WRITE's number
FLOCK = "hhqqi4x"  # struct flock of fcntl(2) on 64-bit Linux: type, whence, start, length, pid


async def shared(qmp: Monitor, disk: Device, nodes: Mapping[str, Node]) -> str:
    """Why others may write to the disk; empty where they may not, or where it cannot be told. Raises QmpError."""
    if await device_property(qmp, disk.qdev, "share-rw") is True:
        return "others may write to it: its device has share-rw=on"
    path = image_path(nodes, disk.format)
    if path and await _forbids_writers(path) is False:
        return f"others may write to it: QEMU does not hold the lock of {path} that forbids it (locking=off)"
    return ""


async def _forbids_writers(path: str) -> bool | None:
    """None: cannot be told."""
    try:
        return await in_time(partial(forbids_writers, path), LOOK_TIMEOUT)
    except NoAnswerError:
        return None


def forbids_writers(path: str) -> bool | None:
    """Does a process that has this image open forbid others to write to it; None where that cannot be told."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        wanted = struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, OTHERS_MUST_NOT_WRITE, 1, 0)
        found: int = struct.unpack(FLOCK, fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, wanted))[0]
        if found != fcntl.F_UNLCK:
            return True
        return False if _is_open(os.fstat(descriptor)) else None
    except OSError:  # a file system without locks
        return None
    finally:
        os.close(descriptor)


def _is_open(file: os.stat_result) -> bool:
    """Has any other process this file open: else the path names another one for QEMU, or has been given to another."""
    for path in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):  # it was closed just now, or is not for us to see
            if path.parts[2] != str(os.getpid()) and os.path.samestat(path.stat(), file):
                return True
    return False
