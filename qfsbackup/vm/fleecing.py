# SPDX-License-Identifier: LGPL-2.1-or-later
"""Fleecing files: raw, sparse, as large as their disk, without a name, handed to QEMU as a file descriptor.

QEMU needs no permission on the folder and nothing is left after a crash. Raw, because discards racing an allocating
write corrupt qcow2 (QEMU before 11.0.1). A file that fills up breaks the snapshot, not the guest.
"""

from __future__ import annotations

import ctypes
import errno
import io
import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path

from qfsbackup.errors import UserError
from qfsbackup.ranges import RangeSet
from qfsbackup.vm.node import node, undoing
from qfsbackup.vm.owner import PREFIX
from qfsbackup.vm.qmp import Qmp

FDSET = PREFIX + "fleecing"  # the opaque string by which cleanup knows our fdsets
LEAST_FREE = 1024 * 1024  # bytes a disk; with less the first guest writes would break the snapshot
BLOCK = 512  # bytes; the unit of st_blocks
BEYOND = 1 << 62  # bytes; no file is so large
SYNC_FILE_RANGE_WAIT_BEFORE = 1  # linux/fs.h
HINT = "Name a folder with enough room (fleece=): it takes what the guest overwrites during the backup."


class FleecingFile:
    """An open fleecing file."""

    def __init__(self, file: io.FileIO, errors: io.FileIO) -> None:
        """`errors` is the same file, opened once more: the kernel tells each open file of an error once."""
        self._file = file
        self._errors = errors

    def used(self) -> int:
        """Bytes allocated now; 0 once the snapshot was given up."""
        return 0 if self._file.closed else os.fstat(self._file.fileno()).st_blocks * BLOCK

    def lost(self) -> bool:
        """Could the file system not store all that QEMU wrote?

        A write ends in the page cache, and is complete for QEMU; where it fails later, the file reads as it was before.
        """
        return not self._errors.closed and _writeback_error(self._errors.fileno()) != 0

    def copied(self) -> RangeSet:
        """Where the file holds data: what the guest has overwritten since the instant, zeros perhaps left out.

        QEMU before 8.0 can report such a range as zero when the guest has trimmed it (see vm/snapshot.py,
        REQUEST_UNIT_BEFORE). It is copied before the guest's trim is carried out, so that looking here *after* QEMU has
        answered never misses one.
        """
        found = RangeSet()
        size, end = os.fstat(self._file.fileno()).st_size, 0
        while end < size:
            try:
                start = os.lseek(self._file.fileno(), end, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                break  # no data up to the end of the file
            end = os.lseek(self._file.fileno(), start, os.SEEK_HOLE)
            found.add(start, end)
        return found


@asynccontextmanager
async def fleecing_file(qmp: Qmp, folder: Path, node_name: str, size: int) -> AsyncIterator[FleecingFile]:
    """A file of `size` bytes in `folder`, and in QEMU a node of this name on it.

    Raises UserError where the folder cannot take it, QmpError where QEMU does not.
    """
    with _created(folder, size) as file:
        async with AsyncExitStack() as stack:
            async with _fdset(qmp, file.fileno()) as number:
                options = {"driver": "file", "filename": f"/dev/fdset/{number}", "discard": "unmap"}
                await stack.enter_async_context(node(qmp, {**options, "node-name": node_name}))
            with _opened_again(file) as errors:
                yield FleecingFile(file, errors)


@asynccontextmanager
async def _fdset(qmp: Qmp, fd: int) -> AsyncIterator[int]:
    """An fdset is needed only until a node has opened it: the node keeps a duplicate."""
    try:
        answer = await qmp.execute_with_fd("add-fd", {"opaque": FDSET}, fd)
        yield answer["fdset-id"]
    finally:
        await remove_fdsets(qmp)


async def remove_fdsets(qmp: Qmp) -> None:
    """Remove the fdsets that hold a fleecing file of ours, finding them by their opaque string."""
    with undoing("remove the descriptors of fleecing files"):
        for fdset in await qmp.execute("query-fdsets"):
            if any(fd.get("opaque") == FDSET for fd in fdset["fds"]):
                await qmp.execute("remove-fd", {"fdset-id": fdset["fdset-id"]})


@contextmanager
def _created(folder: Path, size: int) -> Iterator[io.FileIO]:
    with _create(folder, size) as file:
        try:
            yield file
        finally:
            # QEMU 7.2 keeps its descriptor of a removed fdset open, and with it the space, while the VM is paused.
            with suppress(OSError):
                os.ftruncate(file.fileno(), 0)


def _create(folder: Path, size: int) -> io.FileIO:
    with ExitStack() as stack:
        try:
            file = stack.enter_context(io.FileIO(_unnamed(folder), "r+"))
            os.ftruncate(file.fileno(), size)
        except OSError as error:
            raise _refusal(folder, error) from error
        stack.pop_all()
        return file


@contextmanager
def _opened_again(file: io.FileIO) -> Iterator[io.FileIO]:
    """Another open file description of a nameless file (proc(5), fd)."""
    with io.FileIO(f"/proc/self/fd/{file.fileno()}") as again:
        yield again


def _writeback_error(fd: int) -> int:
    """The errno of a write-back that failed since the last call, 0 for none. Writes nothing back, and does not wait.

    sync_file_range(2) of a range that no file reaches waits for nothing and then reports errors, as fsync(2) does
    (file_fdatawait_range in mm/filemap.c).
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.sync_file_range(fd, ctypes.c_int64(BEYOND), ctypes.c_int64(1), SYNC_FILE_RANGE_WAIT_BEFORE) == 0:
        return 0
    return ctypes.get_errno()


def check_space(folder: Path, disks: int) -> None:
    """Raise UserError where `folder` cannot take what the first guest writes to so many disks push out."""
    try:
        free = free_space(folder)
    except OSError as error:
        raise _refusal(folder, error) from error
    needed = disks * LEAST_FREE
    if free < needed:
        raise UserError(
            f"the fleecing folder {folder} has too little room: {free >> 10} KiB are left, {disks} disks need"
            f" {needed >> 10} KiB at least",
            HINT,
        )


def free_space(folder: Path) -> int:
    """Bytes left in the folder's file system. Raises OSError."""
    space = os.statvfs(folder)
    return space.f_bavail * space.f_frsize


def _unnamed(folder: Path) -> int:
    """A new file without a name, mode 0600; with one for a moment where the file system knows no O_TMPFILE."""
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR):
            raise
    fd, name = tempfile.mkstemp(prefix=FDSET, dir=folder)
    Path(name).unlink()
    return fd


def _refusal(folder: Path, error: OSError) -> UserError:
    hints = {
        errno.EACCES: "Run as a user who may write there, or name another folder (fleece=).",
        errno.EFBIG: "Its file system, or the file size limit (ulimit -f), forbids so large a file: " + HINT,
        errno.EMFILE: "Raise the limit of open files (ulimit -n).",
    }
    number = error.errno or 0
    return UserError(f"no fleecing file in {folder}: {error.strerror}", hints.get(number, HINT))
