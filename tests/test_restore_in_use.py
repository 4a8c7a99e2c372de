# SPDX-License-Identifier: LGPL-2.1-or-later
"""`qfsbackup restore --force` overwrites nothing that somebody uses, and says who that is."""

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qfsbackup import mounts
from qfsbackup.errors import UserError
from qfsbackup.restore import in_use
from qfsbackup.restore.restore import restore
from tests.harness.chunk_set import CHUNK
from tests.harness.disk import MIB
from tests.harness.files import loop_device
from tests.harness.mount import qfsbackup
from tests.harness.qemu import Qemu
from tests.harness.vm import Vm, running_vm


@contextlib.contextmanager
def left_alone(output: Path, *said: str) -> Iterator[None]:
    """The block is refused with these words, and `output` is what it was."""
    before = output.stat()
    with pytest.raises(UserError) as caught:
        yield
    assert [word for word in said if word not in f"{caught.value.what}\n{caught.value.hint}"] == [], caught.value
    after = output.stat()
    assert (before.st_ino, before.st_size, before.st_mtime_ns) == (after.st_ino, after.st_size, after.st_mtime_ns)
    assert not list(output.parent.glob("*.partial"))


@contextlib.contextmanager
def opened_by_a_shell(path: Path, mode: str = "<>") -> Iterator[int]:
    """Another process has the file open; its process id."""
    script = f'exec 3{mode}"$0"; echo; read _'
    words: list[str | Path] = ["/bin/sh", "-c", script, path]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as shell:
        assert shell.stdout
        assert shell.stdin
        shell.stdout.readline()
        yield shell.pid
        shell.stdin.close()


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Those who use a file are in another PID namespace."""
    monkeypatch.setattr(in_use, "PROC", tmp_path / "proc")
    (tmp_path / "proc").mkdir()


async def test_the_image_of_a_running_vm_is_left_alone(paused_vm: Vm, chunks: Path) -> None:
    for disk in paused_vm.disks:
        assert disk.path
        with left_alone(disk.path, "qemu-system", f"process {paused_vm.pid}"):
            restore(chunks, disk.path, force=True)
        done = await qfsbackup("restore", chunks, disk.path, "--force")
        assert (done.code, len(done.stderr.splitlines())) == (2, 2), done


@pytest.mark.usefixtures("no_processes")
async def test_qemus_locks_are_seen_where_its_process_is_not(paused_vm: Vm, chunks: Path) -> None:
    for disk in paused_vm.disks:
        assert disk.path
        with left_alone(disk.path, "locked it"):
            restore(chunks, disk.path, force=True)


@pytest.mark.parametrize("mode", ["<>", "<", ">>"])
def test_a_file_that_a_process_has_open_is_left_alone(chunks: Path, tmp_path: Path, mode: str) -> None:
    output = tmp_path / "disk.raw"
    output.write_bytes(b"old")
    with opened_by_a_shell(output, mode) as pid, left_alone(output, "sh (process", str(pid)):
        restore(chunks, output, force=True)
    restore(chunks, output, force=True)
    assert output.read_bytes() == (tmp_path / "expected").read_bytes()


@pytest.mark.usefixtures("no_processes")
def test_an_open_is_seen_where_the_process_is_not(chunks: Path, tmp_path: Path) -> None:
    output = tmp_path / "disk.raw"
    output.write_bytes(b"old")
    with opened_by_a_shell(output), left_alone(output, "has it open"):
        restore(chunks, output, force=True)
    restore(chunks, output, force=True)


@pytest.mark.usefixtures("no_processes")
@pytest.mark.parametrize("kind", ["nfs4", "cifs"])
def test_a_server_that_gives_no_lease_is_not_taken_for_a_use(
    chunks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A made-up mountinfo, for there is no such server; another's open stands for the lease that is refused."""
    output = tmp_path / "disk.raw"
    output.write_bytes(b"old")
    device = output.stat().st_dev
    line = f"36 35 {os.major(device)}:{os.minor(device)} / /mnt rw - {kind} server:/ rw\n"
    (tmp_path / "mountinfo").write_text(line)
    monkeypatch.setattr(mounts, "MOUNTINFO", tmp_path / "mountinfo")
    with opened_by_a_shell(output):
        restore(chunks, output, force=True)
    assert output.read_bytes() == (tmp_path / "expected").read_bytes()


def test_what_comes_into_use_meanwhile_is_left_alone(
    chunks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "disk.raw"
    output.write_bytes(b"old")
    with contextlib.ExitStack() as stack:
        copying: Callable[..., None] = restore.__globals__["_copy"]

        def copy(*arguments: object, **options: object) -> None:
            copying(*arguments, **options)
            stack.enter_context(opened_by_a_shell(output))

        monkeypatch.setitem(restore.__globals__, "_copy", copy)
        with left_alone(output, "sh (process"):
            restore(chunks, output, force=True)


def test_a_file_below_a_loop_device_is_left_alone(chunks: Path, tmp_path: Path) -> None:
    output = tmp_path / "disk.raw"
    with loop_device(output, 6 * CHUNK) as device:
        (tmp_path / "link").symlink_to(output)
        for name in ("disk.raw", "link"):
            with left_alone(output, f"loop device {device}", f"losetup --detach {device}"):
                restore(chunks, tmp_path / name, force=True)


def test_a_mounted_block_device_is_left_alone(chunks: Path, tmp_path: Path) -> None:
    place = tmp_path / "mounted here"
    place.mkdir()
    with loop_device(tmp_path / "image", MIB) as device:
        subprocess.run(["mkfs.ext2", "-q", device], check=True)
        subprocess.run(["mount", device, place], check=True)
        try:
            with left_alone(device, f"mount at {place}", f"umount {place}"):
                restore(chunks, device, force=True)
        finally:
            subprocess.run(["umount", place], check=True)
        restore(chunks, device, force=True)


@pytest.mark.one_qemu
async def test_a_vms_block_device_is_left_alone(qemu: Qemu, chunks: Path, tmp_path: Path) -> None:
    """QEMU does not claim it exclusively."""
    with loop_device(tmp_path / "image", MIB) as device:
        blockdev = ["-blockdev", f"driver=host_device,filename={device},node-name=n0"]
        devices = [*blockdev, "-device", "virtio-blk-pci,drive=n0"]
        async with running_vm(qemu, tmp_path, [], extra_args=devices) as vm:
            with left_alone(device, "qemu-system", f"process {vm.pid}"):
                restore(chunks, device, force=True)


def test_a_disk_is_in_use_where_its_partition_is(chunks: Path, tmp_path: Path) -> None:
    """Who writes to the partition claims nothing."""
    with loop_device(tmp_path / "image", 4 * MIB) as device:
        subprocess.run(["addpart", device, "1", "2048", "2048"], check=True)
        try:
            with opened_by_a_shell(Path(f"{device}p1")) as pid, left_alone(device, "sh (process", str(pid)):
                restore(chunks, device, force=True)
        finally:
            subprocess.run(["delpart", device, "1"], check=True)


def test_the_chunks_themselves_are_left_alone(chunks: Path) -> None:
    output = chunks / "000" / "00000001"
    with left_alone(output, "among the chunks"):
        restore(chunks, output, force=True)
