# SPDX-License-Identifier: LGPL-2.1-or-later
"""VMs with many disks: QEMU is asked for as many NBD connections as they need, and each disk has its share."""

import time
from pathlib import Path

import pytest

from tests.e2e.support import left_as_it_was
from tests.faults.support import reads
from tests.harness.disk import Disk
from tests.harness.files import make_random
from tests.harness.mount import aside, mounted
from tests.harness.qemu import Qemu
from tests.harness.vm import running_vm

SIZE = 128 * 1024


@pytest.mark.parametrize("count", [30, 100])
async def test_all_disks_of_a_vm_are_mounted(qemu: Qemu, tmp_path: Path, count: int) -> None:
    disks = [
        Disk(f"d{number}", make_random(tmp_path / f"d{number}.raw", SIZE, seed=number), interface="virtio-scsi")
        for number in range(count)
    ]
    async with running_vm(qemu, tmp_path, disks) as vm, left_as_it_was(vm):
        begin = time.monotonic()
        async with mounted(vm.qmp, tmp_path / "mnt", f"fleece={tmp_path}") as mount:
            took = time.monotonic() - begin
            for disk in disks:
                assert disk.path is not None
                assert await reads(mount.image(disk.id)) == await aside(disk.path.read_bytes)
            assert (await mount.status())["state"] == "ready"
        assert took < 90, took  # 100 disks take some five seconds where nothing else runs
