# SPDX-License-Identifier: LGPL-2.1-or-later
"""`chunks:FOLDER` while something happens to the folder: it is changed, covered, or its file system hangs."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from qfsbackup.backup.names import chunk_path
from qfsbackup.contracts import Disk, awaited
from qfsbackup.errors import FsError
from qfsbackup.sources import chunks as kind
from tests.faults.stores import HangingStore, hanging_store
from tests.faults.support import ended, until
from tests.harness.chunk_set import CHUNK
from tests.harness.mount import aside, ending, is_mounted, mounted, qfsbackup
from tests.sources.support import snapshot_of


def changed(path: Path) -> None:
    path.write_bytes(bytes(CHUNK))


def replaced(path: Path) -> None:
    path.with_name("new").write_bytes(bytes(CHUNK))
    path.with_name("new").rename(path)


def shortened(path: Path) -> None:
    time = path.stat().st_mtime_ns
    os.truncate(path, CHUNK // 2)
    os.utime(path, ns=(time, time))


@pytest.mark.parametrize("change", [changed, replaced, shortened, Path.unlink])
async def test_a_chunk_that_is_changed_meanwhile_breaks_the_mount(chunks: Path, change: Callable[[Path], None]) -> None:
    async with snapshot_of(chunks) as (_, disks, status):
        change(chunks / chunk_path(2))
        with pytest.raises(FsError):
            await awaited(disks["vda"].read, 2 * CHUNK + 512, 512)
        assert chunk_path(2) in (status.health.broken or "")


@pytest.mark.parametrize("change", [changed, shortened])
async def test_so_does_one_that_is_open(chunks: Path, change: Callable[[Path], None]) -> None:
    async with snapshot_of(chunks) as (_, disks, status):
        await awaited(disks["vda"].read, 2 * CHUNK + 512, 512)
        change(chunks / chunk_path(2))
        with pytest.raises(FsError):
            await awaited(disks["vda"].read, 2 * CHUNK + 512, 512)
        assert chunk_path(2) in (status.health.broken or "")


async def test_what_is_in_the_page_cache_is_answered_at_once(chunks: Path, tmp_path: Path) -> None:
    if not has_nowait(chunks / chunk_path(2)):
        pytest.skip("not with this file system: tmpfs, FUSE and NFS cannot tell")
    answers: list[object] = []
    async with snapshot_of(chunks) as (_, disks, _status):
        first = await awaited(disks["vda"].read, 2 * CHUNK, CHUNK)
        disks["vda"].read(2 * CHUNK, CHUNK, answers.append)
        assert answers == [first]
        assert first == (tmp_path / "expected").read_bytes()[2 * CHUNK : 3 * CHUNK]


def has_nowait(path: Path) -> bool:
    """Can the file system read what is in the page cache and nothing else."""
    with path.open("rb") as file:
        try:
            return os.preadv(file.fileno(), [bytearray(512)], 0, os.RWF_NOWAIT) > 0
        except OSError:
            return False


async def test_a_mount_of_a_changed_backup_gives_eio_and_ends_with_2(chunks: Path, tmp_path: Path) -> None:
    async with mounted(f"chunks:{chunks}", tmp_path / "mnt", expected=(2,)) as mount:
        assert await aside(mount.image("vda").read_bytes) == (tmp_path / "expected").read_bytes()
        described = await mount.json("vm.json")
        assert [disk["name"] for disk in described["disks"]] == ["vda"]
        assert await mount.json("config/vm.json") == json.loads((tmp_path / "vm.json").read_bytes())
        changed(chunks / chunk_path(0))  # which nobody asks for any more: a last look finds it
        assert (await qfsbackup("umount", mount.path)).code == 2
        assert await mount.process.wait() == 2


async def test_a_folder_below_the_mountpoint_is_still_the_backup(chunks: Path, tmp_path: Path) -> None:
    """The mount covers what it reads."""
    async with mounted(f"chunks:{chunks}", chunks.parent) as mount:
        assert await aside(mount.image("vda").read_bytes) == (tmp_path / "expected").read_bytes()


async def test_what_mounted_the_backup_dies_and_the_mount_breaks(chunks: Path, tmp_path: Path) -> None:
    """Here it is another mount of ours."""
    async with (
        mounted(f"chunks:{chunks}", tmp_path / "below", expected=(137,)) as below,
        snapshot_of(below.path) as (_, disks, status),
    ):
        assert await awaited(disks["vda"].read, 0, 512) == (tmp_path / "expected").read_bytes()[:512]
        worker = await below.worker()
        async with ending(worker):
            os.kill(worker, signal.SIGKILL)
        with pytest.raises(FsError):
            await disks["vda"].probe()
        assert status.health.broken


async def test_reads_that_are_under_way_at_the_end_break_nothing(chunks: Path) -> None:
    answers: list[object] = []
    async with snapshot_of(chunks) as (_, disks, status):
        for number in range(60):
            disks["vda"].read(2 * CHUNK + number * 512, 512, answers.append)
    assert len(answers) == 60
    assert not status.health.broken


async def test_a_folder_that_hangs_is_told_in_time_and_answers_again(
    chunks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kind, "READING", 0.5)
    async with hanging_store(tmp_path) as store:
        await aside(shutil.copytree, chunks, store.path / "chunks" / "vda")
        async with snapshot_of(store.path) as (_, disks, status):
            disk, refused = disks["vda"], []
            await awaited(disk.read, 0, 512)
            await stopped(store)

            async def read(number: int) -> None:
                with pytest.raises(FsError) as caught:
                    await awaited(disk.read, 2 * CHUNK + number * 512, 512)
                refused.append(caught.value)

            with trio.fail_after(10):
                async with trio.open_nursery() as readers:
                    for number in range(40):  # more than there are threads
                        readers.start_soon(read, number)
            assert len(refused) == 40
            assert not status.health.broken
            store.go_on()
            with trio.fail_after(10):
                await disk_answers(disk)


async def stopped(store: HangingStore) -> None:
    """Have it hang, in all of its threads."""
    store.stop()

    async def is_stopped() -> bool:
        return await aside(stand_still, store.pid)

    await until(is_stopped)


def stand_still(pid: int) -> bool:
    """Do all threads of the process (proc(5), status)."""
    return all("\nState:\tT" in (task / "status").read_text() for task in Path(f"/proc/{pid}/task").iterdir())


async def disk_answers(disk: Disk) -> None:
    """Its threads come back, one after the other."""
    while True:
        try:
            await awaited(disk.read, 2 * CHUNK, 512)
        except FsError:
            continue
        else:
            return


async def test_a_mount_of_a_folder_that_hangs_ends_with_a_reader_in_flight(chunks: Path, tmp_path: Path) -> None:
    async with hanging_store(tmp_path) as store:
        await aside(shutil.copytree, chunks, store.path / "chunks" / "vda")
        async with mounted(f"chunks:{store.path}", tmp_path / "mnt", expected=(0, 2)) as mount:
            worker, reading = await mount.worker(), trio.Event()
            await stopped(store)

            def read() -> str:
                with mount.image("vda").open("rb") as file:
                    trio.from_thread.run_sync(reading.set)
                    try:
                        file.read(512)
                    except OSError as error:
                        return str(error)
                return ""

            async with trio.open_nursery() as nursery:
                nursery.start_soon(aside, read)
                await reading.wait()
                async with ended([worker], timeout=30):
                    mount.process.terminate()
            assert not is_mounted(mount.path)
