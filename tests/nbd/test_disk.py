# SPDX-License-Identifier: LGPL-2.1-or-later
"""A disk on real NBD servers: its bytes, its maps, its errors, and the end of the server."""

import errno
import random
import re
from pathlib import Path

import pytest
import trio
import trio.testing

from qfsbackup.contracts import awaited
from qfsbackup.errors import FsError, UserError
from qfsbackup.facts import CLUSTER
from qfsbackup.status import Status
from tests.harness.disk import MIB
from tests.harness.nbd_server import make_certificates, nbdkit, qemu_nbd
from tests.harness.qemu import Qemu, run_img
from tests.nbd.disks import CONTENT, all_of, opened, served


@pytest.mark.parametrize("length", [MIB, 128 * 1024, 5000])
async def test_the_bytes_are_the_disk(qemu: Qemu, tmp_path: Path, length: int) -> None:
    async with served(qemu, tmp_path) as server, opened(server.uri, len(CONTENT)) as (disk, counters):
        assert await all_of(disk, length) == CONTENT
        assert counters.nbd_bytes == len(CONTENT)
        assert 0 < counters.nbd_requests < 32


async def test_zeros_are_not_asked_for(qemu: Qemu, tmp_path: Path) -> None:
    content = CONTENT[:MIB] + bytes(2 * MIB) + CONTENT[MIB : 2 * MIB]
    async with served(qemu, tmp_path, content) as server, opened(server.uri, len(content)) as (disk, counters):
        assert list(disk.data) == [(0, MIB), (3 * MIB, 4 * MIB)]
        assert await all_of(disk, MIB // 2 + 512) == content
        assert counters.nbd_bytes == 2 * MIB
        assert counters.data == 2 * MIB


@pytest.mark.parametrize("size", [0, 512, 4 * MIB - 512, 8 << 40], ids=str)
async def test_disks_of_any_size(tmp_path: Path, size: int) -> None:
    async with nbdkit(tmp_path, ["--no-sr", "pattern", str(size)]) as server, opened(server.uri, size) as (disk, _):
        assert disk.size == size
        assert disk.data.total() == size
        last = max(0, size - 512)
        if size:
            number = int.from_bytes(bytes(await awaited(disk.read, last, 512))[:8], "big")
            assert number == last, "nbdkit's pattern tells the offset of every eight bytes"


async def test_what_is_trimmed_twice_is_counted_once(qemu: Qemu, tmp_path: Path) -> None:
    async with served(qemu, tmp_path) as server, opened(server.uri, len(CONTENT)) as (disk, counters):
        for start, end in [(0, 2), (1, 4), (8, 9), (0, 16)]:
            await disk.trim(start * CLUSTER, (end - start) * CLUSTER)
        assert counters.trimmed == 16 * CLUSTER


async def test_a_minimum_block_is_honoured(tmp_path: Path) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(CONTENT)
    policy = ["--filter=blocksize-policy", "file", str(image), "blocksize-error-policy=error"]
    limit = ["blocksize-minimum=4096", "blocksize-preferred=4096", "blocksize-maximum=65536"]
    async with nbdkit(tmp_path, [*policy, *limit]) as server, opened(server.uri, len(CONTENT)) as (disk, _):
        assert await awaited(disk.read, 4095, 2) == CONTENT[4095:4097]
        assert await all_of(disk, 10_000) == CONTENT


async def test_a_wrong_size_is_refused(tmp_path: Path) -> None:
    async with nbdkit(tmp_path, ["null", "1M"]) as server:
        with pytest.raises(UserError, match="a disk of 1048576 bytes, where one of 2097152"):
            async with opened(server.uri, 2 * MIB):
                pytest.fail("opened")


async def test_a_server_that_takes_one_client_is_enough(qemu: Qemu, tmp_path: Path) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(CONTENT)
    one_client = qemu_nbd(qemu, tmp_path, image, options=["--shared=1"])
    async with one_client as server, opened(server.uri, len(CONTENT)) as (disk, _):
        assert await all_of(disk, MIB) == CONTENT


async def test_trims_are_whole_clusters_and_not_readable_afterwards(qemu: Qemu, tmp_path: Path) -> None:
    content = CONTENT[: MIB + 512]
    image, status = tmp_path / "disk.raw", Status()
    async with served(qemu, tmp_path, content) as server, opened(server.uri, len(content), status) as (disk, counters):
        before = image.stat().st_blocks
        assert disk.can_trim
        await disk.trim(1, CLUSTER)
        assert counters.trimmed == 0
        await disk.trim(CLUSTER + 2, len(content) - CLUSTER - 2)
        assert counters.trimmed == MIB - 2 * CLUSTER
        assert image.stat().st_blocks == before - counters.trimmed // 512
        assert await awaited(disk.read, 0, 1) == content[:1]
        assert await awaited(disk.read, CLUSTER + 1, 1) == content[CLUSTER + 1 : CLUSTER + 2]
        with pytest.raises(FsError) as caught:
            await awaited(disk.read, CLUSTER + 1, 2)
        assert caught.value.errno == errno.EIO
        assert status.health.broken is None


async def test_what_is_trimmed_of_a_server_that_cannot_is_only_not_read(tmp_path: Path) -> None:
    async with nbdkit(tmp_path, ["-r", "pattern", "1M"]) as server, opened(server.uri, MIB) as (disk, _):
        assert not disk.can_trim
        await disk.trim(0, MIB - 8)
        with pytest.raises(FsError) as caught:
            await awaited(disk.read, MIB - 16, 16)
        assert caught.value.errno == errno.EIO
        assert int.from_bytes(await awaited(disk.read, MIB - 8, 8)) == MIB - 8


async def test_a_trim_that_fails_is_an_error(tmp_path: Path) -> None:
    failing = ["--filter=error", "memory", "1M", "error-trim=ENOSPC", "error-trim-rate=100%"]
    async with nbdkit(tmp_path, failing) as server, opened(server.uri, MIB) as (disk, counters):
        with pytest.raises(FsError) as caught:
            await disk.trim(0, MIB)
        assert caught.value.errno == errno.EIO
        assert counters.trimmed == 0


async def test_the_dirty_map_comes_with_the_disk(qemu: Qemu, tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    await run_img(qemu, "create", "-q", "-f", "qcow2", image, "4M")
    await run_img(qemu, "bitmap", "--add", image, "changed")
    await trio.run_process(["qemu-io", "-c", "write -P 7 1M 64k", str(image)], capture_stdout=True)
    async with qemu_nbd(qemu, tmp_path, image, image_format="qcow2", options=["-B", "changed"]) as server:
        async with opened(server.uri, 4 * MIB, context="qemu:dirty-bitmap:changed") as (disk, counters):
            assert list(disk.dirty) == list(disk.data) == [(MIB, MIB + CLUSTER)]
            assert counters.dirty == CLUSTER
            assert await all_of(disk, MIB) == bytes(MIB) + b"\7" * CLUSTER + bytes(3 * MIB - CLUSTER)
        with pytest.raises(UserError, match="qemu:dirty-bitmap:other"):
            async with opened(server.uri, 4 * MIB, context="qemu:dirty-bitmap:other"):
                pytest.fail("opened")


@pytest.mark.parametrize("kind", ["qemu-nbd", "nbdkit"])
async def test_tls(qemu: Qemu, tmp_path: Path, kind: str) -> None:
    certificates = make_certificates(tmp_path / "pki")
    image = tmp_path / "disk.raw"
    image.write_bytes(CONTENT)
    server = (
        qemu_nbd(qemu, tmp_path, image, tcp=True, certificates=certificates)
        if kind == "qemu-nbd"
        else nbdkit(tmp_path, ["file", image], tcp=True, certificates=certificates)
    )
    async with server as running:
        async with opened(running.uri, len(CONTENT)) as (disk, _):
            assert await all_of(disk, MIB) == CONTENT
        with pytest.raises(UserError, match="TLS"):
            async with opened(f"nbd://localhost:{running.port}/", len(CONTENT)):
                pytest.fail("opened")


async def test_a_limited_disk_is_read_at_its_pace(tmp_path: Path) -> None:
    async with nbdkit(tmp_path, ["pattern", "4M"]) as server:
        start = trio.current_time()
        async with opened(server.uri, 4 * MIB, bwlimit=16 * MIB) as (disk, counters):
            assert len(await all_of(disk, MIB)) == 4 * MIB
            # The first request goes at once, so there is a lower bound, which a slow machine cannot break.
            assert trio.current_time() - start >= (4 * MIB - MIB) / (16 * MIB) - 0.1
            assert counters.nbd_bytes == 4 * MIB
        async with opened(server.uri, 4 * MIB, bwlimit=1) as (disk, _):
            with trio.move_on_after(0.05):
                await awaited(disk.read, 0, MIB)
                pytest.fail("a byte a second is not a MiB in 50 ms")


async def test_no_two_requests_of_a_disk_overlap(tmp_path: Path) -> None:
    """By the record of the server: nbdkit's log filter says when a read begins and ends."""
    log = tmp_path / "requests.log"
    chance = random.Random(5)
    arguments = ["--filter=log", "--filter=delay", "pattern", "8M", "delay-read=2ms", f"logfile={log}"]
    async with nbdkit(tmp_path, arguments) as server, opened(server.uri, 8 * MIB) as (disk, _):

        async def reader() -> None:
            position = chance.randrange(4 * MIB)
            for _ in range(30):
                length = chance.choice([4096, 65536, 300_000])
                await awaited(disk.read, position, length)
                position = position + length if chance.random() < 0.8 else chance.randrange(4 * MIB)
                position %= 7 * MIB

        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(reader)
    in_flight: dict[str, tuple[int, int]] = {}
    most = 0
    for line in log.read_text().splitlines():
        begun = re.search(r"(connection=\d+) Read id=(\d+) offset=(0x[0-9a-f]+) count=(0x[0-9a-f]+)", line)
        ended = re.search(r"(connection=\d+) \.\.\.Read id=(\d+)", line)
        if begun:
            start, length = int(begun[3], 16), int(begun[4], 16)
            for other, (low, high) in in_flight.items():
                assert start + length <= low or high <= start, f"{line} while {other} was in flight"
            in_flight[f"{begun[1]} {begun[2]}"] = start, start + length
            most = max(most, len(in_flight))
        elif ended:
            del in_flight[f"{ended[1]} {ended[2]}"]
    assert most > 1, "nothing was in flight at once"
