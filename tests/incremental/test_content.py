# SPDX-License-Identifier: LGPL-2.1-or-later
"""A chain belongs to a disk's content, not to its name: after each of these events what a tool holds after the next
backup is the disk, byte for byte, and where the content may be another's, the backup is full and says why.
"""

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tests.harness.disk import Disk
from tests.harness.qemu import Qemu
from tests.incremental.chain_lab import SIZE, ChainLab, blockdev, drives, said

GONE = "invalid the bitmap qfsbackup-nas-"
Case = Callable[[ChainLab], Awaitable[dict[str, str]]]


def qcow2(lab: ChainLab, disk: str, image: str | None = None) -> Disk:
    """A disk whose bitmaps are inside its image."""
    return Disk(disk, lab.folder / f"{image or disk}.img", SIZE, format="qcow2")


async def one(lab: ChainLab) -> list[Disk]:
    """A VM with a qcow2 disk, backed up, and written to since."""
    await lab.image("vda")
    disks = [qcow2(lab, "vda")]
    await lab.boot(disks)
    await lab.backup()
    await lab.write("vda", "write -P 1 64k 64k")
    return disks


async def scsi(lab: ChainLab, form: str = "qcow2", *, other_size: int = SIZE) -> None:
    """Two disks that can be unplugged without a guest, backed up and written to since."""
    paths = [await lab.image("sda", form=form), await lab.image("sdb", form=form, size=other_size)]
    nodes = [word for name, path in zip(("na", "nb"), paths, strict=True) for word in blockdev(name, path, form)]
    await lab.boot([], "-device", "virtio-scsi-pci,id=scsi0", *nodes)
    await lab.plug("sda", "na")
    await lab.plug("sdb", "nb")
    await lab.backup()
    for name in ("sda", "sdb"):
        await lab.write(name, "write -P 1 64k 64k")


async def a_restart(lab: ChainLab) -> dict[str, str]:
    """The one that must stay incremental; but a raw image holds no bitmap."""
    await lab.image("vda")
    await lab.image("vdb", form="raw")
    disks = [qcow2(lab, "vda"), Disk("vdb", lab.folder / "vdb.img", SIZE)]
    await lab.boot(disks)
    await lab.backup()
    await lab.write("vda", "write -P 1 64k 64k")
    await lab.write("vdb", "write -P 1 64k 64k")
    await lab.off()
    await lab.boot(disks)
    return {"vda": "reuse", "vdb": "is not there: QEMU was restarted"}


async def two_drives_that_change_places(lab: ChainLab) -> dict[str, str]:
    paths = [await lab.image("a"), await lab.image("b")]
    await lab.boot([], *drives(paths))
    await lab.backup()
    await lab.off()
    await lab.boot([], *drives(paths[::-1]))
    return {
        "virtio0": "carries the bitmap of the disk that was called virtio1",
        "virtio1": "carries the bitmap of the disk that was called virtio0",
    }


async def a_drive_put_in_front(lab: ChainLab) -> dict[str, str]:
    paths = [await lab.image("a"), await lab.image("b")]
    await lab.boot([], *drives(paths))
    await lab.backup()
    await lab.off()
    await lab.boot([], *drives([await lab.image("c"), *paths]))
    return {"virtio0": GONE, "virtio1": "was called virtio0", "virtio2": "new"}


async def another_id_without_a_restart(lab: ChainLab) -> dict[str, str]:
    await scsi(lab)
    await lab.unplug("sda")
    await lab.plug("other", "na")
    return {"sdb": "reuse", "other": "new no backup of this disk was committed to the target yet; it carries"}


async def two_ids_that_change_places_without_a_restart(lab: ChainLab) -> dict[str, str]:
    await scsi(lab, "raw")
    await lab.unplug("sda")
    await lab.unplug("sdb")
    await lab.plug("sda", "nb")
    await lab.plug("sdb", "na")
    return {"sda": "was called sdb", "sdb": "was called sda"}


