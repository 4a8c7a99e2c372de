# SPDX-License-Identifier: LGPL-2.1-or-later
"""Bitmaps that are of no use: ours go where QEMU lets them go, others' stay, and none of them stops anything."""

import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from qfsbackup.mount.chain import open_chain
from qfsbackup.vm.ours import NEW, PREFIX
from tests.harness.disk import Disk
from tests.harness.mount import Result, qfsbackup
from tests.harness.qemu import Qemu
from tests.incremental.chain_lab import CHUNK, SIZE, ChainLab, blockdev, chain_lab, drives, said
from tests.vm.support import held
from tests.vm.test_cleanup import mount_process, ready

State = Callable[[ChainLab], Awaitable[list[str]]]  # what disks the VM has then


def qcow2(lab: ChainLab, disk: str, image: str) -> Disk:
    return Disk(disk, lab.folder / f"{image}.img", SIZE, format="qcow2")


async def command(lab: ChainLab, *words: str, state: Path | None = None) -> Result:
    """Run qfsbackup for the lab's VM."""
    return await qfsbackup(words[0], lab.vm.qmp, "-o", f"vm=vm,state={state or lab.folder}", *words[1:])


async def nodes(lab: ChainLab) -> list[str]:
    """The nodes in QEMU that are ours."""
    found = await lab.vm.monitor.execute("query-named-block-nodes", flat=True)
    return [node["node-name"] for node in found if node["node-name"].startswith(PREFIX)]


# ---- what QEMU does not remove ----


async def an_external_snapshot(lab: ChainLab) -> list[str]:
    place = {"node-name": "vda-node", "snapshot-file": str(lab.folder / "top.img"), "snapshot-node-name": "top"}
    await lab.vm.monitor.execute("blockdev-snapshot-sync", place)
    return ["vda"]


async def an_overlay_made_offline(lab: ChainLab) -> list[str]:
    """As a linked clone is."""
    await lab.off()
    await lab.image("top", "-b", lab.folder / "vda.img", "-F", "qcow2")
    await lab.boot([qcow2(lab, "vda", "top")])
    return ["vda"]


async def an_overlay_over_an_image_whose_qemu_was_killed(lab: ChainLab) -> list[str]:
    """Its bitmaps are inconsistent."""
    await lab.off()
    await lab.boot([qcow2(lab, "vda", "vda")])
    lab.vm.process.kill()
    await lab.vm.process.wait()
    await lab.close()
    await lab.image("top", "-b", lab.folder / "vda.img", "-F", "qcow2")
    await lab.boot([qcow2(lab, "vda", "top")])
    return ["vda"]


async def a_throw_away_overlay(lab: ChainLab) -> list[str]:
    await lab.off()
    drive = f"file={lab.folder}/vda.img,format=qcow2,if=none,id=d"
    await lab.boot([], "-drive", drive, "-device", "virtio-blk-pci,id=vda,drive=d", "-snapshot")
    return ["vda"]


async def a_read_only_image(lab: ChainLab) -> list[str]:
    """Another one has taken its place."""
    await lab.off()
    await lab.image("vdb")
    ro = [*blockdev("ro", lab.folder / "vda.img", read_only=True), "-device", "virtio-scsi-pci"]
    await lab.boot([qcow2(lab, "vda", "vdb")], *ro, "-device", "scsi-cd,drive=ro,id=cd")
    return ["vda"]


