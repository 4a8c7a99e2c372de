# SPDX-License-Identifier: LGPL-2.1-or-later
"""RangeSet against the plain set of the bytes it stands for."""

import time
from array import array
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from qfsbackup.ranges import RangeSet

SIZE = 48

offsets = st.integers(0, SIZE)
pairs = st.tuples(offsets, offsets)
lists = st.lists(pairs, max_size=10)


def bytes_of(pairs: list[tuple[int, int]]) -> set[int]:
    return {offset for start, end in pairs for offset in range(start, end)}


def check(ranges: RangeSet, expected: set[int]) -> None:
    """The same bytes, in ranges that neither touch nor overlap."""
    parts = list(ranges)
    assert bytes_of(parts) == expected
    assert all(start < end for start, end in parts)
    assert all(end < start for (_, end), (start, _) in pairwise(parts))
    assert len(ranges) == len(parts)
    assert ranges.total() == len(expected)


@settings(deadline=None)
@given(lists)
def test_ranges_may_come_in_any_order_touch_and_overlap(pairs: list[tuple[int, int]]) -> None:
    check(RangeSet(pairs), bytes_of(pairs))


@settings(deadline=None)
@given(lists, lists)
def test_sets_combine_as_sets_of_bytes_do(mine: list[tuple[int, int]], others: list[tuple[int, int]]) -> None:
    a, b = RangeSet(mine), RangeSet(others)
    check(a | b, bytes_of(mine) | bytes_of(others))
    check(a & b, bytes_of(mine) & bytes_of(others))
    check(a - b, bytes_of(mine) - bytes_of(others))
    check(a, bytes_of(mine))
    assert (a == b) == (bytes_of(mine) == bytes_of(others))


@settings(deadline=None)
@given(lists, offsets, offsets)
def test_looking_up(pairs: list[tuple[int, int]], start: int, end: int) -> None:
    ranges, inside = RangeSet(pairs), bytes_of(pairs)
    asked = range(start, max(start, end))
    assert (start in ranges) == (start in inside)
    assert ranges.overlaps(start, end) == any(offset in inside for offset in asked)
    assert ranges.next_inside(start, end) == next((offset for offset in asked if offset in inside), end)
    if start <= end:
        assert ranges.next_outside(start, end) == next((offset for offset in asked if offset not in inside), end)
    check(RangeSet(ranges.clip(start, end)), inside & set(asked))


@settings(deadline=None)
@given(lists, st.integers(1, 16))
def test_aligning(pairs: list[tuple[int, int]], unit: int) -> None:
    ranges, inside = RangeSet(pairs), bytes_of(pairs)
    units = [set(range(start, start + unit)) for start in range(0, SIZE + unit, unit)]
    check(ranges.aligned_inward(unit), set().union(*(bytes_ for bytes_ in units if bytes_ <= inside)))
    touched = set().union(*(bytes_ for bytes_ in units if bytes_ & inside))
    check(ranges.aligned_outward(unit, SIZE), {offset for offset in touched if offset < SIZE})


@settings(deadline=None)
@given(lists, st.integers(0, 10), st.integers(0, 10))
def test_a_slice_has_the_ranges_by_number(pairs: list[tuple[int, int]], first: int, last: int) -> None:
    ranges = RangeSet(pairs)
    assert list(ranges.slice(first, last)) == list(ranges)[first:last]


@settings(deadline=None)
@given(lists, st.lists(st.tuples(st.booleans(), offsets, offsets), max_size=10), offsets, offsets)
def test_what_is_counted_follows_every_change(
    pairs: list[tuple[int, int]], changes: list[tuple[bool, int, int]], start: int, end: int
) -> None:
    ranges, inside = RangeSet(pairs), bytes_of(pairs)
    for is_added, first, last in changes:
        assert ranges.total() == len(inside)  # it is known before the change
        if is_added:
            ranges.add(first, last)
            inside |= bytes_of([(first, last)])
        else:
            ranges.remove(first, last)
            inside -= bytes_of([(first, last)])
        check(ranges, inside)
        check(ranges.copy(), inside)
        assert ranges.total_within(start, end) == len(inside & bytes_of([(start, end)]))
        assert RangeSet(ranges).total_within(start, end) == ranges.total_within(start, end)


def test_counting_a_million_ranges_again_takes_no_time() -> None:
    ranges = RangeSet((start, start + 1) for start in range(0, 2_000_000, 2))
    assert ranges.total() == 1_000_000
    begin = time.perf_counter()
    for start in range(0, 1000, 2):
        ranges.remove(start, start + 1)
        assert ranges.total_within(0, 2_000_000) == 1_000_000 - start // 2 - 1
    assert time.perf_counter() - begin < 5  # counted each time it took 20 s


def test_borders_are_taken_as_they_are() -> None:
    ranges = RangeSet.from_borders(array("Q", [2, 5, 9, 11]))
    assert list(ranges) == [(2, 5), (9, 11)]
    assert repr(ranges) == "RangeSet([(2, 5), (9, 11)])"


def test_the_largest_offset_fits() -> None:
    ranges = RangeSet([(0, 2**64 - 1)])
    assert ranges.total() == 2**64 - 1
