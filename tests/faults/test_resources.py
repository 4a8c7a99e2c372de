# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a mount takes while it lives, and that it leaves nothing behind, however often it is made.

ROUNDS says how many times a VM is mounted and unmounted; 200 is what a release is tested with.
"""

import json
import os
import re
from pathlib import Path

import pytest
import trio

from tests.e2e.support import idle_vm, left_as_it_was, runtime_folder
from tests.faults.support import ended, mounter, reads, unmounted
from tests.harness.disk import MIB, Disk
from tests.harness.mount import aside, mounted
from tests.harness.nbd_server import nbdkit
from tests.harness.qemu import Qemu
from tests.harness.vm import running_vm
from tests.vm.support import make_source

pytestmark = pytest.mark.one_qemu

ROUNDS = int(os.environ.get("ROUNDS", "10"))
TIB = 1 << 40
PIECE = 16 * MIB
MEMORY = 128 * MIB  # above start


def memory(pid: int, field: str) -> int:
    """A field of proc(5), status; in bytes."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def descriptors(pid: int) -> int:
    """How many it has open."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def threads(pid: int) -> int:
    """How many it has."""
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


async def read_some(path: Path, place: int, length: int) -> None:
    """Sequentially, from there on."""

    def read() -> None:
        with path.open("rb", buffering=0) as file:
            file.seek(place)
            left = length
            while left > 0 and (data := file.read(min(MIB, left))):
                left -= len(data)

    await aside(read)


async def test_eight_large_disks_read_at_once_take_little_memory(qemu: Qemu, tmp_path: Path) -> None:
    """Each is 1 TiB, with data at both ends; two readers a disk."""
    places = (0, TIB - PIECE)
    disks = [Disk(f"vd{number}", tmp_path / f"vd{number}.raw", TIB) for number in range(8)]
    for disk in disks:
        await disk.create(qemu)
        with (tmp_path / f"{disk.id}.raw").open("r+b") as file:
            for place in places:
                file.seek(place)
                file.write(b"1" * PIECE)
    async with (
        running_vm(qemu, tmp_path, disks) as vm,
        mounted(vm.qmp, tmp_path / "mnt", f"fleece={tmp_path}") as mount,
    ):
        worker = await mount.worker()
        start = memory(worker, "VmRSS")
        async with trio.open_nursery() as nursery:
            for disk in disks:
                for place in places:
                    nursery.start_soon(read_some, mount.image(disk.id), place, PIECE)
        peak = memory(worker, "VmHWM")
        print(f"at start {start >> 20} MiB, at most {peak >> 20} MiB")
        assert peak - start < MEMORY
        status = await mount.status()
        assert all(disk["nbd_bytes"] >= 2 * PIECE for disk in status["disks"].values())


async def test_a_mount_is_made_and_undone_again_and_again(qemu: Qemu, tmp_path: Path) -> None:
    """Nothing piles up in QEMU or in /run."""
    mountpoint, seen = tmp_path / "mnt", list[int]()
    async with idle_vm(qemu, tmp_path) as vm, mounter(mountpoint) as mounting, left_as_it_was(vm):
        for _ in range(ROUNDS):
            assert await mounting.mount(vm.qmp, mountpoint, f"fleece={tmp_path}") is None
            status = json.loads(await aside((mountpoint / ".qfsbackup/status.json").read_bytes))
            folder = runtime_folder(vm)
            await reads(mountpoint / "images/vda.raw")
            async with ended([status["pid"], status["ppid"]]):
                await unmounted(mountpoint)
            assert not folder.exists()
            seen.append(descriptors(vm.pid))
        assert len(set(seen[1:])) == 1, seen


async def test_a_process_that_takes_snapshots_again_and_again_does_not_grow(qemu: Qemu, tmp_path: Path) -> None:
    """The worker's own descriptors, threads and tasks: here in this process, which takes them one after the other."""
    async with idle_vm(qemu, tmp_path) as vm:
        seen = []
        for _ in range(ROUNDS):
            async with make_source(vm, tmp_path).snapshot():
                pass
            tasks = trio.lowlevel.current_statistics().tasks_living
            seen.append((descriptors(os.getpid()), threads(os.getpid()), tasks))
        assert all(last <= first for first, last in zip(seen[0], seen[-1], strict=True)), seen


async def test_slow_reads_hold_up_neither_the_status_nor_each_other(tmp_path: Path) -> None:
    """Each read takes ten seconds; the status and what is known to be zero come at once."""
    async with (
        nbdkit(tmp_path, ["--filter=delay", "data", "size=64M", "data=1 @33554432 2", "delay-read=10"]) as server,
        mounted(server.uri, tmp_path / "mnt") as mount,
    ):
        [image] = await aside(lambda: list((mount.path / "images").iterdir()))
        async with trio.open_nursery() as nursery:
            for place in range(8):
                nursery.start_soon(read_some, image, place * 4096, 4096)

            with trio.fail_after(5):
                for _ in range(20):
                    assert (await mount.status())["state"] == "ready"
                await read_some(image, 48 * MIB, MIB)  # zeros
            nursery.cancel_scope.cancel()


async def test_a_reader_that_stops_does_not_stop_the_others(qemu: Qemu, tmp_path: Path) -> None:
    async with idle_vm(qemu, tmp_path) as vm, mounted(vm.qmp, tmp_path / "mnt", f"fleece={tmp_path}") as mount:
        lazy = [(await aside(mount.image(disk.id).open, "rb", 0)) for disk in vm.disks for _ in range(8)]
        for file in lazy:
            await aside(file.read, 4096)  # and no more
        for disk in vm.disks:
            assert len(await reads(mount.image(disk.id))) == disk.size
        for file in lazy:
            await aside(file.close)
