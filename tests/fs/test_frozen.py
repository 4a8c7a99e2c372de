# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reading and punching a frozen disk, against a plain byte array."""

from __future__ import annotations

import contextlib
import errno
import os
import random
from collections.abc import Callable
from functools import partial

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from qfsbackup.contracts import Answer, Buffer, awaited
from qfsbackup.errors import FsError
from qfsbackup.facts import CLUSTER
from qfsbackup.fs.window import Window
from qfsbackup.ranges import RangeSet
from tests.fs.memory import MemoryDisk, frozen

SIZE = 6 * CLUSTER + 1536  # ends in the middle of a cluster
NOISE = random.Random(1).randbytes(SIZE)

offsets = st.integers(0, SIZE - 1)
lengths = st.one_of(st.integers(1, 5000), st.integers(1, 3 * CLUSTER), st.just(CLUSTER))
ranges = st.lists(st.tuples(offsets, lengths).map(lambda pair: (pair[0], min(sum(pair), SIZE))), max_size=5)


class LateDisk(MemoryDisk):
    """It answers when it is told to."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self._answers: list[Callable[[], None]] = []

    def read(self, start: int, length: int, answer: Answer) -> None:
        self._answers.append(partial(answer, self.content[start : start + length]))

    def answer(self) -> None:
        for answer in self._answers:
            answer()


def make_disk(data: list[tuple[int, int]]) -> tuple[MemoryDisk, bytearray]:
    content = bytearray(SIZE)
    for start, end in data:
        content[start:end] = NOISE[start:end]
    return MemoryDisk(bytes(content), RangeSet(data)), content


@given(data=ranges, steps=st.lists(st.tuples(st.booleans(), offsets, lengths), max_size=12))
@settings(deadline=None)
def test_reads_equal_the_disk_with_the_punched_ranges_zero(
    data: list[tuple[int, int]], steps: list[tuple[bool, int, int]]
) -> None:
    disk, model = make_disk(data)
    window = Window(frozen(disk), 1, 0, 0, SIZE)

    async def play() -> None:
        for punch, offset, length in steps:
            if punch:
                await window.punch(offset, length)
                end = min(offset + length, SIZE)
                model[offset:end] = bytes(end - offset)
            else:
                assert bytes(await awaited(window.read, offset, length)) == model[offset : offset + length]
        assert bytes(await awaited(window.read, 0, SIZE)) == model

    trio.run(play)


@given(
    data=ranges, steps=st.lists(st.tuples(st.sampled_from(["read", "punch", "release"]), offsets, lengths), max_size=12)
)
@settings(deadline=None)
def test_unread_is_what_was_punched_and_neither_read_nor_released_before(
    data: list[tuple[int, int]], steps: list[tuple[str, int, int]]
) -> None:
    disk, _ = make_disk(data)
    view = frozen(disk)
    fresh, lost = RangeSet(data), RangeSet()  # data that nobody has read, and what went of it

    async def play() -> None:
        for step, offset, length in steps:
            end = min(offset + length, SIZE)
            if step == "punch":
                lost_now = fresh & RangeSet([(offset, end)])
                for start, stop in lost_now:
                    lost.add(start, stop)
                await view.punch(offset, length)
                fresh.remove(offset, end)
            elif step == "release":
                await view.release(offset, end)
                fresh.remove(offset, end)
            else:
                with contextlib.suppress(FsError):
                    await awaited(view.read, offset, end - offset)
                    fresh.remove(offset, end)
            assert view.discarded_unread() == lost.total()

    trio.run(play)


async def test_a_read_that_fails_in_part_or_shows_a_hole_there_has_read_nothing() -> None:
    disk, _ = make_disk([(0, SIZE)])
    disk.trimmed.add(3 * CLUSTER, 4 * CLUSTER)
    view = frozen(disk)
    view.data.remove(CLUSTER, 2 * CLUSTER)  # so that the read has two pieces
    with pytest.raises(FsError):
        await awaited(view.read, 0, SIZE)
    await awaited(partial(view.read, within=RangeSet([(512, 1024)])), 0, CLUSTER)  # as delta/ reads it
    await view.punch(0, CLUSTER)
    assert view.discarded_unread() == CLUSTER - 512


async def test_a_read_that_was_under_way_when_its_range_was_punched_has_read_it() -> None:
    disk = LateDisk(NOISE)
    view = frozen(disk)
    answers: list[Buffer | FsError] = []
    view.read(0, CLUSTER, answers.append)
    await view.punch(0, 2 * CLUSTER)
    assert (answers, view.discarded_unread()) == ([], 2 * CLUSTER)
    disk.answer()
    assert (answers, view.discarded_unread()) == ([NOISE[:CLUSTER]], CLUSTER)


async def test_what_is_answered_after_the_snapshot_broke_is_an_error() -> None:
    disk = LateDisk(NOISE)
    view = frozen(disk)
    answers: list[Buffer | FsError] = []
    view.read(0, CLUSTER, answers.append)
    view._health.mark_broken("as a test")
    disk.answer()
    assert [getattr(answer, "errno", 0) for answer in answers] == [errno.EIO]
    assert (view._figures.read_errors, view._figures.read_bytes) == (1, 0)
    view.read(0, CLUSTER, answers.append)
    assert len(answers) == 2, "a broken snapshot was asked again"


@given(punches=st.lists(st.tuples(offsets, lengths), max_size=8))
@settings(deadline=None)
def test_what_is_trimmed_is_just_what_was_punched(punches: list[tuple[int, int]]) -> None:
    disk, _ = make_disk([(0, SIZE)])
    view = frozen(disk)

    async def play() -> None:
        for offset, length in punches:
            await view.punch(offset, length)

    trio.run(play)
    punched = RangeSet((offset, min(offset + length, SIZE)) for offset, length in punches)
    assert disk.trimmed == punched


@given(data=ranges, offset=offsets)
@settings(deadline=None)
def test_seek_finds_the_next_data_and_the_next_hole(data: list[tuple[int, int]], offset: int) -> None:
    disk, _ = make_disk(data)
    window = Window(frozen(disk), 1, 0, 0, SIZE)
    inside = [position in disk.data for position in range(offset, SIZE)]
    assert window.seek(offset, os.SEEK_HOLE) == offset + (inside.index(False) if False in inside else len(inside))
    if True in inside:
        assert window.seek(offset, os.SEEK_DATA) == offset + inside.index(True)
    else:
        with pytest.raises(FsError) as raised:
            window.seek(offset, os.SEEK_DATA)
        assert raised.value.errno == errno.ENXIO


@pytest.mark.parametrize("whence", [os.SEEK_DATA, os.SEEK_HOLE])
def test_seek_at_the_end_is_enxio(whence: int) -> None:
    disk, _ = make_disk([(0, SIZE)])
    with pytest.raises(FsError) as raised:
        Window(frozen(disk), 1, 0, 0, SIZE).seek(SIZE, whence)
    assert raised.value.errno == errno.ENXIO


async def test_a_window_ends_where_it_ends_and_not_where_the_disk_does() -> None:
    disk, model = make_disk([(0, SIZE)])
    window = Window(frozen(disk), 1, 0, 1000, 5000)
    assert window.attributes().size == 4000
    assert bytes(await awaited(window.read, 3990, 100)) == model[4990:5000]
    assert await awaited(window.read, 4000, 1) == b""
    assert window.seek(10, os.SEEK_HOLE) == 4000
    await window.punch(3000, 1 << 30)
    assert window.seek(0, os.SEEK_HOLE) == 3000
    assert disk.content[5000:5010] == bytes(await awaited(Window(frozen(disk), 1, 0, 0, SIZE).read, 5000, 10))


async def test_a_broken_snapshot_fails_every_read_zeros_and_holes_too() -> None:
    disk, _ = make_disk([])
    view = frozen(disk)
    assert bytes(await awaited(view.read, 0, 10)) == bytes(10)
    view._health.mark_broken("as a test")
    with pytest.raises(FsError) as raised:
        await awaited(view.read, 0, 10)
    assert raised.value.errno == errno.EIO
    assert view._figures.read_errors == 1


async def test_a_disk_that_cannot_trim_cannot_be_punched_and_keeps_its_bytes() -> None:
    disk, model = make_disk([(0, SIZE)])
    disk.can_trim = False
    view = frozen(disk)
    with pytest.raises(FsError) as raised:
        await view.punch(0, CLUSTER)
    assert raised.value.errno == errno.EOPNOTSUPP
    assert bytes(await awaited(view.read, 0, CLUSTER)) == model[:CLUSTER]


async def test_an_error_in_one_piece_of_a_read_is_the_errors_own_and_leaves_others_readable() -> None:
    disk, model = make_disk([(0, CLUSTER), (2 * CLUSTER, SIZE)])
    disk.trimmed.add(3 * CLUSTER, 4 * CLUSTER)
    view = frozen(disk)
    with pytest.raises(FsError):
        await awaited(view.read, 0, SIZE)
    assert bytes(await awaited(view.read, 0, 3 * CLUSTER)) == model[: 3 * CLUSTER]


def test_st_blocks_is_never_zero_for_a_file_that_is_not_empty() -> None:
    disk, _ = make_disk([])
    assert Window(frozen(disk), 1, 0, 0, SIZE).attributes().blocks == 1
    assert Window(frozen(MemoryDisk(b"")), 1, 0, 0, 0).attributes().blocks == 0
