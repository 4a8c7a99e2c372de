# SPDX-License-Identifier: LGPL-2.1-or-later
"""Snapshots of VMs whose CPUs stand still; the test writes to their disks as a guest would."""

from pathlib import Path
from typing import Any

import pytest
import trio

from qfsbackup.errors import UserError
from qfsbackup.facts import CLUSTER
from qfsbackup.mount.checking import look_at_files
from qfsbackup.vm.quirks import survives_iothread
from tests.harness.disk import MIB, Disk
from tests.harness.files import allocated, make_random
from tests.harness.qemu import Qemu
from tests.harness.qmp_proxy import running_proxy
from tests.harness.sockets import listening
from tests.harness.vm import Vm, running_vm
from tests.vm.support import copied, guest_io, held, make_source, served, server_runs


async def test_the_export_shows_the_instant_while_the_guest_goes_on_writing(paused_vm: Vm, tmp_path: Path) -> None:
    await guest_io(paused_vm, "vda", "write -P 0x11 0 1M")
    await guest_io(paused_vm, "vdb", "write -P 0x22 2M 1M")
    async with make_source(paused_vm, tmp_path).snapshot() as snapshot:
        await guest_io(paused_vm, "vda", "write -P 0x99 0 16M")
        await guest_io(paused_vm, "vdb", "write -P 0x99 0 16M")
        vda, vdb = [await copied(disk, tmp_path / "copy") for disk in snapshot.disks]
    assert vda == b"\x11" * MIB + bytes(15 * MIB)
    assert vdb == bytes(2 * MIB) + b"\x22" * MIB + bytes(13 * MIB)


async def test_the_vm_is_exactly_as_before(paused_vm: Vm, tmp_path: Path) -> None:
    before = await held(paused_vm)
    async with make_source(paused_vm, tmp_path).snapshot():
        during = await held(paused_vm)
    assert during["devices"] != before["devices"]
    assert await held(paused_vm) == before
    assert not await server_runs(paused_vm)
    assert not await trio.Path(tmp_path / "nbd.sock").exists()


async def test_the_socket_of_a_dead_mount_is_no_obstacle(paused_vm: Vm, tmp_path: Path) -> None:
    with listening([tmp_path / "nbd.sock"]), pytest.raises(UserError, match="no NBD socket"):
        async with make_source(paused_vm, tmp_path).snapshot():
            pytest.fail("took a socket that somebody listens on")
    async with make_source(paused_vm, tmp_path).snapshot() as snapshot:
        assert await copied(snapshot.disks[0], tmp_path / "copy") == bytes(16 * MIB)


async def test_what_the_guest_writes_during_the_snapshot_stays(paused_vm: Vm, tmp_path: Path) -> None:
    async with make_source(paused_vm, tmp_path).snapshot():
        await guest_io(paused_vm, "vda", "write -P 0x33 0 1M")
    await guest_io(paused_vm, "vda", "read -P 0x33 0 1M")


async def test_nothing_but_the_filters_is_put_in_while_the_guest_stands_still(paused_vm: Vm, tmp_path: Path) -> None:
    await paused_vm.monitor.execute("cont")
    async with running_proxy(paused_vm.qmp, tmp_path / "proxy") as proxy:
        async with make_source(paused_vm, tmp_path, socket=proxy.path).snapshot() as snapshot:
            assert snapshot.pause_ms > 0
        names = proxy.names
    standing = [
        name
        for name in names[names.index("stop") : names.index("cont") + 1]
        if "query" not in name and name != "qom-get"
    ]
    assert standing == ["stop", "qom-set", "qom-set", "human-monitor-command", "cont"]  # was it stopped only by us?
    assert names.index("stop") > max(i for i, name in enumerate(names) if name == "add-fd")
    assert names.index("nbd-server-start") < names.index("block-export-add")
    assert (await held(paused_vm))["status"] == "running"


async def test_what_the_guest_writes_before_its_filter_is_in_belongs_to_the_snapshot(
    paused_vm: Vm, tmp_path: Path
) -> None:
    """All nodes exist by then; a filter that nobody writes through must not disturb the guest."""
    written: list[str] = []

    async def write(name: str, arguments: dict[str, Any]) -> None:
        if name == "qom-set" and not written:
            written.append(arguments["value"])
            await guest_io(paused_vm, "vda", "write -P 0x66 0 1M")
            await guest_io(paused_vm, "vdb", "write -P 0x66 0 1M")

    source = make_source(paused_vm, tmp_path, socket=tmp_path / "proxy")
    async with running_proxy(paused_vm.qmp, source.socket, write), source.snapshot() as snapshot:
        await guest_io(paused_vm, "vda", "write -P 0x77 0 1M")
        await guest_io(paused_vm, "vdb", "write -P 0x77 0 1M")
        for disk in snapshot.disks:
            assert await copied(disk, tmp_path / "copy") == b"\x66" * MIB + bytes(15 * MIB)
    assert written == ["qfsbackup-filter-0"]


