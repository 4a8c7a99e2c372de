# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reading ahead: never a wrong byte, never a hole, never beyond the budget, and nobody else's errors."""

import errno
import gc
import random
from typing import Literal

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from qfsbackup.errors import FsError
from qfsbackup.facts import CLUSTER
from qfsbackup.nbd.budget import IDLE, WINDOW, Budget
from qfsbackup.nbd.fetch import Fetch
from qfsbackup.nbd.readahead import BLOCK
from qfsbackup.ranges import RangeSet
from tests.harness.disk import MIB
from tests.nbd.disks import read
from tests.nbd.support import Bed, fake_disk, in_fast_time

SIZE = 24 * MIB + 4096 + 512
CONTENT = random.Random(1).randbytes(SIZE)


def sparse(holes: RangeSet) -> tuple[bytes, RangeSet]:
    """CONTENT with zeros in `holes`, and what is left as data."""
    content = bytearray(CONTENT)
    for start, end in holes:
        content[start:end] = bytes(end - start)
    return bytes(content), RangeSet([(0, SIZE)]) - holes


async def read_through(bed: Bed, start: int, end: int, length: int) -> None:
    for offset in range(start, end, length):
        wanted = min(length, end - offset)
        assert await read(bed.disk, offset, wanted) == bed.server.content[offset : offset + wanted]


