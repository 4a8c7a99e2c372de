# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is stored in a disk's image, and what is not: where QEMU refuses it, where nobody wants it, and how it goes."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.harness.disk import Disk
from tests.harness.mount import command, mounted, qfsbackup
from tests.harness.qemu import Qemu, run_img
from tests.harness.qmp_proxy import running_proxy
from tests.incremental.chain_lab import SIZE, ChainLab, chain_lab, drives, said
from tests.vm.refusing import running_refusing
from tests.vm.support import held

REFUSED = "Device has active dirty bitmaps"


def qcow2(lab: ChainLab, disk: str) -> Disk:
    return Disk(disk, lab.folder / f"{disk}.img", SIZE, format="qcow2")


async def info(lab: ChainLab, name: str) -> dict[str, Any]:
    """What qemu-img says of an image, but for the space that it takes."""
    found = json.loads(await run_img(lab.qemu, "info", "--output=json", lab.folder / f"{name}.img"))
    return {key: value for key, value in found.items() if key not in ("actual-size", "children")}


async def hmp(lab: ChainLab, line: str) -> str:
    said = await lab.vm.monitor.execute("human-monitor-command", {"command-line": line})
    return str(said).strip()


async def test_what_cannot_hold_a_bitmap_gets_one_that_ends_with_qemu(qemu: Qemu, tmp_path: Path) -> None:
    """Its neighbours are not concerned."""
    async with chain_lab(qemu, tmp_path) as lab:
        await run_img(qemu, "create", "-q", "-f", "qcow2", "-o", "compat=0.10", tmp_path / "vda.img", str(SIZE))
        await lab.image("vdb")
        await lab.image("vdc", form="raw")
        disks = [qcow2(lab, "vda"), qcow2(lab, "vdb"), Disk("vdc", tmp_path / "vdc.img", SIZE)]
        await lab.boot(disks)
        exports = await lab.backup()
        assert "qcow2 v2" in exports["vda"].transient
        assert (exports["vdb"].transient, exports["vdc"].transient) == ("", "a raw image holds none")
        for disk in exports:
            await lab.write(disk, "write -P 1 64k 64k")
        assert said(await lab.backup()) == dict.fromkeys(exports, "reuse")
        await lab.off()
        await lab.boot(disks)
        found = said(await lab.backup())
        assert [found[disk].split()[0] for disk in exports] == ["invalid", "reuse", "invalid"]


@pytest.mark.one_qemu
async def test_whatever_reason_qemu_has_to_refuse_it_is_shown(qemu: Qemu, tmp_path: Path) -> None:
    """The bitmap directory may be full, or hold too many: the test says no instead, for that takes minutes."""
    async with chain_lab(qemu, tmp_path) as lab:
        await lab.image("vda")
        await lab.boot([qcow2(lab, "vda")])
        async with running_refusing(lab.vm.qmp, tmp_path / "proxy") as refusing:
            refusing.command("transaction", 0)
            exports = await lab.backup(socket=tmp_path / "proxy")
        assert exports["vda"].transient == "refused by the test"
        nodes = await lab.vm.monitor.execute("query-named-block-nodes", flat=True)
        assert [one["persistent"] for node in nodes for one in node.get("dirty-bitmaps", ())] == [False, False]
        assert (await lab.backup())["vda"].transient == ""


async def test_all_that_can_be_refused_is_done_before_the_guest_stands_still(qemu: Qemu, tmp_path: Path) -> None:
    """The new bitmap is there by then, and only cleared."""
    async with chain_lab(qemu, tmp_path) as lab:
        await lab.image("vda")
        await lab.image("vdb")
        await lab.boot([qcow2(lab, "vda"), qcow2(lab, "vdb")])
        await lab.backup()
        await lab.vm.monitor.execute("cont")
        async with running_proxy(lab.vm.qmp, tmp_path / "proxy") as proxy:
            await lab.backup(socket=proxy.path)
        names = [name for name, _ in proxy.commands]
        still = proxy.commands[names.index("stop") : names.index("cont")]
        done = [action["type"] for name, given in still if name == "transaction" for action in given["actions"]]
        assert done == ["block-dirty-bitmap-clear"] * 2 + ["block-dirty-bitmap-merge"] * 2
        assert "block-dirty-bitmap-add" not in [name for name, _ in still]


async def test_a_mount_without_a_target_and_a_target_deleted_leave_nothing(qemu: Qemu, tmp_path: Path) -> None:
    async with chain_lab(qemu, tmp_path) as lab:
        await lab.image("vda")
        before = await info(lab, "vda")
        content = (tmp_path / "vda.img").read_bytes()
        await lab.boot([qcow2(lab, "vda")])
        running = await held(lab.vm)
        async with lab.source().snapshot():
            pass
        assert await held(lab.vm) == running
        await lab.off()
        assert (tmp_path / "vda.img").read_bytes() == content
        await lab.boot([qcow2(lab, "vda")])
        await lab.backup()
        await lab.backup(commit=False)
        deleted = await qfsbackup("checkpoints", lab.vm.qmp, "-o", f"vm=vm,state={tmp_path}", "--delete", "nas")
        assert deleted.code == 0, deleted
        after = await held(lab.vm)
        assert {key for key in after if after[key] != running[key]} <= {"sizes", "fdsets"}
        await lab.off()
        assert await info(lab, "vda") == before


