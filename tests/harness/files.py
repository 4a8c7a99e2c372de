# SPDX-License-Identifier: LGPL-2.1-or-later
"""Image files: made with known content, compared byte by byte, and as block devices."""

import contextlib
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

MIB = 1024 * 1024
BLOCK = 4 * MIB


def make_random(path: Path, size: int, *, seed: int = 1, hole_every: int = 0, piece: int = 64 * 1024) -> Path:
    """Write a file of `size` bytes of random content, the same for the same seed; each `hole_every`th piece is a hole
    (0: none). Returns `path`."""
    generator = random.Random(seed)
    with path.open("wb") as file:
        file.truncate(size)
        for number, offset in enumerate(range(0, size, piece)):
            data = generator.randbytes(min(piece, size - offset))
            if not hole_every or number % hole_every != hole_every - 1:
                file.seek(offset)
                file.write(data)
    return path


def allocated(path: Path) -> int:
    """The bytes that a file takes up (st_blocks)."""
    return path.stat().st_blocks * 512


def data_extents(path: Path) -> list[tuple[int, int]]:
    """(offset, length) of what SEEK_DATA and SEEK_HOLE call data."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return list(_data_extents(descriptor, os.fstat(descriptor).st_size))
    finally:
        os.close(descriptor)


def _data_extents(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    end = 0
    while end < size:
        try:
            start = os.lseek(descriptor, end, os.SEEK_DATA)
        except OSError:  # ENXIO: no data up to the end of the file
            return
        end = os.lseek(descriptor, start, os.SEEK_HOLE)
        yield start, end - start


def first_difference(left: Path, right: Path) -> int | None:
    """The offset of the first byte that differs, None if there is none. A shorter file differs where it ends."""
    with left.open("rb", buffering=0) as one, right.open("rb", buffering=0) as other:
        offset = 0
        while True:
            a, b = _read(one.read, BLOCK), _read(other.read, BLOCK)
            if a != b:
                return offset + _mismatch(a, b)
            if not a:
                return None
            offset += len(a)


def assert_same(left: Path, right: Path) -> None:
    """Raise AssertionError that names the first difference and shows the bytes around it."""
    offset = first_difference(left, right)
    assert offset is None, (
        f"{left} ({left.stat().st_size} bytes) and {right} ({right.stat().st_size} bytes) differ from byte {offset}: "
        f"{_at(left, offset)} / {_at(right, offset)}"
    )


def _read(read: Callable[[int], bytes | None], size: int) -> bytes:
    parts = []
    while size and (part := read(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _mismatch(a: bytes, b: bytes) -> int:
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while high - low > 1:  # the first difference lies in [low, high)
        middle = (low + high) // 2
        low, high = (low, middle) if a[low:middle] != b[low:middle] else (middle, high)
    return low


def _at(path: Path, offset: int) -> str:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(16).hex(" ") or "end of file"


@contextmanager
def loop_device(path: Path, size: int) -> Iterator[Path]:
    """A block device of `size` bytes full of old data; what is written is in `path` afterwards."""
    path.write_bytes(b"\xaa" * size)
    words: list[str | Path] = ["losetup", "--find", "--show", path]
    device = Path(subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip())
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


@contextlib.contextmanager
def opened_to_all(folder: Path) -> Iterator[None]:
    """Let every user enter a folder of pytest's, and what stands above it."""
    folders = [path for path in (folder, *folder.parents) if not path.stat().st_mode & 0o001]
    modes = [path.stat().st_mode for path in folders]
    for path in folders:
        path.chmod(0o711)
    try:
        yield
    finally:
        for path, mode in zip(folders, modes, strict=True):
            path.chmod(mode)
