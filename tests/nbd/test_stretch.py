# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who reads much reads a large piece once, for the sake of the server's memory, and nobody notices."""

from pathlib import Path

from qfsbackup.nbd.bandwidth import Bandwidth
from qfsbackup.nbd.pool import STRETCH, STRETCH_AFTER
from tests.harness.disk import MIB
from tests.harness.nbd_server import nbdkit
from tests.nbd.disks import opened

SIZE = STRETCH_AFTER + 256 * MIB


async def stretches(directory: Path, size: int, bandwidth: Bandwidth | None = None, *, trimmed: bool = False) -> int:
    """How many such reads a server sees of whom reads a disk of `size` bytes in sequence."""
    log = directory / "log"
    async with (
        nbdkit(directory, ["--filter=log", "pattern", str(size), f"logfile={log}"]) as server,
        opened(server.uri, size, bandwidth=bandwidth) as (disk, counters),
    ):
        if trimmed:
            disk.end_short_cut()
        for offset in range(0, size, MIB):
            content = await disk.read(offset, MIB)
            assert int.from_bytes(content[:8]) == offset  # nbdkit-pattern-plugin(1)
        assert counters.nbd_bytes - size in (0, STRETCH)
    text = log.read_text()
    assert text.count(" Read id=") >= size // MIB
    return text.count(f"count={STRETCH:#x} ")


async def test_much_reading_is_followed_by_one_large_read(tmp_path: Path) -> None:
    assert await stretches(tmp_path, SIZE) == 1


async def test_little_reading_is_not(tmp_path: Path) -> None:
    assert await stretches(tmp_path, 64 * MIB) == 0


async def test_nor_is_reading_at_a_pace(tmp_path: Path) -> None:
    assert await stretches(tmp_path, SIZE, Bandwidth(1 << 40)) == 0


async def test_nor_is_reading_a_disk_of_which_some_was_given_back(tmp_path: Path) -> None:
    assert await stretches(tmp_path, SIZE, trimmed=True) == 0
