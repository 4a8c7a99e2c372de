# SPDX-License-Identifier: LGPL-2.1-or-later
"""The three map formats: their grammar, and that pages of any size join without a seam."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qfsbackup.contracts import awaited
from qfsbackup.fs import maps
from qfsbackup.ranges import RangeSet

SIZE = 1 << 20

extents = st.lists(
    st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).map(lambda pair: (min(pair), max(pair))), max_size=20
)


async def content(file: maps.MapFile) -> str:
    """Read as the kernel reads, in pieces."""
    size = file.attributes().size
    pieces = [bytes(await awaited(file.read, offset, 1000)) for offset in range(0, size, 1000)]
    assert await awaited(file.read, size, 1) == b""
    return b"".join(pieces).decode()


def contiguous(lines: list[tuple[int, int]]) -> bool:
    position = 0
    for offset, length in lines:
        if offset != position or length <= 0:
            return False
        position += length
    return position == SIZE


@given(dirty=extents)
@settings(deadline=None)
async def test_text_and_json_say_the_same_and_cover_the_disk(dirty: list[tuple[int, int]]) -> None:
    ranges = RangeSet(dirty)
    text = await content(maps.MapFile(1, 0, ranges, SIZE, maps.text_line))
    rows = [line.split() for line in text.splitlines()]
    assert contiguous([(int(row[0]), int(row[1])) for row in rows])
    assert RangeSet((int(row[0]), int(row[0]) + int(row[1])) for row in rows if row[2:] == ["1", "dirty"]) == ranges
    document = json.loads(await content(maps.MapFile(1, 0, ranges, SIZE, maps.json_line, ends=maps.JSON_ENDS)))
    assert [[str(entry[key]) for key in ("offset", "length", "type", "description")] for entry in document] == rows


@given(dirty=extents, data=extents)
@settings(deadline=None)
async def test_the_borg_map_is_contiguous_and_says_same_only_where_nothing_is_dirty(
    dirty: list[tuple[int, int]], data: list[tuple[int, int]]
) -> None:
    file = maps.MapFile(1, 0, RangeSet(dirty), SIZE, maps.borg_line, states=maps.borg_states(RangeSet(data)))
    rows = [line.split() for line in (await content(file)).splitlines()]
    assert contiguous([(int(row[0]), int(row[1])) for row in rows])
    states = {
        state: RangeSet((int(row[0]), int(row[0]) + int(row[1])) for row in rows if row[2] == state)
        for state in ("data", "zero", "same")
    }
    assert states["same"] == RangeSet([(0, SIZE)]) - RangeSet(dirty)
    assert states["data"] == RangeSet(dirty) & RangeSet(data)
    assert states["zero"] == RangeSet(dirty) - RangeSet(data)


@pytest.mark.parametrize("count", [maps.PAGE - 1, maps.PAGE, maps.PAGE + 1, 3 * maps.PAGE])
async def test_pages_join_without_a_seam(count: int) -> None:
    ranges = RangeSet((2 * number, 2 * number + 1) for number in range(count))
    for size in (2 * count - 1, 2 * count):
        text = await content(maps.MapFile(1, 0, ranges, size, maps.text_line))
        rows = [line.split() for line in text.splitlines()]
        assert [int(row[0]) for row in rows] == list(range(size))
        assert {row[3] for row in rows} == {"clean", "dirty"}


async def test_the_map_of_an_empty_disk_is_empty() -> None:
    assert await content(maps.MapFile(1, 0, RangeSet(), 0, maps.text_line)) == ""
    assert json.loads(await content(maps.MapFile(1, 0, RangeSet(), 0, maps.json_line, ends=maps.JSON_ENDS))) == []


async def test_a_map_that_was_measured_is_as_long_as_it_said() -> None:
    ranges = RangeSet((2 * number, 2 * number + 1) for number in range(3 * maps.PAGE))
    file = maps.MapFile(1, 0, ranges, SIZE, maps.text_line)
    assert not file.is_measured
    file.measure()
    assert file.is_measured
    assert file.attributes().size == len(await content(file))
