# SPDX-License-Identifier: LGPL-2.1-or-later
"""Small reads take a shorter way: readers at once get the instant while the guest writes, and what is
punched, given back or broken meanwhile is never read by it again."""

import errno
import os
import random
from pathlib import Path

import pytest
import trio

from tests.e2e.support import left_as_it_was
from tests.faults.support import until
from tests.harness.disk import MIB, Disk
from tests.harness.files import make_random
from tests.harness.mount import Mount, aside, command, mounted
from tests.harness.nbd_server import nbdkit
from tests.harness.qemu import Qemu
from tests.harness.vm import running_vm
from tests.vm.support import guest_io

SIZE = 4 * MIB
LENGTHS = (1, 511, 4096, 4096, 4096, 16384, 65536, 70000)


def read_some(path: Path, content: bytes, seed: int, count: int = 400) -> None:
    """Small reads all over the file, each compared."""
    chance = random.Random(seed)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for _ in range(count):
            start, length = chance.randrange(len(content)), chance.choice(LENGTHS)
            assert os.pread(descriptor, length, start) == content[start : start + length], f"{length} bytes at {start}"
    finally:
        os.close(descriptor)


async def test_readers_at_once_get_the_instant_while_the_guest_writes(qemu: Qemu, tmp_path: Path) -> None:
    image = make_random(tmp_path / "vda.raw", SIZE, hole_every=4)
    content = image.read_bytes()
    async with (
        running_vm(qemu, tmp_path, [Disk("vda", image)]) as vm,
        left_as_it_was(vm),
        mounted(vm.qmp, tmp_path / "mnt", f"fleece={tmp_path}") as mount,
    ):
        async with trio.open_nursery() as nursery:
            for seed in range(4):
                nursery.start_soon(reader, mount.image("vda"), content, seed)
            for number in range(20):
                await guest_io(vm, "vda", f"write -P {number} {number * 150}k 70k")
        status = (await mount.status())["disks"]["vda"]
        assert status["nbd_requests"] > 800, status
        await punched(mount, content)


async def reader(path: Path, content: bytes, seed: int) -> None:
    """One of several."""
    await aside(read_some, path, content, seed)


async def punched(mount: Mount, content: bytes) -> None:
    """While a file is read, a part of it becomes a hole."""
    image, hole = mount.image("vda"), (MIB, 2 * MIB)
    with_hole = content[: hole[0]] + bytes(hole[1] - hole[0]) + content[hole[1] :]
    with image.open("rb", buffering=0) as opened:
        before = os.pread(opened.fileno(), 4096, hole[0] + 8192)
        assert before == content[hole[0] + 8192 :][:4096]
        done = await command("fallocate", "-p", "-o", str(hole[0]), "-l", str(hole[1] - hole[0]), image)
        assert done.code == 0, done
        assert await aside(os.pread, opened.fileno(), 4096, hole[0] + 8192) == bytes(4096)
    await aside(read_some, image, with_hole, 9)


async def test_small_reads_of_a_broken_snapshot_are_errors(qemu: Qemu, tmp_path: Path) -> None:
    image = make_random(tmp_path / "vda.raw", SIZE)
    async with (
        running_vm(qemu, tmp_path, [Disk("vda", image)]) as vm,
        left_as_it_was(vm),
        mounted(vm.qmp, tmp_path / "mnt", f"fleece={tmp_path},fleece-limit=256k", expected=(2,)) as mount,
    ):

        async def broken() -> bool:
            return bool((await mount.status())["broken"])

        descriptor = await aside(os.open, mount.image("vda"), os.O_RDONLY)
        try:
            assert len(await aside(os.pread, descriptor, 4096, 0)) == 4096
            await guest_io(vm, "vda", "write -P 1 0 1M")
            await until(broken)
            for start in (0, 2 * MIB, SIZE - 4096):
                with pytest.raises(OSError) as caught:  # noqa: PT011 - the errno is looked at
                    await aside(os.pread, descriptor, 4096, start)
                assert caught.value.errno == errno.EIO
        finally:
            await aside(os.close, descriptor)


async def test_a_bad_sector_is_an_error_for_its_reader_alone(tmp_path: Path) -> None:
    """nbdkit's error filter fails each read as soon as a file is there."""
    content = random.Random(3).randbytes(SIZE)
    (tmp_path / "image").write_bytes(content)
    trigger = tmp_path / "bad"
    words = ["--filter=error", "file", str(tmp_path / "image"), "error-pread=EIO", "error-pread-rate=50%"]
    async with (
        nbdkit(tmp_path, [*words, f"error-pread-file={trigger}"]) as server,
        mounted(server.uri, tmp_path / "mnt") as mount,
    ):
        [disk] = (await mount.json("vm.json"))["disks"]
        image = mount.image(disk["name"])
        await aside(read_some, image, content, 1, 50)
        trigger.touch()
        assert await aside(errors_of, image, content) > 10
        trigger.unlink()
        await aside(read_some, image, content, 2, 50)


def errors_of(path: Path, content: bytes) -> int:
    """How many of many small reads are EIO; the others are right."""
    chance, errors = random.Random(5), 0
    with path.open("rb", buffering=0) as file:
        for _ in range(100):
            start = chance.randrange(SIZE - 4096)
            try:
                assert os.pread(file.fileno(), 4096, start) == content[start : start + 4096]
            except OSError as error:
                assert error.errno == errno.EIO  # noqa: PT017 - the other outcome is a right answer
                errors += 1
    return errors
