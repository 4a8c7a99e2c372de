# SPDX-License-Identifier: LGPL-2.1-or-later
"""What every Disk promises (contracts.py), of each kind with something real behind it."""

import random
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from qfsbackup.contracts import Buffer, Disk, awaited
from qfsbackup.errors import FsError
from qfsbackup.facts import CLUSTER
from qfsbackup.ranges import RangeSet
from tests.contracts.disk_beds import BEDS, KILLABLE, SIZE, Bed
from tests.nbd.disks import read

Range = tuple[int, int]  # where it starts and ends

lengths = st.sampled_from([1, 512, 4096, CLUSTER, CLUSTER + 1, 300_000])
ranges = st.tuples(st.integers(0, SIZE - 1), st.one_of(lengths, st.integers(1, SIZE))).map(
    lambda pair: (pair[0], min(sum(pair), SIZE))
)


@pytest.fixture(params=BEDS)
async def bed(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Bed]:
    async with BEDS[request.param](tmp_path) as bed:
        yield bed


class Asked:
    """One read of a disk, and what was answered."""

    def __init__(self, disk: Disk, start: int, end: int) -> None:
        self.start, self.end = start, end
        self.answers: list[bytes | FsError] = []
        self._thread = threading.get_ident()
        self._over = trio.Event()
        disk.read(start, end - start, self._answer)

    def _answer(self, content: Buffer | FsError) -> None:
        assert threading.get_ident() == self._thread
        self.answers.append(content if isinstance(content, FsError) else bytes(content))
        self._over.set()

    async def answer(self) -> bytes | FsError:
        with trio.fail_after(20):
            await self._over.wait()
        return self.answers[0]


def pieces(disk: Disk, start: int, end: int) -> Sequence[Range]:
    """What of it may be asked for."""
    return list(disk.data.clip(start, min(end, disk.size)))


async def test_any_range_is_what_the_disk_holds_also_when_it_is_asked_for_twice(bed: Bed) -> None:
    assert bed.disk.size == len(bed.content)

    @settings(max_examples=40, deadline=None, database=None)
    @given(ranges)
    def check(wanted: Range) -> None:
        start, end = wanted
        for _ in range(2):
            found = trio.from_thread.run(read, bed.disk, start, max(min(end, bed.disk.size) - start, 0))
            assert found == bed.content[start:end]

    await trio.to_thread.run_sync(check)  # all with the one bed
    assert not bed.health.broken


async def test_reads_at_once_are_answered_once_each_whatever_is_trimmed_meanwhile(bed: Bed) -> None:
    """What was asked for before a trim comes, what meets it afterwards never does, and all else always does."""
    chance, trimmed, asked = random.Random(3), RangeSet(), list[tuple[Asked, bool]]()
    half = bed.disk.size // 2
    async with trio.open_nursery() as nursery:
        for step in range(60):
            for _ in range(4):
                start = chance.randrange(bed.disk.size - 1)
                end = min(start + chance.choice((1, 512, 4096, 4096, 4096, 70_000, 200_000)), bed.disk.size)
                for piece in pieces(bed.disk, start, end):
                    asked.append((Asked(bed.disk, *piece), trimmed.overlaps(*piece)))
            if step % 6 == 0:
                start = half + chance.randrange(half - CLUSTER)
                trimmed.add(start, start + 50_000)
                nursery.start_soon(bed.disk.trim, start, 50_000)
            await trio.lowlevel.checkpoint()
            if step % 3 == 0:
                await trio.testing.wait_all_tasks_blocked()
    for one, late in asked:
        answer = await one.answer()
        if late and bed.unit == 1:
            assert isinstance(answer, FsError)
        elif not late:
            assert answer == bed.content[one.start : one.end], (one.start, one.end)
    for piece in pieces(bed.disk, 0, half - bed.unit):
        assert await read(bed.disk, piece[0], piece[1] - piece[0]) == bed.content[slice(*piece)]
    await trio.testing.wait_all_tasks_blocked()
    assert {len(one.answers) for one, _ in asked} == {1}
    assert not bed.health.broken