async def another_size_under_the_name_without_a_restart(lab: ChainLab) -> dict[str, str]:
    await scsi(lab, "raw", other_size=2 * SIZE)
    await lab.unplug("sda")
    await lab.unplug("sdb")
    await lab.plug("sda", "nb")
    return {"sda": "was called sdb"}


async def the_data_disk_under_the_system_disks_name(lab: ChainLab) -> dict[str, str]:
    """With another size, too."""
    await lab.image("vda")
    await lab.image("vdb", size=2 * SIZE)
    await lab.boot([qcow2(lab, "vda"), qcow2(lab, "vdb")])
    await lab.backup()
    await lab.off()
    await lab.boot([qcow2(lab, "vda", "vdb")])
    return {"vda": "was called vdb"}


async def an_older_copy(lab: ChainLab) -> dict[str, str]:
    """It has the bitmap of the commit before the last one."""
    disks = await one(lab)
    await lab.off()
    lab.copy("vda", "old")
    await lab.boot(disks)
    await lab.backup()
    await lab.off()
    lab.copy("old", "vda")
    await lab.boot(disks)
    return {"vda": GONE}


async def a_copy_made_after_the_last_commit(lab: ChainLab) -> dict[str, str]:
    """What the VM wrote since the copy is gone, and none of it was ever backed up."""
    disks = await one(lab)
    await lab.off()
    lab.copy("vda", "copy")
    await lab.boot(disks)
    await lab.write("vda", "write -P 2 256k 64k")
    await lab.backup(commit=False)
    await lab.off()
    lab.copy("copy", "vda")
    await lab.boot(disks)
    return {"vda": "reuse"}


async def a_copy_of_another_disk(lab: ChainLab) -> dict[str, str]:
    await lab.image("vda")
    await lab.image("vdb")
    disks = [qcow2(lab, "vda"), qcow2(lab, "vdb")]
    await lab.boot(disks)
    await lab.backup()
    await lab.off()
    lab.copy("vdb", "vda")
    await lab.boot(disks)
    return {"vda": "was called vdb", "vdb": "reuse"}


async def a_clone_of_the_same_name_and_uuid(lab: ChainLab) -> dict[str, str]:
    """Both come in turn: each finds that the last commit was not its own."""
    disks = await one(lab)
    await lab.off()
    lab.copy("vda", "clone")
    await lab.boot([qcow2(lab, "vda", "clone")])
    await lab.write("vda", "write -P 3 512k 64k")
    assert said(await lab.backup()) == {"vda": "reuse"}, "the clone has all that was written since the commit"
    await lab.off()
    await lab.boot(disks)
    return {"vda": GONE}


async def a_larger_image(lab: ChainLab) -> dict[str, str]:
    disks = await one(lab)
    await lab.off()
    await lab.img("resize", "-q", "-f", "qcow2", lab.folder / "vda.img", str(2 * SIZE))
    await lab.boot(disks)
    return {"vda": "reuse"}


