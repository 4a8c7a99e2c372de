# SPDX-License-Identifier: LGPL-2.1-or-later
"""A chain belongs to a disk's content, not to its name: what a tool holds after a backup is the disk, byte for byte,
and where the content may be another's, the backup is full and says why.
"""

from pathlib import Path
from typing import Any

from tests.harness.mount import aside
from tests.harness.qemu import Qemu, run_img
from tests.harness.vm import Vm, running_vm
from tests.incremental.support import Bed, SkippingTool, bitmap_of, fill


async def content(vm: Vm, device: str, copy: Path) -> bytes:
    """A disk as it is now, by the name that QEMU has for its drive; found without the product."""
    await vm.monitor.execute("human-monitor-command", {"command-line": f'qemu-io {device} "flush"'})
    [block] = [block for block in await vm.monitor.execute("query-block") if block["device"] == device]
    image = block["inserted"]["image"]
    await run_img(vm.qemu, "convert", "-U", "-f", image["format"], "-O", "raw", image["filename"], copy)
    return await aside(copy.read_bytes)


async def back_up(lab: Bed, tool: SkippingTool, *disks: str) -> dict[str, Any]:
    """A backup that is committed; what the tool then holds is what the disks are. vm.json."""
    async with lab.mounted("nas", "vm=vm") as mount:
        description: dict[str, Any] = await mount.json("vm.json")
        await tool.take(mount)
        await lab.commit()
    for disk in disks:
        assert tool.image(disk) == await content(lab.vm, disk, lab.folder / "now"), disk
    return description


def reasons(description: dict[str, Any]) -> dict[str, str]:
    """Why each disk's backup is full."""
    return {disk["name"]: disk["bitmap_reason"] for disk in description["disks"]}


async def test_two_disks_that_change_places_are_full_and_right(qemu: Qemu, tmp_path: Path) -> None:
    """QEMU calls them virtio0 and virtio1 in the order of its command line, and their bitmaps are inside of them."""
    await fill(qemu, tmp_path)
    await run_img(qemu, "convert", "-f", "raw", "-O", "qcow2", tmp_path / "vda.img", tmp_path / "vdc.img")
    drives = [f"file={tmp_path}/{name}.img,format=qcow2,if=virtio" for name in ("vdb", "vdc")]
    tool = SkippingTool()
    for number, order in enumerate([drives, drives[::-1]]):
        arguments = [word for drive in order for word in ("-drive", drive)]
        async with running_vm(qemu, tmp_path, [], extra_args=arguments, name=f"vm{number}") as vm:
            lab = Bed(vm, tmp_path)
            description = await back_up(lab, tool, "virtio0", "virtio1")
            if number == 0:
                assert bitmap_of(description) == {"virtio0": "new", "virtio1": "new"}
                continue
            assert bitmap_of(description) == {"virtio0": "invalid", "virtio1": "invalid"}
            assert "carries the bitmap of the disk that was called virtio1" in reasons(description)["virtio0"]
            assert "carries the bitmap of the disk that was called virtio0" in reasons(description)["virtio1"]
            assert bitmap_of(await back_up(lab, tool, "virtio0", "virtio1")) == {"virtio0": "reuse", "virtio1": "reuse"}
            [old] = [one["generation"] for one in description["disks"] if one["name"] == "virtio0"]
            async with lab.mounted("nas", "vm=vm") as mount:
                status = (await mount.status())["disks"]
                assert {(one["base"], one["generation"]) for one in (await mount.json("vm.json"))["disks"]} == {
                    (one["base"], one["generation"]) for one in status.values()
                }
                assert len({one[key] for one in status.values() for key in ("base", "generation")} | {old}) == 5
