# SPDX-License-Identifier: LGPL-2.1-or-later
"""A disk that others may write to has no complete bitmap; one image behind two devices cannot be filtered."""

import json
import logging
from pathlib import Path

import pytest

from qfsbackup.errors import UserError
from tests.harness.disk import MIB, Disk
from tests.harness.qemu import Qemu, run_img
from tests.harness.vm import Vm, running_vm
from tests.vm.checkpoints import NEW, OLD, SIZE, committed, names, source
from tests.vm.support import held, make_source, served


def attached(name: str, path: Path, device: dict[str, object], **protocol: object) -> list[str]:
    """QEMU's command line for a raw image `path` behind a device."""
    file = {"driver": "file", "node-name": f"{name}-file", "filename": str(path), **protocol}
    node = {"driver": "raw", "node-name": f"{name}-node", "file": f"{name}-file"}
    nodes = ["-blockdev", json.dumps(file), "-blockdev", json.dumps(node)]
    return [*nodes, "-device", json.dumps({"id": name, "drive": f"{name}-node", **device})]


async def test_a_disk_that_others_may_write_to_is_never_incremental(
    qemu: Qemu, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whether its device says so, or QEMU does not lock the image. Its neighbour's chain goes on."""
    scsi = {"driver": "scsi-hd", "share-rw": True}
    arguments = ["-device", "virtio-scsi-pci"]
    for name in ("vdb", "vdc", "vdd"):
        await run_img(qemu, "create", "-q", "-f", "raw", tmp_path / name, "1M")
    arguments += attached("vdb", tmp_path / "vdb", scsi)
    arguments += attached("vdc", tmp_path / "vdc", {"driver": "virtio-blk-pci", "share-rw": True})
    arguments += attached("vdd", tmp_path / "vdd", {"driver": "virtio-blk-pci"}, locking="off")
    disks = [Disk("vda", tmp_path / "vda.raw", MIB)]
    async with running_vm(qemu, tmp_path, disks, extra_args=arguments) as vm:
        for generation, base, status in ((OLD, None, "new"), (NEW, OLD, "invalid")):
            bases = {"vdb", "vdc", "vdd"} if base else set()
            async with source(vm, tmp_path, generation, base, also_based=bases).snapshot() as snapshot:
                found = {disk.name: disk for disk in snapshot.disks}
                assert snapshot.keep
                await snapshot.keep()
            assert found["vda"].bitmap == ("reuse" if base else "new")
            for name in ("vdb", "vdc", "vdd"):
                assert (found[name].bitmap, served(found[name]).dirty_context) == (status, None)
                assert "others may write to it" in found[name].bitmap_reason
                assert found[name].generation
            assert {name.split()[0] for name in await names(vm)} == {"vda"}, "a bitmap that is not complete is none"
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    for name, why in (("vdb", "share-rw=on"), ("vdc", "share-rw=on"), ("vdd", str(tmp_path / "vdd"))):
        assert any(f"disk {name}: " in line and why in line and "neither frozen" in line for line in warnings)


async def test_the_base_of_a_disk_that_others_may_write_to_now_is_gone(qemu: Qemu, tmp_path: Path) -> None:
    """Else it would count again once the others have left."""
    disks = [Disk("vda", tmp_path / "vda.raw", SIZE, interface="virtio-scsi")]
    disks += [Disk("vdb", tmp_path / "vdb.qcow2", SIZE, format="qcow2")]
    async with running_vm(qemu, tmp_path, disks) as vm:
        await committed(vm, tmp_path, OLD)
        for shared in (True, False):
            await vm.monitor.execute("device_del", id="vda")
            await vm.monitor.event("DEVICE_DELETED", device="vda")
            device = {"driver": "scsi-hd", "id": "vda", "drive": "vda-node", "bus": "scsi0.0", "share-rw": shared}
            await vm.monitor.execute("device_add", device)
            async with source(vm, tmp_path, NEW, OLD).snapshot() as snapshot:
                assert {disk.name: disk.bitmap for disk in snapshot.disks} == {"vda": "invalid", "vdb": "reuse"}


async def test_one_image_behind_two_devices_is_refused_with_both_their_names(qemu: Qemu, tmp_path: Path) -> None:
    await run_img(qemu, "create", "-q", "-f", "raw", tmp_path / "both", "1M")
    arguments = [
        "-device",
        "virtio-scsi-pci",
        *attached("one", tmp_path / "both", {"driver": "scsi-hd", "share-rw": True}),
    ]
    arguments += ["-device", "scsi-hd,id=two,drive=one-node,share-rw=on"]
    async with running_vm(qemu, tmp_path, [Disk("vda", tmp_path / "vda.raw", MIB)], extra_args=arguments) as vm:
        before = await held(vm)
        for chosen in ([], ["one"], ["two", "vda"]):
            with pytest.raises(UserError, match="one and two are one disk behind 2 devices") as refused:
                async with source(vm, tmp_path, NEW, disks=chosen).snapshot():
                    pytest.fail("was not refused")
            assert "exclude=one:two" in refused.value.hint
        async with make_source(vm, tmp_path, exclude=["one", "two"]).snapshot() as snapshot:
            assert [disk.name for disk in snapshot.disks] == ["vda"]
        assert await held(vm) == before


async def test_another_file_in_the_images_place_tells_nothing(paused_vm: Vm, tmp_path: Path) -> None:
    """QEMU has the one that was there; nobody has locked this one."""
    (tmp_path / "vda.raw").rename(tmp_path / "moved")
    (tmp_path / "vda.raw").write_bytes((tmp_path / "moved").read_bytes())
    async with source(paused_vm, tmp_path, OLD).snapshot() as snapshot:
        assert {disk.name: disk.bitmap_reason.partition(" of ")[0] for disk in snapshot.disks} == {
            "vda": "no backup",
            "vdb": "no backup",
        }
