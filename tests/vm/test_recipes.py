# SPDX-License-Identifier: LGPL-2.1-or-later
"""What every recipe owes: the same tests for each, with every QEMU here that can do it; the newest is one of them."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from qfsbackup.errors import FsError, UserError
from qfsbackup.vm.ours import FILTER, JOB
from qfsbackup.vm.recipes import RECIPES
from tests.harness.disk import MIB, Disk
from tests.harness.files import make_random
from tests.harness.monitor import QmpError
from tests.harness.qemu import Qemu
from tests.harness.qmp_proxy import running_proxy
from tests.harness.vm import Vm, running_vm
from tests.vm.checkpoints import INCREMENTAL, NEW, OLD, dirty, names, of, said, source, two_disks
from tests.vm.support import copied, guest_io, held, make_source
from tests.vm.test_fleecing import mounted

pytestmark = pytest.mark.newest_too

CLUSTER = 64 * 1024
NODES = {"filters": FILTER, "jobs": JOB}
SWITCH = {"filters": "qom-set", "jobs": "transaction"}  # the first command that puts something in the guest's way
KINDS = ("write -P 0x99", "write -z", "write -z -u", "discard")


def is_switch(recipe: str, command: str, arguments: dict[str, Any]) -> bool:
    """Is this the recipe's first command that the guest could notice."""
    return command == SWITCH[recipe] and (recipe == "filters" or "blockdev-backup" in str(arguments))


async def test_every_byte_is_the_instants_whatever_the_guest_does(qemu: Qemu, tmp_path: Path, recipe: str) -> None:
    contents = {name: make_random(tmp_path / f"{name}.raw", 4 * MIB, seed=1, hole_every=4) for name in ("vda", "vdb")}
    disks = [Disk("vda", contents["vda"], 4 * MIB), Disk("vdb", tmp_path / "vdb.qcow2", 4 * MIB, format="qcow2")]
    rng = random.Random(7)
    async with running_vm(qemu, tmp_path, disks) as vm:
        before = await held(vm)
        for name in contents:
            await guest_io(vm, name, "write -P 0x11 1000k 100k")
        truth = contents["vda"].read_bytes(), bytes(1000 << 10) + b"\x11" * (100 << 10) + bytes((4096 - 1100) << 10)
        async with make_source(vm, tmp_path, recipe=recipe).snapshot() as snapshot:
            assert snapshot.details["recipe"] == recipe
            for number in range(60):
                start = rng.randrange(0, 4 * MIB - CLUSTER, 4096)
                await guest_io(vm, rng.choice(["vda", "vdb"]), f"{KINDS[number % 4]} {start} {rng.choice([4, 60])}k")
            shown = tuple([await copied(disk, tmp_path / "copy") for disk in snapshot.disks])
            await guest_io(vm, "vda", "write -P 0x55 0 1M")
        assert shown == truth
        assert await held(vm) | {"sizes": before["sizes"]} == before  # vdb.qcow2 grows
        await guest_io(vm, "vda", "read -P 0x55 0 1M")


async def test_what_is_written_before_the_switch_is_in_it_and_what_comes_after_is_not(
    paused_vm: Vm, tmp_path: Path, recipe: str
) -> None:
    done: list[str] = []

    async def write(pattern: str) -> None:
        for name in ("vda", "vdb"):
            await guest_io(paused_vm, name, f"write -P {pattern} 0 1M")

    async def before(name: str, arguments: dict[str, Any]) -> None:
        if is_switch(recipe, name, arguments) and not done:
            done.append(name)
            await write("0x66")
        elif done == [SWITCH[recipe]] and arguments.get("driver") == "snapshot-access":
            done.append(name)
            await write("0x77")

    made = make_source(paused_vm, tmp_path, socket=tmp_path / "proxy", recipe=recipe)
    async with running_proxy(paused_vm.qmp, made.socket, before), made.snapshot() as snapshot:
        for disk in snapshot.disks:
            assert await copied(disk, tmp_path / "copy") == b"\x66" * MIB + bytes(15 * MIB)
    assert len(done) == 2


async def test_rounds_are_exact_and_one_that_is_not_committed_leaves_nothing(
    qemu: Qemu, tmp_path: Path, recipe: str
) -> None:
    async with two_disks(qemu, tmp_path) as vm:
        for generation, base, kept in ((OLD, None, True), (NEW, OLD, False), (NEW, OLD, True)):
            await guest_io(vm, "vda", "write -P 1 1M 64k")
            async with source(vm, tmp_path, generation, base, recipe=recipe).snapshot() as snapshot:
                await guest_io(vm, "vdb", "write -P 2 2M 64k")
                if base:
                    assert said(snapshot) == [INCREMENTAL] * 2
                    assert await dirty(snapshot.disks[0]) == [(MIB, CLUSTER)]
                    assert await dirty(snapshot.disks[1]) == [(2 * MIB, CLUSTER)]
                assert snapshot.keep
                if kept:
                    await snapshot.keep()
            assert await names(vm) == of(generation if kept else OLD)
        await vm.monitor.execute("quit")
        await vm.process.wait()
    async with (
        two_disks(qemu, tmp_path, name="again") as vm,
        source(vm, tmp_path, OLD, NEW, recipe=recipe).snapshot() as snapshot,
    ):
        assert said(snapshot)[1] == INCREMENTAL  # the qcow2 image holds its bitmap
        assert await dirty(snapshot.disks[1]) == [(2 * MIB, CLUSTER)]


