# SPDX-License-Identifier: LGPL-2.1-or-later
"""A backup that restic mounts is a disk again without a restore: compared, looked into, and booted from."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.support import until
from tests.harness.disk import MIB, Disk
from tests.harness.files import assert_same, make_random
from tests.harness.mount import Mount, aside, command, mounted, qfsbackup
from tests.harness.process import running
from tests.harness.qemu import Qemu, run_img
from tests.harness.vm import running_vm
from tests.vm.support import guest_io

pytestmark = pytest.mark.one_qemu

SIZE = 24 * MIB  # six chunks
TEXT = "one file of the guest's\n"


@dataclass(frozen=True)
class Old:
    """The mounted backup, and what its disks held."""

    mount: Mount
    expected: dict[str, Path]


@contextlib.asynccontextmanager
async def restic_mount(repository: Path, directory: Path, environment: dict[str, str]) -> AsyncIterator[Path]:
    """`restic mount`, with the newest snapshot."""
    await aside(directory.mkdir)
    line: list[str | Path] = ["restic", "--no-cache", "-r", repository, "mount", directory]
    async with running(line, directory.with_name("restic-mount.log"), environment=environment, expected=(0, 1, 130)):

        async def is_there() -> bool:
            return await aside((directory / "snapshots" / "latest").is_dir)

        try:
            await until(is_there)
            yield directory / "snapshots" / "latest"
        finally:
            await command("umount", "-l", directory)


@contextlib.asynccontextmanager
async def backed_up(qemu: Qemu, tmp_path: Path) -> AsyncIterator[Old]:
    """vda has a file system without partitions, vdb noise and holes; a backup of both, mounted twice over."""
    files = tmp_path / "files"
    files.mkdir()
    (files / "text").write_text(TEXT)
    expected = {"vda": tmp_path / "vda.expected", "vdb": tmp_path / "vdb.expected"}
    done = await command("mkfs.ext4", "-q", "-d", files, expected["vda"], f"{SIZE // 1024}k")
    assert done.code == 0, done
    await aside(lambda: make_random(expected["vdb"], SIZE - 512, hole_every=3))
    await run_img(qemu, "convert", "-f", "raw", "-O", "raw", expected["vda"], tmp_path / "vda.raw")
    await run_img(qemu, "convert", "-f", "raw", "-O", "qcow2", expected["vdb"], tmp_path / "vdb.qcow2")
    disks = [Disk("vda", tmp_path / "vda.raw", SIZE), Disk("vdb", tmp_path / "vdb.qcow2", format="qcow2")]
    repository, environment = tmp_path / "repository", {"RESTIC_PASSWORD": "secret"}
    restic = f"restic --no-cache -q -r {repository}"
    async with running_vm(qemu, tmp_path, disks, extra_args=["-name", "web1"]) as vm:
        script = f"{restic} init && {restic} backup chunks config vm.json"
        line: list[str | Path] = [
            "run",
            vm.qmp,
            "--mountpoint",
            tmp_path / "mnt",
            "-o",
            f"fleece={tmp_path}",
            "--",
            "sh",
            "-c",
            script,
        ]
        (tmp_path / "mnt").mkdir()
        done = await qfsbackup(*line, environment=environment)
        assert done.code == 0, done
    async with (
        restic_mount(repository, tmp_path / "restic", environment) as latest,
        mounted(f"chunks:{latest}", tmp_path / "old") as mount,
    ):
        yield Old(mount, expected)


async def test_a_backup_is_disks_again_to_read_to_look_into_and_to_boot_from(qemu: Qemu, tmp_path: Path) -> None:
    """All with one backup, which is what takes the time."""
    async with backed_up(qemu, tmp_path) as old:
        await the_disks_are_what_they_were(old)
        await a_file_comes_out(old, tmp_path / "look")
        await a_vm_starts_on_it_and_takes_it_over(qemu, old, tmp_path)


async def the_disks_are_what_they_were(old: Old) -> None:
    for name, expected in old.expected.items():
        await aside(assert_same, old.mount.image(name), expected)
    described = await old.mount.json("vm.json")
    of_old = await old.mount.json("config/vm.json")
    assert (described["vm"], described["instant"]) == ("web1", of_old["instant"])
    assert (old.mount.path / "config" / "qemu.json").exists()


async def a_file_comes_out(old: Old, look: Path) -> None:
    """The file system fills the whole disk."""
    read = await command("debugfs", "-R", "cat /text", old.mount.image("vda"))
    assert read.stdout == TEXT
    await aside(look.mkdir)
    try:
        done = await command("mount", "-o", "ro,loop,noload", old.mount.image("vda"), look)
        assert done.code == 0, done
        assert await aside((look / "text").read_text) == TEXT
    finally:
        await command("umount", look)


async def a_vm_starts_on_it_and_takes_it_over(qemu: Qemu, old: Old, folder: Path) -> None:
    """Paused: what its guest would do goes through its disk's device."""
    overlay = folder / "web1.qcow2"
    await run_img(qemu, "create", "-q", "-f", "qcow2", "-b", old.mount.image("vdb"), "-F", "raw", overlay)
    async with running_vm(qemu, folder, [Disk("vda", overlay, format="qcow2")], name="again") as vm:
        await guest_io(vm, "vda", "write -P 9 1M 64k")
        await vm.monitor.execute("block-stream", job_id="take-over", device="vda-node")
        await guest_io(vm, "vda", "write -P 7 20M 64k")
        await vm.monitor.event("BLOCK_JOB_COMPLETED", device="take-over", timeout=60)
        assert (await qfsbackup("umount", old.mount.path)).code == 0  # nobody needs it any more
        await guest_io(vm, "vda", "read -P 9 1M 64k")
        await guest_io(vm, "vda", "read -P 7 20M 64k")
    with old.expected["vdb"].open("r+b") as file:
        for start, byte in ((MIB, b"\x09"), (20 * MIB, b"\x07")):
            file.seek(start)
            file.write(byte * 64 * 1024)
    assert "backing" not in await run_img(qemu, "info", overlay)
    await run_img(qemu, "compare", "-f", "raw", "-F", "qcow2", old.expected["vdb"], overlay)
