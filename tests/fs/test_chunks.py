# SPDX-License-Identifier: LGPL-2.1-or-later
"""chunks/: the layout, which times move, and giving back what was read."""

from __future__ import annotations

import errno
import os
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qfsbackup.contracts import awaited
from qfsbackup.errors import FsError
from qfsbackup.facts import MOST_CHUNKS, USUAL_CHUNK, count, fitting, is_chunk_size
from qfsbackup.fs.chunks import ChunkedDisk
from qfsbackup.fs.grid import Grid, cut
from qfsbackup.fs.inodes import is_chunk, parts
from qfsbackup.fs.node import Attributes
from qfsbackup.ranges import RangeSet
from tests.fs.chunked import CHUNK, NEW, NOISE, OLD, SIZE, files, opened, view_of
from tests.fs.memory import MemoryDisk, frozen

sizes = st.integers(0, 8 * CHUNK) | st.integers(0, 8).map(lambda number: number * CHUNK)
offsets = st.integers(0, 8 * CHUNK)
ranges = st.lists(st.tuples(offsets, offsets).map(lambda pair: (min(pair), max(pair))), max_size=4)


# ---- which times move ----


@given(size=sizes, old_size=sizes, dirty=ranges)
@settings(deadline=None)
def test_a_time_moves_where_the_chunk_is_dirty_or_new_or_has_another_size(
    size: int, old_size: int, dirty: list[tuple[int, int]]
) -> None:
    base = Grid(old_size, CHUNK, array("q", range(count(old_size, CHUNK))))
    changed = RangeSet(dirty)
    grid = cut(size, changed, NEW, base)
    assert len(grid.times) == count(size, CHUNK)
    for number, time in enumerate(grid.times):
        same_span = number < len(base.times) and base.span(number) == grid.span(number)
        expected = number if same_span and not changed.overlaps(*grid.span(number)) else NEW
        assert time == expected


@given(size=sizes, dirty=ranges)
@settings(deadline=None)
def test_the_chunks_with_this_mounts_time_are_those_that_dirty_ranges_touch(
    size: int, dirty: list[tuple[int, int]]
) -> None:
    base = cut(size, RangeSet(), OLD, None, CHUNK)
    grid = cut(size, RangeSet(dirty), NEW, base)
    touched = (RangeSet(dirty) & RangeSet([(0, size)])).aligned_outward(CHUNK, size)
    assert RangeSet(grid.span(number) for number, time in enumerate(grid.times) if time == NEW) == touched


def test_without_a_base_all_times_are_the_mounts() -> None:
    assert set(cut(SIZE, RangeSet(), NEW, None, CHUNK).times) == {NEW}


def test_the_chunk_size_stays_until_another_is_asked_for_and_then_all_times_move() -> None:
    base = cut(SIZE, RangeSet(), OLD, None, CHUNK)
    assert cut(SIZE, RangeSet(), NEW, base) == base
    assert cut(SIZE, RangeSet(), NEW, base, CHUNK) == base
    assert cut(SIZE, RangeSet(), NEW, base, 2 * CHUNK) == cut(SIZE, RangeSet(), NEW, None, 2 * CHUNK)


def test_planning_leaves_the_base_alone() -> None:
    base = cut(SIZE, RangeSet(), OLD, None, CHUNK)
    cut(SIZE, RangeSet([(0, SIZE)]), NEW, base)
    assert set(base.times) == {OLD}


def test_a_base_with_a_wrong_number_of_times_is_no_base() -> None:
    assert set(cut(SIZE, RangeSet(), NEW, Grid(SIZE, CHUNK, array("q", [OLD]))).times) == {NEW}


# ---- the size of the chunks ----


