# SPDX-License-Identifier: LGPL-2.1-or-later
"""Events after which an image may show other bytes: offline, by block jobs, by somebody's commands.

Each begins with a backup that is committed, and tells what the next one must say of each disk.
"""

from tests.harness.disk import Disk
from tests.incremental.chain_lab import SIZE, ChainLab, drives, said
from tests.incremental.names_events import GONE, one, qcow2


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


async def a_backing_file_that_somebody_writes_to(lab: ChainLab) -> dict[str, str]:
    """Another clone's commit, say."""
    disks = await overlay(lab)
    await lab.off()
    await lab.image("clone", "-b", lab.folder / "base.img", "-F", "qcow2")
    await lab.boot([qcow2(lab, "vda", "clone")])
    await lab.write("vda", "write -P 7 448k 64k")
    await lab.off()
    await lab.img("commit", "-q", "-f", "qcow2", lab.folder / "clone.img")
    await lab.boot(disks)
    return {"vda": "invalid the files below it were replaced or written to"}


async def an_offline_commit(lab: ChainLab) -> dict[str, str]:
    disks = await overlay(lab)
    await lab.off()
    await lab.img("commit", "-q", "-f", "qcow2", lab.folder / "vda.img")
    await lab.boot(disks)
    return {"vda": "invalid the files below it were replaced or written to"}


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


IMAGES = [
    *[a_larger_image, an_image_cut_off_and_grown_again, an_internal_snapshot_gone_back_to],
    *[a_backing_file_that_somebody_writes_to, another_backing_file_without_a_write],
    *[another_backing_file_with_the_same_content, an_offline_commit],
    *[an_offline_commit_into_the_image_that_was_backed_up, an_offline_commit_of_what_was_backed_up_meanwhile],
    *[an_external_snapshot, a_commit_and_its_pivot, a_commit_and_its_pivot_with_a_backup_before, a_stream],
    *[a_mirror_and_its_pivot, another_file_below_a_node, a_throw_away_overlay, somebodys_bitmap_of_our_name],
]
