# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reading a map: however a server splits its answers the map is the same, and one that breaks the protocol is refused.

The servers of the first half are functions: no real server sends hostile answers.
"""

from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from qfsbackup.errors import UserError
from qfsbackup.nbd import extents
from qfsbackup.nbd.connection import ConnectionLostError, ServerError
from qfsbackup.ranges import RangeSet
from tests.harness.disk import MIB
from tests.harness.nbd_server import nbdkit, qemu_nbd
from tests.harness.qemu import Qemu, run_img

ZERO, HOLE, DIRTY = 2, 1, 1

disks = st.lists(st.tuples(st.integers(1, 9), st.booleans()), max_size=30)
cuts = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 4), st.integers(0, 9)), min_size=1, max_size=10)


def server(content: list[bool], cuts: Iterator[tuple[int, int, int]]) -> extents.BlockStatus:
    """Describes `content`, one flag a byte, in extents of any size: short of what was asked, exact, or beyond it."""

    async def block_status(offset: int, length: int) -> list[int]:
        await trio.lowlevel.checkpoint()
        size, number, beyond = next(cuts)
        end, entries = min(offset + length, offset + size * number), []
        while offset < end:
            stop = min(offset + size, end)
            while content[offset] != content[stop - 1] or len(set(content[offset:stop])) > 1:
                stop -= 1
            if stop == end:
                while beyond and stop < len(content) and content[stop] == content[offset]:
                    stop, beyond = stop + 1, beyond - 1
            entries += [stop - offset, DIRTY if content[offset] else 0]
            offset = stop
        return entries

    return block_status


@settings(deadline=None)
@given(disks, cuts)
async def test_the_map_does_not_depend_on_how_the_server_splits_it(
    disk: list[tuple[int, bool]], cuts: list[tuple[int, int, int]]
) -> None:
    content = [flag for length, flag in disk for _ in range(length)]
    found = await extents.walk(server(content, cycle(cuts)), len(content), extents.is_dirty, trusted=True)
    assert found == RangeSet((offset, offset + 1) for offset, flag in enumerate(content) if flag)


async def test_segments_join_without_a_seam() -> None:
    size = 3 * extents.SEGMENT + 512
    asked: list[tuple[int, int]] = []

    async def block_status(offset: int, length: int) -> list[int]:
        await trio.lowlevel.checkpoint()
        asked.append((offset, offset + length))
        return [length // 2, 0, length - length // 2, DIRTY] if offset == 0 else [length, DIRTY]

    found = await extents.walk(block_status, size, extents.is_dirty, trusted=True)
    assert list(found) == [(extents.SEGMENT // 2, size)]
    assert list(RangeSet(asked)) == [(0, size)]
    assert max(end - start for start, end in asked) < 2**32, "a request's length has 32 bits"


@pytest.mark.parametrize("entries", [[], [0, DIRTY], [512, 0, 0, DIRTY]], ids=["nothing", "empty", "empty-last"])
async def test_an_answer_without_progress_is_refused(entries: list[int]) -> None:
    async def block_status(_offset: int, _length: int) -> list[int]:
        await trio.lowlevel.checkpoint()
        return entries

    with pytest.raises(UserError, match="breaks the protocol"):
        await extents.walk(block_status, MIB, extents.is_dirty, trusted=True)


async def test_endless_tiny_extents_are_refused() -> None:
    async def block_status(_offset: int, length: int) -> list[int]:
        await trio.lowlevel.checkpoint()
        return [1, 0, 1, DIRTY] * min(length // 2, 1000)

    with pytest.raises(UserError, match="too many small extents"):
        await extents.walk(block_status, 1 << 40, extents.is_dirty, trusted=True, most=100_000)


@pytest.mark.parametrize("error", [ServerError(22, "no"), ConnectionLostError("gone")], ids=["refused", "lost"])
async def test_a_dirty_map_that_fails_is_an_error(error: Exception) -> None:
    async def block_status(_offset: int, _length: int) -> list[int]:
        await trio.lowlevel.checkpoint()
        raise error

    with pytest.raises(UserError):
        await extents.walk(block_status, MIB, extents.is_dirty, trusted=True)


async def test_an_allocation_that_fails_is_taken_for_data() -> None:
    async def block_status(offset: int, _length: int) -> list[int]:
        await trio.lowlevel.checkpoint()
        if offset >= MIB // 2:
            raise ServerError(22, "no")
        return [MIB // 2, ZERO]

    found = await extents.walk(block_status, MIB, extents.is_data, trusted=False)
    assert list(found) == [(MIB // 2, MIB)]


def test_a_hole_that_is_not_known_to_be_zero_is_data() -> None:
    assert extents.is_data([0, HOLE, ZERO, HOLE | ZERO]) == [True, True, False, False]


async def test_the_data_of_a_sparse_file(qemu: Qemu, tmp_path: Path) -> None:
    image = tmp_path / "disk.raw"
    with image.open("wb") as file:
        file.truncate(8 * MIB)
        file.seek(3 * MIB)
        file.write(b"x" * MIB)
    async with qemu_nbd(qemu, tmp_path, image) as server:
        assert list(await extents.allocation(server.uri, 8 * MIB)) == [(3 * MIB, 4 * MIB)]


async def test_all_is_data_where_the_server_cannot_tell(tmp_path: Path) -> None:
    async with nbdkit(tmp_path, ["--no-sr", "memory", "8M"]) as server:
        assert list(await extents.allocation(server.uri, 8 * MIB)) == [(0, 8 * MIB)]


async def test_an_endless_sparse_disk_is_walked_at_once(tmp_path: Path) -> None:
    size = 8 << 40
    async with nbdkit(tmp_path, ["null", str(size)]) as server:
        assert not await extents.allocation(server.uri, size)


async def test_the_dirty_map_of_a_bitmap(qemu: Qemu, tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    await run_img(qemu, "create", "-q", "-f", "qcow2", image, "8M")
    await run_img(qemu, "bitmap", "--add", image, "changed")
    await trio.run_process(["qemu-io", "-c", "write 1M 64k", "-c", "write 5M 128k", str(image)])
    async with qemu_nbd(qemu, tmp_path, image, image_format="qcow2", options=["-B", "changed"]) as server:
        found = await extents.dirty(server.uri, 8 * MIB, "qemu:dirty-bitmap:changed")
        with pytest.raises(UserError, match="other"):
            await extents.dirty(server.uri, 8 * MIB, "qemu:dirty-bitmap:other")
    assert list(found) == [(MIB, MIB + 64 * 1024), (5 * MIB, 5 * MIB + 128 * 1024)]
