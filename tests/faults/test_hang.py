# SPDX-License-Identifier: LGPL-2.1-or-later
"""A QEMU that hangs when it should let go: who unmounted is told, and QEMU is put back as soon as it answers."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.e2e.support import idle_vm, left_as_it_was
from tests.faults.support import ended, nothing_of_ours, unmounted
from tests.harness.mount import is_mounted, mounted, processes_of, qfsbackup, taken_away
from tests.harness.qemu import Qemu
from tests.harness.qmp_proxy import running_proxy


async def hung_at_the_end(qemu: Qemu, tmp_path: Path) -> None:
    async with (
        idle_vm(qemu, tmp_path) as vm,
        left_as_it_was(vm),
        mounted(vm.qmp, tmp_path / "mnt", f"fleece={tmp_path}", expected=[2]) as mount,
    ):
        worker = await mount.worker()
        vm.process.send(signal.SIGSTOP)
        async with ended([worker], timeout=60):
            await unmounted(mount.path)
        assert not is_mounted(mount.path)
        assert mount.process.returncode is None
        vm.process.send(signal.SIGCONT)
        with trio.fail_after(30):
            assert await mount.process.wait() == 2
        await nothing_of_ours(vm)
        assert "could not undo all that it did; putting the VM back" in mount.process.log


@pytest.mark.one_qemu
async def test_a_qemu_that_hangs_and_dies_is_given_up(qemu: Qemu, tmp_path: Path) -> None:
    async with (
        idle_vm(qemu, tmp_path) as vm,
        mounted(vm.qmp, tmp_path / "mnt", f"fleece={tmp_path}", expected=[128 + signal.SIGKILL]) as mount,
    ):
        worker = await mount.worker()
        vm.process.send(signal.SIGSTOP)
        async with ended([worker]):
            os.kill(worker, signal.SIGKILL)
        vm.process.kill()
        with trio.fail_after(30):
            assert await mount.process.wait() == 128 + signal.SIGKILL
        assert not is_mounted(mount.path)
        assert "QEMU is gone" in mount.process.log


async def hung_at_the_beginning(qemu: Qemu, tmp_path: Path) -> None:
    """The command does not wait until QEMU comes back."""

    async def hang(name: str, _arguments: dict[str, Any]) -> None:
        if name == "nbd-server-start":
            vm.process.send(signal.SIGSTOP)

    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    async with (
        taken_away(mountpoint),
        idle_vm(qemu, tmp_path) as vm,
        left_as_it_was(vm),
        running_proxy(vm.qmp, tmp_path / "proxy", hang) as proxy,
    ):
        try:
            done = await qfsbackup("mount", proxy.path, mountpoint, "-o", f"fleece={tmp_path}")
            assert done.code == 32
            assert "nbd-server-start: QEMU did not answer" in done.stderr
            assert done.stderr.splitlines()[-1].startswith("Left in the VM: QEMU does not answer. Process ")
            supervisors = processes_of(mountpoint)
            assert supervisors
            async with ended(supervisors):
                vm.process.send(signal.SIGCONT)
        finally:
            vm.process.send(signal.SIGCONT)
        await nothing_of_ours(vm)


@pytest.mark.one_qemu
async def test_a_qemu_that_hangs_is_restored_when_it_comes_back(qemu: Qemu, tmp_path: Path) -> None:
    """Two VMs at once, because QEMU is waited for."""
    async with trio.open_nursery() as nursery:
        for scenario in (hung_at_the_end, hung_at_the_beginning):
            folder = tmp_path / scenario.__name__[-5:]
            folder.mkdir()
            nursery.start_soon(scenario, qemu, folder)
