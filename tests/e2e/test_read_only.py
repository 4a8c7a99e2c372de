# SPDX-License-Identifier: LGPL-2.1-or-later
"""`-o ro`: nothing that is done to a file of the mount by mistake changes what a backup reads, and a commit works."""

import fcntl
import os
import stat
import termios
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from qfsbackup.fs.control import GIVE, WORDS
from tests.fuse.support import PUNCH_HOLE, errno_of, fallocate, opened
from tests.harness.disk import MIB, Disk
from tests.harness.files import assert_same
from tests.harness.mount import DONE, Mount, Result, aside, command, is_mounted, mounted, qfsbackup, taken_away
from tests.harness.qemu import Qemu
from tests.harness.vm import Vm, running_vm
from tests.incremental.support import CHUNK, bed, bitmap_of
from tests.vm.support import guest_io

pytestmark = pytest.mark.one_qemu


@dataclass(frozen=True)
class Shown:
    """A mount, read-only, of a VM whose disk `vda` is an ext4 file system with one file."""

    mount: Mount
    vm: Vm
    original: Path

    async def check_whole(self) -> None:
        """Every byte is the instant's, by each road, and nothing was given back."""
        await aside(assert_same, self.mount.image("vda"), self.original)
        pieces = await aside(sorted, (self.mount.path / "chunks/vda").glob("*/*"))
        chunks = [await aside(piece.read_bytes) for piece in pieces]
        assert b"".join(chunks) == await aside(self.original.read_bytes)
        figures = (await self.mount.status())["disks"]["vda"]
        assert (figures["punched"], figures["trimmed"]) == (0, 0)


@pytest.fixture
async def shown(qemu: Qemu, tmp_path: Path) -> AsyncIterator[Shown]:
    original = tmp_path / "original"
    await aside(lambda: original.write_bytes(bytes(8 * MIB)))
    (tmp_path / "files").mkdir()
    (tmp_path / "files/name").write_text("of the guest\n")
    assert (await command("mkfs.ext4", "-q", "-F", "-d", tmp_path / "files", original)).code == 0
    disk = Disk("vda", tmp_path / "vda.raw")
    await aside((tmp_path / "vda.raw").write_bytes, await aside(original.read_bytes))
    async with (
        running_vm(qemu, tmp_path, [disk]) as vm,
        mounted(vm.qmp, tmp_path / "mnt", "ro,chunk=64k") as mount,
    ):
        yield Shown(mount, vm, original)


LOOP = 'device=$(losetup --find --show {image}) || exit 9; trap "losetup -d $device" EXIT; '
MISTAKES = {
    "mkfs": "mkfs.ext4 -q -F {image}",
    "mkswap": "mkswap -f {image}",
    "fallocate -p on the image": "fallocate -p -o 0 -l 8M {image}",
    "fallocate -p on a chunk": "fallocate -p -o 0 -l 64k {top}/chunks/vda/000/00000000",
    "fallocate -p on the delta": "fallocate -p -o 0 -l 8M {top}/delta/vda.raw",
    "dd": "dd if=/dev/zero of={image} bs=64k count=1 conv=notrunc",
    "dd that truncates": "dd if=/dev/zero of={image} bs=64k count=1",
    "truncate": "truncate -s 0 {image}",
    "blkdiscard through a loop": f"{LOOP} blkdiscard -f $device",
    "mkfs through a loop": f"{LOOP} mkfs.ext4 -q -F $device",
    "a loop made writable": f"{LOOP} blockdev --setrw $device; blkdiscard -f $device",
    "remounted for writing": "mount -i -o remount,rw {top}; fallocate -p -o 0 -l 8M {image}",
}


async def test_no_mistake_changes_what_is_read(shown: Shown) -> None:
    for name, mistake in MISTAKES.items():
        script = mistake.format(image=shown.mount.image("vda"), top=shown.mount.path)
        done = await command("/bin/sh", "-c", script)
        assert done.code not in (0, 9, 127), (name, done)
        await shown.check_whole()


async def test_the_kernel_and_every_file_say_that_it_is_read_only(shown: Shown) -> None:
    found = await command("findmnt", "-n", "-o", "OPTIONS", shown.mount.path)
    assert "ro" in found.stdout.strip().split(","), found

    def modes() -> set[int]:
        files = [path for path in shown.mount.path.rglob("*") if path.is_file()]
        files += [shown.mount.path / ".qfsbackup/control", shown.mount.path / ".qfsbackup/status.json"]
        return {stat.S_IMODE(path.stat().st_mode) for path in files if path.exists()}

    assert await aside(modes) == {0o400}
    assert await aside(errno_of, lambda: fallocate(shown.mount.image("vda"), PUNCH_HOLE, 0, MIB)) == "EROFS"


