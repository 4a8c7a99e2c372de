# SPDX-License-Identifier: LGPL-2.1-or-later
"""The place where old data goes fails: the guest's writes go on, the snapshot is broken, and everybody is told.

See stores.py. An ext4 also stands still (fsfreeze).
"""

import contextlib
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from qfsbackup.vm.quirks import CBW_TIMEOUT, cbw_timeout
from tests.e2e.support import left_as_it_was
from tests.faults.stores import brittle_store, small_store
from tests.faults.support import nothing_of_ours, reads, said, unmounted, until, until_eio
from tests.harness.disk import MIB, Disk
from tests.harness.files import make_random
from tests.harness.mount import PROGRAM, Mount, aside, command, mounted, qfsbackup, taken_away
from tests.harness.process import running
from tests.harness.qemu import Qemu
from tests.harness.vm import Vm, running_vm
from tests.vm.support import guest_io

SIZE = 8 * MIB


@contextlib.asynccontextmanager
async def writing_vm(qemu: Qemu, folder: Path) -> AsyncIterator[Vm]:
    """A VM whose CPUs run a BIOS, with a disk full of data."""
    disks = [Disk("vda", make_random(folder / "vda.raw", SIZE)), Disk("vdb", make_random(folder / "vdb.raw", MIB))]
    async with running_vm(qemu, folder, disks) as vm:
        await vm.monitor.execute("cont")
        yield vm


async def overwrite(vm: Vm) -> None:
    """The guest overwrites most of its disk, and reads back what it has written."""
    await guest_io(vm, "vda", f"write -P 5 0 {SIZE - MIB}")
    await guest_io(vm, "vda", f"read -P 5 0 {SIZE - MIB}")


async def fill(vm: Vm, _: Path) -> None:
    await overwrite(vm)


async def lose_what_was_written(vm: Vm, folder: Path) -> None:
    """The writes end in the page cache, and fail when they should go to the disk."""
    await overwrite(vm)
    (folder / "trigger").touch()
    await command("sync", "-f", folder / "fleece")


@dataclass(frozen=True)
class Failure:
    """A store, what makes it fail, and why the snapshot is then said to be broken."""

    store: Callable[[Path], contextlib.AbstractAsyncContextManager[Path]]
    happen: Callable[[Vm, Path], Awaitable[None]]
    words: str
    options: str = ""


FAILURES = {
    "it is full": Failure(small_store, fill, "refuses to read"),
    "it is over the limit": Failure(brittle_store, fill, "over fleece-limit=1048576", ",fleece-limit=1M"),
    "it loses what was written": Failure(brittle_store, lose_what_was_written, "could not be stored"),
}


async def is_broken(mount: Mount) -> bool:
    """By what its status says."""
    return bool((await mount.status())["state"] == "broken")


@pytest.mark.parametrize("name", FAILURES)
async def test_a_store_that_fails_breaks_the_snapshot_and_not_the_guest(qemu: Qemu, tmp_path: Path, name: str) -> None:
    failure = FAILURES[name]
    async with failure.store(tmp_path) as fleece, writing_vm(qemu, tmp_path) as vm, left_as_it_was(vm):
        options = f"fleece={fleece},target=nas,state={tmp_path}{failure.options}"
        async with mounted(vm.qmp, tmp_path / "mnt", options, expected=(2,)) as mount:
            await failure.happen(vm, tmp_path)
            await until(lambda: is_broken(mount))  # although nobody reads
            for disk in vm.disks:
                await until_eio(mount.image(disk.id))
            (await qfsbackup("commit", mount.path)).refused(2, "not committed")
            assert failure.words in (await mount.status())["broken"]
            await guest_io(vm, "vda", "write -P 6 0 1M")
            await unmounted(mount.path)
            assert await mount.process.wait() == 2
            assert "the snapshot is broken" in mount.process.log
        await nothing_of_ours(vm)
        assert (await qfsbackup("checkpoints", vm.qmp, "-o", f"state={tmp_path}")).stdout.count("nas") == 0


async def test_run_does_not_commit_what_broke_after_it_was_read(qemu: Qemu, tmp_path: Path) -> None:
    fifo, mountpoint = tmp_path / "fifo", tmp_path / "mnt"
    os.mkfifo(fifo)
    mountpoint.mkdir()
    async with small_store(tmp_path) as fleece, writing_vm(qemu, tmp_path) as vm, left_as_it_was(vm):
        options = f"fleece={fleece},target=nas,state={tmp_path}"
        script = f"cat images/* > /dev/null && echo read > {fifo} && read line < {fifo}"
        line: list[str | Path] = [PROGRAM, "run", vm.qmp, "-o", options, "--mountpoint", mountpoint, "--", "sh", "-c"]
        async with taken_away(mountpoint), running([*line, script], tmp_path / "run.log", expected=[125]) as process:
            assert await said(fifo) == "read\n"
            await overwrite(vm)
            await aside(fifo.write_text, "go on\n")
            assert await process.wait() == 125
            assert "not committed: the snapshot is broken" in process.log


async def test_a_store_that_stands_still_holds_up_a_write_no_longer_than_promised(qemu: Qemu, tmp_path: Path) -> None:
    """QEMU before 9.1 gives up after 4 s; newer ones wait 45 s, so here the store comes back before that."""
    impatient = cbw_timeout(qemu.version) < CBW_TIMEOUT
    async with brittle_store(tmp_path) as fleece, writing_vm(qemu, tmp_path) as vm, left_as_it_was(vm):
        options = f"fleece={fleece}"
        async with mounted(vm.qmp, tmp_path / "mnt", options, expected=(2 if impatient else 0,)) as mount:
            content = await reads(mount.image("vda"))
            assert (await command("fsfreeze", "-f", fleece)).code == 0
            try:
                async with trio.open_nursery() as nursery:
                    started = time.monotonic()
                    nursery.start_soon(guest_io, vm, "vda", "write -P 5 0 64k")
                    assert not await is_broken(mount)  # the status answers
                    if not impatient:
                        await command("fsfreeze", "-u", fleece)
                stalled = time.monotonic() - started
            finally:
                with trio.CancelScope(shield=True):
                    await command("fsfreeze", "-u", fleece)
            assert stalled < 15, stalled  # 4 s, and what a busy machine adds
            if impatient:
                await until(lambda: is_broken(mount))
                await until_eio(mount.image("vda"))
            else:
                assert await reads(mount.image("vda")) == content
            await unmounted(mount.path)
            await mount.process.wait()
        await nothing_of_ours(vm)


async def test_a_store_that_fills_up_is_announced(qemu: Qemu, tmp_path: Path) -> None:
    async with writing_vm(qemu, tmp_path) as vm, left_as_it_was(vm):
        options = f"fleece={tmp_path},fleece-limit=4M"
        async with mounted(vm.qmp, tmp_path / "mnt", options) as mount:
            assert (await mount.status())["fleecing"]["warning"] is False
            await guest_io(vm, "vda", "write -P 5 0 3500k")

            async def warned() -> bool:
                return bool((await mount.status())["fleecing"]["warning"])

            await until(warned)
            fleecing = (await mount.status())["fleecing"]
            assert fleecing["full_in_s"] is not None
            assert "of 4194304 bytes; at this rate they are full in" in mount.process.log
            assert not await is_broken(mount)
