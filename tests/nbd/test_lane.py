# SPDX-License-Identifier: LGPL-2.1-or-later
"""The short way of small reads: what goes it and what does not, the right bytes or none, nothing in flight overlaps.

All on real servers, for the lane is C over libnbd.
"""

import random
import re
from pathlib import Path

import pytest
import trio
import trio.testing

from qfsbackup.contracts import Buffer, Disk, awaited
from qfsbackup.errors import FsError
from qfsbackup.facts import CLUSTER
from qfsbackup.status import Status
from tests.harness.disk import MIB
from tests.harness.nbd_server import make_certificates, nbdkit, qemu_nbd
from tests.harness.qemu import Qemu
from tests.nbd.disks import CONTENT, half_broken, opened, served
from tests.nbd.short import Read, lane_of, short, slow
from tests.nbd.support import fake_disk, in_fast_time

SIZE = len(CONTENT)


async def test_a_small_read_gives_the_bytes_and_is_counted(qemu: Qemu, tmp_path: Path) -> None:
    async with served(qemu, tmp_path) as server, opened(server.uri, SIZE) as (disk, counters):
        reads = [(4096, 4096), (1, 1), (12345, 6789), (SIZE - 512, 512), (CLUSTER, CLUSTER)]
        for start, length in reads:
            assert await short(disk, start, length) == CONTENT[start : start + length]
            assert await awaited(disk.read, start, length) == CONTENT[start : start + length]
        assert counters.nbd_requests == 5
        assert counters.nbd_bytes == sum(length for _, length in reads)


async def test_what_was_read_stays_as_it_is_for_who_keeps_it(qemu: Qemu, tmp_path: Path) -> None:
    kept: list[memoryview] = []
    async with served(qemu, tmp_path) as server, opened(server.uri, SIZE) as (disk, _):
        lane, over = lane_of(disk), trio.Event()
        assert lane

        def keep(content: Buffer | FsError) -> None:
            assert not isinstance(content, FsError)
            kept.append(memoryview(content)[1:])
            over.set()

        assert lane.read(65536, 4096, keep)
        await over.wait()
        for start in range(MIB, 2 * MIB, 32768):
            assert await short(disk, start, 512) == CONTENT[start : start + 512]
    assert bytes(kept[0]) == CONTENT[65537 : 65536 + 4096]


async def test_what_is_no_small_random_read_of_data_is_refused(qemu: Qemu, tmp_path: Path) -> None:
    content = CONTENT[:MIB] + bytes(MIB) + CONTENT[2 * MIB :]
    async with served(qemu, tmp_path, content) as server, opened(server.uri, SIZE) as (disk, _):
        assert not Read(disk, MIB, 512).taken, "a hole"
        assert not Read(disk, MIB - 512, 1024).taken, "the edge of one"
        assert not Read(disk, 0, CLUSTER + 1).taken, "a large one"
        assert not Read(disk, 512 * 1024 - 512, 1024).taken, "one that needs two requests"
        assert not Read(disk, SIZE - 512, 1024).taken, "one behind the end"
        assert await short(disk, MIB - 4096, 4096) is not None
        assert not Read(disk, 2 * MIB, 4096).taken, "one that goes on behind a hole"
        assert await short(disk, 8192, 4096) is not None
        assert not Read(disk, 12288, 4096).taken, "one that goes on where one has ended"
        assert not Read(disk, 16384, 4096).taken, "and so on: it was refused, but read all the same"


async def test_a_read_meets_neither_another_one_nor_a_job(tmp_path: Path) -> None:
    async with slow(tmp_path) as (disk, _):
        first, meets, beside = (Read(disk, start, 4096) for start in (8192, 8192 + 4095, 65536))
        assert (first.taken, meets.taken, beside.taken) == (True, False, True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read_right, disk, 0, 16384)  # waits for the first one
            await trio.testing.wait_all_tasks_blocked()
            assert not Read(disk, 4096, 512).taken, "it meets a job that waits"
            assert Read(disk, 3 * MIB, 512).taken
            assert await first.answer() == CONTENT[8192 : 8192 + 4096]
            assert await beside.answer() == CONTENT[65536 : 65536 + 4096]
            assert not Read(disk, 4096, 512).taken, "it meets a job in flight"
        assert await short(disk, 4096, 512) == CONTENT[4096 : 4096 + 512]


async def read_right(disk: Disk, start: int, length: int) -> None:
    assert await awaited(disk.read, start, length) == CONTENT[start : start + length]