async def test_a_trim_of_the_guest_passes_and_the_snapshot_keeps_the_data(paused_vm: Vm, tmp_path: Path) -> None:
    await guest_io(paused_vm, "vda", "write -P 0x88 0 4M")
    async with make_source(paused_vm, tmp_path).snapshot() as snapshot:
        await guest_io(paused_vm, "vda", "discard 0 4M")
        assert allocated(tmp_path / "vda.raw") == 0
        assert await copied(snapshot.disks[0], tmp_path / "copy") == b"\x88" * 4 * MIB + bytes(12 * MIB)


@pytest.mark.parametrize("command", ["write -P 0x99", "write -z", "write -z -u", "discard"])
@pytest.mark.parametrize("name", ["vda", "vdb"])
async def test_reading_cluster_by_cluster_gives_the_instant_whatever_the_guest_does(
    paused_vm: Vm, tmp_path: Path, command: str, name: str
) -> None:
    await guest_io(paused_vm, name, "write -P 0x88 0 8M")
    async with make_source(paused_vm, tmp_path, disks=[name]).snapshot() as snapshot:
        for offset in range(0, 16 * 1024, 192):
            await guest_io(paused_vm, name, f"{command} {offset}k {4 if offset % 384 else 64}k")
        assert await copied(snapshot.disks[0], tmp_path / "copy") == b"\x88" * 8 * MIB + bytes(8 * MIB)


async def test_old_qemu_answers_a_request_across_an_overwritten_cluster_wrongly(paused_vm: Vm, tmp_path: Path) -> None:
    """Why there is a request unit. Fails when a QEMU before 8.0 has the fix, or a newer one lost it."""
    await guest_io(paused_vm, "vda", "write -P 0x88 0 1M")
    async with make_source(paused_vm, tmp_path).snapshot() as snapshot:
        await guest_io(paused_vm, "vda", "discard 0 64k")
        command = ["qemu-io", "-f", "raw", "-c", "read -P 0x88 0 128k", served(snapshot.disks[0]).uri]
        answer = await trio.run_process(command, capture_stdout=True, check=False)
        wrong = b"Pattern verification failed" in answer.stdout
        assert served(snapshot.disks[0]).request_unit == (CLUSTER if wrong else None)


async def test_one_disk_needs_no_stop(paused_vm: Vm, tmp_path: Path) -> None:
    await paused_vm.monitor.execute("cont")
    source = make_source(paused_vm, tmp_path, socket=tmp_path / "proxy", disks=["vdb"])
    async with running_proxy(paused_vm.qmp, source.socket) as proxy, source.snapshot() as snapshot:
        assert snapshot.pause_ms == 0
    assert not {"stop", "cont"} & set(proxy.names)


async def test_a_vm_that_its_owner_paused_stays_paused(paused_vm: Vm, tmp_path: Path) -> None:
    await paused_vm.monitor.execute("cont")
    await paused_vm.monitor.execute("stop")
    async with make_source(paused_vm, tmp_path).snapshot() as snapshot:
        assert snapshot.pause_ms == 0
        assert (await held(paused_vm))["status"] == "paused"
    assert (await held(paused_vm))["status"] == "paused"


@pytest.mark.parametrize("size", [0, 512, 3 * 512, 65536 + 512, 4 * 1024**4])
async def test_a_disk_of_any_size(qemu: Qemu, tmp_path: Path, size: int) -> None:
    disks = [Disk("vda", tmp_path / "vda.raw", size)]
    async with running_vm(qemu, tmp_path, disks) as vm:
        before = await held(vm)
        source = make_source(vm, tmp_path)
        async with source.snapshot() as snapshot:
            [disk] = snapshot.disks
            assert disk.size == size
            shown = await trio.run_process(["nbdinfo", "--size", served(disk).uri], capture_stdout=True)
            assert int(shown.stdout) == size
            if size:
                await guest_io(vm, "vda", f"write -P 0x44 {size - 512} 512")
                await look_at_files(source.status)
                assert source.status.fleecing_used > 0
        assert await held(vm) == before