async def test_a_loop_device_is_read_only_without_being_asked_for_it(shown: Shown, tmp_path: Path) -> None:
    made = await command("losetup", "--find", "--show", shown.mount.image("vda"))
    assert made.code == 0, made
    try:
        device = made.stdout.strip()
        assert (await command("blockdev", "--getro", device)).stdout.strip() == "1"
    finally:
        await command("losetup", "-d", device)
    async with taken_away(tmp_path / "guest"):
        (tmp_path / "guest").mkdir()
        done = await command("mount", "-o", "loop", shown.mount.image("vda"), tmp_path / "guest")
        assert done.code == 0, done
        assert await aside((tmp_path / "guest/name").read_text) == "of the guest\n"
        assert await command("umount", tmp_path / "guest") == DONE


async def test_modes_lose_their_write_bits(qemu: Qemu, tmp_path: Path) -> None:
    async with (
        running_vm(qemu, tmp_path, [Disk("vda", tmp_path / "vda.raw", MIB)]) as vm,
        mounted(vm.qmp, tmp_path / "mnt", "rw,mode=660,ro,uid=12") as mount,
    ):
        found = await aside(mount.image("vda").stat)
        assert (stat.S_IMODE(found.st_mode), found.st_uid) == (0o440, 12)


async def test_of_ro_and_rw_the_later_one_counts(qemu: Qemu, tmp_path: Path) -> None:
    async with (
        running_vm(qemu, tmp_path, [Disk("vda", tmp_path / "vda.raw", MIB)]) as vm,
        mounted(vm.qmp, tmp_path / "mnt", "ro,rw") as mount,
    ):
        await aside(fallocate, mount.image("vda"), PUNCH_HOLE, 0, CHUNK)
        assert (await mount.status())["disks"]["vda"]["punched"] == CHUNK


# ---- a commit ----

WAYS = [("ro", "commit"), ("ro", "umount --commit"), ("ro", "run"), ("rw", "control")]


@pytest.mark.parametrize(("options", "way"), WAYS)
async def test_what_was_mounted_is_committed(qemu: Qemu, tmp_path: Path, options: str, way: str) -> None:
    async with bed(qemu, tmp_path) as lab:
        if way == "run":
            await lab.run("nas", "cat chunks/*/*/* > /dev/null", options)
        else:
            async with lab.mounted("nas", options) as mount:
                if way == "control":
                    await aside((mount.path / ".qfsbackup/control").write_text, "commit\n")
                else:
                    name, *flags = way.split()
                    assert await qfsbackup(name, mount.path, *flags) == Result(0, "", "")
                    assert is_mounted(mount.path) == (name == "commit")
        assert set(bitmap_of(await lab.committed("nas")).values()) == {"reuse"}


async def test_an_ioctl_that_is_not_ours_is_none(shown: Shown) -> None:
    def answers(path: Path) -> set[str]:
        with opened(path, os.O_RDONLY) as descriptor:
            return {
                errno_of(lambda: fcntl.ioctl(descriptor, termios.TCGETS, bytes(64))),
                errno_of(lambda: fcntl.ioctl(descriptor, GIVE, b"commit".ljust(WORDS))),
            }

    for path in (shown.mount.image("vda"), shown.mount.path / "vm.json", shown.mount.path):
        assert await aside(answers, path) == {"ENOTTY"}


async def test_what_was_read_is_released_on_a_read_only_mount_too(qemu: Qemu, tmp_path: Path) -> None:
    """The mount does it by itself, for whoever asked for it by name; no writer is needed, or let in."""
    async with bed(qemu, tmp_path) as lab:
        async with lab.mounted("nas", "ro,discard=release") as mount:
            await guest_io(lab.vm, "vda", f"write -P 1 0 {4 * CHUNK}")
            paths = await aside(sorted, (mount.path / "chunks/vda").glob("*/*"))
            for path in paths:
                await aside(path.read_bytes)
            assert await aside(errno_of, paths[0].read_bytes) == "EIO"
            assert await aside(errno_of, lambda: os.open(paths[1], os.O_RDWR)) == "EROFS"
            assert (await mount.status())["disks"]["vda"]["trimmed"] > 0
            await lab.commit()
        assert bitmap_of(await lab.committed("nas"))["vda"] == "reuse"