async def test_bitmaps_in_the_image_keep_qemu_from_going_back_until_one_command_takes_them_off(
    qemu: Qemu, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with chain_lab(qemu, tmp_path) as lab:
        image = await lab.image("vda")
        await lab.boot([qcow2(lab, "vda")])
        assert await hmp(lab, "savevm before") == ""
        await lab.backup()
        [line] = [line for line in caplog.messages if "internal snapshots" in line]
        assert "(before), and QEMU goes back to none of them" in line
        assert f"qfsbackup checkpoints {lab.vm.qmp} --delete nas" in line
        assert REFUSED in await hmp(lab, "loadvm before")
        (await qfsbackup("checkpoints", image)).refused(2, f"{image} is in use")
        (await qfsbackup("checkpoints", image, "--delete", "nas")).refused(2, f"{image} is in use")
        await qfsbackup("checkpoints", lab.vm.qmp, "-o", f"vm=vm,state={tmp_path}", "--delete", "nas")
        assert await hmp(lab, "loadvm before") == ""
        exports = await lab.backup()
        await lab.off()
        back = await command(qemu.img, "snapshot", "-a", "before", image)
        assert REFUSED in back.stderr
        generation = exports["vda"].generation
        listed = (await qfsbackup("checkpoints", image)).stdout.splitlines()
        name = f"qfsbackup-nas-{generation}"
        assert sorted(listed) == [f"nas  {generation}  {name}", f"nas  {generation}  {name}.low"]
        (await qfsbackup("checkpoints", image, "--delete", "usb")).refused(1, "no bitmap of target usb")
        deleted = await qfsbackup("checkpoints", image, "--delete", "nas")
        assert (deleted.code, len(deleted.stdout.splitlines())) == (0, 2), deleted
        assert (await command(qemu.img, "snapshot", "-a", "before", image)).code == 0
        await lab.boot([qcow2(lab, "vda")])
        assert said(await lab.backup())["vda"].startswith("invalid")


@pytest.mark.one_qemu
async def test_an_image_that_holds_no_bitmaps_is_named_in_two_lines(qemu: Qemu, tmp_path: Path) -> None:
    raw = tmp_path / "raw.img"
    await run_img(qemu, "create", "-q", "-f", "raw", raw, "1M")
    (await qfsbackup("checkpoints", raw)).refused(1, f"{raw} cannot be looked into")
    plain = tmp_path / "plain.qcow2"
    await run_img(qemu, "create", "-q", "-f", "qcow2", plain, "1M")
    assert (await qfsbackup("checkpoints", plain)).stdout == f"no target has a bitmap in {plain}\n"


async def test_transient_bitmaps_store_nothing_in_the_image(qemu: Qemu, tmp_path: Path) -> None:
    """A chain as long as QEMU lives. A new QEMU starts from an internal snapshot, as libvirt reverts to one."""
    async with chain_lab(qemu, tmp_path) as lab:
        await lab.image("vda")
        await lab.boot([qcow2(lab, "vda")])
        assert await hmp(lab, "savevm before") == ""
        await lab.backup()  # in the image
        for status in ("reuse", "reuse"):
            await lab.write("vda", "write -P 1 64k 64k")
            exports = await lab.backup(in_image=False)
            assert (exports["vda"].bitmap, exports["vda"].transient) == (status, "bitmaps=transient")
        assert REFUSED in await hmp(lab, "loadvm before"), "a QEMU that runs counts those, too"
        await lab.off()
        assert "bitmaps" not in (await info(lab, "vda"))["format-specific"]["data"]
        await lab.boot([qcow2(lab, "vda")], "-loadvm", "before")
        assert said(await lab.backup(in_image=False))["vda"].startswith("invalid")
        await lab.off()
        assert (await command(qemu.img, "snapshot", "-a", "before", tmp_path / "vda.img")).code == 0


@pytest.mark.one_qemu
async def test_the_option_says_so_in_a_mount(qemu: Qemu, tmp_path: Path) -> None:
    async with chain_lab(qemu, tmp_path) as lab:
        await lab.image("vda")
        await lab.boot([qcow2(lab, "vda")])
        for option, reason in (("bitmaps=persistent", ""), ("bitmaps=transient", "bitmaps=transient")):
            options = f"target=nas,vm=vm,state={tmp_path},fleece={tmp_path},{option}"
            async with mounted(lab.vm.qmp, tmp_path / "mnt", options) as mount:
                [disk] = (await mount.json("vm.json"))["disks"]
                assert disk["bitmap_transient"] == reason
                assert (await mount.status())["disks"]["vda"]["bitmap_transient"] == reason


@pytest.mark.one_qemu
async def test_checkpoints_says_which_names_may_shift(qemu: Qemu, tmp_path: Path) -> None:
    async with chain_lab(qemu, tmp_path) as lab:
        await lab.image("vda")
        await lab.boot([qcow2(lab, "vda")], *drives([await lab.image("b")]))
        await lab.backup()
        listed = await qfsbackup("checkpoints", lab.vm.qmp, "-o", f"vm=vm,state={tmp_path}")
        shifting = {line.split()[1]: "may shift to another disk" in line for line in listed.stdout.splitlines()}
        assert shifting == {"vda": False, "virtio0": True}
