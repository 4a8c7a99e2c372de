# SPDX-License-Identifier: LGPL-2.1-or-later
"""Disks that are resized between two backups, or during one."""

from pathlib import Path

import pytest

from qfsbackup.vm.bitmaps.checkpoint import GRANULARITY, bitmap_name
from tests.harness.disk import MIB
from tests.harness.monitor import QmpError
from tests.harness.qemu import Qemu
from tests.harness.vm import Vm
from tests.vm.checkpoints import (
    INCREMENTAL,
    NEW,
    OLD,
    SIZE,
    bitmaps,
    committed,
    dirty,
    own,
    said,
    source,
    two_disks,
)
from tests.vm.support import copied, guest_io, held, served


@pytest.mark.parametrize("size", [SIZE // 2, 2 * SIZE])
async def test_a_resize_during_a_snapshot_is_refused(paused_vm: Vm, tmp_path: Path, size: int) -> None:
    """QEMU would abort: at once, with the bitmap of the guest's own node exported; after a cut, at the next read."""
    vm = paused_vm
    await committed(vm, tmp_path, OLD)
    await guest_io(vm, "vda", "write -P 1 1M 64k")
    async with source(vm, tmp_path, NEW, OLD).snapshot() as snapshot:
        for number, disk in enumerate(("vda", "vdb")):
            for node in (f"qfsbackup-filter-{number}", f"{disk}-node"):
                with pytest.raises(QmpError, match="resize"):
                    await vm.monitor.execute("block_resize", {"node-name": node, "size": size})
        assert await dirty(snapshot.disks[0]) == [(MIB, GRANULARITY)]
        for found in snapshot.disks:
            assert len(await copied(found, tmp_path / "copy")) == SIZE
    await vm.monitor.execute("block_resize", {"node-name": "vda-node", "size": size})
    assert dict((await held(vm))["sizes"])["vda-node"] == size


@pytest.mark.parametrize(
    ("sizes", "low"),
    [
        ([], SIZE),
        ([2 * SIZE], SIZE),
        ([2 * SIZE, SIZE], SIZE),
        ([SIZE // 2], SIZE // 2 - GRANULARITY),
        ([SIZE // 2, SIZE], SIZE // 2 - GRANULARITY),
        ([2 * SIZE, 5 * MIB + 512, 2 * SIZE, SIZE - 512], 5 * MIB),
        ([512, SIZE], 0),
        ([SIZE - GRANULARITY, SIZE], SIZE - 2 * GRANULARITY),
    ],
    ids=str,
)
async def test_what_a_resize_cut_off_or_added_since_is_told(
    paused_vm: Vm, tmp_path: Path, sizes: list[int], low: int
) -> None:
    """QEMU's own bitmaps call a disk clean whose second half was cut off and added again."""
    vm = paused_vm
    await committed(vm, tmp_path, OLD)
    for name in ("vda", "vdb"):
        for size in sizes:
            await vm.monitor.execute("block_resize", {"node-name": f"{name}-node", "size": size})
        assert (await bitmaps(vm))[f"{name} {bitmap_name('nas', own(OLD, name))}"]["count"] == 0
    async with source(vm, tmp_path, NEW, OLD).snapshot() as snapshot:
        assert said(snapshot) == [INCREMENTAL, INCREMENTAL]
        assert [served(disk).low_water for disk in snapshot.disks] == [low, low]


async def test_a_resize_of_the_last_session_is_told_after_a_restart(qemu: Qemu, tmp_path: Path) -> None:
    async with two_disks(qemu, tmp_path, name="first") as vm:
        await committed(vm, tmp_path, OLD)
        for size in (SIZE // 2, SIZE):
            await vm.monitor.execute("block_resize", {"node-name": "vdb-node", "size": size})
        await vm.monitor.execute("quit")
        assert await vm.process.wait() == 0
    async with (
        two_disks(qemu, tmp_path, name="second") as vm,
        source(vm, tmp_path, NEW, OLD).snapshot() as snapshot,
    ):
        assert said(snapshot)[1] == INCREMENTAL
        assert served(snapshot.disks[1]).low_water == SIZE // 2 - GRANULARITY
