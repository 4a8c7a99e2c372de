# SPDX-License-Identifier: LGPL-2.1-or-later
"""mount(8), fstab, and what `qfsbackup status` says of a mount."""

import contextlib
import json
import os
import re
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from tests.harness.mount import (
    DONE,
    PROGRAM,
    aside,
    command,
    ending,
    is_mounted,
    mounted,
    qfsbackup,
)
from tests.harness.vm import Vm

# ---- mount(8) and fstab ----


@pytest.fixture
def helper() -> Path:
    """/sbin/mount.qfsbackup, where mount(8) looks, for this checkout (`./run setup` may have made it for another)."""
    link, ours = Path("/sbin/mount.qfsbackup"), PROGRAM.with_name("mount.qfsbackup")
    if link.resolve() != ours.resolve():
        new = link.with_name(f"mount.qfsbackup.{os.getpid()}")
        new.symlink_to(ours)
        new.rename(link)
    return link


@pytest.mark.one_qemu
@pytest.mark.usefixtures("helper")
async def test_mount_8_mounts_and_unmounts(vm: Vm, directory: Path) -> None:
    options = "ro,noauto,nofail,_netdev,x-systemd.automount,disks=vdb,mode=440"
    assert await command("mount", "-t", "qfsbackup", vm.qmp, directory, "-o", options) == DONE
    assert await aside(os.listdir, directory / "images") == ["vdb.raw"]
    found = await command("findmnt", "-n", "-o", "FSTYPE,SOURCE", directory)
    assert found.stdout.split() == ["fuse.qfsbackup", str(vm.qmp)]
    async with left_as_it_was_without_mount(vm, directory):
        assert await command("umount", directory) == DONE


@contextlib.asynccontextmanager
async def left_as_it_was_without_mount(vm: Vm, directory: Path) -> AsyncIterator[None]:
    """After the block there is no mount, and soon no filter in QEMU."""
    yield
    assert not is_mounted(directory)
    with trio.fail_after(20):
        while (await qfsbackup("cleanup", vm.qmp)).code != 0:
            pass


@pytest.mark.one_qemu
@pytest.mark.usefixtures("helper")
async def test_fstab_mounts_and_a_failure_has_two_lines_and_32(vm: Vm, directory: Path, tmp_path: Path) -> None:
    fstab = tmp_path / "fstab"
    fstab.write_text(f"{vm.qmp} {directory} qfsbackup defaults,rw,exclude=vda,x-systemd.requires=vm.service 0 0\n")
    assert await command("mount", "-a", "-T", fstab) == DONE
    assert await aside(os.listdir, directory / "images") == ["vdb.raw"]
    assert await qfsbackup("umount", directory) == DONE
    (await command("mount", "-t", "qfsbackup", tmp_path / "none.qmp", directory)).refused(32, "none.qmp")
    fstab.write_text(f"{tmp_path / 'off.qmp'} {directory} qfsbackup ro,nofail 0 0\n")
    assert await command("mount", "-a", "-T", fstab) == DONE
    wrong = await command("mount", "-t", "qfsbackup", vm.qmp, directory, "-o", "nope=1")
    wrong.refused(1, "unknown option: nope")


@pytest.mark.one_qemu
async def test_the_type_that_mount_shows_can_be_mounted_and_nothing_again(vm: Vm, directory: Path) -> None:
    """mount(8) looks for programs in a PATH of its own; one of its folders gets ours, for this test alone."""
    ours = f"mount -t tmpfs none /usr/local/bin && ln -s {PROGRAM} /usr/local/bin/qfsbackup"
    mounting = f"mount -t fuse.qfsbackup {vm.qmp} {directory} -o ro,disks=vdb"
    again = "".join(f"mount -o {options} {directory}; " for options in ("remount", "remount,rw", "remount,target=a"))
    script = f"{ours} && {mounting} && {again} ls {directory}/images && exec umount {directory}"
    done = await command("unshare", "--mount", "sh", "-c", script)
    assert (done.code, done.stdout) == (0, "vdb.raw\n"), done
    said = "a snapshot cannot be mounted again with other options\nUnmount it (qfsbackup umount DIR) and mount it anew,"
    assert done.stderr.count(said) == 3, done
    helper = await command(PROGRAM.with_name("mount.qfsbackup"), vm.qmp, directory, "-o", "rw,remount")
    helper.refused(1, "cannot be mounted again")


