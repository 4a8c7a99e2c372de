# SPDX-License-Identifier: LGPL-2.1-or-later
"""Chunks given back: with access=dirty before anybody reads, with discard=release once they are read."""

from __future__ import annotations

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qfsbackup.contracts import awaited
from qfsbackup.errors import FsError
from qfsbackup.fs.chunks import ChunkedDisk
from qfsbackup.fs.grid import cut
from qfsbackup.ranges import RangeSet
from tests.fs.chunked import CHUNK, NEW, NOISE, OLD, SIZE, files, opened, raises_eio, view_of
from tests.fs.memory import MemoryDisk, frozen

# ---- access=dirty ----


async def test_clean_chunks_that_were_released_cannot_be_read_and_the_dirty_ones_can() -> None:
    disk = MemoryDisk(NOISE)
    shown = frozen(disk)
    base = cut(SIZE, RangeSet(), OLD, None, CHUNK)
    grid = cut(SIZE, RangeSet([(CHUNK + 10, CHUNK + 20), (4 * CHUNK, 4 * CHUNK + 1)]), NEW, base)
    for number in (0, 2, 3, 5):
        await shown.release(*grid.span(number))
    view = ChunkedDisk(shown, 7, grid, NEW)
    for number in (0, 2, 3, 5):
        await raises_eio(opened(view, number))
    for number in (1, 4):
        start, end = grid.span(number)
        assert bytes(await awaited(opened(view, number).read, 0, CHUNK)) == NOISE[start:end]
    assert disk.trimmed == RangeSet([(0, CHUNK), (2 * CHUNK, 4 * CHUNK), (5 * CHUNK, SIZE)])
    assert [file.attributes().time for _, file in files(view)] == [OLD, NEW, OLD, OLD, NEW, OLD]


# ---- discard=release ----


async def test_a_chunk_that_was_read_whole_is_given_back_when_it_is_closed() -> None:
    disk = MemoryDisk(NOISE)
    view = view_of(disk, release=True)
    handle = opened(view, 1)
    await awaited(handle.read, CHUNK // 2, CHUNK)
    await awaited(handle.read, 0, CHUNK // 2)
    assert disk.trims == []
    await handle.close()
    assert disk.trims == [(CHUNK, 2 * CHUNK)]
    await raises_eio(opened(view, 1))
    for number in (0, 2):
        start, end = view.grid.span(number)
        assert bytes(await awaited(opened(view, number).read, 0, CHUNK)) == NOISE[start:end]


async def test_a_chunk_that_was_read_in_part_stays() -> None:
    disk = MemoryDisk(NOISE)
    view = view_of(disk, release=True)
    handle = opened(view, 1)
    await awaited(handle.read, 0, CHUNK - 1)
    await handle.close()
    await opened(view, 1).close()
    assert disk.trims == []
    assert bytes(await awaited(opened(view, 1).read, 0, CHUNK)) == NOISE[CHUNK : 2 * CHUNK]


async def test_two_readers_of_a_part_each_have_not_read_the_whole() -> None:
    disk = MemoryDisk(NOISE)
    view = view_of(disk, release=True)
    one, two = opened(view, 1), opened(view, 1)
    await awaited(one.read, 0, CHUNK // 2)
    await awaited(two.read, CHUNK // 2, CHUNK // 2)
    await one.close()
    await two.close()
    assert disk.trims == []


async def test_a_chunk_stays_as_long_as_somebody_has_it_open() -> None:
    disk = MemoryDisk(NOISE)
    view = view_of(disk, release=True)
    fast, slow = opened(view, 1), opened(view, 1)
    await awaited(fast.read, 0, CHUNK)
    await fast.close()
    assert bytes(await awaited(slow.read, 0, CHUNK // 2)) == NOISE[CHUNK : CHUNK + CHUNK // 2]
    assert disk.trims == []
    await slow.close()
    assert disk.trims == [(CHUNK, 2 * CHUNK)]
    assert view.in_use == {}


async def test_what_a_seek_tells_of_holes_counts_as_read() -> None:
    disk = MemoryDisk(NOISE, RangeSet([(1000, 2000), (CHUNK, SIZE)]))
    view = view_of(disk, release=True)
    handle = opened(view, 0)
    start = handle.seek(0, os.SEEK_DATA)
    end = handle.seek(start, os.SEEK_HOLE)
    assert (start, end) == (1000, 2000)
    with pytest.raises(FsError):
        handle.seek(end, os.SEEK_DATA)
    await handle.close()
    assert disk.trims == [], "the data between the holes was not read"
    handle = opened(view, 0)
    handle.seek(0, os.SEEK_DATA)
    await awaited(handle.read, start, end - start)
    with pytest.raises(FsError):
        handle.seek(end, os.SEEK_DATA)
    await handle.close()
    assert disk.trims == [(0, CHUNK)]
    await raises_eio(opened(view, 0))


async def test_a_read_that_failed_is_no_read() -> None:
    disk = MemoryDisk(NOISE)
    disk.trimmed.add(CHUNK, 2 * CHUNK)
    view = view_of(disk, release=True)
    handle = opened(view, 1)
    await raises_eio(handle, 0, CHUNK)
    await handle.close()
    assert disk.trims == []


async def test_a_disk_that_cannot_trim_keeps_its_chunks() -> None:
    disk = MemoryDisk(NOISE)
    disk.can_trim = False
    view = view_of(disk, release=True)
    handle = opened(view, 1)
    await awaited(handle.read, 0, CHUNK)
    await handle.close()
    assert bytes(await awaited(opened(view, 1).read, 0, CHUNK)) == NOISE[CHUNK : 2 * CHUNK]


@given(order=st.permutations(range(6)))
@settings(deadline=None)
async def test_what_is_trimmed_in_the_end_is_all(order: list[int]) -> None:
    disk = MemoryDisk(NOISE)
    view = view_of(disk, release=True)
    for number in order:
        handle = opened(view, number)
        await awaited(handle.read, 0, CHUNK)
        await handle.close()
    assert disk.trimmed == RangeSet([(0, SIZE)])