async def test_a_full_fleecing_folder_breaks_the_snapshot_and_not_the_guest(
    qemu: Qemu, tmp_path: Path, recipe: str
) -> None:
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=3M", "none") as small:
        async with running_vm(qemu, tmp_path, [Disk("vda", tmp_path / "vda.raw", 8 * MIB)]) as vm:
            before = await held(vm)
            made = make_source(vm, tmp_path, fleece=small, recipe=recipe)
            async with made.snapshot() as snapshot, snapshot.disks[0].open() as disk:
                await guest_io(vm, "vda", "write -P 2 0 8M")
                await guest_io(vm, "vda", "read -P 2 0 8M")
                with pytest.raises(FsError):
                    await disk.probe()
                assert made.status.health.broken
            assert await held(vm) == before


async def backup(vm: Vm, node: str, folder: Path) -> None:
    """Of somebody else."""
    path = folder / "theirs"
    path.write_bytes(bytes(16 * MIB))
    await vm.monitor.execute("blockdev-add", {"driver": "file", "node-name": "theirs", "filename": str(path)})
    await vm.monitor.execute("blockdev-backup", job_id="theirs", device=node, target="theirs", sync="none")


async def end_backup(vm: Vm) -> None:
    await vm.monitor.execute("job-cancel", id="theirs")
    await vm.monitor.event("JOB_STATUS_CHANGE", id="theirs", status="null")
    await vm.monitor.execute("blockdev-del", {"node-name": "theirs"})


async def refused(vm: Vm, tmp_path: Path, words: Sequence[str], **options: Any) -> None:
    with pytest.raises(UserError) as caught:
        async with make_source(vm, tmp_path, **options).snapshot():
            pytest.fail("was not refused")
    assert any(word in caught.value.what for word in words), caught.value


async def test_a_backup_of_others_is_refused_found_or_borne_and_keeps_its_place(
    paused_vm: Vm, tmp_path: Path, recipe: str
) -> None:
    """Before us, between our looks, while we are there, and while we leave."""
    vm, before, began = paused_vm, await held(paused_vm), False
    await backup(vm, "vda-node", tmp_path)
    await refused(vm, tmp_path, ["a block job of disk vda", "another backup"], recipe=recipe)
    await end_backup(vm)

    async def begin(name: str, arguments: dict[str, Any]) -> None:
        nonlocal began
        if is_switch(recipe, name, arguments) and not began:
            began = True
            await backup(vm, "vda-node", tmp_path)

    async with running_proxy(vm.qmp, tmp_path / "proxy", begin) as proxy:
        await refused(vm, tmp_path, ["somebody is at work on disk vda"], socket=proxy.path, recipe=recipe)
    assert began
    assert not [name for name, _, _ in (await held(vm))["nodes"] if name.startswith("qfsbackup-")]
    await end_backup(vm)
    assert await held(vm) == before
    async with make_source(vm, tmp_path, recipe=recipe).snapshot() as snapshot:
        await guest_io(vm, "vda", "write -P 1 0 1M")
        await backup(vm, "vda-node", tmp_path)
        await guest_io(vm, "vda", "write -P 2 0 2M")
        assert await copied(snapshot.disks[0], tmp_path / "copy") == bytes(16 * MIB)
    assert (tmp_path / "theirs").read_bytes()[: 2 * MIB] == b"\x01" * MIB + bytes(MIB)
    await guest_io(vm, "vda", "write -P 3 2M 1M")
    assert [job for job, _ in (await held(vm))["jobs"]] == ["theirs"]
    await end_backup(vm)
    assert await held(vm) == before


async def test_what_would_hurt_is_refused_by_qemu_while_we_are_there(
    paused_vm: Vm, tmp_path: Path, recipe: str
) -> None:
    async with make_source(paused_vm, tmp_path, recipe=recipe).snapshot():
        for node in (f"{NODES[recipe]}0", "vda-node"):
            for size in (8 * MIB, 32 * MIB):
                with pytest.raises(QmpError, match=r"resize|busy"):
                    await paused_vm.monitor.execute("block_resize", {"node-name": node, "size": size})
            target = {"driver": "null-co", "node-name": "theirs", "size": 16 * MIB}
            await paused_vm.monitor.execute("blockdev-add", target)
            with pytest.raises(QmpError, match="root"):
                await paused_vm.monitor.execute("blockdev-mirror", device=node, target="theirs", sync="none")
            await paused_vm.monitor.execute("blockdev-del", {"node-name": "theirs"})


async def test_a_disk_that_is_unplugged_stays_readable(qemu: Qemu, tmp_path: Path, recipe: str) -> None:
    disks = [Disk(name, tmp_path / f"{name}.raw", MIB, interface="virtio-scsi") for name in ("sda", "sdb")]
    async with running_vm(qemu, tmp_path, disks) as vm:
        async with make_source(vm, tmp_path, recipe=recipe).snapshot() as snapshot:
            await vm.monitor.execute("device_del", id="sda")
            await vm.monitor.event("DEVICE_DELETED", device="sda")
            assert await copied(snapshot.disks[0], tmp_path / "copy") == bytes(MIB)
        assert not [name for name, _, _ in (await held(vm))["nodes"] if name.startswith("qfsbackup-")]


def test_jobs_are_refused_where_the_guest_would_see_their_errors() -> None:
    with pytest.raises(UserError) as caught:
        RECIPES["jobs"].check((10, 0, 2))
    assert caught.value.what == "recipe=jobs needs QEMU 10.1 or newer, and this is 10.0.2"
