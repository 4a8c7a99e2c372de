# SPDX-License-Identifier: LGPL-2.1-or-later
"""The place where old data goes hangs, metadata and all: the mount answers and can be ended, and QEMU does not hang.

Undoing anything in QEMU would hang it, so that waits until the store answers; the supervisor sees to it.
"""

from pathlib import Path

import pytest
import trio

from qfsbackup.vm.quirks import CBW_TIMEOUT, cbw_timeout
from tests.e2e.support import idle_vm, left_as_it_was
from tests.faults.stores import hanging_store
from tests.faults.support import ended, nothing_of_ours, until, until_eio
from tests.harness.mount import is_mounted, mounted, qfsbackup
from tests.harness.qemu import Qemu
from tests.harness.vm import Vm
from tests.vm.support import guest_io


async def answers(vm: Vm) -> bool:
    """Does QEMU."""
    with trio.move_on_after(3):
        return bool((await vm.monitor.execute("query-status"))["running"])
    return False


async def test_a_store_that_hangs_hangs_neither_the_mount_nor_qemu(qemu: Qemu, tmp_path: Path) -> None:
    async with hanging_store(tmp_path) as store, idle_vm(qemu, tmp_path) as vm, left_as_it_was(vm):
        async with mounted(vm.qmp, tmp_path / "mnt", f"fleece={store.path}", expected=(2,)) as mount:
            await guest_io(vm, "vda", "write -P 5 0 64k")
            assert (await mount.fresh_status())["fleecing"]["used"] > 0
            worker = await mount.worker()
            store.stop()
            if cbw_timeout(qemu.version) < CBW_TIMEOUT:
                await guest_io(vm, "vda", "write -P 6 1M 64k")

            async def is_broken() -> bool:
                return bool((await mount.status())["state"] == "broken")

            await until(is_broken, timeout=20)
            await until_eio(mount.image("vda"))
            async with ended([worker], timeout=20):
                mount.process.terminate()
            assert not is_mounted(mount.path)
            assert "the VM is left with our filters for now" in mount.process.log

            async def has_tried() -> bool:
                return "QEMU would hang with it; trying again until it is gone" in mount.process.log

            await until(has_tried, timeout=30)  # the supervisor, by `qfsbackup cleanup`
            assert await answers(vm)
            assert mount.process.returncode is None
            store.go_on()
            with trio.fail_after(60):  # the supervisor tries now and then
                assert await mount.process.wait() == 2
        await nothing_of_ours(vm)


@pytest.mark.one_qemu
async def test_a_store_that_hangs_is_refused(qemu: Qemu, tmp_path: Path) -> None:
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    async with hanging_store(tmp_path) as store, idle_vm(qemu, tmp_path) as vm, left_as_it_was(vm):
        store.stop()
        done = await qfsbackup("mount", vm.qmp, mountpoint, "-o", f"fleece={store.path}")
        done.refused(32, f"the fleecing folder {store.path} does not answer")
