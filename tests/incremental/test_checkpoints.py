# SPDX-License-Identifier: LGPL-2.1-or-later
"""Targets, disks and VMs that come and go: each chain starts where it was committed, or is full and says why."""

from pathlib import Path
from typing import Any

import pytest

from tests.harness.disk import Disk
from tests.harness.mount import Result, aside, qfsbackup
from tests.harness.qemu import Qemu
from tests.incremental.support import CHUNKS, SIZE, all_chunks, bed, bitmap_of, changed, chunk_names, stats, words
from tests.vm.support import guest_io

OTHER_UUID = "11111111-2222-4333-8444-555555555555"
Stats = dict[str, tuple[int, int, int, int]]


def dirty_now(lines: list[str]) -> dict[tuple[str, str], str]:
    """What `checkpoints` says at the end of its lines, by target and disk."""
    return {(line.split()[0], line.split()[1]): words(line)[-1].partition(", ")[2] for line in lines}


def reason(description: dict[str, Any], disk: str) -> str:
    """Why a disk's backup is full."""
    [found] = [one["bitmap_reason"] for one in description["disks"] if one["name"] == disk]
    return str(found)


async def test_each_target_has_a_chain_of_its_own(qemu: Qemu, tmp_path: Path) -> None:
    async with bed(qemu, tmp_path) as lab:
        assert await lab.checkpoints() == ["no target has committed a backup of this VM"]
        await lab.committed("nas")
        await guest_io(lab.vm, "vda", "write -P 1 0 64k")
        assert bitmap_of(await lab.committed("usb")) == {"vda": "new", "vdb": "new"}
        await guest_io(lab.vm, "vda", "write -P 2 128k 64k")
        lines = await lab.checkpoints()
        assert dirty_now(lines) == {
            ("nas", "vda"): "128 KiB dirty now",
            ("nas", "vdb"): "0 B dirty now",
            ("usb", "vda"): "64 KiB dirty now",
            ("usb", "vdb"): "0 B dirty now",
        }
        assert len({words(line)[2] for line in lines}) == 4  # generations: each disk of each target has its own
        async with lab.mounted("nas") as mount:
            assert (await mount.status())["disks"]["vda"]["dirty"] == 128 * 1024
        deleted = await lab.checkpoints("--delete", "nas")
        assert deleted[0] == "forgot target nas: its next backup is a full one"
        assert len(deleted) == 5
        assert {target for target, _ in dirty_now(await lab.checkpoints())} == {"usb"}
        done = await qfsbackup("checkpoints", lab.qmp, "-o", lab.options("nas"), "--delete", "nas")
        done.refused(1, "no target nas has committed")
        assert "Targets: usb." in done.stderr
        assert bitmap_of(await lab.committed("nas")) == {"vda": "new", "vdb": "new"}
        assert bitmap_of(await lab.committed("usb")) == {"vda": "reuse", "vdb": "reuse"}


async def test_a_target_that_is_in_use_is_not_deleted(qemu: Qemu, tmp_path: Path) -> None:
    async with bed(qemu, tmp_path) as lab:
        await lab.committed("nas")
        async with lab.mounted("usb"):
            pass
        assert len(await lab.checkpoints()) == 2
        async with lab.mounted("nas"):  # a QMP socket serves one client
            done = await qfsbackup("checkpoints", lab.qmp, "-o", lab.options("nas"), "--delete", "nas")
        assert done.code != 0
        assert len(done.stderr.splitlines()) == 2, done
        assert len(await lab.checkpoints()) == 2


async def test_a_disk_that_was_left_out_keeps_its_own_base(qemu: Qemu, tmp_path: Path) -> None:
    async with bed(qemu, tmp_path) as lab:
        await lab.committed("nas")
        for disk in ("vda", "vdb"):
            await guest_io(lab.vm, disk, "write -P 1 0 64k")
        assert bitmap_of(await lab.committed("nas", "exclude=vdb")) == {"vda": "reuse"}
        await guest_io(lab.vm, "vda", "write -P 1 128k 64k")
        async with lab.mounted("nas") as mount:
            assert bitmap_of(await mount.json("vm.json")) == {"vda": "reuse", "vdb": "reuse"}
            dirty = await mount.json("maps/vda.json"), await mount.json("maps/vdb.json")
            assert [[e["offset"] for e in one if e["type"]] for one in dirty] == [[128 * 1024], [0]]


async def test_a_changed_chunk_size_moves_all_times(qemu: Qemu, tmp_path: Path) -> None:
    async with bed(qemu, tmp_path) as lab:
        async with lab.mounted("nas") as mount:
            before = await stats(mount)
            await lab.commit()
        async with lab.mounted("nas", "chunk=128k") as mount:
            assert len(await stats(mount)) == CHUNKS
            assert changed(before, await stats(mount)) == set(await stats(mount))
        async with lab.mounted("nas") as mount:  # not committed, so the old size is still the base
            again = await stats(mount)
            assert changed(before, again) == set(again) == set(before), "a tool may have the larger ones by these names"
            assert {path: one[:1] for path, one in again.items()} == {path: one[:1] for path, one in before.items()}


