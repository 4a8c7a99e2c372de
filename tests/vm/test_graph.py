# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is seen of a VM, and which disks of it are chosen or refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qfsbackup.errors import UserError
from qfsbackup.vm.look.graph import Machine, look
from qfsbackup.vm.look.selection import choose, left_out, refuse_disks, refuse_machine
from qfsbackup.vm.monitors.qmp_socket import connect
from tests.harness.disk import MIB, Disk
from tests.harness.qemu import Qemu
from tests.harness.qmp_proxy import running_proxy
from tests.harness.vm import UUID, Vm, running_vm
from tests.vm.support import copied, held, make_source


async def seen(vm: Vm) -> Machine:
    """What `look` sees of the VM."""
    async with connect(vm.qmp, print) as qmp:
        return await look(qmp)


def drives(tmp_path: Path) -> list[Disk]:
    """One drive of each kind."""
    return [
        Disk("plain", tmp_path / "plain.raw", MIB),
        Disk("slow", tmp_path / "slow.qcow2", 2 * MIB, "qcow2", "virtio-scsi", throttle=0),
        Disk("old", tmp_path / "old.qcow2", MIB, "qcow2", "ide", legacy=True),
        Disk("thread", tmp_path / "thread.raw", MIB, iothread=True),
        Disk("scsi-thread", tmp_path / "scsi-thread.raw", MIB, interface="virtio-scsi", iothread=True),
        Disk("fixed", tmp_path / "fixed.raw", MIB, read_only=True),
        Disk("cd", tmp_path / "cd.iso", MIB, interface="virtio-scsi", read_only=True, cdrom=True),
        Disk("empty", interface="ide", cdrom=True),
    ]


async def test_all_drives_are_seen_as_they_are(qemu: Qemu, tmp_path: Path) -> None:
    async with running_vm(qemu, tmp_path, drives(tmp_path), extra_args=["-name", "web1"]) as vm:
        machine = await seen(vm)
    assert (machine.version, machine.name, machine.uuid, machine.status) == (qemu.version, "web1", UUID, "prelaunch")
    disks = {disk.name: disk for disk in machine.disks}
    assert disks.keys() == {disk.id for disk in drives(tmp_path)}
    assert [node.driver for node in disks["slow"].nodes] == ["throttle", "qcow2"]
    assert [node.driver for node in disks["old"].nodes] == ["qcow2"]
    assert disks["slow"].root.size == 2 * MIB
    assert disks["plain"].qdev == "/machine/peripheral/plain/virtio-backend"
    assert {name for name, disk in disks.items() if disk.iothread} == {"thread", "scsi-thread"}
    assert {name: left_out(disk) for name, disk in disks.items() if left_out(disk)} == {
        "fixed": "read-only",
        "cd": "a CD-ROM",
        "empty": "no medium",
    }


async def test_a_vm_without_a_name_and_an_id(paused_vm: Vm) -> None:
    assert (await seen(paused_vm)).name is None


async def test_disks_are_chosen_by_name(qemu: Qemu, tmp_path: Path) -> None:
    async with running_vm(qemu, tmp_path, drives(tmp_path)) as vm:
        machine = await seen(vm)
    writable = {"plain", "slow", "old", "thread", "scsi-thread"}
    assert {disk.name for disk in choose(machine, [], [])} == writable
    assert {disk.name for disk in choose(machine, [], ["old", "cd"])} == writable - {"old"}
    assert {disk.name for disk in choose(machine, ["cd", "plain"], [])} == {"cd", "plain"}
    with pytest.raises(UserError, match="called nonsense") as caught:
        choose(machine, ["plain", "nonsense"], [])
    assert "empty (no medium)" in caught.value.hint
    with pytest.raises(UserError, match="called nonsense"):
        choose(machine, [], ["nonsense"])
    with pytest.raises(UserError, match="empty has no medium"):
        choose(machine, ["empty"], [])
    with pytest.raises(UserError, match="no disk"):
        choose(machine, ["plain"], ["plain"])


async def test_a_vm_without_disks(qemu: Qemu, tmp_path: Path) -> None:
    async with running_vm(qemu, tmp_path, []) as vm:
        with pytest.raises(UserError, match="no disk"):
            choose(await seen(vm), [], [])


async def test_vms_that_cannot_be_snapshot(paused_vm: Vm) -> None:
    machine = await seen(paused_vm)
    refuse_machine(machine)
    refuse_machine(replace(machine, version=(7, 1, 0), migration="completed", status="running"))
    with pytest.raises(UserError, match=r"7\.0\.9 is too old"):
        refuse_machine(replace(machine, version=(7, 0, 9)))
    with pytest.raises(UserError, match="inmigrate"):
        refuse_machine(replace(machine, status="inmigrate"))
    with pytest.raises(UserError, match="migrated"):
        refuse_machine(replace(machine, migration="active"))