async def test_a_trim_forbids_just_its_range_and_gives_clusters_back_that_neighbours_complete(bed: Bed) -> None:
    """The end of one cluster, the one behind it, then the beginning of the first; always the same twice."""
    disk, first = bed.disk, CLUSTER // 2
    steps = [((first, CLUSTER), 0), ((CLUSTER, 2 * CLUSTER), 1), ((4096, first), 1), ((0, 4096), 2)]
    for (start, end), whole in steps:
        for _ in range(2):
            await disk.trim(start, end - start)
        if bed.figures:
            assert bed.figures.trimmed == (whole * CLUSTER if disk.can_trim else 0)
        assert isinstance(await Asked(disk, end - 1, end).answer(), FsError)
        assert isinstance(await Asked(disk, start, end).answer(), FsError)
        if start:
            before = (start - 512, start) if start != CLUSTER else (0, 512)
            assert await Asked(disk, *before).answer() == bed.content[slice(*before)]
    assert await Asked(disk, 2 * CLUSTER, 3 * CLUSTER).answer() == bed.content[2 * CLUSTER : 3 * CLUSTER]
    assert not bed.health.broken


async def test_the_end_of_the_disk_can_be_trimmed_and_more(bed: Bed) -> None:
    start = bed.disk.size - 100_000
    await bed.disk.trim(start, 1 << 40)
    await bed.disk.trim(bed.disk.size, 5)
    assert isinstance(await Asked(bed.disk, bed.disk.size - 1, bed.disk.size).answer(), FsError)
    if bed.figures and bed.disk.can_trim:
        assert bed.figures.trimmed == bed.disk.size // CLUSTER * CLUSTER - -(-start // CLUSTER) * CLUSTER
    [*_, last] = pieces(bed.disk, 0, start // 4096 * 4096)
    assert await Asked(bed.disk, last[1] - 1, last[1]).answer() == bed.content[last[1] - 1 : last[1]]


async def test_what_may_not_be_asked_for_is_an_error_and_harms_nobody(bed: Bed) -> None:
    size, hole = bed.disk.size, bed.disk.data.next_outside(0, bed.disk.size)
    for start, length in [(size - 1, 2), (size, 1), (1 << 62, 1), (hole, 1), (0, size + 1)]:
        assert isinstance(await Asked(bed.disk, start, start + length).answer(), FsError)
    assert await Asked(bed.disk, 0, 512).answer() == bed.content[:512]
    assert not bed.health.broken


async def test_it_can_be_probed_also_when_its_beginning_or_all_of_it_is_gone(bed: Bed) -> None:
    await bed.disk.probe()
    for length in (100, CLUSTER - 1, CLUSTER + 700, bed.disk.size):
        await bed.disk.trim(0, length)
        await bed.disk.probe()
    assert not bed.health.broken


async def test_who_does_not_wait_any_more_leaves_the_others_alone(bed: Bed) -> None:
    async with trio.open_nursery() as nursery:
        for number in range(8):
            nursery.start_soon(awaited, bed.disk.read, number * 4096, 4096)
        await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    assert await read(bed.disk, 0, 65536) == bed.content[:65536]


@pytest.mark.parametrize("bed", KILLABLE, indirect=True)
async def test_what_is_behind_it_goes_and_every_read_and_probe_is_an_error(bed: Bed) -> None:
    assert bed.kill
    bed.kill()
    asked = [Asked(bed.disk, number * 8192, number * 8192 + 512) for number in range(0, 32, 3)]
    answers = [await one.answer() for one in asked]
    while not bed.health.broken:
        answers.append(await Asked(bed.disk, 0, 512).answer())
    assert all(isinstance(answer, FsError) or answer in bed.content for answer in answers)
    assert isinstance(await Asked(bed.disk, 0, 512).answer(), FsError)
    with pytest.raises(FsError):
        await bed.disk.probe()


@pytest.mark.parametrize("kind", BEDS)
async def test_closing_it_leaves_no_read_without_an_answer(kind: str, tmp_path: Path) -> None:
    async with BEDS[kind](tmp_path) as bed:
        asked = [Asked(bed.disk, *piece) for piece in pieces(bed.disk, 0, bed.disk.size)]
        asked += [Asked(bed.disk, number * 8192, number * 8192 + 512) for number in range(0, 32, 3)]
    assert {len(one.answers) for one in asked} == {1}
    for one in asked:
        assert isinstance(one.answers[0], FsError) or one.answers == [bed.content[one.start : one.end]]
