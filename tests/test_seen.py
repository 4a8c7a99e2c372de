# SPDX-License-Identifier: LGPL-2.1-or-later
"""What readers were answered: nothing is ever in it that was not noted, and it does not grow without bound."""

import random
from array import array
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qfsbackup import seen
from qfsbackup.ranges import RangeSet
from qfsbackup.seen import BATCH, MOST, UNIT, Seen

ranges = st.lists(st.tuples(st.integers(0, 500), st.integers(0, 50)).map(lambda pair: (pair[0], sum(pair))))


@given(steps=st.lists(st.tuples(st.booleans(), ranges), max_size=5))
def test_all_that_was_noted_is_inside_and_nothing_else(steps: list[tuple[bool, list[tuple[int, int]]]]) -> None:
    noted = Seen()
    for together, parts in steps:
        if together:
            noted.add_borders(array("Q", [border for part in parts for border in part]).tobytes())
        else:
            for start, end in parts:
                noted.add(start, end)
    assert noted.ranges() == RangeSet(part for _, parts in steps for part in parts)


def test_ranges_are_joined_before_many_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    joined: list[int] = []

    def counted(parts: Sequence[tuple[int, int]] = ()) -> RangeSet:
        joined.append(len(parts))
        return RangeSet(parts)

    monkeypatch.setattr(seen, "RangeSet", counted)
    noted = Seen()
    for number in range(3 * BATCH):
        noted.add(number, number + 1)
    assert joined == [0, BATCH, BATCH, BATCH]


def test_memory_is_bounded_and_what_is_forgotten_is_small() -> None:
    noted = Seen()
    order = list(range(2 * MOST))
    random.Random(1).shuffle(order)
    large = (1 << 40, (1 << 40) + 2 * UNIT)
    noted.add(*large)
    for number in order:  # every second 4 KiB
        noted.add(number * 8192, number * 8192 + 4096)
        assert len(noted._joined) <= MOST
    left = noted.ranges()
    assert left.covers(*large)
    assert not left.overlaps(4096, 8192)
    assert left.total() < 2 * MOST * 4096