@given(size=st.integers(0, 1 << 50), chunk=st.integers(16, 30).map(lambda bits: 1 << bits))
@settings(deadline=None)
def test_chunks_are_doubled_only_until_they_are_few_enough(size: int, chunk: int) -> None:
    fit = fitting(size, chunk)
    assert count(size, fit) <= MOST_CHUNKS
    assert fit == chunk or count(size, fit // 2) > MOST_CHUNKS
    assert is_chunk_size(fit)


def test_chunks_usually_have_four_mebibytes_and_a_disk_that_outgrows_its_chunks_gets_new_ones() -> None:
    assert cut(1 << 30, RangeSet(), NEW).chunk == USUAL_CHUNK
    base = cut(MOST_CHUNKS * CHUNK, RangeSet(), OLD, None, CHUNK)
    grown = cut(MOST_CHUNKS * CHUNK + 1, RangeSet(), NEW, base)
    assert grown.chunk == 2 * CHUNK
    assert set(grown.times) == {NEW}


@pytest.mark.parametrize("size", [0, 1, 4096, CHUNK - 1, CHUNK + 1, 3 * CHUNK, 2 << 40])
def test_a_chunk_size_is_a_power_of_two_in_bounds(size: int) -> None:
    assert not is_chunk_size(size)


# ---- the layout ----


@pytest.mark.parametrize("number", [0, 1, 255, 256, 257, 1000, MOST_CHUNKS])
def test_names_are_in_the_order_of_the_disk_and_folders_are_small(number: int) -> None:
    content = MemoryDisk(b"")
    view = ChunkedDisk(frozen(content), 7, Grid(number * CHUNK, CHUNK, array("q", [NEW]) * number), NEW)
    found = files(view)
    assert len(found) == number
    assert [path for path, _ in found] == sorted(path for path, _ in found)
    folders = list(view.entries(0))
    assert max([len(folders), *(len(list(folder.entries(0))) for _, folder in folders)]) <= 256
    inodes = [file.attributes().inode for _, file in found]
    assert [parts(inode)[0::2] for inode in inodes] == [(7, position) for position in range(number)]
    assert all(map(is_chunk, inodes))
    others = {view.attributes().inode, *(folder.attributes().inode for _, folder in folders)}
    assert len(others) == len(folders) + 1
    assert not any(map(is_chunk, others))


def test_a_chunk_keeps_its_name_and_inode_when_the_disk_grows() -> None:
    small, large = (
        ChunkedDisk(frozen(MemoryDisk(b"")), 7, Grid(number * CHUNK, CHUNK, array("q", [NEW]) * number), NEW)
        for number in (300, 40_000)
    )
    before = [(path, file.attributes().inode) for path, file in files(small)]
    assert [(path, file.attributes().inode) for path, file in files(large)][:300] == before


def test_entries_start_anywhere_and_are_what_lookup_finds() -> None:
    view = ChunkedDisk(frozen(MemoryDisk(b"")), 7, Grid(600 * CHUNK, CHUNK, array("q", [NEW]) * 600), NEW)
    assert [name for name, _ in view.entries(1)] == ["001", "002"]
    part = view.lookup("002")
    assert part is not None
    assert [name for name, _ in part.entries(85)] == ["00000597", "00000598", "00000599"]
    for name, file in part.entries(0):
        found = part.lookup(name)
        assert found is not None
        assert found.attributes() == file.attributes()


@pytest.mark.parametrize("name", ["", ".", "3", "003", "0000", "-01", "+01", " 01", "00\u0661", "00²", "\udc80"])
def test_there_is_no_other_name_for_a_folder(name: str) -> None:
    assert view_of(MemoryDisk(NOISE)).lookup(name) is None


@pytest.mark.parametrize("name", ["", "0", "00000006", "00000256", "0000000", "000000000", "0000000\u0661", "-0000001"])
def test_there_is_no_other_name_for_a_chunk(name: str) -> None:
    part = view_of(MemoryDisk(NOISE)).lookup("000")
    assert part is not None
    assert part.lookup(name) is None


def test_a_folder_is_as_new_as_its_newest_chunk() -> None:
    times = array("q", [OLD]) * 600
    times[300] = NEW
    view = ChunkedDisk(frozen(MemoryDisk(b"")), 7, Grid(600 * CHUNK, CHUNK, times), 5)
    assert [folder.attributes().time for _, folder in view.entries(0)] == [OLD, NEW, OLD]
    assert view.attributes().time == NEW
    assert ChunkedDisk(frozen(MemoryDisk(b"")), 7, Grid(0, CHUNK, array("q")), 5).attributes().time == 5


# ---- the content ----


@given(data=ranges)
@settings(deadline=None)
async def test_the_chunks_in_order_are_the_disk(data: list[tuple[int, int]]) -> None:
    content = bytearray(SIZE)
    for start, end in data:
        content[start:end] = NOISE[start:end]
    view = view_of(MemoryDisk(bytes(content), RangeSet(data) & RangeSet([(0, SIZE)])))
    pieces = []
    for _, file in files(view):
        attributes = file.attributes()
        pieces.append(bytes(await awaited(file.open().read, 0, 10 * CHUNK)))
        assert attributes.size == len(pieces[-1])
        assert attributes.blocks >= 1
    assert b"".join(pieces) == content


def test_a_zero_chunk_is_a_file_with_a_hole() -> None:
    view = view_of(MemoryDisk(bytes(SIZE), RangeSet([(CHUNK, SIZE)])))
    shown = [file.attributes() for _, file in files(view)]
    assert shown[0] == Attributes(shown[0].inode, CHUNK, 1, NEW, punchable=True)
    assert shown[1].blocks == CHUNK // 512
    with pytest.raises(FsError) as raised:
        opened(view, 0).seek(0, os.SEEK_DATA)
    assert raised.value.errno == errno.ENXIO
    assert opened(view, 1).seek(0, os.SEEK_HOLE) == CHUNK


async def test_punching_a_chunk_punches_the_disk_there() -> None:
    disk = MemoryDisk(NOISE)
    view = view_of(disk)
    await opened(view, 2).punch(0, 10 * CHUNK)
    assert disk.trims == [(2 * CHUNK, 3 * CHUNK)]
    assert bytes(await awaited(opened(view, 2).read, 0, CHUNK)) == bytes(CHUNK)
    assert bytes(await awaited(opened(view, 3).read, 0, CHUNK)) == NOISE[3 * CHUNK : 4 * CHUNK]
