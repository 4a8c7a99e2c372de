# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reads that are tried by the short way alone."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from qfsbackup.contracts import Buffer, Disk
from qfsbackup.errors import FsError
from qfsbackup.nbd._lane import Lane
from qfsbackup.nbd.disk import NbdDisk
from qfsbackup.status import DiskStatus
from tests.harness.nbd_server import nbdkit
from tests.nbd.disks import CONTENT, opened

SIZE = len(CONTENT)


class Read:
    """One read that is tried by the short way alone."""

    def __init__(self, disk: Disk, start: int, length: int) -> None:
        self._answers: list[Buffer | FsError] = []
        self._over = trio.Event()
        lane = lane_of(disk)
        self.taken = lane is not None and lane.read(start, length, self._answer) > 0

    def _answer(self, content: Buffer | FsError) -> None:
        self._answers.append(content if isinstance(content, FsError) else bytes(content))
        self._over.set()

    async def answer(self) -> Buffer | FsError:
        """What was read."""
        with trio.fail_after(10):
            await self._over.wait()
        [answer] = self._answers
        return answer


def lane_of(disk: Disk) -> Lane | None:
    assert isinstance(disk, NbdDisk)
    return disk._lane


async def short(disk: Disk, start: int, length: int) -> Buffer | FsError | None:
    """What the short way gives; None where it does not take the read."""
    read = Read(disk, start, length)
    return await read.answer() if read.taken else None


@asynccontextmanager
async def slow(directory: Path, *filters: str) -> AsyncIterator[tuple[Disk, DiskStatus]]:
    """CONTENT on a server that takes a moment for each read."""
    image = directory / "slow.raw"
    image.write_bytes(CONTENT)
    words = [f"--filter={name}" for name in filters] + ["--filter=delay", "file", str(image), "delay-read=50ms"]
    async with nbdkit(directory, words) as server, opened(server.uri, SIZE) as (disk, counters):
        yield disk, counters