async def test_disks_come_and_go_without_moving_the_others(qemu: Qemu, tmp_path: Path) -> None:
    """Restarts too: persistent on qcow2, lost on raw."""
    async with bed(qemu, tmp_path, name="one") as lab, lab.mounted("nas", "vm=vm") as mount:
        before = await stats(mount)
        await lab.commit()
    more = Disk("aaa", tmp_path / "aaa.img", SIZE, format="qcow2")
    async with bed(qemu, tmp_path, more, name="two") as lab:
        await guest_io(lab.vm, "vdb", "write -P 1 64k 64k")
        async with lab.mounted("nas", "vm=vm") as mount:
            description, after = await mount.json("vm.json"), await stats(mount)
            await lab.commit()
        assert bitmap_of(description) == {"vda": "invalid", "vdb": "reuse", "aaa": "new"}
        assert "QEMU was restarted" in reason(description, "vda")
        moved = {*chunk_names("vda", range(CHUNKS)), *chunk_names("aaa", range(CHUNKS)), *chunk_names("vdb", [1])}
        assert changed(before, after) == moved
        assert {path: after[path][3] for path in before} == {path: before[path][3] for path in before}  # inodes
    async with bed(qemu, tmp_path, name="three") as lab, lab.mounted("nas", "vm=vm") as mount:
        assert bitmap_of(await mount.json("vm.json")) == {"vda": "invalid", "vdb": "reuse"}
        assert changed(after, await stats(mount)) == set(chunk_names("vda", range(CHUNKS)))
        await lab.commit()
    async with bed(qemu, tmp_path, name="four") as lab:
        lines = dirty_now(await lab.checkpoints("-o", "vm=vm"))
        assert lines["nas", "aaa"] == "next backup is full: the VM has no such disk now"
        assert lines["nas", "vda"].startswith("next backup is full: the bitmap qfsbackup-nas-")
        assert "is not there: QEMU was restarted" in lines["nas", "vda"]
        assert lines["nas", "vdb"] == "0 B dirty now"


@pytest.mark.one_qemu
async def test_another_vm_behind_the_same_name_is_full_and_shows_no_time_twice(qemu: Qemu, tmp_path: Path) -> None:
    """Its bitmaps would be taken for the first one's: the qcow2 image is the same."""
    async with bed(qemu, tmp_path, name="one") as lab, lab.mounted("nas", "vm=vm") as mount:
        before = await stats(mount)
        await lab.commit()
    async with bed(qemu, tmp_path, name="two", extra_args=["-uuid", OTHER_UUID]) as lab:
        assert await lab.checkpoints("-o", "vm=vm") == ["no target has committed a backup of this VM"]
        async with lab.mounted("nas", "vm=vm") as mount:
            description, after = await mount.json("vm.json"), await stats(mount)
        assert description["uuid"] == OTHER_UUID
        assert bitmap_of(description) == {"vda": "new", "vdb": "new"}
        assert changed(before, after) == all_chunks()
        assert not {value[1] for value in before.values()} & {value[1] for value in after.values()}


@pytest.mark.parametrize("sizes", [(2, 3), (2, 1), (2, 3, 1)], ids=str)
async def test_a_resize_touches_the_last_and_the_new_chunks(qemu: Qemu, tmp_path: Path, sizes: tuple[int, ...]) -> None:
    """Sizes in units of SIZE / 2 + 512, so that the last chunk is never a whole one."""
    unit = SIZE // 2 + 512
    async with bed(qemu, tmp_path) as lab:
        await lab.vm.monitor.execute("block_resize", {"node-name": "vda-node", "size": sizes[0] * unit})
        async with lab.mounted("nas") as mount:
            before = await stats(mount)
            await lab.commit()
        for size in sizes[1:]:
            await lab.vm.monitor.execute("block_resize", {"node-name": "vda-node", "size": size * unit})
        async with lab.mounted("nas") as mount:
            after = await stats(mount)
            assert bitmap_of(await mount.json("vm.json")) == {"vda": "reuse", "vdb": "reuse"}
            assert (await mount.json("vm.json"))["disks"][0]["size"] == sizes[-1] * unit
        whole = min(sizes) * unit // 65536
        last = -(-sizes[-1] * unit // 65536)
        assert changed(before, after) == set(chunk_names("vda", range(whole, last)))


async def test_umount_with_commit_commits(qemu: Qemu, tmp_path: Path) -> None:
    async with bed(qemu, tmp_path) as lab:
        lab.mountpoint.mkdir()
        for status in ("new", "reuse"):
            assert await qfsbackup("mount", lab.qmp, lab.mountpoint, "-o", lab.options("nas")) == Result(0, "", "")
            assert f'"bitmap": "{status}"' in await aside((lab.mountpoint / "vm.json").read_text)
            assert await qfsbackup("umount", "--commit", lab.mountpoint) == Result(0, "", "")
        assert len(await lab.checkpoints()) == 2
