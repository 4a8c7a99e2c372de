# SPDX-License-Identifier: LGPL-2.1-or-later
"""A backup's snapshot, and the content of its disks."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from qfsbackup.contracts import Disk, Mounting, Snapshot, awaited
from qfsbackup.mount.tree import note
from qfsbackup.options import Options
from qfsbackup.sources import find
from qfsbackup.status import Status
from tests.harness.chunk_set import CHUNK


@asynccontextmanager
async def snapshot_of(folder: Path, **options: Any) -> AsyncIterator[tuple[Snapshot, dict[str, Disk], Status]]:
    """The snapshot, with its disks open."""
    mounting = Mounting(Options(**options), folder, Status())
    async with AsyncExitStack() as stack:
        snapshot = await stack.enter_async_context(find(f"chunks:{folder}").snapshot(mounting))
        note(mounting.status, snapshot, mounting.options)
        disks = {one.name: await stack.enter_async_context(one.open()) for one in snapshot.disks}
        yield snapshot, disks, mounting.status


async def content_of(disk: Disk, at_once: int = 3 * CHUNK) -> bytes:
    """All of it, over the borders of chunks."""
    content = bytearray(disk.size)
    for start, end in disk.data:
        for offset in range(start, end, at_once):
            stop = min(offset + at_once, end)
            content[offset:stop] = await awaited(disk.read, offset, stop - offset)
    return bytes(content)
