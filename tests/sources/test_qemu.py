# SPDX-License-Identifier: LGPL-2.1-or-later
"""A running VM as a source: what it tells about its snapshot, and what becomes of it when QEMU goes away."""

import contextlib
import json
import signal
import time
from pathlib import Path

import pytest
import trio

from qfsbackup.errors import UserError
from qfsbackup.vm.monitor import COMMAND_TIMEOUT
from qfsbackup.vm.monitors import qmp_socket as qmp_module
from qfsbackup.vm.quirks import request_unit, text
from tests.harness.disk import MIB, Disk
from tests.harness.qemu import Qemu
from tests.harness.vm import UUID, Vm, running_vm
from tests.vm.support import held, make_source, served


async def test_a_snapshot_tells_what_it_is(qemu: Qemu, tmp_path: Path) -> None:
    disks = [
        Disk("vda", tmp_path / "vda.qcow2", 3 * MIB, "qcow2"),
        Disk("cd", tmp_path / "cd.iso", MIB, interface="virtio-scsi", read_only=True, cdrom=True),
    ]
    async with running_vm(qemu, tmp_path, disks, extra_args=["-name", "web1"]) as vm:
        source = make_source(vm, tmp_path)
        start = time.time_ns()
        async with source.snapshot() as snapshot:
            assert start < snapshot.instant < time.time_ns()
            assert (snapshot.vm, snapshot.uuid, snapshot.frozen, snapshot.pause_ms) == ("web1", UUID, False, 0.0)
            assert snapshot.details["qemu"] == text(qemu.version)
            assert snapshot.details["disks_left_out"] == {"cd": "a CD-ROM"}
            assert json.loads(snapshot.config["qemu.json"])["name"] == {"name": "web1"}
            [disk] = snapshot.disks
            assert (disk.name, disk.size, served(disk).dirty_context) == ("vda", 3 * MIB, None)
            assert disk.details == {
                "interface": "virtio-blk-device",
                "format": "qcow2",
                "file": str(tmp_path / "vda.qcow2"),
                "cluster": 64 * 1024,
            }
            assert served(disk).request_unit == request_unit(qemu.version)
            assert source.status.disks["vda"].size == 3 * MIB
        assert source.status.vm_gone is None


async def test_the_name_of_the_vm(paused_vm: Vm, tmp_path: Path) -> None:
    async with make_source(paused_vm, tmp_path).snapshot() as snapshot:
        assert snapshot.vm == "vm"  # of the socket vm.qmp
    async with make_source(paused_vm, tmp_path, vm="mine").snapshot() as snapshot:
        assert snapshot.vm == "mine"


async def test_a_runtime_folder_with_odd_characters(paused_vm: Vm, tmp_path: Path) -> None:
    runtime = tmp_path / "ä & %20?#"
    runtime.mkdir()
    async with make_source(paused_vm, tmp_path, runtime=runtime).snapshot() as snapshot:
        shown = await trio.run_process(["nbdinfo", "--size", served(snapshot.disks[0]).uri], capture_stdout=True)
        assert int(shown.stdout) == 16 * MIB


async def test_a_runtime_folder_that_cannot_be_used(paused_vm: Vm, tmp_path: Path) -> None:
    before = await held(paused_vm)
    for runtime in (tmp_path / "missing", tmp_path / ("x" * 100)):
        with pytest.raises(UserError, match="no NBD socket"):
            async with make_source(paused_vm, tmp_path, runtime=runtime).snapshot():
                pytest.fail("was not refused")
    assert await held(paused_vm) == before


async def test_the_end_of_the_vm_is_told_within_a_second(paused_vm: Vm, tmp_path: Path) -> None:
    source = make_source(paused_vm, tmp_path)
    async with source.snapshot() as snapshot:
        paused_vm.process.kill()
        with trio.fail_after(1):
            while source.status.vm_gone is None:
                await trio.lowlevel.checkpoint()
        assert "ended" in source.status.vm_gone
        with pytest.raises(OSError, match=r"refused|No such"):
            await trio.open_unix_socket(str(tmp_path / "nbd.sock"))
        assert snapshot.disks


async def test_a_vm_that_quits_takes_the_snapshot_with_it(paused_vm: Vm, tmp_path: Path) -> None:
    source = make_source(paused_vm, tmp_path)
    async with source.snapshot():
        await paused_vm.monitor.execute("quit")
        assert await paused_vm.process.wait() == 0
    assert source.status.vm_gone is not None


@pytest.mark.one_qemu
async def test_a_vm_that_hangs_does_not_keep_the_end_waiting(paused_vm: Vm, tmp_path: Path) -> None:
    before = await held(paused_vm)
    async with make_source(paused_vm, tmp_path).snapshot():
        paused_vm.process.send(signal.SIGSTOP)
        start = trio.current_time()
    assert trio.current_time() - start < COMMAND_TIMEOUT + 12
    paused_vm.process.send(signal.SIGCONT)
    await _free(paused_vm.qmp)
    async with make_source(paused_vm, tmp_path).snapshot():
        pass
    assert await held(paused_vm) == before


async def _free(socket: Path) -> None:
    """Wait until QEMU has done with the connections that were made while it hung."""
    with trio.fail_after(20):
        while True:
            with contextlib.suppress(UserError):
                async with qmp_module.connect(socket, on_gone=print):
                    return
            await trio.lowlevel.checkpoint()