STATES = [
    *[an_external_snapshot, an_overlay_made_offline, an_overlay_over_an_image_whose_qemu_was_killed],
    *[a_throw_away_overlay, a_read_only_image],
]


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
async def test_what_qemu_does_not_remove_is_named_and_stops_nothing(
    qemu: Qemu, tmp_path: Path, state: State, caplog: pytest.LogCaptureFixture
) -> None:
    async with chain_lab(qemu, tmp_path) as lab:
        await lab.image("vda")
        await lab.boot([qcow2(lab, "vda", "vda")])
        old = (await lab.backup())["vda"].generation
        disks = await state(lab)
        for statuses in (["new", "invalid"], ["reuse"], ["reuse"]):  # the third is the one that removes the first's
            found = await lab.backup()
            assert all(found[disk].bitmap in statuses for disk in disks), said(found)
            for disk in disks:
                await lab.write(disk, "write -P 3 128k 64k")
        stuck = f"qfsbackup-nas-{old}"
        assert stuck in await lab.bitmaps()
        warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert any(stuck in line and "QEMU does not remove it" in line for line in warned), warned
        assert all("Traceback" not in line for line in warned)
        cleaned = await command(lab, "cleanup")
        assert cleaned.code == 0, cleaned
        assert f"left alone: the bitmap {stuck} of " in cleaned.stdout
        listed = await command(lab, "checkpoints")
        assert f"{stuck} of {lab.folder / 'vda.img'}: of no use" in listed.stdout, listed
        deleted = await command(lab, "checkpoints", "--delete", "nas")
        assert deleted.code == 0, deleted
        assert f"left alone: the bitmap {stuck} of " in deleted.stdout
        assert {name.removesuffix(".low") for name in await lab.bitmaps()} == {stuck}


async def test_a_detached_image_is_rid_of_what_is_of_no_use(qemu: Qemu, tmp_path: Path) -> None:
    """Of an inactive one QEMU tells no bitmaps at all."""
    async with chain_lab(qemu, tmp_path) as lab:
        await lab.image("vda")
        await lab.boot([qcow2(lab, "vda", "vda")])
        await lab.backup()
        await lab.off()
        node = blockdev("loose", lab.folder / "vda.img")
        await lab.boot([qcow2(lab, "vdb", "vdb")], *node)
        if lab.qemu.version >= (10, 0, 0):
            await lab.vm.monitor.execute("blockdev-set-active", {"node-name": "loose", "active": False})
            assert said(await lab.backup())["vdb"].startswith("new")
            await lab.vm.monitor.execute("blockdev-set-active", {"node-name": "loose", "active": True})
        await lab.backup()
        deleted = await command(lab, "checkpoints", "--delete", "nas")
        assert (deleted.code, await lab.bitmaps()) == (0, set()), deleted


