# SPDX-License-Identifier: LGPL-2.1-or-later
"""What broke in the last moment of a mount is in its exit status, with and without a target, however it ends."""

import os
from pathlib import Path

import pytest
import trio

from tests.e2e.support import idle_vm, left_as_it_was
from tests.faults.stores import brittle_store
from tests.faults.support import said, unmounted
from tests.harness.mount import PROGRAM, Mount, aside, command, mounted, qfsbackup, taken_away
from tests.harness.process import running
from tests.harness.qemu import Qemu
from tests.vm.support import guest_io

pytestmark = pytest.mark.one_qemu


async def lose(folder: Path) -> None:
    """What the guest has pushed out should go to the disk, and fails."""
    (folder / "trigger").touch()
    await command("sync", "-f", folder / "fleece")


async def end(mount: Mount, way: str) -> None:
    if way == "umount(8)":
        await unmounted(mount.path)
    elif way == "SIGTERM":
        mount.process.terminate()
    else:
        (await qfsbackup("umount", mount.path)).refused(2, "the snapshot was broken", "could not be stored")


@pytest.mark.parametrize("way", ["umount(8)", "SIGTERM", "umount"])
async def test_the_exit_status_says_what_broke_last(qemu: Qemu, tmp_path: Path, way: str) -> None:
    async with (
        brittle_store(tmp_path) as fleece,
        idle_vm(qemu, tmp_path) as vm,
        left_as_it_was(vm),
        mounted(vm.qmp, tmp_path / "mnt", f"fleece={fleece}", expected=(2,)) as mount,
    ):
        await guest_io(vm, "vda", "write -P 5 0 256k")
        await mount.fresh_status()  # so that the next look is not just now
        await lose(tmp_path)
        await end(mount, way)
        with trio.fail_after(30):
            assert await mount.process.wait() == 2
        assert "could not be stored" in mount.process.log


async def test_run_says_it_too(qemu: Qemu, tmp_path: Path) -> None:
    fifo, mountpoint = tmp_path / "fifo", tmp_path / "mnt"
    os.mkfifo(fifo)
    mountpoint.mkdir()
    async with brittle_store(tmp_path) as fleece, idle_vm(qemu, tmp_path) as vm, left_as_it_was(vm):
        script = f"echo there > {fifo}; read line < {fifo}; touch {tmp_path}/trigger; sync -f {fleece}; true"
        line: list[str | Path] = [PROGRAM, "run", vm.qmp, "-o", f"fleece={fleece}", "--mountpoint", mountpoint]
        line += ["--", "sh", "-c", script]
        async with taken_away(mountpoint), running(line, tmp_path / "run.log", expected=[125]) as process:
            assert await said(fifo) == "there\n"
            await guest_io(vm, "vda", "write -P 5 0 256k")
            await aside(fifo.write_text, "go on\n")
            assert await process.wait() == 125
            assert "the snapshot broke while the command ran" in process.log