async def test_after_a_trim_all_but_that_goes_the_short_way(qemu: Qemu, tmp_path: Path) -> None:
    async with served(qemu, tmp_path) as server, opened(server.uri, SIZE) as (disk, _):
        assert await short(disk, 0, 512) is not None
        for start, end in [(MIB, MIB + CLUSTER), (2 * MIB + 100, 2 * MIB + 1000)]:
            await disk.trim(start, end - start)
            for before, length in [(512, 513), (0, 1), (-50, 100), (1 - (end - start), 512)]:
                assert not Read(disk, start - before, length).taken
                with pytest.raises(FsError):
                    await awaited(disk.read, start - before, length)
            assert await short(disk, start - 64, 64) == CONTENT[start - 64 : start]
            assert await short(disk, end + 1, 64) == CONTENT[end + 1 : end + 65]


async def test_what_may_be_read_changes_while_reads_are_in_flight(tmp_path: Path) -> None:
    async with slow(tmp_path) as (disk, _), trio.open_nursery() as nursery:
        reads = [Read(disk, number * CLUSTER + 512, 4096) for number in range(1, 20)]
        assert all(read.taken for read in reads)
        for number in range(5, 15):
            nursery.start_soon(disk.trim, number * CLUSTER, CLUSTER)
        await trio.testing.wait_all_tasks_blocked()
        assert not Read(disk, 5 * CLUSTER + 8192, 512).taken
        for number, read in enumerate(reads, 1):
            start = number * CLUSTER + 512
            assert await read.answer() == CONTENT[start : start + 4096], "they were asked for before"
        assert await short(disk, 30 * CLUSTER, 512) == CONTENT[30 * CLUSTER : 30 * CLUSTER + 512]


async def test_closing_answers_what_a_server_that_hangs_does_not(tmp_path: Path) -> None:
    image, status = tmp_path / "image", Status()
    image.write_bytes(CONTENT)
    async with nbdkit(tmp_path, ["--filter=delay", "file", str(image), "delay-read=60"]) as server:
        async with opened(server.uri, SIZE, status) as (disk, _):
            reads = [Read(disk, number * CLUSTER, 512) for number in range(20)]
            assert all(read.taken for read in reads)
        for read in reads:
            assert isinstance(await read.answer(), FsError)
        assert not status.health.broken
        server.process.kill()


async def test_a_trim_waits_for_the_reads_in_flight(tmp_path: Path) -> None:
    async with slow(tmp_path) as (disk, _), trio.open_nursery() as nursery:
        read = Read(disk, CLUSTER, 4096)
        assert read.taken
        nursery.start_soon(disk.trim, CLUSTER, CLUSTER)
        assert await read.answer() == CONTENT[CLUSTER : CLUSTER + 4096]


async def test_a_bad_sector_is_told_and_harms_nobody_else(tmp_path: Path) -> None:
    async with half_broken(tmp_path, "EIO") as server, opened(server.uri, SIZE) as (disk, _):
        bad, good = Read(disk, MIB + 4096, 512), Read(disk, 4096, 512)
        assert (bad.taken, good.taken) == (True, True)
        assert isinstance(await bad.answer(), FsError)
        assert await good.answer() == CONTENT[4096 : 4096 + 512]
        with pytest.raises(FsError):
            await awaited(disk.read, MIB + 4096, 512)
        assert await short(disk, 3 * MIB, 512) == CONTENT[3 * MIB : 3 * MIB + 512]


async def test_a_server_that_dies_leaves_no_read_without_an_answer(tmp_path: Path) -> None:
    status = Status()
    image = tmp_path / "image"
    image.write_bytes(CONTENT)
    words = ["--filter=delay", "file", str(image), "delay-read=60"]
    async with nbdkit(tmp_path, words) as server, opened(server.uri, SIZE, status) as (disk, _):
        reads = [Read(disk, number * CLUSTER, 512) for number in range(20)]
        assert all(read.taken for read in reads)
        server.process.kill()
        for read in reads:
            assert isinstance(await read.answer(), FsError)
        assert status.health.broken
        assert not Read(disk, 3 * MIB, 512).taken
        with pytest.raises(FsError):
            await awaited(disk.read, 0, 512)


async def test_a_minimum_block_is_honoured(tmp_path: Path) -> None:
    policy = ["blocksize-minimum=4096", "blocksize-error-policy=error"]
    image = tmp_path / "image"
    image.write_bytes(CONTENT)
    words = ["--filter=blocksize-policy", "file", str(image), *policy]
    async with nbdkit(tmp_path, words) as server, opened(server.uri, SIZE) as (disk, counters):
        assert await short(disk, 5000, 10) == CONTENT[5000:5010]
        assert await short(disk, 8190, 4) == CONTENT[8190:8194]
        assert (counters.nbd_requests, counters.nbd_bytes) == (0, 0), "the short way alone counts nothing"
        assert await awaited(disk.read, 20000, 1) == CONTENT[20000:20001]
        assert (counters.nbd_requests, counters.nbd_bytes) == (1, 4096)