async def an_image_cut_off_and_grown_again(lab: ChainLab) -> dict[str, str]:
    disks = await one(lab)
    await lab.off()
    await lab.img("resize", "-q", "-f", "qcow2", "--shrink", lab.folder / "vda.img", str(SIZE // 2))
    await lab.img("resize", "-q", "-f", "qcow2", lab.folder / "vda.img", str(SIZE))
    await lab.boot(disks)
    return {"vda": "reuse"}


async def an_internal_snapshot_gone_back_to(lab: ChainLab) -> dict[str, str]:
    """QEMU does it once our bitmaps are off."""
    path = await lab.image("vda")
    await lab.img("snapshot", "-c", "before", path)
    disks = [qcow2(lab, "vda")]
    await lab.boot(disks)
    await lab.write("vda", "write -P 1 0 512k")
    exports = await lab.backup()
    await lab.off()
    name = f"qfsbackup-nas-{exports['vda'].generation}"
    for bitmap in (name, f"{name}.low"):
        await lab.img("bitmap", "--remove", path, bitmap)
    await lab.img("snapshot", "-a", "before", path)
    await lab.boot(disks)
    return {"vda": GONE}


async def overlay(lab: ChainLab) -> list[Disk]:
    """A disk with a backing file, backed up and written to since; another backing file is there, too."""
    base = await lab.image("base")
    await lab.image("other")
    await lab.image("vda", "-b", base, "-F", "qcow2")
    disks = [qcow2(lab, "vda")]
    await lab.boot(disks)
    await lab.write("vda", "write -P 1 0 64k")
    await lab.backup()
    await lab.write("vda", "write -P 1 64k 64k")
    return disks


async def another_backing_file_without_a_write(lab: ChainLab) -> dict[str, str]:
    disks = await overlay(lab)
    await lab.off()
    other = lab.folder / "other.img"
    await lab.img("rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", other, lab.folder / "vda.img")
    await lab.boot(disks)
    return {"vda": "invalid the files below it changed from"}


async def another_backing_file_with_the_same_content(lab: ChainLab) -> dict[str, str]:
    disks = await overlay(lab)
    await lab.off()
    await lab.img("rebase", "-f", "qcow2", "-F", "qcow2", "-b", lab.folder / "other.img", lab.folder / "vda.img")
    await lab.boot(disks)
    return {"vda": "invalid the files below it changed from"}


async def an_offline_commit(lab: ChainLab) -> dict[str, str]:
    disks = await overlay(lab)
    await lab.off()
    await lab.img("commit", "-q", "-f", "qcow2", lab.folder / "vda.img")
    await lab.boot(disks)
    return {"vda": "reuse"}


async def an_offline_commit_into_the_image_that_was_backed_up(lab: ChainLab) -> dict[str, str]:
    """Its bitmap has recorded what qemu-img wrote."""
    disks = await one(lab)
    await lab.off()
    await lab.image("top", "-b", lab.folder / "vda.img", "-F", "qcow2")
    await lab.boot([qcow2(lab, "vda", "top")])
    await lab.write("vda", "write -P 5 320k 64k")
    await lab.off()
    await lab.img("commit", "-q", "-d", "-f", "qcow2", lab.folder / "top.img")
    await lab.boot(disks)
    return {"vda": "reuse"}


async def an_offline_commit_of_what_was_backed_up_meanwhile(lab: ChainLab) -> dict[str, str]:
    disks = await one(lab)
    await lab.off()
    await lab.image("top", "-b", lab.folder / "vda.img", "-F", "qcow2")
    await lab.boot([qcow2(lab, "vda", "top")])
    await lab.write("vda", "write -P 5 320k 64k")
    assert said(await lab.backup())["vda"].startswith(GONE)
    await lab.off()
    await lab.img("commit", "-q", "-d", "-f", "qcow2", lab.folder / "top.img")
    await lab.boot(disks)
    return {"vda": GONE}


async def snapshot(lab: ChainLab) -> None:
    """An external snapshot while the VM runs."""
    place = {"node-name": "vda-node", "snapshot-file": str(lab.folder / "top.img"), "snapshot-node-name": "top"}
    await lab.vm.monitor.execute("blockdev-snapshot-sync", place)
    await lab.write("vda", "write -P 5 320k 64k")


async def an_external_snapshot(lab: ChainLab) -> dict[str, str]:
    await one(lab)
    await snapshot(lab)
    return {"vda": GONE}


async def a_commit_and_its_pivot(lab: ChainLab) -> dict[str, str]:
    """Back on the image that was backed up; its bitmap has recorded what the job wrote."""
    await one(lab)
    await snapshot(lab)
    await lab.write("vda", "discard 0 64k")
    await lab.job("block-commit", device="top", top_node="top", base_node="vda-node")
    return {"vda": "reuse"}


async def a_commit_and_its_pivot_with_a_backup_before(lab: ChainLab) -> dict[str, str]:
    await one(lab)
    await snapshot(lab)
    await lab.backup()
    await lab.write("vda", "write -P 6 640k 64k")
    await lab.job("block-commit", device="top", top_node="top", base_node="vda-node")
    return {"vda": GONE}


async def a_stream(lab: ChainLab) -> dict[str, str]:
    await overlay(lab)
    await lab.job("block-stream", device="vda-node")
    return {"vda": "invalid the files below it changed from"}


async def a_mirror_and_its_pivot(lab: ChainLab) -> dict[str, str]:
    await one(lab)
    path = lab.folder / "mirror.img"
    await lab.img("create", "-q", "-f", "qcow2", path, str(SIZE))
    file = {"driver": "file", "filename": str(path)}
    await lab.vm.monitor.execute("blockdev-add", {"driver": "qcow2", "node-name": "mirror", "file": file})
    await lab.job("blockdev-mirror", device="vda-node", target="mirror", sync="full")
    return {"vda": GONE}


async def another_file_below_a_node(lab: ChainLab) -> dict[str, str]:
    """The bitmap stays on the node, which shows other bytes now."""
    paths = [await lab.image(name, form="raw") for name in ("a", "b")]
    files = [{"driver": "file", "node-name": path.stem, "filename": str(path)} for path in paths]
    await lab.boot([Disk("vda", paths[0], SIZE)])
    await lab.backup()
    for file in files[1:]:
        await lab.vm.monitor.execute("blockdev-add", file)
    options = {"driver": "raw", "node-name": "vda-node", "file": "b"}
    await lab.vm.monitor.execute("blockdev-reopen", {"options": [options]})
    return {"vda": "invalid its file changed from"}


async def a_throw_away_overlay(lab: ChainLab) -> dict[str, str]:
    """With -snapshot QEMU writes to a file that is gone with it."""
    path = await lab.image("a")
    for _ in range(2):
        await lab.boot([], *drives([path]), "-snapshot")
        await lab.backup()
        await lab.write("virtio0", "write -P 1 64k 64k")
        await lab.off()
    await lab.boot([], *drives([path]))
    return {"virtio0": GONE}


async def somebodys_bitmap_of_our_name(lab: ChainLab) -> dict[str, str]:
    """Removed and made again, it has lost its companion."""
    await one(lab)
    for name in await lab.bitmaps():
        await lab.vm.monitor.execute("block-dirty-bitmap-remove", node="vda-node", name=name)
        if not name.endswith(".low"):
            bitmap = {"node": "vda-node", "name": name, "granularity": 65536, "persistent": True}
            await lab.vm.monitor.execute("block-dirty-bitmap-add", bitmap)
    return {"vda": "has lost its companion"}


CASES: list[Case] = [
    *[a_restart, two_drives_that_change_places, a_drive_put_in_front, another_id_without_a_restart],
    *[two_ids_that_change_places_without_a_restart, another_size_under_the_name_without_a_restart],
    *[the_data_disk_under_the_system_disks_name, an_older_copy, a_copy_made_after_the_last_commit],
    *[a_copy_of_another_disk, a_clone_of_the_same_name_and_uuid, a_larger_image, an_image_cut_off_and_grown_again],
    *[an_internal_snapshot_gone_back_to, another_backing_file_without_a_write],
    *[another_backing_file_with_the_same_content, an_offline_commit],
    *[an_offline_commit_into_the_image_that_was_backed_up, an_offline_commit_of_what_was_backed_up_meanwhile],
    *[an_external_snapshot, a_commit_and_its_pivot, a_commit_and_its_pivot_with_a_backup_before, a_stream],
    *[a_mirror_and_its_pivot, another_file_below_a_node, a_throw_away_overlay, somebodys_bitmap_of_our_name],
]


@pytest.mark.parametrize("happens", CASES, ids=lambda case: case.__name__)
async def test_what_is_held_after_it_is_the_disk_itself(qemu: Qemu, tmp_path: Path, happens: Case) -> None:
    lab = ChainLab(qemu, tmp_path)
    try:
        expected = await happens(lab)
        for disk in expected:
            await lab.write(disk, "write -P 9 192k 64k")
        found = said(await lab.backup())
        assert found.keys() == expected.keys()
        assert all(words in found[disk] for disk, words in expected.items()), found
        for disk in expected:
            await lab.write(disk, "write -P 10 0 64k")
        assert said(await lab.backup()) == dict.fromkeys(expected, "reuse")
        assert len([name for name in await lab.bitmaps() if not name.endswith(".low")]) >= len(expected)
    finally:
        await lab.close()
