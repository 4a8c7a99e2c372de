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
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path

from qfsbackup.patience import NoAnswerError, in_time
from qfsbackup.ranges import RangeSet
from qfsbackup.status import FleecingLook
from qfsbackup.vm.fleecing_folder import CLOSE_TIMEOUT, FleecingFolder, answers, create, files_of, free_space
from qfsbackup.vm.monitor import Monitor
from qfsbackup.vm.node import node, undoing
from qfsbackup.vm.ours import FDSET

BLOCK = 512  # bytes; the unit of st_blocks
BEYOND = 1 << 62  # bytes; no file is so large
SYNC_FILE_RANGE_WAIT_BEFORE = 1  # linux/fs.h


class FleecingFile:
    """An open fleecing file. Whatever asks its file system may hang, and is for a thread."""

    def __init__(self, folder: Path, size: int) -> None:
        """A new one of `size` bytes. Raises UserError where the folder cannot take it."""
        self._file = create(folder, size)
        # Opened once more (proc(5), fd): the kernel tells each open file of an error once.
        self._errors = io.FileIO(f"/proc/self/fd/{self._file.fileno()}")
        self._has_lost = False

    @property
    def path(self) -> str:
        """It has no name, but as long as it is open this leads to it."""
        return f"/proc/{os.getpid()}/fd/{self._file.fileno()}"

    @property
    def descriptor(self) -> int:
        """What QEMU gets."""
        return self._file.fileno()

    def close(self) -> None:
        """Give its space back. QEMU 7.2 keeps its descriptor of a removed fdset open while the VM is paused."""
        with suppress(OSError):
            os.ftruncate(self._file.fileno(), 0)
        self._errors.close()
        self._file.close()

    def used(self) -> int:
        """Bytes allocated now. Raises OSError."""
        return os.fstat(self._file.fileno()).st_blocks * BLOCK

    def lost(self) -> bool:
        """Could the file system not store all that QEMU wrote?

        A write ends in the page cache, and is complete for QEMU; where it fails later, the file reads as it was before.
        """
        self._has_lost |= _writeback_error(self._errors.fileno()) != 0
        return self._has_lost

    def copied(self) -> RangeSet:
        """Where the file holds data: what the guest has overwritten since the instant, zeros perhaps left out.

        QEMU before 8.0 can report such a range as zero when the guest has trimmed it (see quirks.request_unit).
        It is copied before the guest's trim is carried out, so that looking here *after* QEMU has answered never misses
        one.
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


def look_at(files: Mapping[str, FleecingFile], folder: Path) -> FleecingLook:
    """How full they are, by the disk's name, and whether they hold all. For a thread. Raises OSError."""
    return FleecingLook(
        used={name: file.used() for name, file in files.items()},
        lost=[name for name, file in files.items() if file.lost()],
        free=free_space(folder),
    )


@asynccontextmanager
async def fleecing_file(qmp: Monitor, folder: FleecingFolder, node_name: str, size: int) -> AsyncIterator[FleecingFile]:
    """A file of `size` bytes in `folder`, and in QEMU a node of this name on it.

    Raises UserError where the folder cannot take it, QmpError where QEMU does not.
    """
    async with AsyncExitStack() as stack:
        file = await folder.ask(partial(FleecingFile, folder.path, size))
        stack.push_async_callback(folder.let_go, file.close)
        async with qmp.one_connection(), _fdset(qmp, file.descriptor) as number:
            options = {"driver": "file", "filename": f"/dev/fdset/{number}", "discard": "unmap"}
            await stack.enter_async_context(node(qmp, {**options, "node-name": node_name}))
        yield file


@asynccontextmanager
async def left_while_hanging(qmp: Monitor, files: Mapping[int, FleecingFile]) -> AsyncIterator[None]:
    """Where the files do not answer at the end of the block, QEMU is asked for nothing any more: see the folder."""
    try:
        yield
    finally:
        if not await answers([file.path for file in list(files.values())[:1]]):  # all are in one file system
            qmp.leave("the fleecing files' file system does not answer, and QEMU would hang with it")


@asynccontextmanager
async def _fdset(qmp: Monitor, fd: int) -> AsyncIterator[int]:
    """An fdset is needed only until a node has opened it: the node keeps a duplicate."""
    try:
        answer = await qmp.execute_with_fd("add-fd", {"opaque": FDSET}, fd)
        yield answer["fdset-id"]
    finally:
        await remove_fdsets(qmp)


async def remove_fdsets(qmp: Monitor) -> None:
    """Remove the fdsets that hold a fleecing file of ours, finding them by their opaque string."""
    with undoing("remove the descriptors of fleecing files"):
        for fdset in await qmp.execute("query-fdsets"):
            if any(fd.get("opaque") == FDSET for fd in fdset["fds"]):
                await qmp.execute("remove-fd", {"fdset-id": fdset["fdset-id"]})


async def empty_fdsets(qmp: Monitor) -> None:
    """Give the space back that QEMU 7.2 holds in removed fdsets until the VM runs again, once no node uses the files.

    Of the descriptors themselves only QEMU can let go. Where QEMU cannot be seen (another PID namespace, another user)
    the space stays as well.
    """
    with undoing("give the space of fleecing files back"), suppress(NoAnswerError):
        fds = [fd for fdset in await qmp.execute("query-fdsets") for fd in fdset["fds"] if fd.get("opaque") == FDSET]
        held = {f"/proc/{qmp.peer_pid}/fd/{fd['fd']}" for fd in fds}
        await in_time(partial(_empty, held.intersection(files_of(qmp.peer_pid))), CLOSE_TIMEOUT)


def _empty(paths: Iterable[str]) -> None:
    for path in paths:
        with suppress(OSError):
            os.truncate(path, 0)


def _writeback_error(fd: int) -> int:
    """The errno of a write-back that failed since the last call, 0 for none. Writes nothing back, and does not wait.

    sync_file_range(2) of a range that no file reaches waits for nothing and then reports errors, as fsync(2) does
    (file_fdatawait_range in mm/filemap.c).
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.sync_file_range(fd, ctypes.c_int64(BEYOND), ctypes.c_int64(1), SYNC_FILE_RANGE_WAIT_BEFORE) == 0:
        return 0
    return ctypes.get_errno()
