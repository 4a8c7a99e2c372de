# SPDX-License-Identifier: LGPL-2.1-or-later
"""Events after which a disk may be called otherwise, or another image be under its name.

Each begins with a backup that is committed, and tells what the next one must say of each disk.
"""

from tests.harness.disk import Disk
from tests.incremental.chain_lab import SIZE, ChainLab, blockdev, drives, said

GONE = "invalid the bitmap qfsbackup-nas-"


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


async def two_ids_that_change_places_and_back_without_a_commit(lab: ChainLab) -> dict[str, str]:
    """The bitmaps of the commit count again, but what the tools have is of the other disk."""
    await scsi(lab, "raw")
    for nodes in ("nb", "na"), ("na", "nb"):
        await lab.unplug("sda")
        await lab.unplug("sdb")
        await lab.plug("sda", nodes[0])
        await lab.plug("sdb", nodes[1])
        if nodes == ("nb", "na"):
            await lab.backup(commit=False)
    return {"sda": "reuse", "sdb": "reuse"}


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


NAMES = [
    *[a_restart, two_drives_that_change_places, a_drive_put_in_front, another_id_without_a_restart],
    *[two_ids_that_change_places_without_a_restart, another_size_under_the_name_without_a_restart],
    two_ids_that_change_places_and_back_without_a_commit,
    *[the_data_disk_under_the_system_disks_name, an_older_copy, a_copy_made_after_the_last_commit],
    *[a_copy_of_another_disk, a_clone_of_the_same_name_and_uuid],
]