async def test_what_stays_in_an_image_that_became_read_only_is_not_called_as_it_was(
    qemu: Qemu, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An external snapshot during a mount that is not committed: QEMU does not remove the new bitmap any more."""
    caplog.set_level(logging.INFO)
    async with chain_lab(qemu, tmp_path) as lab:
        await lab.image("vda")
        await lab.boot([qcow2(lab, "vda", "vda")])
        async with (
            open_chain("nas", lab.folder, CHUNK, in_image=True) as chain,
            lab.source(checkpoint=chain.request).snapshot() as snapshot,
        ):
            await an_external_snapshot(lab)
        name = f"{PREFIX}nas-{snapshot.disks[0].generation}"
        assert {bitmap.removesuffix(".low") for bitmap in await lab.bitmaps()} == {name}
        assert any(f"but for what it does not remove: the bitmap {name} of " in line for line in caplog.messages)
        assert "QEMU is as it was" not in caplog.messages


# ---- whose they are ----


async def test_another_state_folders_bitmaps_stay_and_are_named(
    qemu: Qemu, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with chain_lab(qemu, tmp_path) as lab:
        await lab.image("vda")
        await lab.boot([qcow2(lab, "vda", "vda")])
        first = (await lab.backup())["vda"].generation
        second = lab.folder / "second"
        second.mkdir()
        async with (
            open_chain("nas", second, CHUNK, in_image=True) as chain,
            lab.source(checkpoint=chain.request).snapshot() as snapshot,
        ):
            assert [disk.bitmap for disk in snapshot.disks] == ["new"]
        assert any(f"left alone: the bitmap qfsbackup-nas-{first} of " in line for line in caplog.messages)
        listed = await command(lab, "checkpoints", state=second)
        assert listed.stdout.count(f"nas  the bitmap qfsbackup-nas-{first}") == 1, listed
        assert "made with another state folder" in listed.stdout
        refused = await command(lab, "checkpoints", "--delete", "nas", state=second)
        refused.refused(1, "no target nas has committed")
        assert "--others" in refused.stderr
        await lab.write("vda", "write -P 1 0 64k")
        assert said(await lab.backup()) == {"vda": "reuse"}, "the first chain goes on"
        assert (await command(lab, "checkpoints", "--delete", "nas", "--others", state=second)).code == 0
        assert await lab.bitmaps() == set()
        assert said(await lab.backup())["vda"].startswith("invalid")


async def test_a_state_folder_that_is_missing_is_not_begun_by_mistake(qemu: Qemu, tmp_path: Path) -> None:
    async with chain_lab(qemu, tmp_path) as lab:
        await lab.boot([qcow2(lab, "vda", "vda")])
        before = await held(lab.vm)
        (lab.folder / "mnt").mkdir()
        options = f"target=nas,state={lab.folder}/sate"
        done = await qfsbackup("mount", lab.vm.qmp, lab.folder / "mnt", "-o", options)
        done.refused(2, f"the state folder {lab.folder}/sate does not exist")
        assert f"mkdir -m 700 -p {lab.folder}/sate" in done.stderr
        assert not (lab.folder / "sate").exists()
        assert await held(lab.vm) == before


# ---- what a dead mount began ----


async def test_a_plain_cleanup_finds_the_bitmaps_of_a_mount_that_died(qemu: Qemu, tmp_path: Path) -> None:
    """Without state= or target=: the marks in QEMU tell."""
    async with chain_lab(qemu, tmp_path) as lab:
        await lab.image("vda")
        await lab.boot([qcow2(lab, "vda", "vda")])
        await lab.backup()
        before = await held(lab.vm)
        async with mount_process(lab.vm.qmp, lab.folder, "nas") as process:
            await ready(process)
            process.kill()
            await process.wait()
        new = [name.removeprefix(NEW) for name in await nodes(lab) if name.startswith(NEW)]
        assert len(new) == 1
        assert any(new[0] in name for name in await lab.bitmaps())
        done = await qfsbackup("cleanup", lab.vm.qmp)
        assert done.code == 0, done
        assert f"removed the bitmap qfsbackup-nas-{new[0]} of {tmp_path / 'vda.img'}" in done.stdout
        after = await held(lab.vm)
        assert {key for key in before if before[key] != after[key]} <= {"fdsets", "sizes"}
        assert said(await lab.backup()) == {"vda": "reuse"}


async def test_bases_of_disks_that_changed_places_go_with_the_commit(qemu: Qemu, tmp_path: Path) -> None:
    async with chain_lab(qemu, tmp_path) as lab:
        paths = [await lab.image("a"), await lab.image("b")]
        for order in (paths, paths[::-1]):
            await lab.boot([], *drives(order))
            exports = await lab.backup()
            new = {f"qfsbackup-nas-{export.generation}" for export in exports.values()}
            assert {name.removesuffix(".low") for name in await lab.bitmaps()} == new
            await lab.off()


@pytest.mark.one_qemu
async def test_while_a_mount_lives_nobody_deletes_what_it_records(qemu: Qemu, tmp_path: Path) -> None:
    """Through another QMP socket, and with another state folder."""
    async with chain_lab(qemu, tmp_path) as lab:
        await lab.image("vda")
        second = tmp_path / "second.qmp"
        (tmp_path / "other").mkdir()
        await lab.boot([qcow2(lab, "vda", "vda")], "-qmp", f"unix:{second},server=on,wait=off")
        async with mount_process(lab.vm.qmp, lab.folder, "nas") as process:
            await ready(process)
            before = await lab.bitmaps()
            options = ["-o", f"vm=vm,state={tmp_path / 'other'}", "--delete", "nas", "--others"]
            done = await qfsbackup("checkpoints", second, *options)
            assert (done.code != 0, len(done.stderr.splitlines())) == (True, 2), done
            assert await lab.bitmaps() == before
            process.kill()
            await process.wait()
        done = await qfsbackup("checkpoints", second, *options)
        assert done.code == 0, done
        assert await lab.bitmaps() == set()
