# SPDX-License-Identifier: LGPL-2.1-or-later
"""A set of bytes of a disk, kept as sorted half-open ranges.

The borders of all ranges stand in one array: start, end, start, end, ...; strictly increasing, so that ranges neither
touch nor overlap. An offset is inside where an odd number of borders is at or below it:

    borders      2     5        9  11
    bytes    . . # # # . . . .  # # . .

Sixteen bytes a range; looking up is a bisection, combining two sets is one walk along the smaller of them. The bytes
inside are counted once, when somebody asks, and kept from then on.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from itertools import chain


class RangeSet:
    """Ranges `(start, end)` in bytes, end excluded."""

    __slots__ = ("_borders", "_total")

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        """`ranges` may come in any order, touch and overlap; empty ones are dropped."""
        self._borders = borders = array("Q")
        self._total: int | None = None  # once it was asked for
        first = last = -1  # the last range so far
        for start, end in ranges:
            if start >= end:
                continue
            if start > last:
                borders.append(start)
                borders.append(end)
                first, last = start, end
            elif start >= first:
                borders[-1] = last = max(last, end)
            else:
                self.add(start, end)
                first, last = borders[-2], borders[-1]

    def copy(self) -> RangeSet:
        """A set of its own with the same ranges."""
        result = RangeSet()
        result._borders = self._borders[:]
        result._total = self._total
        return result

    @classmethod
    def from_borders(cls, borders: array[int]) -> RangeSet:
        """The set with these borders, which must be strictly increasing and even in number; they are not copied."""
        result = cls()
        result._borders = borders
        return result

    @property
    def borders(self) -> array[int]:
        """All borders in order, type code "Q"; not a copy."""
        return self._borders

    def add(self, start: int, end: int) -> None:
        """Put `[start, end)` into the set. Appending behind the last range costs constant time."""
        if start >= end:
            return
        borders = self._borders
        if self._total is not None:
            self._total += end - start - self.total_within(start, end)
        if not borders or start > borders[-1]:
            borders.extend((start, end))
            return
        low, high = bisect_left(borders, start), bisect_right(borders, end)
        keep = [start] if low % 2 == 0 else []
        keep += [end] if high % 2 == 0 else []
        borders[low:high] = array("Q", keep)

    def remove(self, start: int, end: int) -> None:
        """Take `[start, end)` out of the set."""
        if start >= end:
            return
        borders = self._borders
        if self._total is not None:
            self._total -= self.total_within(start, end)
        low, high = bisect_left(borders, start), bisect_right(borders, end)
        keep = [start] if low % 2 == 1 else []
        keep += [end] if high % 2 == 1 else []
        borders[low:high] = array("Q", keep)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        borders = iter(self._borders)
        return zip(borders, borders, strict=True)

    def __len__(self) -> int:
        """How many ranges there are."""
        return len(self._borders) // 2

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RangeSet) and self._borders == other._borders

    __hash__ = None  # type: ignore[assignment]  # a set that grows is no key

    def __repr__(self) -> str:
        return f"RangeSet({list(self)})"

    def total(self) -> int:
        """How many bytes are inside. Constant time, but for the first call."""
        if self._total is None:
            self._total = sum(self._borders[1::2]) - sum(self._borders[0::2])
        return self._total

    def total_within(self, start: int, end: int) -> int:
        """How many bytes of `[start, end)` are inside. Linear in the ranges there, or in the others if fewer."""
        if start >= end:
            return 0
        borders = self._borders
        low, high = bisect_right(borders, start), bisect_left(borders, end)
        if high - low > len(borders) // 2:
            return self.total() - self._count(0, start) - self._count(end, max(borders[-1], end))
        return self._count(start, end)

    def _count(self, start: int, end: int) -> int:
        if start >= end:
            return 0
        borders = self._borders
        low, high = bisect_right(borders, start), bisect_left(borders, end)
        starts, ends = borders[low + low % 2 : high : 2], borders[low + 1 - low % 2 : high : 2]
        cut_at_start, cut_at_end = low % 2 == 1, high % 2 == 1
        return sum(ends) + (end if cut_at_end else 0) - sum(starts) - (start if cut_at_start else 0)

    def __contains__(self, offset: int) -> bool:
        return bisect_right(self._borders, offset) % 2 == 1

    def covers(self, start: int, end: int) -> bool:
        """Is every byte of `[start, end)` inside?"""
        borders = self._borders
        index = bisect_right(borders, start)
        return start >= end or (index % 2 == 1 and end <= borders[index])

    def overlaps(self, start: int, end: int) -> bool:
        """Is any byte of `[start, end)` inside?"""
        borders = self._borders
        index = bisect_right(borders, start)
        return start < end and (index % 2 == 1 or (index < len(borders) and borders[index] < end))

    def next_inside(self, offset: int, end: int) -> int:
        """The first offset at or behind `offset` that is inside; `end` where there is none before it."""
        index = bisect_right(self._borders, offset)
        if index % 2 == 1:
            return min(offset, end)
        return min(self._borders[index], end) if index < len(self._borders) else end

    def next_outside(self, offset: int, end: int) -> int:
        """The first offset at or behind `offset` that is not inside; at most `end`."""
        index = bisect_right(self._borders, offset)
        return min(self._borders[index] if index % 2 == 1 else offset, end)

    def clip(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The parts of the ranges that lie in `[start, end)`, in order."""
        position = self.next_inside(start, end)
        while position < end:
            stop = self.next_outside(position, end)
            yield position, stop
            position = self.next_inside(stop, end)

    def slice(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """The ranges number `first` to `last` (excluded), counted from 0."""
        borders = iter(self._borders[2 * first : 2 * last])
        return zip(borders, borders, strict=True)

    def __or__(self, other: RangeSet) -> RangeSet:
        return self._combine(other, lambda mine, others: mine or others)

    def __and__(self, other: RangeSet) -> RangeSet:
        return self._combine(other, lambda mine, others: mine and others)

    def __sub__(self, other: RangeSet) -> RangeSet:
        return self._combine(other, lambda mine, others: mine and not others)

    def _combine(self, other: RangeSet, inside: Callable[[bool, bool], bool]) -> RangeSet:
        if len(self) <= len(other):
            return _combine(self._borders, other._borders, inside)
        return _combine(other._borders, self._borders, lambda others, mine: inside(mine, others))

    def aligned_inward(self, unit: int) -> RangeSet:
        """The whole units of `unit` bytes that lie inside."""
        return RangeSet((-(-start // unit) * unit, end // unit * unit) for start, end in self)

    def aligned_outward(self, unit: int, size: int) -> RangeSet:
        """Every unit of `unit` bytes that is touched, cut at `size`."""
        return RangeSet((start // unit * unit, min(-(-end // unit) * unit, size)) for start, end in self)


def _combine(few: array[int], many: array[int], inside: Callable[[bool, bool], bool]) -> RangeSet:
    """Between two borders of `few` the result is everything, nothing, `many` or its opposite.

    So it has the borders of `many` there, which are copied as a piece, or none.
    """
    results = [(inside(bool(odd), False), inside(bool(odd), True)) for odd in (0, 1)]
    borders, was, low = array("Q"), False, 0
    for number, start in enumerate(chain((0,), few)):
        end = few[number] if number < len(few) else None
        if start == end:
            continue
        low = bisect_right(many, start, low)
        now = results[number % 2][low % 2]
        if now != was:
            borders.append(start)
            was = now
        if results[number % 2][0] != results[number % 2][1]:
            high = len(many) if end is None else bisect_left(many, end, low)
            borders.extend(many[low:high])
            was = was != bool((high - low) % 2)
            low = high
    return RangeSet.from_borders(borders)