@pytest.mark.one_qemu
async def test_a_mount_is_found_through_links(vm: Vm, directory: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "s").mkdir(mode=0o700)
    (tmp_path / "folder/link").symlink_to("../link")
    (tmp_path / "link").symlink_to(directory)
    (tmp_path / "parent").symlink_to(tmp_path)
    for name in ("link", "folder/link", "parent/mnt", "parent/folder/link"):
        assert (
            await qfsbackup("mount", vm.qmp, tmp_path / name, "-o", "ro,target=nas,state=" + str(tmp_path / "s"))
            == DONE
        )
        assert is_mounted(directory)
        assert await qfsbackup("commit", tmp_path / name) == DONE
        assert await qfsbackup("umount", tmp_path / name) == DONE
        assert not is_mounted(directory)


@pytest.mark.one_qemu
async def test_a_dead_mount_is_taken_away_through_a_link(vm: Vm, directory: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(directory)
    assert await qfsbackup("mount", vm.qmp, directory) == DONE
    status = json.loads(await aside((directory / ".qfsbackup/status.json").read_text))
    for process in (status["ppid"], status["pid"]):
        async with ending(process):
            os.kill(process, signal.SIGKILL)
    again = await qfsbackup("mount", vm.qmp, tmp_path / "link")
    assert (again.code, "left by an earlier snapshot" in again.stderr) == (0, True), again
    assert await qfsbackup("umount", tmp_path / "link") == DONE
    assert not is_mounted(directory)


async def test_without_proc_that_is_what_is_said(directory: Path) -> None:
    lines = [
        "mount nbd://localhost/ $0",
        "umount $0",
        "commit $0",
        "status",
        "run nbd://localhost/ --mountpoint $0 -- true",
    ]
    for line in lines:
        script = f"umount -l /proc && exec {PROGRAM} {line}"
        done = await command("unshare", "--mount", "sh", "-c", script, directory)
        assert done.stderr.splitlines()[0] == "there is no /proc, so what is mounted cannot be seen", (line, done)
        assert done.code == {"mount": 2, "run": 125}.get(line.split()[0], 2)


# ---- status ----

DISK_KEYS = {"size", "data", "dirty", "bitmap", "nbd_bytes", "nbd_requests", "read_bytes", "read_errors", "punched"}
DISK_KEYS |= {"trimmed", "discarded_unread", "fleecing_used", "generation", "base"}
KEYS = {"format", "source", "mountpoint", "pid", "ppid", "vm", "instant", "frozen", "pause_ms", "state", "broken"}
KEYS |= {"vm_gone", "fleecing", "disks"}


@pytest.mark.one_qemu
async def test_status_has_its_shape(vm: Vm, directory: Path) -> None:
    async with mounted(vm.qmp, directory) as mount:
        await aside(mount.image("vda").read_bytes)
        listed = json.loads((await qfsbackup("status", directory, "--json")).stdout)
        text = await qfsbackup("status", directory)
        everywhere = await qfsbackup("status")
    [status] = listed
    assert (status["format"], status["state"], status["broken"], status["vm_gone"]) == (2, "ready", None, None)
    assert status.keys() >= KEYS
    assert (status["source"], status["mountpoint"]) == (str(vm.qmp), str(directory))
    assert status["fleecing"].keys() >= {"used", "free", "limit"}
    assert set(status["disks"]) == {"vda", "vdb"}
    assert status["disks"]["vda"].keys() >= DISK_KEYS
    assert status["disks"]["vda"]["read_bytes"] == status["disks"]["vda"]["size"] == 4 << 20
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", status["instant"])
    assert text.stdout.startswith(f"{directory}  {vm.qmp}  ready\n")
    assert "  vda: 4 MiB, data 260 KiB, dirty 4 MiB (none); read 4 MiB, " in text.stdout
    assert str(directory) in everywhere.stdout
