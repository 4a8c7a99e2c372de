# SPDX-License-Identifier: LGPL-2.1-or-later
"""What readers were answered: nothing is ever in it that was not noted, and it does not grow without bound."""

import random

from hypothesis import given
from hypothesis import strategies as st

from qfsbackup.fs._seen import MOST, UNIT
from qfsbackup.fs.seen import Seen
from qfsbackup.ranges import RangeSet

ranges = st.lists(st.tuples(st.integers(0, 500), st.integers(0, 50)).map(lambda pair: (pair[0], sum(pair))))


@given(steps=st.lists(st.tuples(st.booleans(), ranges), max_size=5))
def test_all_that_was_noted_is_inside_and_nothing_else(steps: list[tuple[bool, list[tuple[int, int]]]]) -> None:
    noted = Seen()
    for asked, parts in steps:
        for start, end in parts:
            noted.add(start, end)
        if asked:
            noted.ranges()
    assert noted.ranges() == RangeSet(part for _, parts in steps for part in parts)


def test_thousands_of_reads_here_and_there_are_what_they_were() -> None:
    noted, expected, generator = Seen(), RangeSet(), random.Random(7)
    for _ in range(5000):
        start = generator.randrange(1 << 20)
        end = start + generator.choice((0, 1, 7, 512, 4096))
        noted.add(start, end)
        expected.add(start, end)
    assert noted.ranges() == expected


def test_memory_is_bounded_and_what_is_forgotten_is_small() -> None:
    noted = Seen()
    order = list(range(2 * MOST))
    random.Random(1).shuffle(order)
    large = (1 << 40, (1 << 40) + 2 * UNIT)
    noted.add(*large)
    for number in order:  # every second 4 KiB
        noted.add(number * 8192, number * 8192 + 4096)
    assert len(noted.ranges()) <= MOST
    left = noted.ranges()
    assert left.covers(*large)
    assert not left.overlaps(4096, 8192)
    assert left.total() < 2 * MOST * 4096
