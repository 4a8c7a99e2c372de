# SPDX-License-Identifier: LGPL-2.1-or-later
"""A disk whose server fails, hangs or goes: who gets an error, and when the snapshot counts as broken."""

import errno
from pathlib import Path

import pytest
import trio
import trio.testing

from qfsbackup.contracts import awaited
from qfsbackup.errors import FsError
from qfsbackup.health import Health
from qfsbackup.status import Status
from tests.harness.disk import MIB
from tests.harness.nbd_server import nbdkit
from tests.nbd.disks import CONTENT, half_broken, opened


async def test_an_error_meets_only_who_reads_that_range(tmp_path: Path) -> None:
    status = Status()
    async with half_broken(tmp_path, "EIO") as server, opened(server.uri, len(CONTENT), status) as (disk, _):
        for offset in range(0, len(CONTENT), MIB // 4):
            if MIB <= offset < 2 * MIB:
                with pytest.raises(FsError) as caught:
                    await awaited(disk.read, offset, MIB // 4)
                assert caught.value.errno == errno.EIO
            else:
                assert await awaited(disk.read, offset, MIB // 4) == CONTENT[offset : offset + MIB // 4]
        assert status.health.broken is None


async def test_a_refused_read_breaks_the_snapshot(tmp_path: Path) -> None:
    status = Status()
    async with half_broken(tmp_path, "EINVAL") as server, opened(server.uri, len(CONTENT), status) as (disk, _):
        assert await awaited(disk.read, 0, 4096) == CONTENT[:4096]
        with pytest.raises(FsError):
            await awaited(disk.read, MIB, 4096)
        assert status.health.broken


async def test_a_killed_server_fails_waiting_and_later_reads(tmp_path: Path) -> None:
    status = Status()
    slow = ["--filter=delay", "pattern", "64M", "delay-read=60"]
    async with nbdkit(tmp_path, slow) as server, opened(server.uri, 64 * MIB, status) as (disk, counters):
        failed: list[int] = []

        async def wait_for(offset: int) -> None:
            with pytest.raises(FsError) as caught:
                await awaited(disk.read, offset, MIB)
            failed.append(caught.value.errno)

        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                for number in range(40):  # more than go out at once
                    nursery.start_soon(wait_for, number * MIB)
                await trio.testing.wait_all_tasks_blocked()
                assert counters.nbd_requests
                server.process.kill()
            assert failed == [errno.EIO] * 40
            assert "lost" in (status.health.broken or "")
            with pytest.raises(FsError):
                await awaited(disk.read, 0, 512)


async def test_an_idle_disk_notices_that_the_server_is_gone(tmp_path: Path) -> None:
    gone = trio.Event()

    class Watched(Health):
        def mark_broken(self, reason: str) -> None:
            super().mark_broken(reason)
            gone.set()

    status = Status(health=Watched())
    async with nbdkit(tmp_path, ["null", "1M"]) as server, opened(server.uri, MIB, status):
        server.process.kill()
        with trio.fail_after(5):
            await gone.wait()
        assert "lost" in (status.health.broken or "")


async def test_a_cancelled_read_leaves_the_others_alone(tmp_path: Path) -> None:
    slow = ["--filter=delay", "pattern", "64M", "delay-read=200ms"]
    async with nbdkit(tmp_path, slow) as server, opened(server.uri, 64 * MIB) as (disk, _):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(awaited, disk.read, 0, MIB)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        found = bytes(await awaited(disk.read, 0, MIB))
        assert found[MIB // 2 : MIB // 2 + 8] == (MIB // 2).to_bytes(8, "big")


async def test_closing_does_not_wait_for_a_server_that_hangs(tmp_path: Path) -> None:
    slow = ["--filter=delay", "pattern", "64M", "delay-read=60"]
    status = Status()
    async with nbdkit(tmp_path, slow) as server:
        with trio.fail_after(10):
            async with opened(server.uri, 64 * MIB, status) as (disk, _), trio.open_nursery() as nursery:
                nursery.start_soon(awaited, disk.read, 0, MIB)
                await trio.testing.wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
        assert status.health.broken is None, "closing is no loss"
        server.process.kill()
