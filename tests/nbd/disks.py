# SPDX-License-Identifier: LGPL-2.1-or-later
"""Disks on real NBD servers, as the tests open them."""

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from qfsbackup.contracts import Disk, Mounting, awaited
from qfsbackup.nbd.export import Export
from qfsbackup.nbd.opening import connected_disks
from qfsbackup.options import Options
from qfsbackup.status import DiskStatus, Status
from tests.harness.disk import MIB
from tests.harness.nbd_server import NbdServer, nbdkit, qemu_nbd
from tests.harness.qemu import Qemu

CONTENT = random.Random(4).randbytes(4 * MIB)

# nbdkit's eval plugin, serving $FILE; reads that touch the second MiB fail with $ERROR.
BAD_SECOND_MIB = (
    'if [ $4 -lt 2097152 ] && [ $(($4 + $3)) -gt 1048576 ]; then echo "$ERROR bad" >&2; exit 1; fi; '
    'dd if="$FILE" skip=$4 count=$3 iflag=skip_bytes,count_bytes status=none'
)


@asynccontextmanager
async def opened(
    uri: str, size: int, status: Status | None = None, *, context: str | None = None, bwlimit: int | None = None
) -> AsyncIterator[tuple[Disk, DiskStatus]]:
    """The disk at `uri`, and its counters."""
    status = status or Status()
    status.disks["vda"] = counters = DiskStatus(size)
    mounting = Mounting(Options(bwlimit=bwlimit), Path("/none"), status)
    async with connected_disks([Export("vda", uri, size, context)], mounting, own=True) as [found], found() as disk:
        yield disk, counters


@asynccontextmanager
async def served(qemu: Qemu, directory: Path, content: bytes = CONTENT) -> AsyncIterator[NbdServer]:
    image = directory / "disk.raw"
    with image.open("wb") as file:
        file.truncate(len(content))
        for offset in range(0, len(content), MIB):
            piece = content[offset : offset + MIB]
            if any(piece):  # zeros become a hole
                file.seek(offset)
                file.write(piece)
    async with qemu_nbd(qemu, directory, image, options=["--discard=unmap"]) as server:
        yield server


@asynccontextmanager
async def half_broken(directory: Path, error: str) -> AsyncIterator[NbdServer]:
    """CONTENT, of which reads of the second MiB fail with `error`."""
    image = directory / "disk.raw"
    image.write_bytes(CONTENT)
    script = BAD_SECOND_MIB.replace("$FILE", str(image)).replace("$ERROR", error)
    async with nbdkit(
        directory, ["eval", f"get_size=echo {len(CONTENT)}", "can_multi_conn=exit 0", f"pread={script}"]
    ) as server:
        yield server


async def read(disk: Disk, start: int, length: int) -> bytes:
    """Zeros and what is data, of which alone a disk may be asked."""
    content = bytearray(length)
    for first, last in disk.data.clip(start, start + length):
        content[first - start : last - start] = await awaited(disk.read, first, last - first)
    return bytes(content)


async def all_of(disk: Disk, length: int) -> bytes:
    """The whole disk, in reads of `length` bytes."""
    offsets = range(0, disk.size, length)
    return b"".join([await read(disk, offset, min(length, disk.size - offset)) for offset in offsets])
