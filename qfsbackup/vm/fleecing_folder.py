# SPDX-License-Identifier: LGPL-2.1-or-later
"""The folder where fleecing files are made, whose file system may be full, and may hang.

What hangs there must not hang us: it is asked in threads. And it must not hang QEMU, whose main loop waits for the
writes that are on their way when a filter is taken out, and for the file system when a file is closed (seen in 7.2 and
10.0). So nothing is undone in QEMU while its fleecing files do not answer: the guest goes on behind the filters, which
copy nothing any more.
"""

from __future__ import annotations

import errno
import io
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

import trio

from qfsbackup.errors import UserError
from qfsbackup.patience import NoAnswerError, Patience, in_time

LEAST_FREE = 1024 * 1024  # bytes a disk; with less the first guest writes would break the snapshot
TIMEOUT = 10.0  # seconds for one call
CLOSE_TIMEOUT = 3.0  # seconds
HINT = "Name a folder with enough room (fleece=): it takes what the guest overwrites during the backup."
PREFIX = "qfsbackup-fleecing"  # of the name that a file has for a moment where there is no O_TMPFILE
OURS = re.compile(rf"/(#\d+|{PREFIX}\w+) \(deleted\)")  # what proc(5) shows of a file without a name

T = TypeVar("T")


class FleecingFolder:
    """`path`, for one snapshot."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._patience = Patience(TIMEOUT, CLOSE_TIMEOUT)

    async def ask(self, call: Callable[[], T]) -> T:
        """What `call` returns, which asks the file system. Raises UserError where that does not answer."""
        try:
            return await self._patience.ask(call)
        except NoAnswerError:
            raise UserError(f"the fleecing folder {self.path} does not answer", HINT) from None

    async def let_go(self, close: Callable[[], object]) -> None:
        """Close one of its files; where that hangs it goes with the process, and so do all others."""
        await self._patience.let_go(close)

    async def check_space(self, disks: int) -> None:
        """Raise UserError where it cannot take what the first guest writes to so many disks push out."""
        await self.ask(partial(_check_space, self.path, disks))


async def answers(files: Sequence[str]) -> bool:
    """Can these files be written to, now? Also when cancelled."""
    if not files:
        return True
    with trio.CancelScope(shield=True):
        try:
            await in_time(partial(_touch, files), CLOSE_TIMEOUT)
        except NoAnswerError:
            return False
    return True


def _touch(files: Sequence[str]) -> None:
    """Change nothing, but as a write would. In a process of its own: a thread in a frozen file system outlives ours."""
    subprocess.run(["chmod", "u+r", "--", *files], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)


def files_of(pid: int) -> list[str]:
    """The fleecing files that a process has open; none where it cannot be seen."""
    found = []
    with suppress(OSError):
        for path in list(Path(f"/proc/{pid}/fd").iterdir()) if pid else ():
            with suppress(FileNotFoundError):  # it was closed meanwhile
                if OURS.search(str(path.readlink())):
                    found.append(str(path))
    return found


def create(folder: Path, size: int) -> io.FileIO:
    """A new file of `size` bytes, without a name. Raises UserError."""
    with ExitStack() as stack:
        try:
            file = stack.enter_context(io.FileIO(_unnamed(folder), "r+"))
            os.ftruncate(file.fileno(), size)
        except OSError as error:
            raise _refusal(folder, error) from error
        stack.pop_all()
        return file


def _check_space(folder: Path, disks: int) -> None:
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
    fd, name = tempfile.mkstemp(prefix=PREFIX, dir=folder)
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
