# SPDX-License-Identifier: LGPL-2.1-or-later
"""What was discarded before anybody had read it is not backed up, and never committed unless somebody meant it."""

import shlex
from pathlib import Path

import pytest

from tests.harness.disk import MIB
from tests.harness.mount import Result, aside, command, is_mounted, qfsbackup
from tests.harness.nbd_server import nbdkit
from tests.harness.qemu import Qemu
from tests.incremental.support import CHUNK, DISKS, Bed, bed, bitmap_of

pytestmark = pytest.mark.one_qemu
KIB = 1024
DATA = 24 * CHUNK  # of the disks' 32 clusters each fourth is a hole

LOOP = 'device=$(losetup --find --show images/{}.raw); blkdiscard -f "$device"; losetup -d "$device"'
SMALL = "for n in 5 3 4 1 2 {6..47}; do dd if=images/vda.raw of=/dev/null bs=4k skip=$n count=1 iflag=direct; done"


def punch(cluster: int) -> str:
    return f"fallocate -p -o {cluster * CHUNK} -l 64k images/vda.raw"


def read(name: str, cluster: int) -> str:
    return f"dd if={name} of=/dev/null bs=64k skip={cluster} count=1"


# what is done in one mount, step by step, and the bytes that nobody had read of what was discarded in this step
STEPS: dict[str, tuple[str, int]] = {
    "after reading in small pieces, here and there": (f"{SMALL}; fallocate -p -o 4k -l 188k images/vda.raw", 0),
    "a hole": (punch(3), 0),
    "a part of the image": (punch(4), CHUNK),
    "the same again": (punch(4), 0),
    "a chunk": ("fallocate -p -o 0 -l 64k chunks/vda/000/00000005", CHUNK),
    "the delta": (f"fallocate -p -o {6 * CHUNK} -l 64k delta/vda.raw", CHUNK),
    "after half of it was read": (f"dd if=images/vda.raw of=/dev/null bs=32k skip=16 count=1; {punch(8)}", CHUNK // 2),
    "after reading the chunk": (f"{read('chunks/vda/000/00000009', 0)}; {punch(9)}", 0),
    "after reading the delta": (f"{read('delta/vda.raw', 10)}; {punch(10)}", 0),
    "after reading the other disk": (f"{read('images/vdb.raw', 12)}; {punch(12)}", CHUNK),
    "all of the other disk, by a loop device": (LOOP.format("vdb"), DATA - CHUNK),
    "reading what was discarded": ("cat images/*", 0),
    "what was read since": (LOOP.format("vda"), 0),
}


async def test_what_nobody_had_read_is_counted(qemu: Qemu, tmp_path: Path) -> None:
    async with bed(qemu, tmp_path) as lab, lab.mounted("nas") as mount:
        lost = 0
        for name, (script, more) in STEPS.items():
            done = await command("bash", "-c", script, cwd=mount.path)
            lost += more
            disks = (await mount.status())["disks"]
            found = {disk: disks[disk]["discarded_unread"] for disk in DISKS}
            assert sum(found.values()) == lost, (name, found, done)
        (await qfsbackup("commit", mount.path)).refused(
            2, f"not committed: {found['vda']} bytes of vda, {found['vdb']}"
        )
        status = await qfsbackup("status", mount.path)
        assert "discarded before anybody read them" in status.stdout


async def test_discarding_what_was_read_is_free(qemu: Qemu, tmp_path: Path) -> None:
    async with bed(qemu, tmp_path) as lab:
        each = "for chunk in chunks/*/*/*; do cat $chunk > /dev/null; fallocate -p -o 0 -l 64k $chunk; done"
        await lab.run("nas", each)
        assert await bitmaps(lab) == {"reuse"}


async def bitmaps(lab: Bed) -> set[str]:
    """What a backup finds now."""
    return set(bitmap_of(await lab.committed("nas", "ro")).values())


async def test_a_mkfs_by_mistake_is_no_backup(qemu: Qemu, tmp_path: Path) -> None:
    async with bed(qemu, tmp_path) as lab:
        async with lab.mounted("nas") as mount:
            await command("mkfs.ext4", "-F", "-q", mount.image("vda"))
            (await qfsbackup("umount", mount.path, "--commit")).refused(2, "bytes of vda were discarded")
            assert is_mounted(mount.path)
        assert await bitmaps(lab) == {"new"}


@pytest.mark.parametrize("way", ["commit", "umount --commit", "run", "control"])
async def test_what_was_given_away_on_purpose_is_said_so(qemu: Qemu, tmp_path: Path, way: str) -> None:
    async with bed(qemu, tmp_path) as lab:
        if way == "run":
            place = ["-o", lab.options("nas"), "--mountpoint", str(lab.mountpoint), "--discarded-on-purpose"]
            lab.mountpoint.mkdir()
            done = await qfsbackup("run", lab.qmp, *place, "--", *shlex.split(punch(1)))
            assert done.code == 0, done
        else:
            async with lab.mounted("nas") as mount:
                assert (await command(*shlex.split(punch(1)), cwd=mount.path)).code == 0
                if way == "control":
                    control = mount.path / ".qfsbackup/control"
                    await aside(control.write_text, "commit discarded-on-purpose\n")
                else:
                    name, *flags = way.split()
                    done = await qfsbackup(name, *flags, "--discarded-on-purpose", mount.path)
                    assert done == Result(0, "", "")
        assert await bitmaps(lab) == {"reuse"}


async def test_a_run_that_discards_what_it_has_not_read_fails_and_commits_nothing(qemu: Qemu, tmp_path: Path) -> None:
    async with bed(qemu, tmp_path) as lab:
        done = await lab.run("nas", f"{punch(1)} && cat chunks/*/*/* > /dev/null", code=125)
        assert f"not committed: {CHUNK} bytes of vda were discarded" in done.stderr, done
        assert await bitmaps(lab) == {"new"}
        await lab.run("nas", f"cat chunks/*/*/* > /dev/null && {punch(1)}")
        assert await bitmaps(lab) == {"reuse"}
        clean = "fallocate -p -o 0 -l 64k chunks/vdb/000/00000001"  # a tool that reads all again would read zeros
        done = await lab.run("nas", clean, code=125)
        assert f"{CHUNK} bytes of vdb were discarded" in done.stderr, done
        assert await bitmaps(lab) == {"reuse"}
        assert DISKS == ("vda", "vdb")


async def test_reads_that_failed_do_not_count(tmp_path: Path) -> None:
    """A run without a target has nothing to commit, and yet the command may have stored zeros."""
    broken, punch = tmp_path / "broken", "fallocate -p -o 64k -l 64k images/*"
    options = ["--filter=error", "memory", "4M", "error-pread=EIO", "error-pread-rate=1", f"error-file={broken}"]
    (tmp_path / "mnt").mkdir()
    async with nbdkit(tmp_path, options) as server:
        filled = await command("qemu-io", "-f", "raw", "-c", f"write -P 5 0 {MIB}", server.uri)
        assert filled.code == 0, filled
        line = ["run", server.uri, "-o", "trim-server-data", "--mountpoint", str(tmp_path / "mnt"), "--", "sh", "-c"]
        script = f"touch {broken}; ! cat images/* > /dev/null && rm {broken} && {punch}"
        done = await qfsbackup(*line, script)
        assert done.code == 125, done
        assert f"may have stored zeros: {CHUNK} bytes of disk were discarded" in done.stderr, done