@pytest.mark.parametrize(
    ("version", "aborts"),
    [((7, 2, 13), False), ((7, 2, 14), True), ((8, 1, 5), True), ((8, 2, 0), False), ((10, 0, 2), False)],
)
@pytest.mark.one_qemu
async def test_an_iothread_is_refused_on_the_versions_that_abort(
    qemu: Qemu, tmp_path: Path, version: tuple[int, int, int], aborts: bool
) -> None:
    async with running_vm(qemu, tmp_path, [Disk("vda", tmp_path / "vda.raw", MIB, iothread=True)]) as vm:
        machine = replace(await seen(vm), version=version)
    if aborts:
        with pytest.raises(UserError, match="iothread"):
            refuse_disks(machine, machine.disks)
    else:
        refuse_disks(machine, machine.disks)


async def test_a_vm_that_waits_for_a_migration(qemu: Qemu, tmp_path: Path) -> None:
    disks = [Disk("vda", tmp_path / "vda.raw", MIB)]
    async with running_vm(qemu, tmp_path, disks, extra_args=["-incoming", "defer"]) as vm:
        with pytest.raises(UserError, match="inmigrate"):
            async with make_source(vm, tmp_path).snapshot():
                pytest.fail("was not refused")


async def test_another_backup_is_left_alone(paused_vm: Vm, tmp_path: Path) -> None:
    run = paused_vm.monitor.execute
    await run("blockdev-add", {"driver": "null-co", "node-name": "target", "size": 16 * MIB, "read-zeroes": True})
    await run("blockdev-backup", {"job-id": "theirs", "device": "vda-node", "target": "target", "sync": "none"})
    before = await held(paused_vm)
    with pytest.raises(UserError, match="backup of disk vda"):
        async with make_source(paused_vm, tmp_path).snapshot():
            pytest.fail("was not refused")
    async with make_source(paused_vm, tmp_path, exclude=["vda"]).snapshot() as snapshot:
        assert [disk.name for disk in snapshot.disks] == ["vdb"]
    after = await held(paused_vm)
    assert after["devices"] == before["devices"]
    assert [device for device, _ in after["jobs"]] == ["theirs"]


@pytest.mark.parametrize("times", [1, 100])
async def test_a_node_that_comes_while_we_look_hides_no_disk(paused_vm: Vm, tmp_path: Path, times: int) -> None:
    """It is the root of the device in `query-block`, and was not there when the nodes were asked for."""
    monitor, device = paused_vm.monitor, "/machine/peripheral/vda/virtio-backend"
    roots = ["vda-node", *(f"root{number}" for number in range(times))]

    async def put_in(name: str, _arguments: dict[str, Any]) -> None:
        if name == "query-block" and len(roots) > 1:
            below = roots.pop(0)
            await monitor.execute("blockdev-add", driver="copy-on-read", node_name=roots[0], file=below)
            await monitor.execute("qom-set", path=device, property="drive", value=roots[0])

    async with running_proxy(paused_vm.qmp, tmp_path / "proxy", put_in), connect(tmp_path / "proxy", print) as qmp:
        if times == 1:
            assert [disk.name for disk in choose(await look(qmp), (), ())] == ["vda", "vdb"]
        else:
            with pytest.raises(UserError, match="change at every look"):
                await look(qmp)


async def test_a_foreign_copy_before_write_filter_is_left_alone(paused_vm: Vm, tmp_path: Path) -> None:
    run = paused_vm.monitor.execute
    await run("blockdev-add", {"driver": "null-co", "node-name": "target", "size": 16 * MIB, "read-zeroes": True})
    filter_options = {"driver": "copy-before-write", "node-name": "theirs", "file": "vda-node", "target": "target"}
    await run("blockdev-add", filter_options)
    path = "/machine/peripheral/vda/virtio-backend"
    await run("qom-set", {"path": path, "property": "drive", "value": "theirs"})
    before = await held(paused_vm)
    with pytest.raises(UserError, match="backup of disk vda"):
        async with make_source(paused_vm, tmp_path).snapshot():
            pytest.fail("was not refused")
    assert await held(paused_vm) == before


async def test_rarer_devices_are_disks_too(qemu: Qemu, tmp_path: Path) -> None:
    """Firmware variables, NVMe, USB and floppy disks; and devices that nobody gave an id."""
    nodes = {"flash": 4 * MIB, "nvme": MIB, "usb": MIB, "floppy": 1440 * 1024, "nobody": MIB}
    extra = []
    for name, size in nodes.items():
        (tmp_path / name).write_bytes(bytes(size))
        extra += ["-blockdev", json.dumps({"driver": "file", "node-name": name, "filename": str(tmp_path / name)})]
    extra += ["-machine", "pflash0=flash", "-device", "nvme,serial=1,drive=nvme,id=n", "-device", "qemu-xhci"]
    extra += [
        "-device",
        "usb-storage,drive=usb,removable=on,id=u",
        "-device",
        "isa-fdc",
        "-device",
        "floppy,drive=floppy,id=f",
    ]
    extra += ["-device", "virtio-blk-pci,drive=nobody"]
    async with running_vm(qemu, tmp_path, [], extra_args=extra) as vm:
        before = await held(vm)
        async with make_source(vm, tmp_path).snapshot() as snapshot:
            exports = {disk.name: disk for disk in snapshot.disks}
            assert exports.keys() == {"flash", "n", "u", "f", "nobody"}
            assert await copied(exports["flash"], tmp_path / "copy") == bytes(4 * MIB)
            assert all(before["devices"][path] != device for path, device in (await held(vm))["devices"].items())
        assert await held(vm) == before
