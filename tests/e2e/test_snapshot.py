# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest keeps writing while its VM is mounted: the images are its disks at one instant, and it never notices.

What the disks held at the instant is recorded without the product: a proxy holds it at the command after (or before)
which the disks are known to stand still, and the test copies the disk files.
"""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness.disk import MIB, Disk
from tests.harness.files import assert_same, make_random
from tests.harness.mount import Mount, aside, command, mounted
from tests.harness.pattern import last_of_prefix
from tests.harness.qemu import Qemu, run_img
from tests.harness.qmp_proxy import running_proxy
from tests.harness.shell import writing
from tests.harness.vm import Vm, running_vm
from tests.vm.support import guest_io

SIZE = 8 * MIB
MIXED = ("vda", "vdb", "sda", "vdc")  # as the guest calls them, too: one SCSI disk, for two may swap their names


def mixed_disks(folder: Path) -> list[Disk]:
    """Every way to attach a disk that a guest on q35 can use."""
    return [
        Disk("vda", folder / "vda.img", SIZE),
        Disk("vdb", folder / "vdb.img", SIZE, format="qcow2", legacy=True),
        Disk("sda", folder / "sda.img", SIZE, interface="virtio-scsi", legacy=True),
        Disk("vdc", folder / "vdc.img", SIZE, format="qcow2", throttle=0),
    ]


async def copy_disks(vm: Vm, folder: Path) -> list[Path]:
    """Raw copies of all disks as their files are now; they must stand still and be flushed."""
    await aside(folder.mkdir)
    for disk in vm.disks:
        assert disk.path is not None
        await run_img(vm.qemu, "convert", "-U", "-f", disk.format, "-O", "raw", disk.path, folder / disk.id)
    return [folder / disk.id for disk in vm.disks]


@contextlib.asynccontextmanager
async def recorded(
    vm: Vm, folder: Path, *options: str, before: str = "", after: str = "", stop: bool = False
) -> AsyncIterator[tuple[Mount, list[Path]]]:
    """The VM mounted, and copies of its disks made when the product sent the first `before`, or got the first `after`
    answered. With `stop` the guest stands still from the copy until the first qom-set is done."""
    copies = list[Path]()

    async def copy() -> None:
        if stop:
            await vm.monitor.execute("stop")
        copies.extend(await copy_disks(vm, folder))

    async def on_command(name: str, _: dict[str, Any]) -> None:
        if name == before and not copies:
            await copy()

    async def on_reply(name: str, _: dict[str, Any], _reply: dict[str, Any]) -> None:
        if name == after and not copies:
            await copy()
        if name == "qom-set" and stop and copies and (await vm.monitor.execute("query-status"))["status"] == "paused":
            await vm.monitor.execute("cont")

    async with (
        running_proxy(vm.qmp, folder.with_suffix(".qmp"), on_command, on_reply) as proxy,
        mounted(proxy.path, folder.with_suffix(".mnt"), *options) as mount,
    ):
        assert copies, f"no {before}{after} passed: {proxy.names}"
        yield mount, copies


async def assert_images(mount: Mount, vm: Vm, copies: list[Path]) -> None:
    """Every image is what was recorded, byte for byte."""
    for disk, copy in zip(vm.disks, copies, strict=True):
        await aside(assert_same, mount.image(disk.id), copy)


async def more_writes(vm: Vm, seconds: float) -> None:
    """Let the guest go on for a while; it is the guest that counts the time, so it does run."""
    await vm.shell.run(f"usleep {int(seconds * 1e6)}")


async def test_several_disks_are_one_instant_while_the_guest_writes(qemu: Qemu, tmp_path: Path) -> None:
    async with running_vm(qemu, tmp_path, mixed_disks(tmp_path), guest=True) as vm:
        devices = " ".join(f"/dev/{name}" for name in MIXED)
        async with writing(vm.shell, f"-o {devices}") as writes:
            await more_writes(vm, 0.5)
            async with recorded(vm, tmp_path / "record", after="stop") as (mount, copies):
                await assert_images(mount, vm, copies)
                await more_writes(vm, 2)
                await assert_images(mount, vm, copies)
                status, description = await mount.fresh_status(), await mount.json("vm.json")
            await more_writes(vm, 0.5)
        writes.check()
    assert 0 < last_of_prefix(copies) < writes.writes  # the check of the record: one instant over all disks
    assert description["pause_ms"] > 0
    assert not description["frozen"]
    assert {disk["name"] for disk in description["disks"]} == set(MIXED)
    for name in MIXED:  # the guest did overwrite what was being read
        assert status["disks"][name]["fleecing_used"] >= MIB, status
    assert vm.process.returncode == 0


async def test_a_single_disk_is_one_instant_without_a_pause(qemu: Qemu, tmp_path: Path) -> None:
    disks = [Disk("vda", tmp_path / "vda.qcow2", SIZE, format="qcow2")]
    async with running_vm(qemu, tmp_path, disks, guest=True) as vm:
        async with writing(vm.shell, "/dev/vda") as writes:
            await more_writes(vm, 0.5)
            async with recorded(vm, tmp_path / "record", before="qom-set", stop=True) as (mount, copies):
                await assert_images(mount, vm, copies)
                await more_writes(vm, 1)
                await assert_images(mount, vm, copies)
                assert (await mount.json("vm.json"))["pause_ms"] == 0
        writes.check()
        assert writes.verified > 0


@pytest.mark.parametrize("moment", ["before it is served", "once it is mounted"])
@pytest.mark.parametrize("change", ["write -P 9 64k 64k", "write -z -u 64k 64k", "discard 64k 64k"])
async def test_a_read_over_copied_and_untouched_clusters_is_the_instant(
    qemu: Qemu, tmp_path: Path, change: str, moment: str
) -> None:
    """QEMU before 8.0 takes a copied cluster from the disk, as it is now, where it is asked for together with an
    untouched one behind it, for its data as well as for its block status: hbitmap_status() returned false for a dirty
    run that ends inside the range (fixed by "hbitmap: fix hbitmap_status() return first dirty bit position")."""
    disk = make_random(tmp_path / "vda.raw", MIB)
    before = await aside(disk.read_bytes)

    async def on_command(name: str, _: dict[str, Any]) -> None:
        if (name, moment) == ("nbd-server-start", "before it is served"):
            await guest_io(vm, "vda", change)

    async with (
        running_vm(qemu, tmp_path, [Disk("vda", disk)]) as vm,
        running_proxy(vm.qmp, tmp_path / "proxy.qmp", on_command) as proxy,
        mounted(proxy.path, tmp_path / "mnt") as mount,
    ):
        if moment == "once it is mounted":
            await guest_io(vm, "vda", change)
        assert await aside(disk.read_bytes) != before
        assert await aside(mount.image("vda").read_bytes) == before


async def make_file_systems(vm: Vm) -> None:
    for name in ("vda", "vdb"):
        await vm.shell.run(
            f"mkfs.ext4 -q /dev/{name} && mkdir /mnt/{name} && mount /dev/{name} /mnt/{name} &&"
            f" dd if=/dev/zero of=/mnt/{name}/records bs=1M count=4 && echo {name} > /mnt/{name}/name && sync"
        )


async def file_system(image: Path) -> tuple[bool, bool]:
    """Is the ext4 file system consistent, and does it need its journal replayed?"""
    check = await command("e2fsck", "-fn", image)
    features = await command("dumpe2fs", "-h", image)
    assert "Filesystem features" in features.stdout, features.stderr
    return check.code == 0, "needs_recovery" in features.stdout


async def mounted_file(image: Path, mountpoint: Path, name: str) -> str:
    """A file out of the file system in `image`, mounted through a loop device."""
    mountpoint.mkdir()  # noqa: ASYNC240 - nothing is mounted there yet
    done = await command("mount", "-o", "ro,loop", "-t", "ext4", image, mountpoint)
    assert done.code == 0, done.stderr
    try:
        return await aside((mountpoint / name).read_text)
    finally:
        await command("umount", mountpoint)


async def test_a_frozen_guest_is_mounted_clean_and_stays_intact(guest_vm: Vm, tmp_path: Path) -> None:
    vm = guest_vm
    await make_file_systems(vm)
    images = [disk.path for disk in vm.disks]
    async with writing(vm.shell, "-o /mnt/vda/records /mnt/vdb/records") as writes:
        await more_writes(vm, 0.5)
        agent = f"agent={vm.agent},freeze=require"
        async with recorded(vm, tmp_path / "frozen", agent, before="qom-set", stop=True) as (mount, copies):
            await more_writes(vm, 1)
            await assert_images(mount, vm, copies)
            description = await mount.json("vm.json")
            for disk in vm.disks:
                assert await file_system(mount.image(disk.id)) == (True, False)
                assert await mounted_file(mount.image(disk.id), tmp_path / f"loop-{disk.id}", "name") == f"{disk.id}\n"
        async with mounted(vm.qmp, tmp_path / "unfrozen", "freeze=off") as mount:  # the check can fail
            assert (await file_system(mount.image("vda")))[1]
        await more_writes(vm, 0.5)
    writes.check()
    assert (description["frozen"], description["pause_ms"]) == (True, 0)
    await vm.shell.run("umount /mnt/vda /mnt/vdb")
    await vm.monitor.execute("quit")
    assert await vm.process.wait() == 0
    for number, image in enumerate(images):
        assert image is not None
        await run_img(vm.qemu, "convert", "-O", "raw", image, tmp_path / f"after-{number}")
        assert await file_system(tmp_path / f"after-{number}") == (True, False)