@in_fast_time
async def test_a_libnbd_that_hides_its_handle_costs_the_short_way_and_nothing_else() -> None:
    async with fake_disk(CONTENT) as bed:
        assert bed.pool.open_lane(bed.disk.data, bed.disk._ask_again) is None
        await read_right(bed.disk, 4096, 4096)


@pytest.mark.parametrize("kind", ["qemu-nbd", "nbdkit"])
async def test_replies_that_wait_inside_of_tls_are_seen(qemu: Qemu, tmp_path: Path, kind: str) -> None:
    """Several come in one piece from the socket, which then has nothing more to say."""
    certificates, image = make_certificates(tmp_path / "pki"), tmp_path / "disk.raw"
    image.write_bytes(CONTENT)
    server = (
        qemu_nbd(qemu, tmp_path, image, tcp=True, certificates=certificates, options=["--shared=8"])
        if kind == "qemu-nbd"
        else nbdkit(tmp_path, ["file", str(image)], tcp=True, certificates=certificates)
    )
    async with server as running, opened(running.uri, SIZE) as (disk, _):
        for turn in range(20):
            reads = [Read(disk, (3 * number + 1 + turn) * 8192, 512) for number in range(30)]
            for number, read in enumerate(reads):
                start = (3 * number + 1 + turn) * 8192
                if read.taken:
                    assert await read.answer() == CONTENT[start : start + 512]
            assert sum(read.taken for read in reads) > 20


async def test_who_has_to_pay_goes_the_ordinary_way(qemu: Qemu, tmp_path: Path) -> None:
    async with (
        served(qemu, tmp_path) as server,
        opened(server.uri, SIZE, bwlimit=MIB) as (disk, _),
    ):
        assert lane_of(disk) is None


@pytest.mark.parametrize("seed", range(3))
async def test_readers_of_all_kinds_get_the_disk_and_nothing_in_flight_overlaps(tmp_path: Path, seed: int) -> None:
    """Small reads by both ways, large ones, readers in sequence, and trims of the last MiB; nbdkit writes down what is
    in flight."""
    image, log = tmp_path / "image", tmp_path / "log"
    image.write_bytes(CONTENT)
    words = ["--filter=log", "--filter=delay", "file", str(image), "rdelay=1ms", f"logfile={log}"]
    async with nbdkit(tmp_path, words) as server, opened(server.uri, SIZE) as (disk, counters):
        taken = 0

        async def reader(number: int) -> None:
            nonlocal taken
            chance = random.Random(seed * 100 + number)
            for turn in range(60):
                start, length = chance.randrange(3 * MIB), chance.choice([1, 512, 4096, 4096, 65536, 200_000])
                if number == 3 and turn > 40:
                    await disk.trim(3 * MIB + chance.randrange(MIB - 2 * CLUSTER), 2 * CLUSTER)
                for begin in range(start, min(start + chance.choice([1, 1, 1, 4]) * length, 3 * MIB), length):
                    end = min(begin + length, 3 * MIB)
                    content = await short(disk, begin, end - begin)
                    taken += content is not None
                    if content is None:
                        content = await awaited(disk.read, begin, end - begin)
                    assert content == CONTENT[begin:end]

        async with trio.open_nursery() as nursery:
            for number in range(seed, 4):
                nursery.start_soon(reader, number)
        assert taken >= 10
        assert counters.nbd_requests >= 10
    assert_apart(log.read_text())


def assert_apart(log: str) -> None:
    """`Read id=N offset=O count=C ...` begins a request, `...Read id=N return=0` ends it."""
    running: dict[str, tuple[int, int]] = {}
    begun = 0
    for line in log.splitlines():
        where = re.search(r"connection=(\d+)", line)
        begins = re.search(r" (?:Read|Trim) id=(\d+) offset=(\w+) count=(\w+)", line)
        ends = re.search(r"\.\.\.(?:Read|Trim) id=(\d+)", line)
        if where and begins:
            start, length = int(begins[2], 0), int(begins[3], 0)
            assert not [other for other in running.values() if other[0] < start + length and start < other[1]], line
            running[f"{where[1]}.{begins[1]}"] = start, start + length
            begun += 1
        elif where and ends:
            del running[f"{where[1]}.{ends[1]}"]
    assert begun > 20
