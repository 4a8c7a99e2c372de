# SPDX-License-Identifier: LGPL-2.1-or-later
"""Checkpoints as QEMU keeps them: what is added at the instant, what the map says, what stays and what goes."""

from pathlib import Path
from typing import Any, Literal

import pytest

from qfsbackup.vm.bitmaps.checkpoint import GRANULARITY, bitmap_name
from tests.harness.disk import MIB, Disk
from tests.harness.qemu import Qemu
from tests.harness.qmp_proxy import running_proxy
from tests.harness.vm import Vm, running_vm
from tests.vm.checkpoints import (
    FULL,
    INCREMENTAL,
    NEW,
    OLD,
    OTHER,
    SIZE,
    bitmaps,
    committed,
    dirty,
    names,
    of,
    own,
    pair,
    said,
    source,
    two_disks,
)
from tests.vm.support import copied, guest_io, held


@pytest.mark.parametrize("legacy", [False, True], ids=["blockdev", "drive"])
async def test_the_chain_of_two_backups(qemu: Qemu, tmp_path: Path, legacy: bool) -> None:
    """New bitmaps record from the instant, persistent where the format can keep them; the map is what changed."""
    async with two_disks(qemu, tmp_path, legacy=legacy) as vm:
        before = await held(vm)
        async with source(vm, tmp_path, OLD).snapshot() as snapshot:
            assert said(snapshot) == [FULL, FULL]
            await guest_io(vm, "vda", "write -P 1 1M 64k")
            found = await bitmaps(vm)
            assert set(found) == of(OLD)
            assert snapshot.keep is not None
            await snapshot.keep()
        for name, bitmap in found.items():
            low = name.endswith(".low")
            assert (bitmap["granularity"], bitmap["recording"]) == (GRANULARITY, not low)
            assert bitmap["persistent"] == name.startswith("vdb")
            assert bitmap["count"] == (SIZE if low else GRANULARITY if name.startswith("vda") else 0)
        await guest_io(vm, "vda", "write -P 2 2M 1")
        await guest_io(vm, "vdb", "discard 3M 1M")
        async with source(vm, tmp_path, NEW, OLD).snapshot() as snapshot:
            assert said(snapshot) == [INCREMENTAL, INCREMENTAL]
            await guest_io(vm, "vda", "write -P 3 4M 64k")  # after the instant
            assert await dirty(snapshot.disks[0]) == [(MIB, GRANULARITY), (2 * MIB, GRANULARITY)]
            assert await dirty(snapshot.disks[1]) == [(3 * MIB, MIB)]
            assert await names(vm) == of(OLD) | of(NEW)
            assert snapshot.keep is not None
            await snapshot.keep()
            assert await names(vm) == of(NEW)
        after = await held(vm)
        assert await names(vm) == of(NEW)
        assert {key for key in before if before[key] != after[key]} <= {"bitmaps", "sizes"}  # a qcow2 file grows


async def test_without_a_commit_the_base_stays_and_goes_on_recording(paused_vm: Vm, tmp_path: Path) -> None:
    vm = paused_vm
    await committed(vm, tmp_path, OLD)
    before = await held(vm)
    async with source(vm, tmp_path, NEW, OLD).snapshot() as snapshot:
        assert said(snapshot) == [INCREMENTAL, INCREMENTAL]
    assert await held(vm) == before
    async with source(vm, tmp_path, NEW, OLD).snapshot():
        await guest_io(vm, "vda", "write -P 3 4M 64k")
    assert await names(vm) == of(OLD)
    async with source(vm, tmp_path, OTHER, OLD).snapshot() as snapshot:
        assert await dirty(snapshot.disks[0]) == [(4 * MIB, GRANULARITY)]


async def test_a_write_around_the_instant_is_in_the_map_or_the_next_one_never_in_none(
    paused_vm: Vm, tmp_path: Path
) -> None:
    """Where nothing stops the guest: between the new bitmap and the filter, and between the filter and the map."""
    vm = paused_vm
    await committed(vm, tmp_path, OLD)
    passed: list[str] = []

    async def write(name: str, _: dict[str, Any]) -> None:
        passed.append(name)
        if name == "qom-set" and passed.count(name) == 1:
            await guest_io(vm, "vda", "write -P 1 1M 64k")
        if name == "transaction" and passed.count(name) == 3:  # it copies the map
            await guest_io(vm, "vda", "write -P 2 2M 64k")

    proxied = source(vm, tmp_path, NEW, OLD, socket=tmp_path / "proxy", disks=["vda"])
    async with running_proxy(vm.qmp, proxied.socket, write), proxied.snapshot() as snapshot:
        [disk] = snapshot.disks
        content = await copied(disk, tmp_path / "copy")
        assert (content[MIB], content[2 * MIB]) == (1, 0)  # the first is in the snapshot, the second is not
        assert await dirty(disk) == [(MIB, GRANULARITY), (2 * MIB, GRANULARITY)]
        assert snapshot.keep is not None
        await snapshot.keep()
    assert passed.count("transaction") == 3
    async with source(vm, tmp_path, OTHER, NEW, disks=["vda"]).snapshot() as snapshot:
        assert (2 * MIB, GRANULARITY) in await dirty(snapshot.disks[0])


