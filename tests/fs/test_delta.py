# SPDX-License-Identifier: LGPL-2.1-or-later
"""delta/: over the base's image it makes the instant's, and it says exactly what is dirty."""

from __future__ import annotations

import errno
import os
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qfsbackup.contracts import awaited
from qfsbackup.errors import FsError
from qfsbackup.facts import CLUSTER
from qfsbackup.fs.delta import Delta
from qfsbackup.ranges import RangeSet
from tests.fs.memory import MemoryDisk, frozen

SIZE = 5 * CLUSTER + 1536
NOISE = random.Random(1).randbytes(SIZE)
OLD = random.Random(2).randbytes(SIZE)

offsets = st.integers(0, SIZE)
ranges = st.lists(st.tuples(offsets, offsets).map(lambda pair: (min(pair), max(pair))), max_size=5)


def make_delta(data: list[tuple[int, int]], dirty: list[tuple[int, int]]) -> tuple[MemoryDisk, Delta]:
    content = bytearray(SIZE)
    for start, end in data:
        content[start:end] = NOISE[start:end]
    disk = MemoryDisk(bytes(content), RangeSet(data), RangeSet(dirty))
    return disk, Delta(frozen(disk), 1, 0)


def data_extents(delta: Delta) -> RangeSet:
    """What SEEK_DATA and SEEK_HOLE find, from the first byte to the last."""
    found, position = RangeSet(), 0
    while position < SIZE:
        try:
            start = delta.seek(position, os.SEEK_DATA)
        except FsError:  # ENXIO: no more data
            break
        position = delta.seek(start, os.SEEK_HOLE)
        assert position > start
        found.add(start, position)
    return found


@given(data=ranges, dirty=ranges)
@settings(deadline=None)
async def test_its_data_over_the_old_image_is_the_new_one(
    data: list[tuple[int, int]], dirty: list[tuple[int, int]]
) -> None:
    disk, delta = make_delta(data, dirty)
    image, expected = bytearray(OLD), bytearray(OLD)
    for start, end in RangeSet(dirty):
        expected[start:end] = disk.content[start:end]
    for start, end in data_extents(delta):
        image[start:end] = await awaited(delta.read, start, end - start)
    assert image == expected


@given(data=ranges, dirty=ranges)
@settings(deadline=None)
async def test_all_that_is_clean_is_zeros_and_what_is_dirty_is_the_disk(
    data: list[tuple[int, int]], dirty: list[tuple[int, int]]
) -> None:
    disk, delta = make_delta(data, dirty)
    expected = bytearray(SIZE)
    for start, end in RangeSet(dirty):
        expected[start:end] = disk.content[start:end]
    assert bytes(await awaited(delta.read, 0, 2 * SIZE)) == expected
    assert await awaited(delta.read, SIZE, 1) == b""
    assert data_extents(delta) == RangeSet(dirty)
    assert delta.attributes().blocks == max(-(-RangeSet(dirty).total() // 512), 1)


@given(dirty=ranges, punches=ranges)
@settings(deadline=None)
async def test_a_punched_range_is_a_hole_and_no_other_views_clean_bytes_go(
    dirty: list[tuple[int, int]], punches: list[tuple[int, int]]
) -> None:
    disk, delta = make_delta([(0, SIZE)], dirty)
    for start, end in punches:
        await delta.punch(start, end - start)
    punched = RangeSet(punches) & RangeSet(dirty)
    assert data_extents(delta) == RangeSet(dirty) - punched
    assert delta.attributes().blocks == max(-(-(RangeSet(dirty) - punched).total() // 512), 1)
    assert disk.trimmed - RangeSet(dirty) == RangeSet()


@pytest.mark.parametrize("whence", [os.SEEK_DATA, os.SEEK_HOLE])
def test_seek_at_the_end_is_enxio(whence: int) -> None:
    with pytest.raises(FsError) as raised:
        make_delta([], [(0, SIZE)])[1].seek(SIZE, whence)
    assert raised.value.errno == errno.ENXIO


async def test_a_broken_snapshot_fails_every_read_holes_too() -> None:
    _, delta = make_delta([], [])
    delta._disk._health.mark_broken("as a test")
    with pytest.raises(FsError) as raised:
        await awaited(delta.read, 0, 10)
    assert raised.value.errno == errno.EIO


async def test_clean_bytes_that_were_released_are_no_error_for_they_are_not_shown() -> None:
    _, delta = make_delta([(0, SIZE)], [(0, 100)])
    await delta._disk.release(CLUSTER, SIZE)
    assert bytes(await awaited(delta.read, 0, SIZE)) == NOISE[:100] + bytes(SIZE - 100)
    await delta._disk.release(0, CLUSTER)
    with pytest.raises(FsError):
        await awaited(delta.read, 0, SIZE)