Step = tuple[Literal["read", "seek", "trim", "cancel", "pause"], int, int]
lengths = st.sampled_from([1, 512, 4096, 10_000, CLUSTER, 128 * 1024, 300_000, BLOCK])
step = st.tuples(
    st.sampled_from(["read", "read", "read", "read", "seek", "trim", "cancel", "pause"]), st.integers(0, SIZE), lengths
)
readers = st.lists(st.lists(step, max_size=25), min_size=1, max_size=4)
spans = st.lists(st.tuples(st.integers(0, SIZE // CLUSTER), st.integers(1, 40)), max_size=6).map(
    lambda pairs: RangeSet((number * CLUSTER, min((number + count) * CLUSTER, SIZE)) for number, count in pairs)
)


@settings(deadline=None)
@given(readers=readers, holes=spans, bad=spans, seed=st.integers(), minimum=st.sampled_from([1, 512]))
@in_fast_time
async def test_readers_in_any_order_get_the_bytes_or_an_error_of_their_own(
    readers: list[list[Step]], holes: RangeSet, bad: RangeSet, seed: int, minimum: int
) -> None:
    """Readers with seeks, trims, cancelled reads and bad sectors, against the bytes themselves."""
    chance = random.Random(seed)
    content, data = sparse(holes)
    async with fake_disk(content, data, minimum=minimum) as bed:
        bed.server.bad, bed.server.delay = bad, lambda: chance.random() * 0.005
        async with trio.open_nursery() as nursery:
            for steps in readers:
                nursery.start_soon(play, bed, steps, chance)
        assert not bed.health.broken
        for start, end in bed.server.reads:
            assert bed.disk.data.overlaps(start, end), "a hole was read"
        await trio.sleep(1)
        assert not bed.server.in_flight
    assert bed.budget.used == 0


async def play(bed: Bed, steps: list[Step], chance: random.Random) -> None:
    """One reader."""
    position = 0
    for action, offset, length in steps:
        if action == "seek":
            position = min(offset, SIZE - 1)
        elif action == "trim":
            bed.trims.add(offset, offset + length * 4)
            await bed.disk.trim(offset, length * 4)
        elif action == "pause":
            await trio.sleep(chance.random() * 3)
        else:
            end = min(position + length, SIZE)
            with trio.move_on_after(chance.random() * 0.002 if action == "cancel" else 100):
                await check_read(bed, position, end)
            position = end if end < SIZE else 0


async def check_read(bed: Bed, start: int, end: int) -> None:
    """The right bytes; or an error, but only one of this very range."""
    unit = bed.pool.facts.minimum
    try:
        found = await read(bed.disk, start, end - start)
    except FsError:
        bad = bed.server.bad.overlaps(start // unit * unit, -(-end // unit) * unit)
        assert bad or bed.trims.overlaps(start, end), "an error of another range"
    else:
        assert found == bed.server.content[start:end]


@in_fast_time
async def test_a_sequential_reader_is_read_ahead_of() -> None:
    async with fake_disk(CONTENT) as bed:
        bed.server.delay = lambda: 0.1
        start = trio.current_time()
        await read_through(bed, 0, 24 * MIB, MIB)
        assert trio.current_time() - start < 24 * 0.1 / 2
        assert RangeSet(bed.server.reads) == RangeSet([(0, SIZE)])
        assert bed.status.nbd_bytes == SIZE, "a byte was read twice"


@in_fast_time
async def test_a_random_reader_costs_exactly_what_it_asks_for() -> None:
    async with fake_disk(CONTENT) as bed:
        wanted = [(offset, offset + 4096) for offset in random.Random(2).sample(range(0, SIZE - 4096, 8192), 500)]
        for start, end in wanted:
            await read(bed.disk, start, end - start)
        assert bed.server.reads == wanted


@in_fast_time
async def test_reads_that_overtake_each_other_are_one_reader() -> None:
    async with fake_disk(CONTENT) as bed:
        for group in range(0, 24 * MIB, 4 * MIB):
            async with trio.open_nursery() as nursery:
                for offset in (MIB, 0, 3 * MIB, 2 * MIB):
                    nursery.start_soon(read_through, bed, group + offset, group + offset + MIB, MIB)
        assert bed.status.nbd_bytes <= SIZE + 8 * MIB, "what was read already is fetched again and again"


@in_fast_time
async def test_a_reader_that_goes_on_behind_a_hole_is_still_known() -> None:
    content, data = sparse(RangeSet([(4 * MIB, 12 * MIB)]))
    async with fake_disk(content, data) as bed:
        await read_through(bed, 0, 4 * MIB, MIB)
        before = len(bed.server.reads)
        await read_through(bed, 12 * MIB, 13 * MIB, MIB)
        assert (12 * MIB, 12 * MIB + MIB // 2) in bed.server.reads[:before]
        assert not RangeSet(bed.server.reads).overlaps(4 * MIB, 12 * MIB)


@in_fast_time
async def test_a_reader_that_skips_holes_is_read_ahead_of() -> None:
    """As `cp --sparse=auto` reads: each piece of data, and nothing between them."""
    pieces = [(start, start + 2 * CLUSTER) for start in range(0, SIZE - 2 * CLUSTER, MIB)]
    content, data = sparse(RangeSet([(0, SIZE)]) - RangeSet(pieces))
    async with fake_disk(content, data) as bed:
        for number, (start, end) in enumerate(pieces):
            if number > 1:
                assert any(first <= start < last for first, last in bed.server.reads), f"{number} had to wait"
            assert await read(bed.disk, start, end - start) == content[start:end]
        assert bed.status.nbd_bytes == data.total()


@in_fast_time
async def test_all_readers_together_stay_within_the_budget() -> None:
    budget = Budget(total=8 * MIB)
    async with fake_disk(CONTENT, budget=budget) as one, fake_disk(CONTENT, budget=budget) as two:
        held: list[int] = []

        async def watched(bed: Bed, start: int) -> None:
            for offset in range(start, start + 6 * MIB, MIB):
                await read_through(bed, offset, offset + MIB, MIB)
                held.append(budget.used)

        async with trio.open_nursery() as nursery:
            for bed in (one, two):
                for start in range(0, 24 * MIB, 6 * MIB):
                    nursery.start_soon(watched, bed, start)
        assert 0 < max(held) <= 8 * MIB
    assert budget.used == 0


@in_fast_time
async def test_the_window_of_a_reader_that_stopped_is_taken_for_another() -> None:
    budget = Budget(total=WINDOW)
    async with fake_disk(CONTENT, budget=budget) as stopped, fake_disk(CONTENT, budget=budget) as busy:
        await read_through(stopped, 0, 10 * MIB, MIB)
        await trio.sleep(IDLE + 1)
        assert budget.used == WINDOW
        requests = busy.status.nbd_requests
        await read_through(busy, 0, 4 * MIB, MIB)
        assert busy.status.nbd_requests - requests > 2 * 4, "nothing was fetched ahead"
        await read_through(stopped, 10 * MIB, 24 * MIB, MIB)


@in_fast_time
async def test_an_error_in_a_block_fetched_ahead_meets_only_who_reads_it() -> None:
    async with fake_disk(CONTENT) as bed:
        bed.server.bad = RangeSet([(5 * MIB + 4096, 5 * MIB + 8192)])
        await read_through(bed, 0, 5 * MIB + 4096, 4096)
        with pytest.raises(FsError, match="bad sector"):
            await read(bed.disk, 5 * MIB + 4096, 4096)
        await read_through(bed, 5 * MIB + 8192, 8 * MIB, 4096)
        assert not bed.health.broken


@in_fast_time
async def test_a_trim_forgets_what_was_fetched_of_it() -> None:
    async with fake_disk(CONTENT) as bed:
        await read_through(bed, 0, 4 * MIB, MIB)
        await bed.disk.trim(4 * MIB, MIB)
        with pytest.raises(FsError) as caught:
            await read(bed.disk, 4 * MIB, 4096)
        assert caught.value.errno == errno.EIO
        assert not bed.health.broken
        await read_through(bed, 5 * MIB, 24 * MIB, MIB)


@given(st.integers(0, SIZE), st.integers(0, SIZE))
@settings(deadline=None)
@in_fast_time
async def test_a_trim_gives_back_whole_clusters_only(offset: int, length: int) -> None:
    async with fake_disk(CONTENT) as bed:
        await bed.disk.trim(offset, length)
        inside = RangeSet([(offset, min(offset + length, SIZE))]).aligned_inward(CLUSTER)
        assert RangeSet(bed.server.trims) == inside
        assert bed.status.trimmed == inside.total()


@in_fast_time
async def test_a_buffer_is_free_as_soon_as_it_was_handed_out() -> None:
    """Not when the garbage collector comes: by then eight disks hold half a gigabyte."""
    gc.collect()
    gc.disable()
    try:
        async with fake_disk(CONTENT) as bed:
            await read_through(bed, 0, SIZE, MIB)
            await read_through(bed, 0, SIZE // 2, 4096 * 3)
            alive = sum(fetch.end - fetch.start for fetch in gc.get_objects() if isinstance(fetch, Fetch))
            assert alive <= bed.budget.used + MIB
    finally:
        gc.enable()


@in_fast_time
async def test_a_reader_of_what_alone_is_wanted_costs_nothing_behind_its_end() -> None:
    wanted = RangeSet([(4 * MIB, 8 * MIB), (16 * MIB, 20 * MIB)])
    async with fake_disk(CONTENT, wanted=wanted) as bed:
        for start, end in wanted:
            await read_through(bed, start, end, 128 * 1024)
        assert RangeSet(bed.server.reads) == wanted
        assert bed.status.nbd_bytes == wanted.total()
