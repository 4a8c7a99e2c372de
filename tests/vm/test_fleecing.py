# SPDX-License-Identifier: LGPL-2.1-or-later
"""Fleecing files, and folders that cannot take them."""

import contextlib
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import DEVNULL, CalledProcessError

import pytest
import trio

from qfsbackup.errors import UserError
from qfsbackup.mount.checking import look_at_files
from qfsbackup.ranges import RangeSet
from qfsbackup.vm.fleecing_folder import create, files_of
from qfsbackup.vm.freeze import Freeze
from qfsbackup.vm.look.graph import look
from qfsbackup.vm.monitors.qmp_socket import connect
from qfsbackup.vm.recipes import RECIPES
from qfsbackup.vm.snapshot import take
from tests.harness.disk import MIB, Disk
from tests.harness.qemu import Qemu
from tests.harness.vm import Vm, running_vm
from tests.vm.support import copied, guest_io, held, make_source, served


@contextlib.contextmanager
def mounted(folder: Path, *arguments: str) -> Iterator[Path]:
    """A file system mounted on a new folder."""
    folder.mkdir()
    subprocess.run(["mount", *arguments, str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # a failed test may have left it in use


def names(folder: Path, pattern: str) -> list[str]:
    """The names in a folder."""
    return [path.name for path in folder.glob(pattern)]


async def refusal(vm: Vm, tmp_path: Path, fleece: Path) -> UserError:
    """The error of a snapshot with this fleecing folder; the VM must be as before."""
    before = await held(vm)
    with pytest.raises(UserError) as caught:
        async with make_source(vm, tmp_path, fleece=fleece).snapshot():
            pytest.fail("was not refused")
    assert await held(vm) == before
    return caught.value


async def test_a_fleecing_file_grows_with_the_guests_writes_and_has_no_name(paused_vm: Vm, tmp_path: Path) -> None:
    fleece = tmp_path / "fleece"
    fleece.mkdir()
    source = make_source(paused_vm, tmp_path, fleece=fleece)
    await guest_io(paused_vm, "vda", "write -P 1 0 2M")
    async with source.snapshot():
        await look_at_files(source.status)
        assert source.status.fleecing_used == 0
        assert source.status.fleecing_free > 0
        await guest_io(paused_vm, "vda", "write -P 2 0 1M")
        await look_at_files(source.status)
        assert source.status.disks["vda"].fleecing_used == MIB
        assert source.status.disks["vdb"].fleecing_used == 0
        assert names(fleece, "*") == []


@pytest.mark.parametrize("fleece", ["", "tmpfs"])
async def test_what_the_guest_overwrote_shows_in_the_fleecing_file(qemu: Qemu, tmp_path: Path, fleece: str) -> None:
    disks = [Disk("vda", tmp_path / "vda.raw", 16 * MIB)]
    with mounted(tmp_path / "fleece", "-t", "tmpfs", "none") if fleece else contextlib.nullcontext(tmp_path) as folder:
        async with running_vm(qemu, tmp_path, disks) as vm, connect(vm.qmp, print) as qmp:
            await guest_io(vm, "vda", "write -P 1 0 16M")
            machine = await look(qmp)
            taking = take(
                *(qmp, machine, machine.disks),
                recipe=RECIPES["filters"],
                checkpoints={},
                in_image=True,
                fleece=folder,
                socket_path=tmp_path / "nbd.sock",
                freeze=Freeze("off", None),
                lost=print,
            )
            async with taking as taken:
                copied = taken.served[0].fleecing
                assert copied is not None
                assert copied.copied() == RangeSet()
                await guest_io(vm, "vda", "discard 1M 64k")
                await guest_io(vm, "vda", "write -z 3M 1M")
                await guest_io(vm, "vda", "write -P 2 16383k 512")
                last = 16 * MIB - 65536
                expected = RangeSet([(MIB, MIB + 65536), (3 * MIB, 4 * MIB), (last, 16 * MIB)])
                assert copied.copied() == expected


async def test_a_trim_gives_the_space_back(paused_vm: Vm, tmp_path: Path) -> None:
    source = make_source(paused_vm, tmp_path)
    await guest_io(paused_vm, "vda", "write -P 1 0 2M")
    async with source.snapshot() as snapshot:
        await guest_io(paused_vm, "vda", "write -P 2 0 2M")
        await trio.run_process(
            ["qemu-io", "-f", "raw", "-c", "discard 0 1M", served(snapshot.disks[0]).uri], stdout=DEVNULL
        )
        await look_at_files(source.status)
        assert source.status.disks["vda"].fleecing_used == MIB


async def test_a_full_fleecing_folder_breaks_the_snapshot_and_not_the_guest(qemu: Qemu, tmp_path: Path) -> None:
    disks = [Disk("vda", tmp_path / "vda.raw", 16 * MIB)]
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=3M", "none") as small:
        async with running_vm(qemu, tmp_path, disks) as vm:
            await guest_io(vm, "vda", "write -P 1 0 16M")
            async with make_source(vm, tmp_path, fleece=small).snapshot() as snapshot:
                await guest_io(vm, "vda", "write -P 2 0 16M")
                await guest_io(vm, "vda", "read -P 2 0 16M")
                with pytest.raises(CalledProcessError):
                    await copied(snapshot.disks[0], tmp_path / "copy")
            await guest_io(vm, "vda", "read -P 2 0 16M")
            space = os.statvfs(small)
            assert space.f_bfree == space.f_blocks  # QEMU 7.2 may keep the file open, but it is empty


async def test_a_folder_without_room(paused_vm: Vm, tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=1M", "none") as small:
        what = (await refusal(paused_vm, tmp_path, small)).what
        assert "1024 KiB are left, 2 disks need 2048 KiB" in what


async def test_a_folder_that_is_none(paused_vm: Vm, tmp_path: Path) -> None:
    assert "No such file" in (await refusal(paused_vm, tmp_path, tmp_path / "missing")).what
    (tmp_path / "file").write_text("")
    assert "Not a directory" in (await refusal(paused_vm, tmp_path, tmp_path / "file")).what


async def test_a_read_only_folder(paused_vm: Vm, tmp_path: Path) -> None:
    with mounted(tmp_path / "fixed", "-t", "tmpfs", "-o", "ro,size=9M", "none") as fixed:
        assert "Read-only" in (await refusal(paused_vm, tmp_path, fixed)).what


async def test_a_file_size_limit(paused_vm: Vm, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, before[1]))
    try:
        assert "limit" in (await refusal(paused_vm, tmp_path, tmp_path)).hint
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.skipif(shutil.which("fuse2fs") is None, reason="fuse2fs is missing: no file system without O_TMPFILE")
async def test_a_file_system_without_unnamed_files(qemu: Qemu, tmp_path: Path) -> None:
    """A FUSE file system knows no O_TMPFILE (fuse2fs)."""
    image = tmp_path / "ext4"
    await trio.run_process(["mkfs.ext4", "-q", str(image), "16M"])
    disks = [Disk("vda", tmp_path / "vda.raw", MIB)]
    with mounted(tmp_path / "fuse", "-t", "fuse.fuse2fs", str(image)) as fuse:
        async with running_vm(qemu, tmp_path, disks) as vm:
            source = make_source(vm, tmp_path, fleece=fuse)
            async with source.snapshot() as snapshot:
                await guest_io(vm, "vda", "write -P 2 0 1M")
                assert names(fuse, "qfsbackup*") == []
                await look_at_files(source.status)
                assert source.status.fleecing_used == MIB
                assert await copied(snapshot.disks[0], tmp_path / "copy") == bytes(MIB)


def test_they_are_found_also_while_their_process_closes_other_files(tmp_path: Path) -> None:
    """Or a clean-up would not see whether their file system answers, and QEMU might hang over it."""
    busy = "import os\nprint(flush=True)\nwhile True:\n for fd in [os.dup(0) for _ in range(200)]: os.close(fd)"
    command = [sys.executable, "-c", busy]
    with (
        create(tmp_path, 4096) as file,
        subprocess.Popen(command, pass_fds=[file.fileno()], stdout=subprocess.PIPE, stderr=DEVNULL) as process,
    ):
        assert process.stdout
        process.stdout.readline()
        try:
            assert {len(files_of(process.pid)) for _ in range(200)} == {1}
        finally:
            process.kill()