Damage = Literal["disabled", "missing", "granularity"]


@pytest.mark.parametrize("damage", ["disabled", "missing", "granularity"])
async def test_a_base_that_is_no_good_makes_that_disk_alone_full(paused_vm: Vm, tmp_path: Path, damage: Damage) -> None:
    vm = paused_vm
    await committed(vm, tmp_path, OLD)
    bitmap = {"node": "vda-node", "name": bitmap_name("nas", own(OLD, "vda"))}
    command = "block-dirty-bitmap-disable" if damage == "disabled" else "block-dirty-bitmap-remove"
    await vm.monitor.execute(command, bitmap)
    if damage == "granularity":
        await vm.monitor.execute("block-dirty-bitmap-add", bitmap | {"granularity": 4096})
    async with source(vm, tmp_path, NEW, OLD).snapshot() as snapshot:
        assert said(snapshot) == [("invalid", None), INCREMENTAL]
        assert bitmap["name"] in snapshot.disks[0].bitmap_reason
        assert snapshot.keep is not None
        await snapshot.keep()
    assert await names(vm) >= of(NEW)
    async with source(vm, tmp_path, OTHER, NEW).snapshot() as snapshot:
        assert said(snapshot) == [INCREMENTAL, INCREMENTAL]
    assert await names(vm) == of(NEW)


async def test_a_crash_of_qemu_makes_the_next_backup_full_and_a_clean_end_does_not(qemu: Qemu, tmp_path: Path) -> None:
    """QEMU flags the stored bitmaps while it runs; after a crash they cannot even be disabled, only removed."""
    async with two_disks(qemu, tmp_path, name="first") as vm:
        await committed(vm, tmp_path, OLD)
        await vm.monitor.execute("quit")
        assert await vm.process.wait() == 0
    async with two_disks(qemu, tmp_path, name="second") as vm:
        assert await names(vm) == pair("vdb", OLD)
        async with source(vm, tmp_path, NEW, OLD).snapshot() as snapshot:
            assert said(snapshot) == [("invalid", None), INCREMENTAL]
            assert "not there" in snapshot.disks[0].bitmap_reason
        vm.process.kill()
        await vm.process.wait()
    async with two_disks(qemu, tmp_path, name="third") as vm:
        assert [bitmap.get("inconsistent") for bitmap in (await bitmaps(vm)).values()] == [True, True]
        async with source(vm, tmp_path, NEW, OLD).snapshot() as snapshot:
            assert said(snapshot) == [("invalid", None), ("invalid", None)]
            assert await names(vm) == of(NEW)
        assert await names(vm) == set()
        await vm.monitor.execute("block_resize", {"node-name": "vdb-node", "size": 2 * SIZE})


async def test_leftovers_of_the_store_go_and_nobody_elses(paused_vm: Vm, tmp_path: Path) -> None:
    vm = paused_vm
    await committed(vm, tmp_path, OLD)
    others = ["foreign", "qfsbackup-nas", bitmap_name("nas", f"{1:06}{OTHER[6:]}")]
    for name in [*others, bitmap_name("nas", OTHER), bitmap_name("usb", OTHER)]:
        await vm.monitor.execute("block-dirty-bitmap-add", node="vdb-node", name=name, persistent=True)
    async with source(vm, tmp_path, NEW, OLD).snapshot():
        pass
    assert await names(vm) == of(OLD) | {f"vdb {name}" for name in others}


async def test_another_target_has_bitmaps_of_its_own(paused_vm: Vm, tmp_path: Path) -> None:
    vm = paused_vm
    await committed(vm, tmp_path, OLD)
    both = {own(OLD, "vda"), own(OLD, "vdb")}
    async with source(vm, tmp_path, NEW, target="usb", also_committed=both).snapshot() as snapshot:
        assert said(snapshot) == [FULL, FULL]
        assert await names(vm) == of(OLD) | of(NEW, "usb")
    assert await names(vm) == of(OLD)


async def test_a_disk_that_nobody_can_write_has_no_bitmap(qemu: Qemu, tmp_path: Path) -> None:
    disks = [Disk("vda", tmp_path / "vda.raw", SIZE, interface="virtio-scsi", read_only=True)]
    disks += [Disk("vdb", tmp_path / "vdb.qcow2", SIZE, format="qcow2")]
    for disk in disks:
        await disk.create(qemu)
    async with (
        running_vm(qemu, tmp_path, disks) as vm,
        source(vm, tmp_path, NEW, disks=["vda", "vdb"]).snapshot() as snapshot,
    ):
        assert said(snapshot) == [("none", None), FULL]
        assert await names(vm) == pair("vdb", NEW)
