# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the tests of the kernel side share: a mount of memory, and calls that Python's os lacks."""

import contextlib
import ctypes
import errno
import os
import sys
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from pathlib import Path

from tests.harness.mount import Mount, mounting

PUNCH_HOLE = 0x02 | 0x01  # with KEEP_SIZE (linux/falloc.h)
_LIBC = ctypes.CDLL(None, use_errno=True)


@contextlib.asynccontextmanager
async def memory_mount(directory: Path, *owner: int | str, expected: Collection[int] = (0,)) -> AsyncIterator[Mount]:
    """The tree of tests/fuse/serve.py at `directory`; `owner` is uid, gid, mode."""
    line: list[str | Path] = [sys.executable, "-m", "tests.fuse.serve", directory, *map(str, owner)]
    async with mounting(line, directory, expected=expected) as process:
        yield Mount(directory, process)


def fallocate(path: Path, mode: int, offset: int, length: int) -> None:
    """fallocate(2). Raises OSError."""
    with opened(path, os.O_RDWR) as descriptor:
        result = _LIBC.fallocate(descriptor, mode, ctypes.c_long(offset), ctypes.c_long(length))
        if result != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))


@contextlib.contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    """A file descriptor for the length of the block."""
    descriptor = os.open(path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def errno_of(call: Callable[[], object]) -> str:
    """The name of the errno that a call raises, empty if it raises none."""
    try:
        call()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return ""
