# SPDX-License-Identifier: LGPL-2.1-or-later
"""borg 2 takes `maps/<disk>.borgmap` as it is: it reads what the map calls data, and gives the disk back."""

import os
from pathlib import Path

import pytest

from tests.harness.files import assert_same
from tests.harness.mount import Mount, aside, command
from tests.harness.qemu import CACHE, Qemu
from tests.incremental.support import CHUNK, DISKS, Bed, bed
from tests.vm.support import guest_io

BORG = CACHE / "borg2/bin/borg"
DIRTY = 4 * CHUNK  # what the guest changes between the two backups, of both disks

pytestmark = [
    pytest.mark.one_qemu,
    pytest.mark.skipif(not BORG.exists(), reason=f"borg 2 could not be installed: {CACHE / 'borg2.log'} says why"),
]


async def borg(lab: Bed, *words: str, cwd: Path | None = None) -> None:
    """Run it on a repository of the test's own."""
    environment = {"BORG_REPO": str(lab.folder / "borg2"), "BORG_BASE_DIR": str(lab.folder / "borg2-base")}
    trust = {"BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes"}
    done = await command(BORG, *words, environment={**os.environ, **environment, **trust}, cwd=cwd)
    assert done.code == 0, done


async def back_up(lab: Bed, mount: Mount, name: str, before: str | None = None) -> None:
    """An archive for each disk, from the one `before`, and a commit."""
    for disk in DISKS:
        reuse = ["--reuse-from", f"{disk}-{before}"] if before else []
        words = ["--map", f"maps/{disk}.borgmap", *reuse, "--chunker-params", f"fixed,{CHUNK}"]
        await borg(lab, "create", *words, f"{disk}-{name}", f"images/{disk}.raw", cwd=mount.path)
    await lab.commit()


async def assert_restored(lab: Bed, name: str) -> None:
    """What borg has of each disk is the disk as it is now."""
    for disk in DISKS:
        folder = lab.folder / f"{disk}-{name}"
        folder.mkdir()
        await borg(lab, "extract", f"{disk}-{name}", cwd=folder)
        now = await lab.disk(disk, lab.folder / f"{disk}.now")
        await aside(assert_same, folder / f"images/{disk}.raw", now)


async def test_borg_2_reads_what_changed_and_restores_the_disk(qemu: Qemu, tmp_path: Path) -> None:
    async with bed(qemu, tmp_path) as lab:
        await borg(lab, "repo-create", "-e", "none-sha256")
        async with lab.mounted("borg2") as mount:
            await back_up(lab, mount, "first")
        await assert_restored(lab, "first")
        await guest_io(lab.vm, "vda", "write -P 1 200k 1k")  # inside of a chunk
        await guest_io(lab.vm, "vda", f"write -P 2 {8 * CHUNK - 512} 1k")  # over the edge of two
        await guest_io(lab.vm, "vdb", f"write -z {4 * CHUNK} {CHUNK}")
        async with lab.mounted("borg2") as mount:
            await back_up(lab, mount, "second", before="first")
            disks = (await mount.status())["disks"]
            assert sum(disk["dirty"] for disk in disks.values()) == DIRTY
            assert sum(disk["read_bytes"] for disk in disks.values()) <= DIRTY
        await assert_restored(lab, "second")