@pytest.mark.parametrize("legacy", [False, True], ids=["blockdev", "drive"])
@pytest.mark.parametrize("interface", ["virtio-blk", "virtio-scsi", "ide"])
async def test_every_way_to_attach_a_disk(qemu: Qemu, tmp_path: Path, interface: str, legacy: bool) -> None:
    make_random(tmp_path / "raw", MIB)
    kinds = {"raw": tmp_path / "raw", "qcow2": tmp_path / "qcow2"}
    disks = [
        Disk(f"disk-{kind}", path, MIB, format=kind, interface=interface, legacy=legacy, throttle=throttle)  # type: ignore[arg-type]
        for (kind, path), throttle in zip(kinds.items(), [None, 0], strict=True)
    ]
    async with running_vm(qemu, tmp_path, disks) as vm:
        before = await held(vm)
        async with make_source(vm, tmp_path).snapshot() as snapshot:
            assert [disk.name for disk in snapshot.disks] == ["disk-raw", "disk-qcow2"]
            assert [disk.details["format"] for disk in snapshot.disks] == ["raw", "qcow2"]
            assert await copied(snapshot.disks[0], tmp_path / "copy") == (tmp_path / "raw").read_bytes()
        assert await held(vm) == before


async def test_a_named_cd_is_exported_even_when_it_is_ejected_meanwhile(qemu: Qemu, tmp_path: Path) -> None:
    make_random(tmp_path / "cd.iso", MIB)
    disks = [Disk("cd", tmp_path / "cd.iso", interface="virtio-scsi", read_only=True, cdrom=True)]
    async with running_vm(qemu, tmp_path, disks) as vm:
        async with make_source(vm, tmp_path, disks=["cd"]).snapshot() as snapshot:
            [disk] = snapshot.disks
            async with disk.open() as opened:
                assert not opened.can_trim
            await vm.monitor.execute("eject", id="cd", force=True)
            assert await copied(disk, tmp_path / "copy") == (tmp_path / "cd.iso").read_bytes()
        assert not await server_runs(vm)


async def test_a_disk_in_an_iothread_is_refused_where_qemu_would_abort(qemu: Qemu, tmp_path: Path) -> None:
    disks = [
        Disk("vda", tmp_path / "vda.raw", MIB, iothread=True),
        Disk("sda", tmp_path / "sda.raw", MIB, interface="virtio-scsi", iothread=True),
    ]
    async with running_vm(qemu, tmp_path, disks) as vm:
        await vm.monitor.execute("cont")
        before = await held(vm)
        for name in ("vda", "sda"):
            source = make_source(vm, tmp_path, disks=[name])
            if not survives_iothread(qemu.version):
                with pytest.raises(UserError, match="iothread"):
                    async with source.snapshot():
                        pytest.fail("was not refused")
            else:
                async with source.snapshot() as snapshot:
                    assert await copied(snapshot.disks[0], tmp_path / "copy") == bytes(MIB)
        assert await held(vm) == before


async def test_an_unplugged_disk_is_no_obstacle_to_the_end(qemu: Qemu, tmp_path: Path) -> None:
    disks = [Disk(name, tmp_path / f"{name}.raw", MIB, interface="virtio-scsi") for name in ("sda", "sdb")]
    async with running_vm(qemu, tmp_path, disks) as vm:
        async with make_source(vm, tmp_path).snapshot():
            await vm.monitor.execute("device_del", id="sda")
            await vm.monitor.event("DEVICE_DELETED", device="sda")
        after = await held(vm)
    assert [name for name, _, _ in after["nodes"] if name.startswith("qfsbackup-")] == []
    assert after["devices"] == {"sdb": ("sdb-node", "", None)}


async def test_a_snapshot_taken_below_the_filter_stays(paused_vm: Vm, tmp_path: Path) -> None:
    """Somebody gives the disk an overlay meanwhile: the guest must go on with the overlay, not with what is below."""
    async with make_source(paused_vm, tmp_path).snapshot():
        overlay = str(tmp_path / "overlay.qcow2")
        arguments = {"node-name": "vda-node", "snapshot-file": overlay, "snapshot-node-name": "overlay"}
        await paused_vm.monitor.execute("blockdev-snapshot-sync", arguments)
        await guest_io(paused_vm, "vda", "write -P 0x55 0 64k")
    after = await held(paused_vm)
    assert after["devices"]["/machine/peripheral/vda/virtio-backend"][0] == "overlay"
    await guest_io(paused_vm, "vda", "read -P 0x55 0 64k")


async def test_cancelling_undoes_everything(paused_vm: Vm, tmp_path: Path) -> None:
    before = await held(paused_vm)
    with trio.CancelScope() as scope:
        async with make_source(paused_vm, tmp_path).snapshot():
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert await held(paused_vm) == before


async def test_an_error_of_the_block_comes_out_as_it_is(paused_vm: Vm, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        async with make_source(paused_vm, tmp_path).snapshot():
            raise ZeroDivisionError
