# SPDX-License-Identifier: LGPL-2.1-or-later
"""Somebody else's job uses our filter when we leave: what is left is said, and taken out once the job is over."""

import contextlib
import os
import re
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from tests.e2e.support import idle_vm, left_as_it_was
from tests.faults.support import ended, nothing_of_ours, said
from tests.harness.mount import aside, command, is_mounted, mounting, qfsbackup
from tests.harness.qemu import Qemu
from tests.harness.qmp_proxy import running_proxy
from tests.harness.vm import Vm
from tests.vm.support import guest_io, make_source

# The real command, with less patience between two tries.
PROGRAM = [
    sys.executable,
    "-c",
    "import qfsbackup.mount.rescue as m, sys; m.PAUSE = 0.2; m.LONGEST_PAUSE = 0.5;"
    " from qfsbackup.cli.main import main; sys.exit(main())",
]
LEFT = "qfsbackup-filter-0 (used by block job theirs)"


async def begin_backup(vm: Vm) -> None:
    """Of the node that the guest's device is attached to: our filter."""
    run = vm.monitor.execute
    await run("blockdev-add", {"driver": "null-co", "node-name": "target", "size": 4 << 20, "read-zeroes": True})
    await run("blockdev-backup", job_id="theirs", device="qfsbackup-filter-0", target="target", sync="none")


async def end_backup(vm: Vm) -> None:
    await vm.monitor.execute("block-job-cancel", device="theirs", force=True)
    await vm.monitor.event("BLOCK_JOB_CANCELLED", device="theirs")
    await vm.monitor.execute("blockdev-del", {"node-name": "target"})


def supervisor(text: str) -> int:
    """The process that goes on trying."""
    match = re.search(r"Process (\d+) takes it out as soon as it can", text)
    assert match, text
    return int(match[1])


@contextlib.asynccontextmanager
async def then_taken_out(vm: Vm, pids: list[int]) -> AsyncIterator[None]:
    """After the block, in which the guest goes on, the job ends, and these processes do when all is as it was."""
    yield
    await guest_io(vm, "vda", "write -P 9 0 64k")
    async with ended(pids):
        await end_backup(vm)
    await nothing_of_ours(vm)


async def test_unmount_says_what_is_left_and_the_supervisor_takes_it_out(qemu: Qemu, tmp_path: Path) -> None:
    directory = tmp_path / "mnt"
    line = [*PROGRAM, "mount", "--foreground", "-v", "VM", str(directory), "-o", f"fleece={tmp_path}"]
    async with idle_vm(qemu, tmp_path) as vm, left_as_it_was(vm):
        line[line.index("VM")] = str(vm.qmp)
        async with mounting(line, directory, expected=[2]) as process:
            await begin_backup(vm)
            async with then_taken_out(vm, [process.pid]):
                done = await qfsbackup("umount", directory)
                done.refused(2, "unmounted", LEFT)
                assert supervisor(done.stderr) == process.pid
                assert not is_mounted(directory)
                assert process.returncode is None
            assert "QEMU is as it was" in process.log
            assert process.returncode == 2
        again = await qfsbackup("cleanup", vm.qmp)
        assert (again.code, again.stderr) == (0, "")


@pytest.mark.one_qemu
async def test_sigterm_ends_the_trying_and_cleanup_does_the_rest(qemu: Qemu, tmp_path: Path) -> None:
    directory = tmp_path / "mnt"
    async with idle_vm(qemu, tmp_path) as vm, left_as_it_was(vm):
        line = [*PROGRAM, "mount", "--foreground", str(vm.qmp), str(directory), "-o", f"fleece={tmp_path}"]
        async with mounting(line, directory, expected=[2]) as process:
            await begin_backup(vm)
            (await qfsbackup("umount", directory)).refused(2, LEFT)
            async with ended([process.pid]):
                process.terminate()
            assert f"giving up; then: qfsbackup cleanup {vm.qmp}" in process.log
        done = await qfsbackup("cleanup", vm.qmp)
        assert done.code == 32
        assert LEFT in done.stderr.splitlines()[-2]
        await end_backup(vm)
        assert (await qfsbackup("cleanup", vm.qmp)).code == 0


