# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a dead mount left is undone, and nothing else is touched."""

import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
import trio

from qfsbackup.errors import UserError
from qfsbackup.vm.cleanup import undo_leftovers
from qfsbackup.vm.fleecing_folder import files_of
from qfsbackup.vm.monitors.qmp_socket import connect
from qfsbackup.vm.ours import PREFIX
from qfsbackup.vm.quirks import keeps_fdsets
from tests.harness.disk import MIB, Disk
from tests.harness.qemu import Qemu
from tests.harness.vm import Vm, running_vm
from tests.vm.support import guest_io, held, make_source, server_runs


async def clean(vm: Vm) -> list[str]:
    """Run `cleanup` on a connection of its own."""
    async with connect(vm.qmp, print) as qmp:
        return await undo_leftovers(qmp)


@contextlib.asynccontextmanager
async def mount_process(qmp: Path, folder: Path, *target: str) -> AsyncIterator[trio.Process]:
    """A process that takes a snapshot; its stdout tells when it has it."""
    command = [sys.executable, "-m", "tests.vm.killed_mount", str(qmp), str(folder), *target]
    async with trio.open_nursery() as nursery:
        process: trio.Process = await nursery.start(
            partial(trio.run_process, command, stdout=subprocess.PIPE, check=False)
        )
        yield process
        nursery.cancel_scope.cancel()


async def ready(process: trio.Process) -> None:
    assert process.stdout is not None
    assert (await process.stdout.receive_some()).startswith(b"ready")


async def test_a_killed_mount_is_undone_by_the_next_one(paused_vm: Vm, tmp_path: Path) -> None:
    await paused_vm.monitor.execute("cont")
    before = await held(paused_vm)
    async with mount_process(paused_vm.qmp, tmp_path) as process:
        await ready(process)
        process.kill()
        await process.wait()
    assert await held(paused_vm) != before
    async with make_source(paused_vm, tmp_path, runtime=tmp_path, disks=["vdb"]).snapshot() as snapshot:
        assert [disk.name for disk in snapshot.disks] == ["vdb"]
    assert await held(paused_vm) == before


async def test_cleaning_up_twice_is_as_good_as_once(paused_vm: Vm, tmp_path: Path) -> None:
    before = await held(paused_vm)
    async with mount_process(paused_vm.qmp, tmp_path) as process:
        await ready(process)
        process.kill()
        await process.wait()
    [line] = await clean(paused_vm)
    assert "qfsbackup-filter-1" in line
    assert await held(paused_vm) == before
    assert await clean(paused_vm) == []
    assert not await server_runs(paused_vm)


async def test_the_snapshot_of_a_living_mount_is_not_touched(qemu: Qemu, tmp_path: Path) -> None:
    second = tmp_path / "second.qmp"
    extra = ["-qmp", f"unix:{second},server=on,wait=off"]
    disks = [Disk("vda", tmp_path / "vda.raw", MIB)]
    async with running_vm(qemu, tmp_path, disks, extra_args=extra) as vm, mount_process(vm.qmp, tmp_path) as process:
        await ready(process)
        during = await held(vm)
        with pytest.raises(UserError, match=f"process {process.pid}"):
            async with make_source(vm, tmp_path, socket=second).snapshot():
                pytest.fail("was not refused")
        assert await held(vm) == during
        process.kill()
        await process.wait()
        async with make_source(vm, tmp_path, socket=second).snapshot() as snapshot:
            assert len(snapshot.disks) == 1


async def test_a_guest_paused_by_its_owner_stays_paused(paused_vm: Vm, tmp_path: Path) -> None:
    await paused_vm.monitor.execute("cont")
    async with mount_process(paused_vm.qmp, tmp_path) as process:
        await ready(process)
        process.kill()
        await process.wait()
    await paused_vm.monitor.execute("stop")
    await clean(paused_vm)
    assert (await held(paused_vm))["status"] == "paused"


async def test_what_others_export_is_not_touched(paused_vm: Vm, tmp_path: Path) -> None:
    """Somebody added an export to the server of a mount that died: the server is left to them."""
    async with mount_process(paused_vm.qmp, tmp_path) as process:
        await ready(process)
        arguments = {"type": "nbd", "id": "theirs", "node-name": "vda-file"}
        await paused_vm.monitor.execute("block-export-add", arguments)
        process.kill()
        await process.wait()
    await clean(paused_vm)
    assert [export["id"] for export in (await held(paused_vm))["exports"]] == ["theirs"]
    with pytest.raises(UserError, match="theirs"):
        async with make_source(paused_vm, tmp_path).snapshot():
            pytest.fail("was not refused")


async def test_a_running_server_of_somebody_else_is_refused_and_left_alone(paused_vm: Vm, tmp_path: Path) -> None:
    address = {"type": "unix", "data": {"path": str(tmp_path / "theirs")}}
    await paused_vm.monitor.execute("nbd-server-start", {"addr": address})
    before = await held(paused_vm)
    with pytest.raises(UserError, match="already running"):
        async with make_source(paused_vm, tmp_path).snapshot():
            pytest.fail("was not refused")
    assert await held(paused_vm) == before
    assert await server_runs(paused_vm)


async def test_a_filter_that_somebody_else_now_needs_is_reported(paused_vm: Vm, tmp_path: Path) -> None:
    async with mount_process(paused_vm.qmp, tmp_path) as process:
        await ready(process)
        process.kill()
        await process.wait()
    overlay = {"driver": "copy-on-read", "node-name": "theirs", "file": "qfsbackup-filter-0"}
    await paused_vm.monitor.execute("blockdev-add", overlay)
    with pytest.raises(UserError, match="qfsbackup-filter-0"):
        await clean(paused_vm)
    await guest_io(paused_vm, "vda", "write -P 1 0 64k")
    await paused_vm.monitor.execute("blockdev-del", {"node-name": "theirs"})
    await clean(paused_vm)
    assert [name for name, _, _ in (await held(paused_vm))["nodes"] if name.startswith(PREFIX)] == []


def held_space(vm: Vm) -> list[int]:
    """The blocks of each nameless file that QEMU has open."""
    return [Path(path).stat().st_blocks for path in files_of(vm.pid)]


@pytest.mark.parametrize("killed", [False, True], ids=["unmounted", "killed"])
async def test_a_vm_that_stands_still_keeps_no_space(paused_vm: Vm, tmp_path: Path, killed: bool) -> None:
    """QEMU 7.2 keeps the descriptors until it runs again, and nobody else can take them away: they are empty."""
    async with contextlib.AsyncExitStack() as stack:
        if killed:
            process = await stack.enter_async_context(mount_process(paused_vm.qmp, tmp_path))
            await ready(process)
        else:
            await stack.enter_async_context(make_source(paused_vm, tmp_path).snapshot())
        await guest_io(paused_vm, "vda", "write -P 1 0 1M")
        assert max(held_space(paused_vm)) > 0
        if killed:
            process.kill()
            await process.wait()
            await clean(paused_vm)
    assert sum(held_space(paused_vm)) == 0
    assert held_space(paused_vm) == ([0, 0] if keeps_fdsets(paused_vm.qemu.version) else [])