async def test_a_bitmap_that_somebody_uses_is_not_left_for_ever(qemu: Qemu, tmp_path: Path) -> None:
    """He exports the new bitmap of a mount that is not committed."""
    directory, options = tmp_path / "mnt", f"fleece={tmp_path},target=nas,state={tmp_path}"
    async with idle_vm(qemu, tmp_path) as vm:
        line = [*PROGRAM, "mount", "--foreground", str(vm.qmp), str(directory), "-o", options]
        run = vm.monitor.execute
        async with mounting(line, directory, expected=[2]) as process:
            nodes = {node["node-name"]: node for node in await run("query-named-block-nodes", flat=True)}
            bitmaps = [bitmap["name"] for bitmap in nodes["vdb-node"]["dirty-bitmaps"] if bitmap["recording"]]
            bitmap = {"node": "vdb-node", "name": next(name for name in bitmaps if name.startswith("qfsbackup-"))}
            theirs = {"type": "nbd", "id": "theirs", "node-name": "vdb-node", "bitmaps": [bitmap]}
            await run("block-export-add", theirs)
            done = await qfsbackup("umount", directory)
            done.refused(2, "uncommitted bitmaps")
            async with ended([process.pid]):
                await run("block-export-del", id="theirs", mode="hard")
            await nothing_of_ours(vm)


@pytest.mark.one_qemu
async def test_run_says_what_is_left_and_does_not_wait(qemu: Qemu, tmp_path: Path) -> None:
    directory, fifo = tmp_path / "mnt", tmp_path / "fifo"
    directory.mkdir()
    os.mkfifo(fifo)
    async with idle_vm(qemu, tmp_path) as vm, left_as_it_was(vm):
        shell = f"echo here > {fifo}; read go < {fifo}"
        line = [*PROGRAM, "run", str(vm.qmp), "-o", f"fleece={tmp_path}", "--mountpoint", str(directory)]
        async with trio.open_nursery() as nursery:

            async def begin() -> None:
                assert await said(fifo) == "here\n"
                await begin_backup(vm)
                await aside(fifo.write_text, "go\n")

            nursery.start_soon(begin)
            done = await command(*line, "--", "sh", "-c", shell)
        assert done.code == 125
        assert LEFT in done.stderr
        async with then_taken_out(vm, [supervisor(done.stderr)]):
            pass


async def test_a_mount_that_fails_half_way_says_what_is_left(qemu: Qemu, tmp_path: Path) -> None:
    """The job begins on the filter of the first disk, while the second one gets its own."""
    directory, begun = tmp_path / "mnt", False

    async def begin(name: str, arguments: dict[str, object]) -> None:
        nonlocal begun
        if name == "qom-set" and arguments["value"] == "qfsbackup-filter-1" and not begun:
            begun = True
            await begin_backup(vm)

    async with (
        idle_vm(qemu, tmp_path) as vm,
        left_as_it_was(vm),
        running_proxy(vm.qmp, tmp_path / "proxy", begin) as proxy,
    ):
        directory.mkdir()
        done = await command(*PROGRAM, "mount", proxy.path, directory, "-o", f"fleece={tmp_path}")
        assert done.code == 32
        what, hint = done.stderr.splitlines()[-2:]
        assert "somebody is at work on disk vda" in what
        assert hint.startswith(f"Left in the VM: {LEFT}")
        async with then_taken_out(vm, [supervisor(hint)]):
            pass


async def test_the_source_knows_what_is_left(paused_vm: Vm, tmp_path: Path) -> None:
    source = make_source(paused_vm, tmp_path)
    async with source.snapshot():
        await paused_vm.monitor.execute(
            "blockdev-add", {"driver": "raw", "node-name": "t", "file": "qfsbackup-access-0"}
        )
    assert source.status.unrestored
    assert "qfsbackup-access-0 (used by t)" in source.status.unrestored
    again = make_source(paused_vm, tmp_path)
    await paused_vm.monitor.execute("blockdev-del", {"node-name": "t"})
    async with again.snapshot():
        pass
    assert again.status.unrestored is None
